"""``pipeline baselines`` on real files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_schema.errors import CacheMissing
from pipeline import compose, inputs, presets, registry, results
from pipeline.baselines import baselines
from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.overrides import apply
from pipeline.scoring import compare
from stages.config import PipelineConfig
from stages.decode.evaluate import read_predictions, rescore

Configure = Callable[..., PipelineConfig]


@pytest.fixture(scope="module")
def configure(world: Path) -> Configure:
    def make(*sets: str) -> PipelineConfig:
        videos = [f"data.videos={world}/videos", f"data.annotations={world}/lvu", "data.task=scene"]
        return apply(presets.miniature(), [*videos, *sets])

    return make


@pytest.fixture(scope="module")
def cache(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP tokens of the world; no teacher."""
    path = tmp_path_factory.mktemp("cache") / "features"
    options = {"workers": 0, "retry_failed": False, "splits": [], "device": "cpu", "dry_run": False}
    compose.extract(configure(), which="clip", cache=path, progress=lambda *_: None, **options)
    return path


def run(config: PipelineConfig, cache: Path, out: Path, *names: str, **options: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"split": "test", "dry_run": False, "progress": lambda *_: None}
    return baselines(config, cache=cache, out=out, names=names, **(base | options))


def test_every_baseline_leaves_predictions_that_score_as_reported(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    config = configure()
    names = ("majority", "clip_mean", "clip_last")
    result = run(config, cache, tmp_path / "out", *names)
    assert list(result["baselines"]) == list(names)
    samples = {s.sample_id: s for s in inputs.load_dataset(config).samples("test")}
    for name in names:
        path = tmp_path / "out" / name / "predictions.jsonl"
        predictions = read_predictions(path)
        assert {p.sample_id: (p.video_id, p.answer) for p in predictions} == {
            key: (s.video_id, s.answer) for key, s in samples.items()
        }
        assert rescore(path, "exact").to_json()["correct"] == result["baselines"][name]["correct"]
    assert json.loads((tmp_path / "out" / "baselines.json").read_text()) == result
    train = Counter(s.answer for s in inputs.load_dataset(config).samples("train"))
    said = {p.beams[0] for p in read_predictions(tmp_path / "out" / "majority" / "predictions.jsonl")}
    assert [train[word] for word in said] == [max(train.values())]


def test_a_second_start_fits_nothing_and_another_setting_does(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(configure(), cache, out, "clip_mean")
    again = run(configure(), cache, out, "clip_mean")
    assert (first["fitted"], again["fitted"]) == (1, 0)
    assert first["baselines"] == again["baselines"]
    assert run(configure("data.num_frames=5"), cache, out, "clip_mean")["fitted"] == 1
    assert run(configure("data.num_frames=5", "data.task=director"), cache, out, "clip_mean")["fitted"] == 1


def test_a_teacher_probe_needs_the_teacher_and_the_others_do_not(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    run(configure(), cache, tmp_path, "majority")
    with pytest.raises(CacheMissing, match="pipeline extract-teacher"):
        run(configure(), cache, tmp_path, "teacher_mean")


def test_a_probe_without_room_is_named_and_the_others_go_on(
    configure: Configure, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train.probes.MAX_FLAT", 500)
    result = run(configure(), cache, tmp_path, "clip_flat", "clip_mean")
    assert list(result["baselines"]) == ["clip_mean"]
    assert "a linear probe takes up to 500" in result["refused"]["clip_flat"]


def test_without_val_nothing_can_be_chosen(configure: Configure, cache: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "lvu").mkdir()
    for split in ("train", "test"):
        (tmp_path / "lvu" / f"{split}.json").write_bytes((world / "lvu" / f"{split}.json").read_bytes())
    with pytest.raises(ConfigError, match="no val split"):
        run(configure(f"data.annotations={tmp_path}/lvu"), cache, tmp_path / "out")


def test_an_unknown_name_is_answered_with_the_known(configure: Configure, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no probe is called 'clip_maen'; known: clip_mean"):
        run(configure(), cache, tmp_path, "clip_maen")
    dry = run(configure(), cache, tmp_path, dry_run=True)
    assert dry["baselines"] == len(registry.PROBES)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def open_questions(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's questions, each worded once, in two types; ``who`` is not asked in val."""
    folder = tmp_path_factory.mktemp("open")
    for split in ("train", "val", "test"):
        rows = json.loads((world / "msvd_qa" / f"qa_{split}.json").read_text())
        for number, (key, row) in enumerate(list(rows.items())):
            row |= {"question": f"{row['question']} {key}", "answer_type": "who" if number % 3 == 0 else "what"}
            if split == "val" and row["answer_type"] == "who":
                del rows[key]
        (folder / f"qa_{split}.json").write_text(json.dumps(rows))
    return folder


def test_on_open_questions_a_probe_is_fitted_per_type_and_a_type_without_val_gets_the_most_frequent_answer(
    configure: Configure, cache: Path, open_questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    config = configure(f"data.annotations={open_questions}")
    result = run(
        config, cache, tmp_path / "out", "majority", "clip_mean", progress=lambda *done: told.append(str(done))
    )
    assert list(result["baselines"]) == ["majority", "clip_mean"]
    majority, probe = result["baselines"].values()
    assert majority["n"] == probe["n"]
    assert list(probe["chosen"]) == ["what", "who"]  # two, and not one per question
    (reason,) = probe["not_fitted"].values()
    assert "0 val samples" in reason["reason"]
    assert majority["not_fitted"] == {}
    assert any("clip_mean, 2 of 2" in line for line in told)
    results.show_baselines(result)
    shown = capsys.readouterr().out
    assert f"clip_mean could not be fitted to {reason['samples']} of {probe['n']} questions" in shown
    assert "Row 'majority': that of the training questions" in shown
    assert compare([tmp_path / "out" / "majority", tmp_path / "out" / "clip_mean"], split="test")["held_out"][
        "held_out"
    ]


def test_where_no_baseline_is_left_the_command_fails_and_says_why(
    configure: Configure, cache: Path, open_questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train.probes.MAX_FLAT", 5)
    config = configure(f"data.annotations={open_questions}")
    sets = [f"--set=data.{key}={getattr(config.data, key)}" for key in ("videos", "annotations", "task")]
    command = ["baselines", *sets, "--cache", str(cache), "--out", str(tmp_path / "out"), "--probe", "clip_mean"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3
    assert "clip_mean was left out: 96 numbers per sample; a linear probe takes up to 5" in done.output
