"""An int8 store from the command line: extracted, checked, mended, cleaned and learnt from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from cache_schema import quantize
from cache_schema.store import FeatureStore
from pipeline.cli import app
from stages.data.loader import Frames, Ring, features
from stages.miniature.world import write_world
from tests.cache_schema.makers import flip_bit, tree
from tests.cache_schema.test_export import read_elsewhere


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, env={"COLUMNS": "100", "NO_COLOR": "1"}, prog_name="pipeline")


def ask(*arguments: object) -> tuple[int, Any]:
    """Exit code and the JSON that a command prints."""
    done = run(*arguments, "--json")
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve drawn videos of the miniature, and a training of three steps on them."""
    world = tmp_path_factory.mktemp("world")
    write_world(world, videos=12, seed=2)
    sets = [f"data.videos={world}/videos", f"data.annotations={world}/lvu", "extract.shard_frames=64"]
    sets += ["train.max_steps=3", "train.batch_size=4", "train.warmup_steps=1"]
    return [word for setting in sets for word in ("--set", setting)]


@pytest.fixture(scope="module")
def made(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both encoders' features, the tokens as int8."""
    store = tmp_path_factory.mktemp("int8") / "store"
    done = run("extract", "--dtype", "int8", *settings, "--cache", store, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "tokens as int8: error" in done.stderr
    return store


@pytest.fixture
def copy(made: Path, settings: list[str], tmp_path: Path) -> tuple[Path, list[object]]:
    """A store to damage, and the options that name it."""
    shutil.copytree(made, tmp_path / "store")
    return tmp_path / "store", ["--cache", tmp_path / "store", *settings, "--set", "clip.dtype=int8"]


def test_the_option_is_the_setting(made: Path, settings: list[str], tmp_path: Path) -> None:
    options = [*settings, "--cache", tmp_path / "store", "--device", "cpu"]
    code, by_setting = ask("extract-clip", *options, "--set", "clip.dtype=int8")
    assert (code, by_setting["failed"]) == (0, 0)
    assert tree(tmp_path / "store/tokens") == tree(made / "tokens")
    assert ask("extract-clip", *options, "--dtype", "int8")[1]["skipped"] == by_setting["videos"]
    refused = run("extract-clip", *options)  # the preset stores float16
    assert refused.exit_code == 4
    assert "dtype" in refused.stderr
    assert run("extract-clip", *options, "--dtype", "int4").exit_code == 2


def test_what_is_stored_is_near_what_float16_stores_and_half_as_large(
    made: Path, settings: list[str], tmp_path: Path
) -> None:
    assert run("extract-clip", *settings, "--cache", tmp_path / "store", "--device", "cpu").exit_code == 0
    exact, int8 = FeatureStore.open(tmp_path / "store", "tokens"), FeatureStore.open(made, "tokens")
    scale = int8.layout.info.channel_scale
    assert scale is not None
    assert 0 < scale.error < quantize.LIMIT
    assert int8.plan.segments == exact.plan.segments
    lost = whole = 0.0
    for video in int8.plan.videos:
        frames = exact.plan.segments_of(video)[0].frame_index
        wanted, got = (store.read(video, frames).astype(np.float64) / scale.values for store in (exact, int8))
        lost, whole = lost + float(((got - wanted) ** 2).sum()), whole + float((wanted**2).sum())
    assert (lost / whole) ** 0.5 == pytest.approx(scale.error, rel=0.2)  # as the calibration said of other frames
    assert int8.layout.frame_bytes / exact.layout.frame_bytes == pytest.approx(0.5, abs=0.02)


def test_damage_is_found_and_mended_to_the_same_bytes(copy: tuple[Path, list[object]], made: Path) -> None:
    store, options = copy
    assert ask("cache", "verify", *options, "--full", "--semantic", "6", "--sources", "--device", "cpu")[0] == 0
    tokens = FeatureStore.open(store, "tokens")
    assert tokens.plan.num_shards > 2
    flip_bit(tokens.layout.info.shard_file(0), 5)  # a token's scale
    os.truncate(tokens.layout.info.shard_file(1), 1000)
    tokens.layout.info.shard_file(2).unlink()
    code, found = ask("cache", "verify", *options, "--full")
    assert code == 4
    assert {(p["shard"], p["kind"]) for p in found["problems"]} == {(0, "frame"), (1, "truncated"), (2, "deleted")}
    code, mended = ask("cache", "repair", *options, "--device", "cpu")
    assert (code, mended["repaired"], mended["left"]) == (0, 3, [])
    assert tree(store) == tree(made)
    flip_bit(tokens.layout.info.shard_file(0), 5)
    refused = run("cache", "repair", *options[:-2], "--device", "cpu")  # with the settings of a float16 store
    assert refused.exit_code == 4
    assert "dtype" in refused.stderr


def test_leftovers_are_removed_and_the_store_is_not(copy: tuple[Path, list[object]], made: Path) -> None:
    store, options = copy
    (store / "tokens" / ".shard-1.gone.12.0123abcd.partial").write_bytes(b"half a shard")
    code, done = ask("cache", "gc", *options, "--host", "gone")
    assert (code, done["removed"]) == (0, 1)
    assert tree(store) == tree(made)


def test_plain_is_float16_for_a_zarr_that_does_not_know_this_package(made: Path, tmp_path: Path) -> None:
    code, done = ask("cache", "export", "--plain", "--out", tmp_path / "plain", "--cache", made)
    assert (code, done["format"], done["modalities"]) == (0, "plain", ["pooled/layer8", "tokens"])
    store = FeatureStore.open(made, "tokens")
    expected = np.full((store.plan.num_shards * store.shard_frames, *store.spec.frame_shape), np.nan, np.float16)
    for segment in store.plan.segments:
        expected[segment.start : segment.stop] = store.read(segment.video_id, segment.frame_index)
    np.testing.assert_array_equal(read_elsewhere(tmp_path / "plain", "tokens"), expected)
    assert "shards" in run("cache", "export", "--plain", "--out", tmp_path / "again", "--cache", made).stdout


def test_a_student_learns_from_it_and_is_sent_int8_and_scales(
    copy: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, options = copy
    read, sent = FeatureStore.read_stored, []

    def watched(self: FeatureStore, *arguments: Any, **named: Any) -> Any:
        rows = read(self, *arguments, **named)
        sent.append((self.modality.partition("/")[0], rows.dtype, rows.shape[1:]))
        return rows

    monkeypatch.setattr(FeatureStore, "read_stored", watched)
    done = run("train-student", *options, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 0, done.output
    losses = [json.loads(line)["loss_ce"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    tokens = FeatureStore.open(store, "tokens")
    assert {entry for entry in sent if entry[0] == "tokens"} == {
        ("tokens", np.dtype(np.uint8), (tokens.layout.frame_bytes,))
    }
    refused = run("train-student", *options[:-2], "--out", tmp_path / "other", "--device", "cpu")
    assert refused.exit_code == 4
    assert "dtype: 'int8' there, 'float16' here" in refused.stderr


def test_the_ring_gives_int8_and_scales_which_make_what_a_read_makes(made: Path) -> None:
    store = FeatureStore.open(made, "tokens")
    videos = store.plan.videos[:3]
    index = {video: np.array(store.plan.segments_of(video)[0].frame_index[:4]) for video in videos}
    with Ring([store], [Frames.of(list(index.items()))]) as ring:
        (stored,) = next(ring)
        assert stored.dtype == torch.uint8
        scales, numbers = quantize.split(stored[1].numpy(), store.spec.frame_shape)
        assert (scales.dtype, numbers.dtype) == (np.float16, np.int8)
        for row, (video, frames) in zip(features(stored, store), index.items(), strict=True):
            np.testing.assert_array_equal(row.numpy(), store.read(video, frames))


def test_features_that_int8_would_spoil_are_refused_before_anything_is_written(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "LIMIT", 1e-4)  # no encoder at hand loses 1.5 %; tests/cache_schema has such features
    options = [*settings, "--cache", tmp_path / "store", "--device", "cpu"]
    done = run("extract-clip", *options, "--dtype", "int8")
    assert done.exit_code == 2
    assert "int8 would change the features by" in done.stderr
    assert "frames that the scales were not taken from" in done.stderr
    assert "--set clip.dtype=float16" in done.stderr
    assert not (tmp_path / "store/tokens").exists()
    assert run("extract-clip", *options).exit_code == 0  # and the way out is open


def test_too_few_frames_for_a_calibration_are_refused_with_the_way_out(settings: list[str], tmp_path: Path) -> None:
    few = ["--set", "data.fps=0.5", "--split", "val"]  # seven frames
    done = run("extract-clip", *settings, *few, "--dtype", "int8", "--cache", tmp_path / "store", "--device", "cpu")
    assert done.exit_code == 2, done.output
    assert "16 or more frames" in done.stderr
    assert "--set clip.dtype=float16" in done.stderr
