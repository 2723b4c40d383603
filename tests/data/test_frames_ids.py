"""Which file an id means: ids are data from strangers, and no path is ever built from one."""

from __future__ import annotations

import os
import unicodedata

import pytest

from stages.data.frames import FrameFolders, VideoFiles, list_videos
from tests.data.barcode import write_video
from tests.data.test_frames_folders import numbers, refused, write_frames

CFR = [k * 3600 for k in range(60)]


def frames(source: VideoFiles, video_id: str) -> list[int]:
    return numbers(source, video_id, (0, 1, 2))


BAD_IDS = ["", ".", "..", "../other", "/etc/passwd", "a/../../b", "a\0b", "a\nb", "a\\b", "x" * 300, "\ud800", "a//b"]


@pytest.mark.parametrize("video_id", BAD_IDS)
def test_ids_that_could_leave_the_folder_are_refused(video_id, tmp_path, open_folder):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "other.mp4", CFR[:5])
    source = open_folder(tmp_path / "videos")
    assert not source.has(video_id)
    assert refused(source, video_id).kind == "bad_id"


@pytest.mark.parametrize(
    "name", ["-k_8", "; rm -rf ~", "видео 🎬 名前 ü & 'quote'", "%s$(id)`id`", "file:x", "concat:a|b", "a.b"]
)
def test_any_other_name_is_just_a_name(name, tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR).rename(tmp_path / f"{name}.mp4")
    source = open_folder()
    assert source.video_ids() == [name]
    assert source.has(name)
    assert source.has(f"{name}.mp4")
    assert frames(source, name) == frames(source, f"{name}.mp4") == [0, 2, 5]


def test_an_id_that_nothing_answers_to_is_missing(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR[:5]).rename(tmp_path / ".hidden.mp4")
    (tmp_path / "notes.json").write_text("{}")
    source = open_folder()
    assert source.video_ids() == []
    assert not source.has("hidden")
    assert refused(source, ".hidden").kind == "missing_file"
    assert refused(source, "notes").kind == "missing_file"


def test_two_files_for_one_id_are_an_error_that_names_both(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)
    write_video(tmp_path / "v.mkv", CFR)
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    for name in (composed, decomposed):
        write_video(tmp_path / f"{name}.mp4", CFR)
    source = open_folder()
    assert source.video_ids() == ["v", composed]
    rejection = refused(source, "v")
    assert rejection.kind == "ambiguous_id"
    assert "'v.mkv' and 'v.mp4'" in rejection.reason
    assert refused(source, composed).kind == refused(source, decomposed).kind == "ambiguous_id"
    assert frames(source, "v.mkv") == [0, 2, 5]


def test_a_decomposed_file_name_is_found_by_a_composed_id(tmp_path, open_folder):
    write_video(tmp_path / f"{unicodedata.normalize('NFD', 'é')}.mp4", CFR)
    assert frames(open_folder(), unicodedata.normalize("NFC", "é")) == [0, 2, 5]


def test_a_file_name_that_is_not_utf8_can_be_read(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR).rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    source = open_folder()
    assert source.video_ids() == ["caf\ufffd"]
    assert frames(source, "caf\ufffd") == [0, 2, 5]


def test_links_that_leave_the_folder_are_refused_unless_allowed(tmp_path, open_folder):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "other.mp4", CFR)
    write_video(tmp_path / "videos" / "v.mp4", CFR)
    (tmp_path / "videos" / "out.mp4").symlink_to(tmp_path / "other.mp4")
    (tmp_path / "videos" / "in.mp4").symlink_to("v.mp4")
    (tmp_path / "videos" / "nowhere.mp4").symlink_to("gone.mp4")
    (tmp_path / "link").symlink_to("videos")
    source = open_folder(tmp_path / "link")
    assert refused(source, "out").kind == "outside_root"
    assert refused(source, "nowhere").kind == "missing_file"
    assert frames(source, "in") == [0, 2, 5]
    assert frames(open_folder(tmp_path / "videos", follow_symlinks=True), "out") == [0, 2, 5]


def test_a_folder_that_is_not_there_is_named_with_the_setting_that_helps(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere cannot be listed: .*\n.*--set data.videos=DIR"):
        VideoFiles(tmp_path / "nowhere", fps=10)


def test_the_videos_of_a_folder_are_listed_by_name(tmp_path):
    for name in ("b.mp4", "a.MKV", "c.avi.part", "d.txt"):
        (tmp_path / name).touch()
    assert list_videos(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("video_id", ["000001_000050/1.mp4", "000001_000050/1", "a/b/2.mp4", "a/b/2", "3"])
def test_an_id_may_name_sub_folders(video_id, tmp_path, open_folder):
    for name in ("000001_000050/1.mp4", "a/b/2.mp4", "3.mp4", "a/.hidden/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "new.mp4", CFR).rename(tmp_path / name)
    source = open_folder()
    assert source.video_ids() == ["000001_000050/1", "3", "a/b/2"]
    assert source.has(video_id)
    assert frames(source, video_id) == [0, 2, 5]
    assert source.file(video_id).size > 0
    assert len(source.unasked([video_id])) == 2


@pytest.mark.parametrize(
    ("asked", "near"),
    [("1", "d/1"), ("e/1.mp4", "d/1"), ("d/1.avi", "d/1"), ("D/1", "d/1"), ("d/holiday_2010", "d/holiday_2019")],
)
def test_a_missing_id_says_what_was_looked_for_and_what_is_close(asked, near, tmp_path, open_folder):
    (tmp_path / "d").mkdir()
    for name in ("1", "holiday_2019"):
        write_video(tmp_path / "d" / f"{name}.mp4", CFR[:3])
    rejection = refused(open_folder(), asked)
    assert rejection.kind == "missing_file"
    assert rejection.reason.startswith(f"no file, with or without a video's extension, in {tmp_path} has this name")
    assert f"; close to it: {near!r}" in rejection.reason


def test_no_part_of_an_id_leads_out_of_the_folder_by_a_link(tmp_path, open_folder):
    for folder in ("videos/in", "elsewhere/sub"):
        (tmp_path / folder).mkdir(parents=True)
        write_video(tmp_path / folder / "v.mp4", CFR)
    (tmp_path / "videos" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "inner").symlink_to("in")
    (tmp_path / "videos" / "in" / "ring").symlink_to("..")
    source = open_folder(tmp_path / "videos")
    assert refused(source, "out/sub/v").kind == "outside_root"
    assert refused(source, "out/../in/v").kind == "bad_id"
    assert frames(source, "inner/v") == [0, 2, 5]
    assert source.video_ids() == ["in/v"]
    followed = open_folder(tmp_path / "videos", follow_symlinks=True)
    assert frames(followed, "out/sub/v") == [0, 2, 5]
    assert {"in/v", "out/sub/v"} <= set(followed.video_ids())


def test_a_name_with_a_line_break_is_left_out_and_said(tmp_path, open_folder, caplog):
    write_video(tmp_path / "v.mp4", CFR[:3]).rename(tmp_path / "a\nb.mp4")
    assert open_folder().video_ids() == []
    assert "'a\\nb' in" in caplog.text


def test_frame_folders_may_lie_in_sub_folders(tmp_path):
    for name in ("a/b/v", "w"):
        write_frames(tmp_path / name, 3)
    source = FrameFolders(tmp_path)
    assert source.video_ids() == ["a/b/v", "w"]
    assert frames(source, "a/b/v") == [0, 1, 2]
    assert refused(source, "v").reason == f"no folder in {tmp_path} has this name; close to it: 'a/b/v'"
