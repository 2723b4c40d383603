"""Videos that are not what their annotations say: too short, longer, damaged, HDR, replaced, unasked."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_schema.errors import CacheMismatch, CacheMissing
from cache_schema.store import FeatureStore
from pipeline.cli import app
from pipeline.inputs import refuse_changed_sources
from stages.data.samples import available
from stages.extract.run import Job, extract
from stages.types import Sample
from tests.data.barcode import write_video
from tests.data.test_frames_containers import damaged_in_the_middle

MakeJob = Callable[..., Job]
TENTHS = [k * 9000 for k in range(60)]  # 6 s: 12 grid frames at the miniature's 2 fps


def window(video: str, *frames: int) -> Sample:
    return Sample(f"{video}@{frames[0]}", video, np.array([frames], np.int64), "what?", "a", "t")


def test_of_a_video_that_is_too_short_the_windows_that_fit_are_used_and_the_others_counted(
    make_job: MakeJob, tmp_path: Path
) -> None:
    (tmp_path / "v" / "d").mkdir(parents=True)
    write_video(tmp_path / "v" / "d" / "short.mp4", TENTHS, rate=10)
    job = make_job(tmp_path / "v", tmp_path / "store")
    for _ in range(2):  # the second start says the same
        report = extract(job, {"d/short.mp4": np.arange(60)})
        assert (report.videos, report.frames, report.failures) == (1, 14, {})  # two past the end are answered
        assert report.to_json()["left_out_frames"] == 46
        assert report.left_out == {"d/short.mp4": "46 of 60 frames cannot be had: the file has 12 frames"}
    store = FeatureStore.open(tmp_path / "store", "tokens")
    samples = [window("d/short.mp4", 0, 5, 11), window("d/short.mp4", 10, 30, 59)]
    usable = available(samples, [store])
    assert (usable.samples, usable.dropped) == ((samples[0],), 1)
    assert usable.summary() == (
        "1 of 2 samples are left out: d/short.mp4: tokens: not planned: frames 30, 59 (the file has 12 frames)",
    )
    with pytest.raises(CacheMissing) as refusal:
        usable.require_all("pipeline extract-clip")
    assert "extract-clip" not in str(refusal.value)  # it could not help
    assert str(refusal.value).endswith("Go on without them:  --set data.allow_missing=true")


def test_around_damage_only_the_windows_that_touch_it_are_left_out(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    damaged_in_the_middle(tmp_path / "v", bf="0")
    strict = extract(make_job(tmp_path / "v", tmp_path / "strict"), {"v": np.arange(40)})
    assert strict.failures["v"].startswith("decoding fails at 9.3 s of 20.0 s")
    report = extract(make_job(tmp_path / "v", tmp_path / "store", "data.around_damage=true"), {"v": np.arange(40)})
    assert (report.frames, report.failures) == (37, {})
    assert report.left_out == {"v": "3 of 40 frames cannot be had: the file does not decode at frames 19 to 21"}
    store = FeatureStore.open(tmp_path / "store", "tokens")
    assert store.facts("v")["damaged"] == [[19, 21]]
    samples = [window("v", 0, 18), window("v", 10, 20), window("v", 22, 39)]
    assert available(samples, [store]).samples == (samples[0], samples[2])


def test_a_longer_file_an_hdr_file_and_unasked_files_are_said(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    marks = {"color_primaries": "bt2020", "color_trc": "arib-std-b67", "colorspace": "bt2020nc"}
    write_video(tmp_path / "v" / "long.mp4", TENTHS, rate=10)
    write_video(tmp_path / "v" / "hdr.mp4", TENTHS, rate=10, codec="libx265", pixels="yuv420p10le", options=marks)
    write_video(tmp_path / "v" / "other.mp4", TENTHS[:3], rate=10)
    report = extract(make_job(tmp_path / "v", tmp_path / "store"), {"long": np.arange(3), "hdr": np.arange(12)})
    assert report.lengths == {"long": "its annotation speaks of 3 frames (1.5 s), the file has 12 (6.0 s)"}
    assert report.hdr == {"hdr": "HLG"}
    assert report.unannotated == 1


def test_a_replaced_video_is_named_at_the_next_start_and_a_touched_one_is_not(
    world: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    shutil.copytree(world / "videos", tmp_path / "v")
    first, second, third, *_ = sorted((tmp_path / "v").iterdir())
    frames = {path.stem: np.arange(3) for path in (first, second, third)}
    job = make_job(tmp_path / "v", tmp_path / "store")
    assert extract(job, frames).changed == {}
    first.write_bytes(second.read_bytes() + b"\0")
    second.write_bytes(second.read_bytes()[:-1] + b"\1")  # of the same size
    for path in (second, third):
        os.utime(path, (4e9, 4e9))
    changed = extract(job, frames).changed
    assert changed.keys() == {first.stem, second.stem}
    assert "bytes when it was extracted and has" in changed[first.stem]
    assert changed[second.stem] == "has other bytes now than when it was extracted"
    store = FeatureStore.open(tmp_path / "store", "tokens")
    with pytest.raises(CacheMismatch, match=r"2 videos were replaced .*\n(.*\n)*.*allow_changed=true") as refusal:
        refuse_changed_sources(job.config, store, frames, tmp_path / "store")
    command = shlex.split(str(refusal.value).rpartition("\n")[2])
    assert command[:4] == ["pipeline", "cache", "repair", "--sources"]
    typed = CliRunner().invoke(app, [*command[1:], "--device", "cpu"])
    assert typed.exit_code == 0, typed.output
    assert refuse_changed_sources(job.config, FeatureStore.open(tmp_path / "store", "tokens"), frames, store.path) == ()
    shutil.rmtree(tmp_path / "v")  # training on a machine without the videos
    assert refuse_changed_sources(job.config, store, frames, store.path) == ()
