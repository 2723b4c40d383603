"""Index i gives exactly the picture on screen at i/fps: barcode videos with known times, read back."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.data.frames import VideoFiles
from stages.data.sources.frame_grid import CLAMP_STEPS, Rejected, as_rate, count_clamped, grid_count, ticks_at
from stages.data.sources.video_decode import REORDER_DEPTH, in_order, refuse_gap
from stages.data.sources.video_process import DecoderProcess
from stages.data.sources.video_rgb import as_displayed
from stages.data.sources.video_timeline import Timeline
from stages.types import FrameSource, VideoRejected
from tests.data.barcode import (
    H264_CLOCK,
    HEIGHT,
    MILLISECONDS,
    WIDTH,
    facts_of,
    number_in,
    on_screen,
    picture,
    write_video,
)

CFR = [k * 3600 for k in range(60)]  # 25 fps on a 90 kHz clock
FRAMES = list(range(60))
MS = [k * 40 for k in range(60)]
UNEVEN = [0, 33, 500, 520, 1900, 2000, 2033, 2034, 2400]  # milliseconds
B_FRAMES = {"bf": "3", "g": "12", "b_strategy": "0"}

VIDEOS: dict[str, tuple[str, list[int], dict[str, object]]] = {
    "constant rate": ("a.mp4", CFR, {}),
    "B-frames": ("a.mp4", CFR, {"options": B_FRAMES}),
    "open GOPs": ("a.mkv", MS, {"options": B_FRAMES | {"x264-params": "open-gop=1"}, "time_base": MILLISECONDS}),
    "variable rate": ("a.mp4", [time * 90 for time in UNEVEN], {}),
    "variable rate in milliseconds": ("a.mkv", UNEVEN, {"time_base": MILLISECONDS}),
    "late start": ("a.mp4", [630_000 + time for time in CFR], {}),
    "late start in a transport stream": ("a.ts", [630_000 + time for time in CFR], {}),
    "negative start": ("a.mp4", [time - 18_000 for time in CFR], {"container_options": {"use_editlist": "0"}}),
    "fragmented MP4": ("a.mp4", CFR, {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "program stream": (
        "a.mpg",
        FRAMES,
        {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}, "time_base": Fraction(1, 25)},
    ),
    "MPEG-4 in AVI": ("a.avi", FRAMES, {"codec": "mpeg4", "time_base": Fraction(1, 25)}),
    "H.264 in AVI, without times": ("a.avi", FRAMES, {"time_base": Fraction(1, 25), "options": B_FRAMES}),
    "hidden VP8 frames": (
        "a.webm",
        MS,
        {"codec": "libvpx", "time_base": MILLISECONDS, "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    ),
    "flash video": ("a.flv", MS, {"codec": "flv", "time_base": MILLISECONDS}),
    "windows media": ("a.wmv", MS, {"codec": "wmv2", "time_base": MILLISECONDS}),
    "ogg": ("a.ogv", FRAMES, {"codec": "libvpx", "time_base": Fraction(1, 25)}),
    "sound before the picture": ("a.mp4", CFR, {"audio_first": True}),
}


@pytest.fixture
def open_folder(tmp_path: Path, spare: list[DecoderProcess]) -> Callable[..., VideoFiles]:
    """Makes VideoFiles of tmp_path or another folder."""

    def make(fps: float = 10, folder: Path = tmp_path) -> VideoFiles:
        source = VideoFiles(folder, fps=fps)
        source._reader.decoder.idle = spare
        return source

    return make


def numbers(source: VideoFiles, video_id: str, index: object, batch_size: int = 7) -> list[int]:
    return [
        number_in(rgb)
        for batch in source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=batch_size)
        for rgb in batch
    ]


@pytest.mark.parametrize("fps", [2, 10, 24.5])
@pytest.mark.parametrize("kind", VIDEOS)
def test_each_index_gives_the_picture_on_screen_at_its_time(kind, fps, tmp_path, open_folder):
    name, pts, how = VIDEOS[kind]
    write_video(tmp_path / name, pts, **how)
    time_base = how.get("time_base", H264_CLOCK)
    source = open_folder(fps)
    count = source.count_frames("a")
    seen = numbers(source, "a", range(count))
    assert seen == [on_screen(pts, time_base, i, fps) for i in range(count)]
    facts = facts_of(source, "a", range(count))
    assert (facts.clamped, facts.count, len(facts.pts)) == (0, count, count)
    length = float((pts[-1] - pts[0]) * time_base)
    assert length * fps <= count <= (length + 1) * fps + 1


@given(
    gaps=st.lists(st.integers(1, 900), min_size=1, max_size=30),
    start=st.integers(0, 5000),
    fps=st.sampled_from([1, 2, 10, 12.5, 29.97]),
    wanted=st.sets(st.integers(0, 40), min_size=1, max_size=12),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_times_and_any_choice_of_indices_follow_the_rule(open_folder, tmp_path_factory, gaps, start, fps, wanted):
    folder = tmp_path_factory.mktemp("videos")
    pts = [start]
    for gap in gaps:
        pts.append(pts[-1] + gap)
    write_video(folder / "v.mkv", pts, time_base=MILLISECONDS, options={"bf": "2"})
    source = open_folder(fps, folder)
    index = sorted(i for i in wanted if i < source.count_frames("v"))
    assert numbers(source, "v", index) == [on_screen(pts, MILLISECONDS, i, fps) for i in index]


def test_every_index_alone_gives_the_same_picture_as_all_together(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR, options=B_FRAMES)
    source = open_folder(10)
    together = numbers(source, "v", range(24))
    assert [numbers(source, "v", [i])[0] for i in (0, 3, 11, 23)] == [together[i] for i in (0, 3, 11, 23)]


def test_up_to_two_steps_past_the_end_give_the_last_picture_and_are_counted(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)  # 2.4 s: 24 indices at 10 fps
    source = open_folder(10)
    assert numbers(source, "v", [22, 23, 24, 25]) == [55, 57, 59, 59]
    assert facts_of(source, "v", [22, 23, 24, 25]).clamped == 2
    with pytest.raises(VideoRejected, match=r"frame 26 \(at 2.6 s\) was asked for, the video ends after 24") as caught:
        numbers(source, "v", [0, 26])
    assert caught.value.kind == "past_the_end"


def test_a_transport_stream_whose_clock_restarts_goes_on_where_the_first_part_ended(tmp_path, open_folder):
    part = write_video(tmp_path / "part.ts", CFR, options=B_FRAMES).read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    source = open_folder(10)
    once = numbers(source, "part", range(24))
    assert source.count_frames("joined") == 48
    assert numbers(source, "joined", range(48)) == once + once


@pytest.mark.parametrize("gop", [{"bf": "0"}, {"bf": "7", "b_strategy": "0", "x264-params": "open-gop=1:b-pyramid=2"}])
def test_a_recording_that_starts_between_key_frames_starts_at_its_first_whole_picture(gop, tmp_path, open_folder):
    gop = {"g": "20", "keyint_min": "20", "sc_threshold": "0"} | gop
    data = write_video(tmp_path / "whole.ts", CFR, options=gop).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[188 * 24 :])
    source = open_folder(25)
    count = source.count_frames("cut")
    seen = numbers(source, "cut", range(count))
    assert seen == list(range(seen[0], seen[0] + count))
    assert 5 < seen[0] <= 40
    assert seen[-1] >= 57


def test_an_edit_list_hides_what_comes_before_it(tmp_path, open_folder):
    path = write_video(tmp_path / "v.mp4", CFR, options={"bf": "0"})
    data = bytearray(path.read_bytes())
    at = data.index(b"elst")
    duration, start, _ = struct.unpack(">IiI", data[at + 12 : at + 24])
    clock = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    assert start == 0
    struct.pack_into(">Ii", data, at + 12, duration - duration // 4, clock * 3 // 5)  # from 0.6 s on: picture 15
    path.write_bytes(data)
    assert numbers(open_folder(10), "v", range(5)) == [15, 17, 20, 22, 25]


def test_frames_hold_the_pixels_that_a_plain_decoder_gives(tmp_path, open_folder):
    path = write_video(tmp_path / "v.mkv", MS, time_base=MILLISECONDS, codec="ffv1", pixels="yuv444p")
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (batch,) = open_folder(25).frames("v", np.arange(10), batch_size=10)
    assert batch.dtype == np.uint8
    assert batch.shape == (10, HEIGHT, WIDTH, 3)
    assert np.array_equal(batch, plain[:10])


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        ("libx264", "gray"),
        ("libx264", "yuv420p10le"),
        ("libx264", "yuvj420p"),
        ("libx264", "yuv444p"),
        ("ffv1", "bgra"),
        ("ffv1", "gray16le"),
        ("ffv1", "yuva420p"),
        ("ffv1", "gbrp12le"),
    ],
)
def test_every_pixel_format_becomes_rgb(codec, pixels, tmp_path, open_folder):
    write_video(tmp_path / "v.mkv", MS[:9], time_base=MILLISECONDS, codec=codec, pixels=pixels)
    batches = list(open_folder(25).frames("v", np.arange(9), batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    for number, rgb in enumerate(np.concatenate(batches)):
        assert number_in(rgb) == number
        assert abs(rgb.astype(int) - picture(number)).mean() < 14


@pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_range_in_the_stream(matrix, kr, kb, full, tmp_path, open_folder):
    yuv = {"y": 120, "u": 90, "v": 200}
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv444p", {"qp": "0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for pts in range(3):
            frame = av.VideoFrame(64, 48, "yuv444p")
            for plane, value in zip(frame.planes, yuv.values(), strict=True):
                plane.update(np.full((48, plane.line_size), value, np.uint8).tobytes())
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    y, u, v = yuv["y"], yuv["u"] - 128.0, yuv["v"] - 128.0
    if not full:
        y, u, v = (y - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
    kg = 1 - kr - kb
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    expected = np.clip([red, (y - kr * red - kb * blue) / kg, blue], 0, 255)
    (batch,) = open_folder(10).frames("v", np.array([0]), batch_size=1)
    assert abs(batch[0].astype(float).mean(axis=(0, 1)) - expected).max() < 2


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(degrees, tmp_path, open_folder):
    write_rotated(tmp_path / "v.mp4", degrees)
    (batch,) = open_folder(10).frames("v", np.array([3]), batch_size=1)
    upright = np.rot90(batch[0], -degrees // 90)
    assert upright.shape == (HEIGHT, WIDTH, 3)
    assert number_in(upright) == on_screen(CFR, H264_CLOCK, 3, 10)


def write_rotated(path: Path, degrees: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.set_display_rotation(degrees)
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_display_matrix_moves_every_pixel_where_its_definition_says(matrix, mirrored):
    a, b, c, d = (-matrix[0], matrix[1], -matrix[2], matrix[3]) if mirrored else matrix
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    shown = as_displayed(stored, (a << 16, b << 16, c << 16, d << 16))
    places = {(x, y): (a * x + c * y, b * x + d * y) for y in range(2) for x in range(3)}
    left, top = min(x for x, _ in places.values()), min(y for _, y in places.values())
    for (x, y), (to_x, to_y) in places.items():
        assert np.array_equal(shown[to_y - top, to_x - left], stored[y, x])


def test_a_batch_holds_frames_of_one_size(tmp_path, open_folder):
    small = write_video(tmp_path / "small.ts", CFR[:20])
    large = write_video(tmp_path / "large.ts", CFR[:20], size=(128, 64))
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    batches = list(open_folder(10).frames("both", np.arange(16), batch_size=5))
    assert [batch.shape[:3] for batch in batches] == [(5, 48, 96), (3, 48, 96), (5, 64, 128), (3, 64, 128)]


def test_facts_come_with_the_frames_that_were_read_to_the_end(tmp_path, open_folder):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", [630_000 + time for time in CFR])
    source = open_folder(10)
    reading, other = (source.frames(name, np.array([1, 4]), batch_size=2) for name in "ab")
    with pytest.raises(ValueError, match="once its frames were read to the end"):
        _ = reading.facts
    for _ in zip(reading, other, strict=True):
        pass
    facts = reading.facts
    data = (tmp_path / "a.mp4").read_bytes()
    assert (facts.size, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert facts.pts == (7.08, 7.4)
    assert other.facts.sha256 != facts.sha256 or (tmp_path / "b.mp4").read_bytes() == data


def test_no_index_gives_no_frame_but_checks_the_video(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)
    source = open_folder(10)
    assert numbers(source, "v", np.array([], dtype=np.int64)) == []
    assert facts_of(source, "v", []).pts == ()


@pytest.mark.parametrize("index", [[3, 2], [1, 1], [-1, 0]])
def test_indices_must_be_sorted_unique_and_not_negative(index, tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)
    with pytest.raises(ValueError, match="sorted, unique and not negative"):
        numbers(open_folder(10), "v", index)


def test_two_videos_can_be_read_in_turns(tmp_path, open_folder):
    write_video(tmp_path / "a.mp4", CFR)
    write_video(tmp_path / "b.mp4", CFR[:30])
    source = open_folder(25)
    first, second = (source.frames(name, np.arange(30), batch_size=10) for name in "ab")
    pairs = [(number_in(a[0]), number_in(b[-1])) for a, b in zip(first, second, strict=True)]
    assert pairs == [(0, 9), (10, 19), (20, 29)]


def test_a_reader_that_stops_early_does_not_disturb_the_next_video(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)
    source = open_folder(25)
    frames = iter(source.frames("v", np.arange(60), batch_size=1))
    next(frames)
    frames.close()
    assert numbers(source, "v", [5, 6]) == [5, 6]


def test_the_source_says_its_rule_and_its_decoder(open_folder):
    source = open_folder(10)
    assert isinstance(source, FrameSource)
    assert source.frame_rule == "10 fps grid from first pts, frame on screen, rotation applied, v2"
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    assert source.decoder.startswith(f"pyav {av.__version__} libavcodec {libavcodec} ")


@given(
    duration=st.fractions(min_value=0, max_value=10_000, max_denominator=90_000),
    fps=st.sampled_from([1, 2, 10, 23.976, 29.97, 30, 59.94]),
)
def test_the_last_grid_index_is_inside_the_video_and_the_next_is_not(duration, fps):
    rate = as_rate(fps)
    count = grid_count(duration, rate)
    assert count == 1 or (count - 1) / rate + Fraction(1, 1000) < duration
    assert count / rate + Fraction(1, 1000) >= duration


@given(index=st.integers(0, 200_000), fps=st.sampled_from([1, 10, 29.97]), base=st.sampled_from([1000, 12_800, 90_000]))
def test_ticks_are_the_last_whole_tick_within_a_millisecond(index, fps, base):
    ticks = ticks_at(index, as_rate(fps), Fraction(1, base))
    assert 0 <= index / as_rate(fps) + Fraction(1, 1000) - Fraction(ticks, base) < Fraction(1, base)


def test_clamping_ends_two_steps_after_the_last_index():
    assert count_clamped(range(12), 10, Fraction(10)) == CLAMP_STEPS == 2
    with pytest.raises(Rejected):
        count_clamped(range(13), 10, Fraction(10))


def timeline_of(times: list[int], *, by_pts: bool = True) -> Timeline:
    return Timeline(Fraction(1, 1000), array("q", sorted(times)), min(times), max(times) + 40, 40, by_pts, True)


@given(order=st.permutations(range(12)), missing=st.sets(st.integers(1, 11), max_size=3))
def test_pictures_that_come_out_of_order_are_sorted_by_their_time(order, missing):
    timeline = timeline_of([40 * k for k in range(12)])
    given_out = [(40 * k, f"picture {k}") for k in order if k not in missing]
    assert list(in_order(given_out, timeline)) == sorted(given_out)


def test_nothing_is_held_back_while_pictures_come_in_order():
    timeline = timeline_of([40 * k for k in range(99)])
    taken = []

    def frames() -> Iterator[tuple[int, str]]:
        for k in range(99):
            taken.append(k)
            yield 40 * k, "picture"

    for k, _ in enumerate(in_order(frames(), timeline)):
        assert len(taken) == k + 1


def test_only_a_few_pictures_are_held_for_one_that_never_comes():
    timeline = timeline_of([0, 1, *(40 * k for k in range(1, 99))])
    taken, first = [], None

    def frames() -> Iterator[tuple[int, str]]:
        for k in range(99):
            taken.append(k)
            yield 40 * k, "picture"

    for pts, _ in in_order(frames(), timeline):
        if pts == 40:
            first = len(taken)
            break
    assert first == REORDER_DEPTH + 2


def test_where_packets_lack_times_the_decoders_order_stands():
    timeline = timeline_of([0, 40, 80], by_pts=False)
    assert [name for _, name in in_order([(40, "a"), (80, "b"), (120, "c")], timeline)] == ["a", "b", "c"]


def test_packets_that_give_no_picture_for_over_a_second_are_an_error():
    timeline = timeline_of([40 * k for k in range(99)])
    refuse_gap(1000, 2000, timeline)
    with pytest.raises(Rejected, match=r"nothing decodes between 1\.0 s and 2\.0 s") as caught:
        refuse_gap(1000, 2040, timeline)
    assert caught.value.kind == "decode_error"
