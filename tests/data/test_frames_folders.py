"""MA-LMM's frame folders: index i is frame i + 1, clamped by at most two, decoded in full or refused."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.config import DataConfig
from stages.data.frames import REJECTION_KINDS, FrameFolders, VideoFiles, WebDatasetTars, list_videos, open_source
from stages.data.sources.picture_batches import DEFAULT_LIMITS
from stages.types import FrameSource, VideoRejected
from tests.data.barcode import HEIGHT, WIDTH, facts_of, number_in, picture, write_video


def jpeg(number: int, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number, *size)).convert(mode).save(data, "JPEG", quality=95)
    return data.getvalue()


def write_frames(folder: Path, count: int) -> None:
    """frame000001.jpg shows 0, frame000002.jpg shows 1, …"""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"frame{number + 1:06d}.jpg").write_bytes(jpeg(number))


def numbers(source: FrameSource, video_id: str, index: object) -> list[int]:
    return [
        number_in(rgb)
        for batch in source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=4)
        for rgb in batch
    ]


def refused(source: FrameSource, video_id: str, index: object = (0,)) -> VideoRejected:
    with pytest.raises(VideoRejected) as caught:
        numbers(source, video_id, index)
    assert caught.value.kind in REJECTION_KINDS
    return caught.value


def test_index_i_is_frame_i_plus_one(tmp_path):
    write_frames(tmp_path / "v", 12)
    source = FrameFolders(tmp_path)
    assert isinstance(source, FrameSource)
    assert source.count_frames("v") == 12
    batches = list(source.frames("v", np.arange(12), batch_size=5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert batches[0].shape == (5, HEIGHT, WIDTH, 3)
    assert [number_in(rgb) for rgb in np.concatenate(batches)] == list(range(12))
    assert facts_of(source, "v", range(12)).pts == tuple(round(number / 10, 6) for number in range(12))
    assert source.frame_rule == "10 fps grid on frame%06d.jpg at 10 fps, frame on screen, v1"
    assert source.decoder.startswith("pillow ")


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (2, 3, [0, 5, 10]),
        (5, 6, [0, 2, 4, 6, 8, 10]),
        (25, 30, [int(i / 2.5) for i in range(30)]),
        (3, 4, [0, 3, 6, 10]),  # 1/3 s: frame 3 (0.3 s) is on screen until 0.4 s
    ],
)
def test_another_grid_maps_by_time(fps, count, expected, tmp_path):
    write_frames(tmp_path / "v", 12)
    source = FrameFolders(tmp_path, fps=fps)
    assert source.count_frames("v") == count
    assert numbers(source, "v", range(count)) == expected


def test_two_frames_past_the_end_are_clamped_and_told_and_more_are_refused(tmp_path, caplog):
    write_frames(tmp_path / "v", 12)
    source = FrameFolders(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert numbers(source, "v", [10, 11, 12, 13]) == [10, 11, 11, 11]
    assert facts_of(source, "v", [10, 11, 12, 13]).clamped == 2
    assert "2 frames just past its end" in caplog.text
    assert refused(source, "v", [14]).kind == "past_the_end"


def test_a_missing_frame_is_named_only_when_it_is_wanted(tmp_path):
    write_frames(tmp_path / "v", 12)
    (tmp_path / "v" / "frame000006.jpg").unlink()
    source = FrameFolders(tmp_path)
    assert numbers(source, "v", [4, 6]) == [4, 6]
    rejection = refused(source, "v", [4, 5])
    assert (rejection.kind, rejection.reason) == (
        "missing_frame",
        "number 6 is missing: there are 11 frames, numbered up to 12. "
        "To use the frames around it: a new --cache, with --set data.around_damage=true",
    )


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number)).save(data, "PNG")
    return data.getvalue()


DAMAGED = {
    "cut": (jpeg(1)[:-200], "decode_error", "does not decode"),
    "empty": (b"", "decode_error", "is not a JPEG"),
    "text": (b"no picture", "decode_error", "is not a JPEG"),
    "another format": (png(1), "decode_error", "is not a JPEG"),
    "large": (jpeg(1, (300, 200)), "too_large", "300 × 200 pixels, the limit is 50000"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_frame_refuses_the_video(what, tmp_path):
    data, kind, words = DAMAGED[what]
    write_frames(tmp_path / "v", 3)
    (tmp_path / "v" / "frame000002.jpg").write_bytes(data)
    rejection = refused(FrameFolders(tmp_path, limits=replace(DEFAULT_LIMITS, max_pixels=50_000)), "v", range(3))
    assert rejection.kind == kind
    assert rejection.reason.startswith("frame000002.jpg ")
    assert words in rejection.reason


def test_a_header_that_claims_a_huge_picture_is_refused_before_it_is_allocated(tmp_path):
    write_frames(tmp_path / "v", 1)
    path = tmp_path / "v" / "frame000001.jpg"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5  # SOF0: height and width
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert refused(FrameFolders(tmp_path), "v").kind == "too_large"


def test_grey_and_cmyk_become_rgb(tmp_path):
    write_frames(tmp_path / "v", 2)
    for number, mode in ((1, "L"), (2, "CMYK")):
        (tmp_path / "v" / f"frame{number:06d}.jpg").write_bytes(jpeg(number, mode=mode))
    assert numbers(FrameFolders(tmp_path), "v", [0, 1]) == [1, 2]


def test_frames_of_another_size_start_a_new_batch(tmp_path):
    write_frames(tmp_path / "v", 4)
    (tmp_path / "v" / "frame000003.jpg").write_bytes(jpeg(2, (128, 64)))
    batches = FrameFolders(tmp_path).frames("v", np.arange(4), batch_size=9)
    assert [batch.shape for batch in batches] == [(2, 48, 96, 3), (1, 64, 128, 3), (1, 48, 96, 3)]


def test_other_files_and_hidden_folders_do_not_count(tmp_path):
    write_frames(tmp_path / "a.b", 2)
    write_frames(tmp_path / ".hidden", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for name in ("frame1.jpg", "frame000009.png", "frame0000001.jpg", "xframe000009.jpg"):
        (tmp_path / "a.b" / name).touch()
    source = FrameFolders(tmp_path)
    assert source.video_ids() == list_videos(tmp_path, "frame_folders") == ["a.b", "empty"]
    assert source.count_frames("a.b") == 2
    assert refused(source, "a").kind == refused(source, ".hidden").kind == "missing_file"
    assert refused(source, "empty").kind == "no_frames"
    assert refused(source, "../x").kind == "bad_id"


def test_links_that_leave_the_folder_are_refused_unless_allowed(tmp_path):
    write_frames(tmp_path / "elsewhere", 2)
    write_frames(tmp_path / "root" / "v", 2)
    (tmp_path / "root" / "w").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "v" / "frame000003.jpg").symlink_to(tmp_path / "elsewhere" / "frame000001.jpg")
    source = FrameFolders(tmp_path / "root")
    assert refused(source, "w").kind == refused(source, "v").kind == "outside_root"
    assert numbers(FrameFolders(tmp_path / "root", follow_symlinks=True), "v", [0, 1, 2]) == [0, 1, 0]


def test_a_long_sequence_is_refused(tmp_path):
    write_frames(tmp_path / "v", 12)
    assert refused(FrameFolders(tmp_path, limits=replace(DEFAULT_LIMITS, max_duration_s=1.0)), "v").kind == "too_long"


def test_facts_change_with_any_frame_of_the_folder(tmp_path):
    write_frames(tmp_path / "v", 3)
    source = FrameFolders(tmp_path)
    before = facts_of(source, "v", [0])
    assert before.size == sum(path.stat().st_size for path in (tmp_path / "v").iterdir())
    (tmp_path / "v" / "frame000003.jpg").write_bytes(jpeg(9) + b"\0")
    assert facts_of(source, "v", [0]).sha256 != before.sha256


def test_the_config_opens_the_source_it_names(tmp_path):
    write_frames(tmp_path / "folders" / "v", 2)
    (tmp_path / "files").mkdir()
    write_video(tmp_path / "files" / "v.mp4", [0, 3600])
    kinds = {"frame_folders": FrameFolders, "files": VideoFiles, "webdataset": WebDatasetTars}
    for name, where in (("frame_folders", "folders"), ("files", "files")):
        source = open_source(DataConfig(videos=str(tmp_path / where), source=name, fps=5))
        assert isinstance(source, kinds[name])
        assert isinstance(source, FrameSource)
        assert source.video_ids() == ["v"]
        assert source.frame_rule.startswith("5 fps grid")
        source.close()
    with pytest.raises(ValueError, match=r"--set data\.videos=PATH"):
        open_source(DataConfig())
