"""What a container hides, delays, marks or breaks: a video has the frames that a player shows, and no others."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stages.data.frames import FrameFolders
from tests.data.barcode import facts_of, number_in, picture, write_video
from tests.data.boxes import enable_second_track_only, set_edits
from tests.data.test_frames_folders import numbers, refused, write_frames

CFR = [k * 3600 for k in range(60)]  # 2.4 s at 25 fps
GOPS = {"closed": {"g": "12", "bf": "0"}, "B-frames": {"g": "12", "bf": "3", "b_strategy": "0"}}


def by_player(path: Path) -> list[int]:
    """The numbers of the pictures that libav gives when nobody asks for anything special."""
    with av.open(str(path)) as container:
        return [number_in(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("hidden", [0, 1, 5, 11, 12, 13, 30])
def test_an_edit_list_hides_the_frames_before_it_and_every_other_is_counted(hidden, gop, tmp_path, open_folder):
    path = write_video(tmp_path / "v.mp4", CFR, options=GOPS[gop])
    set_edits(path, [((60 - hidden) / 25, hidden / 25)])
    source = open_folder(fps=25)
    assert source.count_frames("v") == 60 - hidden
    assert numbers(source, "v", range(60 - hidden)) == by_player(path) == list(range(hidden, 60))


@pytest.mark.parametrize("gop", GOPS)
def test_an_edit_list_may_end_early_begin_late_or_join_two_parts(gop, tmp_path, open_folder):
    edits = {
        "short": [(0.8, 0.0)],
        "late": [(1.0, None), (2.4, 0.0)],
        "both": [(0.4, 0.2), (0.4, 1.2)],
    }
    for name, entries in edits.items():
        set_edits(write_video(tmp_path / f"{name}.mp4", CFR, options=GOPS[gop]), entries)
    source = open_folder(fps=25)
    assert numbers(source, "short", range(source.count_frames("short"))) == list(range(20))
    assert numbers(source, "late", range(source.count_frames("late"))) == list(range(60))
    seen = numbers(source, "both", range(source.count_frames("both")))
    assert sorted(set(seen)) == sorted(set(by_player(tmp_path / "both.mp4"))) == [*range(5, 15), *range(30, 40)]


def two_streams(path: Path) -> Path:
    """Pictures 100, 101, … in the first stream and 0, 1, … in the second."""
    with av.open(str(path), "w") as container:
        streams = []
        for _ in range(2):
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
            streams.append(stream)
        for number in range(10):
            for stream, base in zip(streams, (100, 0), strict=True):
                frame = av.VideoFrame.from_ndarray(picture(base + number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def test_of_several_streams_the_first_that_is_not_disabled_is_shown(tmp_path, open_folder):
    two_streams(tmp_path / "both.mp4")
    enable_second_track_only(two_streams(tmp_path / "second.mp4"))
    source = open_folder(fps=25)
    assert numbers(source, "both", [0, 9]) == [100, 109]
    assert numbers(source, "second", [0, 9]) == [0, 9]


# ---------------------------------------------------------------- damage


def damaged(path: Path, at: int, count: int = 400) -> Path:
    """Overwrite bytes in the middle of the pictures."""
    data = bytearray(path.read_bytes())
    data[at : at + count] = b"\xa5" * count
    path.write_bytes(data)
    return path


def damaged_in_the_middle(folder: Path, suffix: str = "mp4", **options: object) -> Path:
    """200 pictures at 10 fps, a key frame every 10, noise added so that every picture has bytes to damage."""
    path = folder / f"v.{suffix}"
    pts = [k * 9000 for k in range(200)]
    write_video(path, pts, rate=10, options={"g": "10", "bf": "0", **options}, size=(96, 48))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        at = packets[93].pos
    return damaged(path, at + 8, 200)


@pytest.mark.parametrize("bf", ["0", "3"])
def test_a_damaged_spot_refuses_the_video_and_names_the_setting_that_keeps_the_rest(bf, tmp_path, open_folder):
    damaged_in_the_middle(tmp_path, bf=bf)
    rejection = refused(open_folder(), "v", range(200))
    assert rejection.kind == "decode_error"
    assert rejection.reason.endswith("--set data.around_damage=true")


@pytest.mark.parametrize("bf", ["0", "3"])
def test_around_damage_every_frame_that_is_given_is_the_right_one(bf, tmp_path, open_folder):
    damaged_in_the_middle(tmp_path, bf=bf)
    source = open_folder(around_damage=True)
    extent = source.extent("v")
    assert extent.count == 200
    lost = {i for first, last in extent.damaged for i in range(first, last + 1)}
    assert 1 <= len(lost) <= 20
    assert lost <= set(range(80, 110))
    sound = [i for i in range(200) if i not in lost]
    assert numbers(source, "v", sound) == sound
    facts = facts_of(source, "v", sound)
    assert (facts.count, facts.damaged) == (200, extent.damaged)
    assert refused(source, "v", [min(lost)]).kind == "decode_error"
    assert facts_of(source, "v", range(50)).damaged == ()


def test_around_damage_a_sound_video_is_whole(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR, options=GOPS["B-frames"])
    source = open_folder(fps=25, around_damage=True)
    assert (source.extent("v").count, source.extent("v").damaged) == (60, ())
    assert numbers(source, "v", range(60)) == list(range(60))


def test_around_damage_a_gap_in_a_frame_folder_costs_only_its_frames(tmp_path):
    write_frames(tmp_path / "v", 12)
    (tmp_path / "v" / "frame000006.jpg").unlink()
    source = FrameFolders(tmp_path, fps=20, around_damage=True)
    assert source.extent("v").damaged == ((10, 11),)
    assert numbers(source, "v", [9, 12, 13]) == [4, 6, 6]
    assert facts_of(source, "v", [9, 12]).damaged == ((10, 11),)
    assert facts_of(source, "v", [9]).damaged == ()


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("marks", "hdr"),
    [
        ({}, ""),
        ({"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709"}, ""),
        ({"color_primaries": "bt2020", "color_trc": "smpte2084", "colorspace": "bt2020nc"}, "PQ"),
        ({"color_primaries": "bt2020", "color_trc": "arib-std-b67", "colorspace": "bt2020nc"}, "HLG"),
        ({"color_primaries": "bt2020", "color_trc": "bt2020-10", "colorspace": "bt2020nc"}, "BT.2020"),
    ],
)
def test_hdr_is_recorded_and_said(marks, hdr, tmp_path, open_folder, caplog):
    write_video(tmp_path / "v.mp4", CFR[:10], pixels="yuv420p10le", codec="libx265", options=marks)
    with caplog.at_level(logging.WARNING):
        assert facts_of(open_folder(), "v", [0, 2]).hdr == hdr
    assert (f"its {hdr} colours are read as ordinary ones" in caplog.text) == bool(hdr)


# ---------------------------------------------------------------- numbered images


def rename(folder: Path, name: str) -> None:
    for path in sorted(folder.iterdir()):
        path.rename(folder / name.format(int(path.stem[5:])))


@pytest.mark.parametrize("name", ["{}.jpg", "frame_{:04d}.jpg", "img-{:05d}.JPEG", "v 2 {:03d}.jpg", "frame{:06d}.jpg"])
def test_any_one_numbering_is_ordered_by_number(name, tmp_path):
    write_frames(tmp_path / "v", 12)
    rename(tmp_path / "v", name)
    source = FrameFolders(tmp_path)
    assert source.count_frames("v") == 12
    assert numbers(source, "v", range(12)) == list(range(12))


def test_numbers_may_start_at_0(tmp_path):
    write_frames(tmp_path / "v", 12)
    for number, path in enumerate(sorted((tmp_path / "v").iterdir())):
        path.rename(path.with_name(f"{number:05d}.jpg"))
    source = FrameFolders(tmp_path)
    assert numbers(source, "v", range(12)) == list(range(12))
    assert facts_of(source, "v", [0, 1]).pts == (0.0, 0.1)


def test_png_is_read_and_must_be_one(tmp_path):
    from tests.data.test_frames_folders import jpeg, png

    (tmp_path / "v").mkdir()
    for number in range(3):
        (tmp_path / "v" / f"frame{number + 1:06d}.png").write_bytes(png(number))
    assert numbers(FrameFolders(tmp_path), "v", range(3)) == [0, 1, 2]
    (tmp_path / "v" / "frame000002.png").write_bytes(jpeg(1))
    assert refused(FrameFolders(tmp_path), "v", range(3)).reason == "frame000002.png is not a PNG"


REFUSED = {
    "two numberings": (["a1.jpg", "b1.jpg"], "unclear_frames", "numbered in 2 ways, such as 'a1.jpg' and 'b1.jpg'"),
    "one number twice": (["1.jpg", "01.jpg"], "unclear_frames", "'01.jpg' and '1.jpg' are both number 1"),
    "other names": (
        ["a.jpg", "notes.txt"],
        "no_frames",
        "it holds 2 other files, such as 'a.jpg'. Wanted: ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_names_are_refused_with_what_is_there_and_what_is_wanted(what, tmp_path):
    names, kind, words = REFUSED[what]
    (tmp_path / "v").mkdir()
    for name in names:
        (tmp_path / "v" / name).touch()
    rejection = refused(FrameFolders(tmp_path), "v")
    assert rejection.kind == kind
    assert words in rejection.reason


def test_indices_past_a_hidden_start_follow_the_clock_of_the_first_shown_picture(tmp_path, open_folder):
    path = write_video(tmp_path / "v.mp4", CFR, options=GOPS["B-frames"])
    set_edits(path, [(47 / 25, 13 / 25)])
    assert facts_of(open_folder(), "v", np.arange(19)).count == 19
