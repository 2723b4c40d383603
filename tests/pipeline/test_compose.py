"""The four commands on real files, in one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schema.errors import CacheMismatch, CacheMissing
from cache_schema.store import FeatureStore
from pipeline import compose, presets
from pipeline.errors import ConfigError, Interrupted
from pipeline.overrides import apply
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.decode.evaluate import rescore
from stages.miniature.world import write_world

QUIET = {"device": "cpu", "dry_run": False, "progress": lambda *_: None}
Configure = Callable[..., PipelineConfig]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn videos."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, videos=12, seed=2)
    return folder


@pytest.fixture(scope="module")
def configure(world: Path) -> Configure:
    """The miniature preset on that world, with short training."""

    def make(*sets: str) -> PipelineConfig:
        return apply(
            presets.miniature(),
            [
                f"data.videos={world}/videos",
                f"data.annotations={world}/lvu",
                "train.epochs=2",
                "train.batch_size=4",
                "train.drop_last=false",
                *sets,
            ],
        )

    return make


def run_extraction(config: PipelineConfig, which: str, cache: Path) -> dict[str, Any]:
    return compose.extract(config, which=which, cache=cache, workers=0, retry_failed=False, splits=[], **QUIET)


@pytest.fixture(scope="module")
def cache(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both extractors' features of the world."""
    path = tmp_path_factory.mktemp("cache") / "features"
    assert run_extraction(configure(), "both", path)["failed"] == 0
    return path


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    return RunFolder.open(out).load_checkpoint("final").tensors


def test_from_video_files_to_a_scored_answer(configure: Configure, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = compose.train(configure(), cache=cache, out=out, **QUIET)
    assert trained["steps"] == len(RunFolder.open(out).metrics()) > 0
    assert {"loss_ce", "loss_kd", "kd/13", "w/13", "grad_norm"} <= trained.keys()
    scored = compose.evaluate(out, cache=cache, split="test", checkpoint=None, **QUIET)
    assert scored["n"] == scored["resumed"] + scored["n"] > 0
    again = rescore(out / "predictions.jsonl", "exact").to_json()
    assert {key: scored[key] for key in ("n", "correct", "top1", "top5", "majority", "interval")} == {
        key: again[key] for key in ("n", "correct", "top1", "top5", "majority", "interval")
    }
    resumed = compose.evaluate(out, cache=cache, split="test", checkpoint=None, **QUIET)
    assert resumed["resumed"] == resumed["n"] == scored["n"]
    nothing = compose.train(configure(), cache=cache, out=out, **QUIET)
    assert nothing["first_step"] == nothing["steps"]


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_training_ends_with_the_weights_of_one_never_interrupted(
    configure: Configure, cache: Path, tmp_path: Path, stop: int
) -> None:
    config = configure("train.save_every=1", "student.dropout=0.1")
    compose.train(config, cache=cache, out=tmp_path / "whole", **QUIET)

    def interrupt(done: int, _total: int, _what: str) -> None:
        if done == stop:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        compose.train(config, cache=cache, out=tmp_path / "cut", **(QUIET | {"progress": interrupt}))
    compose.train(config, cache=cache, out=tmp_path / "cut", **QUIET)
    whole, cut = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert RunFolder.open(tmp_path / "whole").metrics() == RunFolder.open(tmp_path / "cut").metrics()


def test_training_before_extraction_names_the_command(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(CacheMissing, match="pipeline extract-clip --preset miniature"):
        compose.train(configure(), cache=tmp_path / "none", out=tmp_path / "run", **QUIET)


def test_training_without_teacher_features_says_which_are_missing(configure: Configure, tmp_path: Path) -> None:
    run_extraction(configure(), "clip", tmp_path / "features")
    with pytest.raises(CacheMissing, match="pipeline extract-teacher --preset miniature"):
        compose.train(configure(), cache=tmp_path / "features", out=tmp_path / "run", **QUIET)
    compose.train(configure("train.lambda_kd=0"), cache=tmp_path / "features", out=tmp_path / "run", **QUIET)
    assert not any(name.startswith("alignment") for name in final_tensors(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("clip.layer=4", "layer"),
        ("data.fps=5", "frame_rule"),
        ("clip.dtype=float32", "dtype"),
        ("teacher.posterior=sample", "latent"),
        ("clip.geometry=shortest_center teacher.geometry=shortest_center", "resize"),
    ],
)
def test_features_of_other_settings_are_refused(
    configure: Configure, cache: Path, tmp_path: Path, change: str, named: str
) -> None:
    with pytest.raises(CacheMismatch, match=f"  {named}: "):
        compose.train(configure(*change.split()), cache=cache, out=tmp_path / "run", **QUIET)


def test_another_encoder_whose_tokens_have_the_same_shape_is_refused(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    spec = FeatureStore.open(cache, "tokens").spec
    FeatureStore.create(tmp_path / "store", "tokens", replace(spec, encoder="open_clip:miniature-vit-plus"))
    with pytest.raises(CacheMismatch, match="  encoder: "):
        compose.train(configure("train.lambda_kd=0"), cache=tmp_path / "store", out=tmp_path / "run", **QUIET)


def test_missing_videos_stop_training_unless_asked_for(configure: Configure, world: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    gone = sorted(videos.iterdir())[0]
    gone.unlink()
    sets = [f"data.videos={videos}", "train.lambda_kd=0"]
    report = run_extraction(configure(*sets), "clip", tmp_path / "features")
    assert [failure["video"] for failure in report["failures"]] == [gone.stem]
    assert report["coverage"]["train"]["missing"] == [gone.stem]
    with pytest.raises(CacheMissing, match=gone.stem):
        compose.train(configure(*sets), cache=tmp_path / "features", out=tmp_path / "run", **QUIET)
    config = configure(*sets, "data.allow_missing=true")
    assert compose.train(config, cache=tmp_path / "features", out=tmp_path / "run", **QUIET)["dropped"] > 0


def test_a_dry_run_of_lvu_relationship_needs_annotations_only(shared_data: Path, tmp_path: Path) -> None:
    config = apply(
        presets.get("lvu-relationship"), [f"data.annotations={shared_data}/annotations/lvu", "data.videos=absent"]
    )
    options = QUIET | {"dry_run": True}
    common = {"cache": tmp_path, "workers": 0, "retry_failed": False, "splits": [], **options}
    tokens = compose.extract(config, which="clip", **common)
    assert (tokens["videos"], tokens["frames"]) == (228, 28_080)
    assert tokens["bytes"] == 28_080 * 257 * 1408 * 2  # 20.3 GB
    teacher = compose.extract(config, which="teacher", **common)
    assert teacher["bytes"] == 28_080 * 1152 * 4
    assert compose.extract(config, which="both", **common)["bytes"] == tokens["bytes"] + teacher["bytes"]
    training = compose.train(config, cache=tmp_path, out=tmp_path / "run", **options)
    assert (training["samples"], training["steps_per_epoch"], training["steps"]) == (298, 4, 80)


def test_an_empty_folder_of_videos_is_said_so(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "empty").mkdir()
    config = configure("data.name=clips", f"data.videos={tmp_path}/empty", "data.annotations=")
    with pytest.raises(ConfigError, match="name no video"):
        run_extraction(config, "clip", tmp_path / "features")
