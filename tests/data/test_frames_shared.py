"""The 17 hostile files and the 29 real clips: the right frames, or a distinct, true reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stages.data.frames import VideoFiles
from stages.data.sources.picture_batches import DEFAULT_LIMITS
from stages.types import VideoRejected
from tests.data.barcode import facts_of

CYRILLIC = "видео 🎬 名前 ü & 'quote'"

# id -> (grid frames at 2 fps, at 10 fps, sizes h × w in order)
GIVES_FRAMES: dict[str, tuple[int, int, list[tuple[int, int]]]] = {
    "all_black_362s_1080p": (726, 3628, [(1080, 1920)]),
    "huge_8k_8frames_hevc": (1, 4, [(4320, 7680)]),
    "no_duration": (11, 51, [(540, 960)]),
    "odd_size_101x67_yuv444": (7, 31, [(67, 101)]),
    "one_frame": (1, 1, [(540, 960)]),
    "resolution_change": (15, 71, [(360, 480), (144, 176)]),
    "rotated_180_real": (10, 50, [(720, 1280)]),
    "rotated_90_metadata": (7, 31, [(480, 360)]),  # stored 360 × 480
    "vfr": (15, 74, [(480, 720)]),
    "video_not_stream0_3frames_hevc": (1, 1, [(1920, 1080)]),  # stored 1080 × 1920
    CYRILLIC: (6, 30, [(240, 320)]),
}
IS_REFUSED = {
    "audio_only": ("no_video_stream", "there is no video stream in it, only audio"),
    "corrupted_real_decord": (
        "decode_error",
        "decoding fails at 2.8 s of 5.0 s: Invalid data found when processing input. "
        "To use the frames around it: a new --cache, with --set data.around_damage=true",
    ),
    "text_renamed": ("not_a_video", "the file is text, not a video"),
    "truncated_faststart": (
        "truncated",
        "the file is cut off: its header says 12.0 s, only 6.2 s can be read"
        " (its last box (mdat) promises 159083 bytes, there are 87495)",
    ),
    "truncated_no_moov": (
        "no_index",
        "the MP4 index (moov box) is missing, so nothing can be located;"
        " its last box (mdat) promises 153980 bytes, there are 87495",
    ),
    "zero_byte": ("empty_file", "the file is empty (0 bytes)"),
}
CLIPS = [
    *(
        "ball_juggle",
        "bbb_opening",
        "bbb_rabbit",
        "bbb_vp9_square",
        "bottles",
        "car_lot",
        "carphone_qcif",
        "chaplin_bw",
    ),
    *("city_night", "classroom", "dog_leash", "earth_night", "flower_opening", "friday_office", "nasa_two_streams"),
    *("office_phone_h263", "one_by_one_people", "paper_sign", "pour_coffee", "seattle_pan", "sign_eat", "sintel_fight"),
    *("slides_122s", "store_aisle_hevc", "stream_water", "talking_head_53s", "test_clock_av1", "toy_monster"),
    "toy_rabbit",
]
SLOW = {  # seconds of decoding, and twice: by us and by the oracle
    *("all_black_362s_1080p", "huge_8k_8frames_hevc", "rotated_180_real", "ball_juggle", "bbb_opening", "bbb_rabbit"),
    *("bottles", "car_lot", "dog_leash", "one_by_one_people", "pour_coffee", "slides_122s", "talking_head_53s"),
}


def marked(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.fixture(scope="module")
def nasty(shared_data: Path) -> Iterator[dict[int, VideoFiles]]:
    sources = {fps: VideoFiles(shared_data / "nasty", fps=fps) for fps in (2, 10)}
    yield sources
    for source in sources.values():
        source.close()


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> Iterator[dict[int, VideoFiles]]:
    sources = {fps: VideoFiles(shared_data / "clips" / "videos", fps=fps) for fps in (2, 10)}
    yield sources
    for source in sources.values():
        source.close()


def digests(source: VideoFiles, video_id: str, index: object) -> tuple[list[str], list[tuple[int, int]]]:
    """A digest of every frame, and the sizes in order of appearance."""
    found, sizes = [], []
    for batch in source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=8):
        assert batch.dtype == np.uint8
        assert batch.shape[3] == 3
        if batch.shape[1:3] not in sizes:
            sizes.append(batch.shape[1:3])
        found += [hashlib.sha256(rgb.tobytes()).hexdigest() for rgb in batch]
    return found, sizes


def by_plain_decoding(path: Path, fps: int, count: int, *, turn: int = 0) -> list[str]:
    """The slow oracle: decode all in one go, then choose by time. A clock that restarts goes on where it was."""
    shown: list[tuple[Fraction, str]] = []
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        shift, last, length = Fraction(0), None, 1 / Fraction(stream.average_rate)
        for frame in container.decode(stream):
            time = frame.pts * stream.time_base + shift
            if last is not None and time < last - Fraction(1, 10):
                shift += last + length - time
                time = last + length
            last = time
            rgb = np.rot90(frame.to_ndarray(format="rgb24"), turn)
            shown.append((time, hashlib.sha256(np.ascontiguousarray(rgb).tobytes()).hexdigest()))
    shown.sort(key=lambda pair: pair[0])
    first, last = shown[0][0], shown[-1][0]
    assert Fraction(count - 1, fps) <= last - first + length + Fraction(1, 100)
    assert Fraction(count + 1, fps) > last - first
    due = [first + Fraction(i, fps) + Fraction(1, 1000) for i in range(count)]
    return [[digest for time, digest in shown if time <= moment][-1] for moment in due]


def test_the_tables_name_every_file(shared_data, nasty, clips):
    names = {Path(entry["name"]).stem for entry in json.loads((shared_data / "nasty" / "manifest.json").read_text())}
    assert set(GIVES_FRAMES) | set(IS_REFUSED) == names == set(nasty[2].video_ids())
    assert len(names) == 17
    assert sorted(CLIPS) == clips[2].video_ids()
    assert len(CLIPS) == 29


@pytest.mark.parametrize("video_id", IS_REFUSED)
def test_a_hostile_file_is_refused_for_its_own_reason(video_id, nasty):
    for fps, source in nasty.items():
        with pytest.raises(VideoRejected) as caught:
            digests(source, video_id, range(5 * fps))
        assert (caught.value.kind, caught.value.reason) == IS_REFUSED[video_id]


def test_no_two_hostile_files_share_a_reason():
    assert len({kind for kind, _ in IS_REFUSED.values()}) == len(IS_REFUSED)


@pytest.mark.parametrize("video_id", [name for name in IS_REFUSED if name != "corrupted_real_decord"])
def test_what_is_wrong_with_the_container_is_found_without_decoding(video_id, nasty):
    with pytest.raises(VideoRejected) as caught:
        nasty[2].count_frames(video_id)
    assert caught.value.kind == IS_REFUSED[video_id][0]


@pytest.mark.parametrize("fps", [2, 10])
@pytest.mark.parametrize("video_id", marked(list(GIVES_FRAMES)))
def test_a_strange_file_gives_its_frames(video_id, fps, nasty, shared_data):
    count = GIVES_FRAMES[video_id][0 if fps == 2 else 1]
    assert nasty[fps].count_frames(video_id) == count
    if video_id == "all_black_362s_1080p":
        return  # read to its end in test_frames_process.py; 10,883 equal pictures tell an oracle nothing
    found, sizes = digests(nasty[fps], video_id, range(count))
    assert len(found) == count
    assert sizes == GIVES_FRAMES[video_id][2]
    facts = facts_of(nasty[fps], video_id, range(count))
    (path,) = (shared_data / "nasty").glob(f"{video_id}.*")
    manifest = {e["name"]: e for e in json.loads((shared_data / "nasty" / "manifest.json").read_text())}[path.name]
    assert (facts.size, facts.sha256, facts.clamped) == (manifest["bytes"], manifest["sha256"], 0)
    turn = {"rotated_180_real": 2, "rotated_90_metadata": 1, "video_not_stream0_3frames_hevc": 3}.get(video_id, 0)
    assert found == by_plain_decoding(path, fps, count, turn=turn)


def test_a_camera_that_was_held_upright_gives_upright_pictures(nasty, shared_data):
    """Key caps whose letters can be read (looked at once), filmed with a phone held upright."""
    (batch,) = nasty[2].frames("video_not_stream0_3frames_hevc", np.array([0]), batch_size=1)
    (path,) = (shared_data / "nasty").glob("video_not_stream0*")
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(batch[0], np.rot90(stored, -1))  # -90 in the display matrix: a quarter turn clockwise


def test_8k_is_refused_before_decoding_where_the_limit_is_lower(shared_data):
    source = VideoFiles(shared_data / "nasty", fps=10, limits=replace(DEFAULT_LIMITS, max_pixels=33_000_000))
    with pytest.raises(VideoRejected, match=r"7680 × 4320 pixels, the limit is 33000000") as caught:
        source.count_frames("huge_8k_8frames_hevc")
    assert caught.value.kind == "too_large"
    source.close()


@pytest.mark.parametrize("video_id", marked(CLIPS))
def test_a_real_clip_gives_the_frames_that_plain_decoding_gives(video_id, clips, shared_data):
    (path,) = (shared_data / "clips" / "videos").glob(f"{video_id}.*")
    manifest = {e["name"]: e for e in json.loads((shared_data / "clips" / "manifest.json").read_text())}[path.name]
    source = clips[2]
    count = source.count_frames(video_id)
    found, sizes = digests(source, video_id, range(count))
    assert sizes == [(manifest["height"], manifest["width"])]
    assert found == by_plain_decoding(path, 2, count)
    facts = facts_of(source, video_id, range(count))
    assert (facts.size, facts.sha256, facts.clamped) == (manifest["bytes"], manifest["sha256"], 0)
    if manifest["first_pts_s"] is not None:
        assert facts.pts[0] == pytest.approx(manifest["first_pts_s"], abs=1e-6)
        assert facts.pts[-1] <= manifest["last_pts_s"] + 1e-6


@pytest.mark.parametrize("video_id", CLIPS)
def test_ffmpegs_count_of_10_fps_frames_is_ours_or_one_more(video_id, clips, shared_data):
    manifest = {
        Path(entry["name"]).stem: entry for entry in json.loads((shared_data / "clips" / "manifest.json").read_text())
    }[video_id]
    count = clips[10].count_frames(video_id)
    assert 0 <= manifest["frames_at_10fps"] - count <= 1
    if video_id in SLOW:
        return  # all of it would be decoded for one frame
    last = np.arange(max(0, count - 2), manifest["frames_at_10fps"])
    found, _ = digests(clips[10], video_id, last)
    assert len(found) == len(last)
    assert facts_of(clips[10], video_id, last).clamped == manifest["frames_at_10fps"] - count
