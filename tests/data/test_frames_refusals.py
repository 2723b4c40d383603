"""What gives no frames, and why: every refusal has its own kind and a true reason, and nothing is read but the file."""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stages.data.frames import REJECTION_KINDS, VideoFiles
from stages.data.sources import video_timeline
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import DEFAULT_LIMITS
from stages.data.sources.video_sniff import open_window
from stages.data.sources.video_timeline import open_container
from stages.types import VideoRejected
from tests.data.barcode import MILLISECONDS, number_in, picture, write_video

CFR = [k * 3600 for k in range(60)]  # 2.4 s
LONG = [k * 9000 for k in range(100)]  # 10 s at 10 fps
LONG_MS = [k * 100 for k in range(100)]


def refused(source: VideoFiles, video_id: str, index: object = (0,)) -> VideoRejected:
    """The rejection of frames, which must be of a documented kind; counting must reject it too or succeed."""
    with pytest.raises(VideoRejected) as caught:
        for _ in source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=4):
            pass
    assert caught.value.kind in REJECTION_KINDS
    assert caught.value.video_id == video_id
    assert caught.value.reason
    assert "\n" not in caught.value.reason
    return caught.value


def frames(source: VideoFiles, video_id: str, index: object = (0, 1, 2)) -> list[int]:
    return [
        number_in(rgb)
        for batch in source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=4)
        for rgb in batch
    ]


def outcome(source: VideoFiles, video_id: str, index: object) -> str:
    """``frames``, or the kind of the rejection."""
    try:
        frames(source, video_id, index)
    except VideoRejected as rejection:
        return rejection.kind
    return "frames"


def test_every_kind_of_rejection_in_the_code_is_documented_and_the_other_way_round():
    folder = Path(video_timeline.__file__).parent
    files = [*folder.glob("video_*.py"), *folder.glob("*frame*.py"), folder / "tars.py", folder / "folder_ids.py"]
    code = "".join(path.read_text() for path in files if path.name != "frames.py")
    found = re.findall(r'Rejected\(\s*(?:video_id,\s*)?"(\w+)"', code) + re.findall(r'"kind": "(\w+)"', code)
    assert set(found) == set(REJECTION_KINDS)


# --- files that name other files -------------------------------------------------------------------------------------

PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{other}'\n",
    "ffconcat after a byte order mark": "\ufeffffconcat version 1.0\nfile '{other}'\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nfile://{other}\n#EXT-X-ENDLIST\n",
    "DASH": '<?xml version="1.0"?>\n<MPD type="static"><Period><BaseURL>{other}</BaseURL></Period></MPD>',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "ASX": '<asx version="3.0"><entry><ref href="{other}"/></entry></asx>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_text_that_names_another_video_is_never_followed(kind, tmp_path, open_folder):
    other = write_video(tmp_path / "other.mp4", CFR)
    (tmp_path / "x.mp4").write_text(PLAYLISTS[kind].format(other=other), encoding="utf-8")
    rejection = refused(open_folder(), "x")
    assert rejection.kind == "not_a_video"
    assert "names other files; these are never followed" in rejection.reason


def open_alone(path: Path) -> None:
    """Open with libav as the decoder process does, without the look at the first bytes that comes before it."""
    with open_window(str(path), 0, None) as window:
        open_container(window, Limits(10**8, 100.0, 30.0)).close()


@pytest.fixture
def concat_list(tmp_path: Path) -> Path:
    """A list that PyAV does follow when it is not told otherwise."""
    other = write_video(tmp_path / "other.mp4", CFR)
    path = tmp_path / "x.mp4"
    path.write_text(f"ffconcat version 1.0\nfile '{other.name}'\n")
    with av.open(str(path)) as followed:
        assert number_in(next(followed.decode(video=0)).to_ndarray(format="rgb24")) == 0
    return path


def test_the_demuxer_allow_list_alone_keeps_a_list_from_being_opened(concat_list, monkeypatch):
    opened = []
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda *args, **how: opened.append(av_open(*args, **how)) or opened[-1])
    with pytest.raises(Rejected) as caught:
        open_alone(concat_list)
    assert caught.value.kind == "not_a_video"
    assert opened == []
    jpeg = concat_list.with_name("x.jpg")
    Image.fromarray(picture(3)).save(jpeg)
    with pytest.raises(Rejected):
        open_alone(jpeg)
    assert opened == []


def test_without_the_demuxer_allow_list_no_protocol_could_open_the_other_file(concat_list, monkeypatch):
    monkeypatch.setattr(video_timeline, "FORMATS", video_timeline.FORMATS + ",concat")
    monkeypatch.chdir(concat_list.parent)  # where the name in the list would be found
    with pytest.raises(Rejected) as caught:
        open_alone(concat_list)
    assert caught.value.kind == "not_a_video"


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, name) + body


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        yield name, data[at + 8 : at + size]
        at += size


def with_alias(data: bytes, target: str) -> bytes:
    """The boxes of an MP4 whose samples are said to lie in another file (QuickTime data reference 'alis')."""
    path = target.encode() + b"\0" * (len(target.encode()) % 2)
    alias = box(b"alis", bytes(14 + 1 + 27 + 12 + 1 + 63 + 16 + 4 + 16), struct.pack(">HH", 2, len(path)), path)
    rebuilt = b""
    for name, body in boxes(data):
        if name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            body = with_alias(body, target)
        elif name == b"dref":
            body = struct.pack(">II", 0, 1) + alias + struct.pack(">Hh", 0xFFFF, 0)
        rebuilt += box(name, body)
    return rebuilt


def test_an_mp4_whose_samples_lie_in_another_file_is_never_followed(tmp_path, open_folder):
    other = write_video(tmp_path / "other.mp4", CFR)
    kept = b"".join(box(name, body) for name, body in boxes(other.read_bytes()) if name in (b"ftyp", b"moov"))
    (tmp_path / "x.mp4").write_bytes(with_alias(kept, str(other)))
    with av.open(str(tmp_path / "x.mp4"), options={"enable_drefs": "1", "use_absolute_path": "1"}) as followed:
        assert number_in(next(followed.decode(video=0)).to_ndarray(format="rgb24")) == 0  # the reference does work
    assert refused(open_folder(), "x").kind == "no_frames"


# --- what is no video ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_an_image_is_not_a_video(kind, tmp_path, open_folder):
    Image.fromarray(picture(3)).save(tmp_path / "x.mp4", format=kind)
    rejection = refused(open_folder(), "x")
    assert rejection.kind == "not_a_video"
    assert f"{kind.replace('WEBP', 'WebP')} image" in rejection.reason


def test_a_gif_is_a_video_only_if_it_moves(tmp_path, open_folder):
    pictures = [Image.fromarray(picture(number)) for number in range(5)]
    pictures[0].save(tmp_path / "still.gif")
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    (tmp_path / "cut.gif").write_bytes((tmp_path / "moving.gif").read_bytes()[:-40])
    source = open_folder()
    assert frames(source, "moving", range(5)) == [0, 1, 2, 3, 4]
    assert refused(source, "still").reason == "the file is a GIF image of one picture, not a video"
    assert refused(source, "cut").kind in ("truncated", "decode_error")


OTHER_FILES = {
    "text": (b"hello, this is no video\n" * 99, "not_a_video", "is text"),
    "noise": (random.Random(0).randbytes(9999), "not_a_video", "no video container"),
    "zeros": (bytes(9999), "not_a_video", "no video container"),
    "pdf": (b"%PDF-1.7\n" + bytes(999), "not_a_video", "is a PDF"),
    "heif": (box(b"ftyp", b"heic", bytes(8)) + bytes(999), "not_a_video", "HEIF or AVIF image"),
    "empty": (b"", "empty_file", "0 bytes"),
    "one byte": (b"\0", "not_a_video", "no video container"),
    "header only": (box(b"ftyp", b"isom", bytes(8)), "no_index", "moov box) is missing"),
    "damaged index": (
        box(b"ftyp", b"isom", bytes(8)) + box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl"))))),
        "no_video_stream",
        "no video stream in it",
    ),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_are_refused_for_what_they_are(what, tmp_path, open_folder):
    data, kind, words = OTHER_FILES[what]
    (tmp_path / "x.mp4").write_bytes(data)
    rejection = refused(open_folder(), "x")
    assert rejection.kind == kind
    assert words in rejection.reason


def test_sound_alone_and_unknown_codecs_are_told_apart(tmp_path, open_folder):
    video = write_video(tmp_path / "v.mp4", CFR).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(video.replace(b"avc1", b"zzzz"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16_000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    source = open_folder()
    assert refused(source, "sound").reason == "there is no video stream in it, only audio"
    assert refused(source, "unknown").kind == "no_decoder"


def test_a_cover_picture_is_not_a_video_stream(tmp_path, open_folder):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16_000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16_000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
        container.mux(cover.encode(None))
    assert refused(open_folder(), "song").reason == "there is no video stream in it, only a still picture"


def test_pipes_and_folders_are_refused_without_waiting_for_them(tmp_path, open_folder):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    source = open_folder(limits=replace(DEFAULT_LIMITS, timeout_s=20.0))
    assert refused(source, "pipe").kind == "not_a_file"
    assert refused(source, "folder").kind == "not_a_file"


# --- cut and damaged files -------------------------------------------------------------------------------------------

CUT: dict[str, tuple[str, dict[str, object], str]] = {
    "MP4 with its index in front": ("v.mp4", {"container_options": {"movflags": "faststart"}}, "truncated"),
    "MP4 with its index at the end": ("v.mp4", {}, "no_index"),
    "fragmented MP4": (
        "v.mp4",
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "10"}},
        "truncated",
    ),
    "Matroska": ("v.mkv", {"time_base": MILLISECONDS}, "truncated"),
    "AVI": ("v.avi", {"codec": "mpeg4", "time_base": Fraction(1, 10)}, "truncated"),
    "Flash": ("v.flv", {"codec": "flv", "time_base": MILLISECONDS}, "truncated"),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_file_is_refused_even_for_frames_before_the_cut(kind, tmp_path, open_folder):
    name, how, expected = CUT[kind]
    ticks = {MILLISECONDS: 100, Fraction(1, 10): 1}.get(how.get("time_base"), 9000)
    path = write_video(tmp_path / name, [k * ticks for k in range(100)], rate=10, **how)
    source = open_folder()
    assert frames(source, "v") == [0, 1, 2]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    rejection = refused(source, "v")
    assert rejection.kind == expected
    assert "cut off" in rejection.reason or "promises" in rejection.reason
    if kind == "Matroska":
        assert re.search(r"its header says 10.0 s, only [456]\.\d s can be read", rejection.reason)


def test_a_header_may_promise_a_little_more_than_there_is(tmp_path, open_folder):
    path = write_video(tmp_path / "v.mkv", LONG_MS, rate=10, time_base=MILLISECONDS)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, a double
    assert struct.unpack_from(">d", data, at)[0] == 10_000
    source = open_folder()
    for milliseconds, fine in ((10_800, True), (20_000, False)):
        struct.pack_into(">d", data, at, milliseconds)
        path.write_bytes(data)
        if fine:
            assert frames(source, "v") == [0, 1, 2]
        else:
            assert refused(source, "v").reason == "the file is cut off: its header says 20.0 s, only 10.0 s can be read"


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_damaged_pictures_are_refused_and_never_patched_up(name, tmp_path, open_folder):
    how = {"codec": "mpeg4", "time_base": Fraction(1, 10)} if name == "v.avi" else {}
    pts = range(100) if name == "v.avi" else LONG
    path = write_video(
        tmp_path / name, pts, rate=10, size=(320, 240), options={"g": "50", "qmin": "2", "qmax": "4"}, **how
    )
    data = bytearray(path.read_bytes())
    noise = random.Random(1)
    for at in range(len(data) * 4 // 10, len(data) * 6 // 10, 97):
        data[at] = noise.randrange(256)
    path.write_bytes(data)
    rejection = refused(open_folder(), "v", range(100))
    assert rejection.kind in ("decode_error", "damaged_container", "truncated")
    assert "fails at" in rejection.reason or "fails part-way" in rejection.reason or "can be read" in rejection.reason


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.avi", "v.gif"])
def test_any_flipped_bytes_give_frames_or_a_refusal_and_never_another_error(name, tmp_path, open_folder):
    codecs = {"v.avi": "mpeg4", "v.gif": "gif"}
    how = {"codec": codecs[name], "time_base": Fraction(1, 25)} if name in codecs else {}
    if name == "v.gif":
        Image.fromarray(picture(0)).save(
            tmp_path / name,
            save_all=True,
            append_images=[Image.fromarray(picture(k)) for k in range(1, 9)],
            duration=100,
        )
    else:
        write_video(tmp_path / name, range(60) if how else CFR, **how)
    path, noise = tmp_path / name, random.Random(7)
    whole = path.read_bytes()
    source = open_folder(limits=replace(DEFAULT_LIMITS, timeout_s=20.0))
    kinds = set()
    for _ in range(25):
        data = bytearray(whole)
        for _ in range(noise.choice([1, 3, 30])):
            data[noise.randrange(len(data))] = noise.randrange(256)
        path.write_bytes(data)
        kinds.add(outcome(source, "v", range(8)))
    assert kinds <= {"frames", *REJECTION_KINDS} - {"timeout", "decoder_crashed", "out_of_memory"}
    assert len(kinds) > 1


# --- limits ----------------------------------------------------------------------------------------------------------


def test_large_frames_are_refused_before_anything_is_decoded(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", CFR)
    rejection = refused(open_folder(limits=replace(DEFAULT_LIMITS, max_pixels=96 * 48 - 1)), "v")
    assert (rejection.kind, "96 × 48 pixels" in rejection.reason) == ("too_large", True)
    assert frames(open_folder(limits=replace(DEFAULT_LIMITS, max_pixels=96 * 48)), "v") == [0, 2, 5]


def test_frames_that_become_large_in_the_middle_are_refused(tmp_path, open_folder):
    small = write_video(tmp_path / "small.ts", CFR[:20]).read_bytes()
    large = write_video(tmp_path / "large.ts", CFR[:20], size=(320, 240)).read_bytes()
    (tmp_path / "both.ts").write_bytes(small + large)
    source = open_folder(limits=replace(DEFAULT_LIMITS, max_pixels=96 * 48))
    assert frames(source, "both", [0, 4]) == [0, 10]
    assert refused(source, "both", range(16)).kind == "too_large"


def test_a_picture_that_claims_more_than_its_container_is_refused_before_it_is_allocated(tmp_path, open_folder):
    """A PNG of 65535 × 65535 in a Matroska file that says 96 × 48: 17 GB, if anyone believed it."""
    write_video(tmp_path / "v.avi", range(9), codec="png", pixels="rgb24", time_base=Fraction(1, 25))
    data = (tmp_path / "v.avi").read_bytes()
    size = struct.pack(">II", 96, 48)
    assert data.count(b"IHDR" + size) == 9
    (tmp_path / "v.avi").write_bytes(data.replace(b"IHDR" + size, b"IHDR" + struct.pack(">II", 65535, 65535)))
    assert refused(open_folder(), "v").kind in ("too_large", "decode_error")


def test_long_videos_are_refused_by_their_header_and_by_their_packets(tmp_path, open_folder):
    write_video(tmp_path / "v.mp4", LONG, rate=10)
    write_video(tmp_path / "live.webm", LONG_MS, rate=10, time_base=MILLISECONDS, codec="libvpx",
                container_options={"live": "1"})  # fmt: skip
    with av.open(str(tmp_path / "live.webm")) as container:
        assert container.duration is None
    source = open_folder(limits=replace(DEFAULT_LIMITS, max_duration_s=9.0))
    assert refused(source, "v").reason == "it lasts 10.0 s, the limit is 9 s (data.max_duration_s)"
    assert refused(source, "live").kind == "too_long"
    assert frames(open_folder(limits=replace(DEFAULT_LIMITS, max_duration_s=10.1)), "live") == [0, 1, 2]
