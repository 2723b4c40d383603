"""From video files to a store, with real encoders in small sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_schema.errors import CacheMismatch
from cache_schema.store import FeatureStore
from stages.data.frames import open_source
from stages.extract import clip
from stages.extract.run import Job, extract
from tests.extract.conftest import tree, wanted

MakeJob = Callable[..., Job]


def test_every_frame_reaches_the_store_and_a_second_run_does_nothing(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    job, frames = make_job(world / "videos", tmp_path / "store"), wanted(world / "videos")
    seen: list[tuple[int, int, str]] = []
    report = extract(job, frames, progress=lambda *step: seen.append(step))
    assert (report.videos, report.frames, report.skipped, report.failures) == (8, 40, 0, {})
    assert [(done, total) for done, total, _ in seen] == [(i, 8) for i in range(1, 9)]
    before = tree(tmp_path / "store")
    again = extract(job, frames)
    assert (again.videos, again.frames, again.skipped) == (8, 40, 8)
    assert tree(tmp_path / "store") == before


def test_the_stored_tokens_are_those_of_the_encoder_on_the_frames(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    job, frames = make_job(world / "videos", tmp_path / "store", "clip.dtype=float32"), wanted(world / "videos")
    extract(job, frames)
    video = sorted(frames)[3]
    source = open_source(job.config.data)
    encoder = clip.build(job.config, frame_rule=source.frame_rule, decoder=source.decoder)
    pictures = np.concatenate(list(source.frames(video, frames[video], batch_size=2)))
    source.close()
    store = FeatureStore.open(tmp_path / "store", "tokens", encoder.specs["tokens"])
    stored = store.read(video, frames[video][::-1])
    np.testing.assert_allclose(stored, encoder(pictures)["tokens"][::-1], rtol=0, atol=1e-5)
    assert stored.std() > 0.1


def test_batch_size_does_not_change_the_spec(world: Path, make_job: MakeJob, tmp_path: Path) -> None:
    frames = wanted(world / "videos")
    extract(make_job(world / "videos", tmp_path / "store", "extract.batch_size=3"), frames)
    report = extract(make_job(world / "videos", tmp_path / "store", "extract.batch_size=7"), frames)
    assert report.skipped == 8


def test_another_layer_is_refused_with_the_field_named(world: Path, make_job: MakeJob, tmp_path: Path) -> None:
    frames = wanted(world / "videos")
    extract(make_job(world / "videos", tmp_path / "store"), frames)
    with pytest.raises(CacheMismatch, match="layer"):
        extract(make_job(world / "videos", tmp_path / "store", "clip.layer=4"), frames)


def test_the_two_extractors_share_a_plan_and_neither_waits_for_the_other(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    frames = wanted(world / "videos")
    extract(make_job(world / "videos", tmp_path / "store", "teacher.layers=3,8", which="teacher"), frames)
    pooled = {name: FeatureStore.open(tmp_path / "store", name) for name in ("pooled/layer3", "pooled/layer8")}
    plan = pooled["pooled/layer8"].plan
    extract(make_job(world / "videos", tmp_path / "store"), frames)
    tokens = FeatureStore.open(tmp_path / "store", "tokens")
    assert tokens.plan.segments == plan.segments
    assert not tokens.missing(frames)
    video = sorted(frames)[0]
    layers = [pooled[name].read(video, frames[video]) for name in pooled]
    assert np.abs(layers[0] - layers[1]).max() > 1e-3


def test_a_broken_video_is_quarantined_and_tried_again_when_asked(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    broken = sorted(videos.iterdir())[2]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    frames, job = wanted(videos), make_job(videos, tmp_path / "store")
    report = extract(job, frames)
    assert list(report.failures) == [broken.stem]
    assert report.to_json()["failed"] == 1
    assert report.frames == 35
    broken.write_bytes(whole)
    assert list(extract(job, frames).failures) == [broken.stem]  # not tried again by itself
    assert extract(job, frames, retry_failed=True).failures == {}
    whole_store = tmp_path / "never-broken"
    extract(make_job(videos, whole_store), frames)
    assert tree(tmp_path / "store") == tree(whole_store)


def test_an_absent_video_is_named_and_found_once_it_is_there(world: Path, make_job: MakeJob, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    frames, job = wanted(videos), make_job(videos, tmp_path / "store")
    late = sorted(videos.iterdir())[5]
    late.rename(tmp_path / late.name)
    report = extract(job, frames)
    assert list(report.missing) == [late.stem]
    (failure,) = report.to_json()["failures"]
    assert failure["video"] == late.stem
    assert failure["reason"].startswith("no file, with or without a video's extension, in")
    (tmp_path / late.name).rename(late)
    assert extract(job, frames).to_json()["failed"] == 0


@pytest.mark.slow
def test_two_dask_workers_write_the_store_that_one_process_writes(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    frames = wanted(world / "videos")
    extract(make_job(world / "videos", tmp_path / "one"), frames)
    report = extract(make_job(world / "videos", tmp_path / "two"), frames, workers=2)
    assert (report.videos, report.failures) == (8, {})
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert one.keys() == two.keys()
    stores = [FeatureStore.open(tmp_path / name, "tokens") for name in ("one", "two")]
    for video, index in frames.items():
        np.testing.assert_allclose(stores[0].read(video, index), stores[1].read(video, index), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_store_is_byte_equal_to_one_never_interrupted(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    videos = world / "videos"
    job = make_job(videos, tmp_path / "whole")
    extract(job, wanted(videos))
    config = tmp_path / "config.json"
    config.write_text(job.config.model_dump_json())
    command = [sys.executable, "-m", "tests.extract.kill_loop", str(config), str(tmp_path / "killed"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
