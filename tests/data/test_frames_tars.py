"""WebDataset tars: the same frames as from files, read in place, and nothing else in them is touched."""

from __future__ import annotations

import http.server
import io
import logging
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stages.config import DataConfig
from stages.data.frames import FrameFolders, VideoFiles, WebDatasetTars, list_videos, open_source
from stages.data.sources.tar_index import split_key
from stages.data.sources.video_process import DecoderProcess
from stages.types import FrameSource, VideoRejected
from tests.data.barcode import MILLISECONDS, facts_of, write_video
from tests.data.test_frames_folders import jpeg, numbers, refused, write_frames

CFR = [k * 3600 for k in range(60)]


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.fixture
def video(tmp_path: Path) -> bytes:
    (tmp_path / "files").mkdir()
    return write_video(tmp_path / "files" / "abc.mp4", CFR).read_bytes()


@pytest.fixture
def opened(spare: list[DecoderProcess]) -> Iterator[Callable[[str | Path], WebDatasetTars]]:
    """Opens tars at 10 fps; the decoder processes are handed on from test to test."""
    made: list[WebDatasetTars] = []

    def make(tars: str | Path) -> WebDatasetTars:
        made.append(WebDatasetTars(tars, fps=10))
        made[-1]._reader.decoder.idle = spare
        return made[-1]

    yield make
    for source in made:
        source._reader.decoder.idle = []
        source.close()


def test_a_video_in_a_tar_gives_what_the_file_gives(tmp_path, video, opened):
    other = write_video(tmp_path / "other.mkv", [0, 40, 80], time_base=MILLISECONDS).read_bytes()
    members = [("first.txt", b"a caption"), ("deep/folder/abc.mp4", video), ("b.mkv", other), ("abc.json", b"{}")]
    tar = write_tar(tmp_path / "x.tar", members)
    source, files = opened(tar), VideoFiles(tmp_path / "files", fps=10)
    assert isinstance(source, FrameSource)
    assert source.video_ids() == list_videos(tar, "webdataset") == ["b", "deep/folder/abc"]
    assert source.has("abc")
    assert not source.has("first")
    assert source.count_frames("abc") == files.count_frames("abc") == 24
    for ours, theirs in zip(
        source.frames("abc", np.arange(25), batch_size=7), files.frames("abc", np.arange(25), batch_size=7), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert facts_of(source, "deep/folder/abc", [0, 9]) == facts_of(files, "abc", [0, 9])
    assert (source.frame_rule, source.decoder) == (files.frame_rule, files.decoder)
    files.close()


def test_numbered_jpegs_in_a_tar_give_what_the_folder_gives(tmp_path, opened):
    write_frames(tmp_path / "folders" / "v", 12)
    members = [(f"v.{path.name}", path.read_bytes()) for path in sorted((tmp_path / "folders" / "v").iterdir())]
    source, folders = opened(write_tar(tmp_path / "x.tar", members[::-1])), FrameFolders(tmp_path / "folders")
    assert source.count_frames("v") == 12
    assert numbers(source, "v", [0, 5, 11, 12, 13]) == numbers(folders, "v", [0, 5, 11, 12, 13]) == [0, 5, 11, 11, 11]
    assert facts_of(source, "v", [0, 5, 13]) == facts_of(folders, "v", [0, 5, 13])
    assert (source.frame_rule, source.decoder) == (folders.frame_rule, folders.decoder)
    assert refused(source, "v", [14]).kind == "past_the_end"


def test_tars_written_by_the_webdataset_library_are_read(tmp_path, video, opened):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        writer.write({"__key__": "train/abc", "mp4": video, "txt": b"a caption"})
        writer.write({"__key__": "v", **{f"frame{k + 1:06d}.jpg": jpeg(k) for k in range(3)}})
    source = opened(tmp_path / "x.tar")
    assert source.video_ids() == ["train/abc", "v"]
    for video_id in ("train/abc", "train/abc.mp4", "abc", "abc.mp4"):
        assert numbers(source, video_id, [0, 1, 2]) == [0, 2, 5]
    assert refused(source, "test/abc").kind == "missing_file"
    assert "close to it: 'train/abc'" in refused(source, "test/abc").reason
    assert numbers(source, "v", [0, 1, 2]) == [0, 1, 2]
    assert "; " in source.frame_rule


@pytest.mark.parametrize(
    "name", ["abc.mp4", "d/abc.mp4", "./abc.frame000001.jpg", "a/b.c/abc.tar.gz", "noext", "é ü.mp4"]
)
def test_keys_are_split_as_webdataset_splits_them(name):
    base_plus_ext = pytest.importorskip("webdataset.tariterators").base_plus_ext
    key, extension = base_plus_ext(name)
    assert split_key(name) == (None if key is None else (key.removeprefix("./"), extension))


def test_many_tars_are_named_by_braces(tmp_path, video, opened):
    for number in range(3):
        write_tar(tmp_path / f"x-{number:02d}.tar", [(f"v{number}.mp4", video)])
    source = opened(str(tmp_path / "x-{00..02}.tar"))
    assert source.video_ids() == ["v0", "v1", "v2"]
    assert numbers(source, "v2", [2]) == [5]
    assert opened(str(tmp_path / "x-{00,02}.tar")).video_ids() == ["v0", "v2"]


UNSAFE = {
    "a parent folder": ("../abc.mp4", "absolute or leaves the tar"),
    "a parent folder inside": ("x/../../abc.mp4", "absolute or leaves the tar"),
    "an absolute name": ("/tmp/abc.mp4", "absolute or leaves the tar"),
    "a symbolic link": (special("abc.mp4", tarfile.SYMTYPE, "/etc/passwd"), "it is a link"),
    "a hard link": (special("abc.mp4", tarfile.LNKTYPE, "first.mp4"), "it is a link"),
    "a character device": (special("abc.mp4", tarfile.CHRTYPE), "a device, a pipe or a sparse file"),
    "a block device": (special("abc.mp4", tarfile.BLKTYPE), "a device, a pipe or a sparse file"),
    "a pipe": (special("abc.mp4", tarfile.FIFOTYPE), "a device, a pipe or a sparse file"),
    "a line break": ("a\nbc.mp4", "control characters"),
    "a dot in the key": ("a.bc.mp4", "reads this as 'a' with extension 'bc.mp4'"),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_an_unsafe_member_is_left_out_with_its_reason_and_the_others_are_read(what, tmp_path, video, opened, caplog):
    member, reason = UNSAFE[what]
    data = b"" if isinstance(member, tarfile.TarInfo) else video
    tar = write_tar(tmp_path / "x.tar", [("first.mp4", video), (member, data), ("last.mp4", video)])
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        source = opened(tar)
    assert source.video_ids() == ["first", "last"]
    (skipped,) = source.skipped
    assert reason in skipped.reason
    assert reason in caplog.text
    assert "\n" not in skipped.member
    assert numbers(source, "last", [2]) == [5]
    rejection = refused(source, "abc")
    assert rejection.kind == "missing_file"
    assert "1 members were left out" in rejection.reason
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


class Boom:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_pickles_are_never_loaded(tmp_path, video, opened):
    bomb = pickle.dumps(Boom(str(tmp_path / "boom")))
    tar = write_tar(tmp_path / "x.tar", [("abc.pyd", bomb), ("abc.pkl", bomb), ("abc.pth", bomb), ("abc.mp4", video)])
    source = opened(tar)
    assert source.video_ids() == ["abc"]
    assert numbers(source, "abc", [2]) == [5]
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)  # the bomb does work
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("second", ["abc.mp4", "./abc.mkv", "abc.frame000001.jpg"])
@pytest.mark.parametrize("first", ["abc.mp4", "abc.frame000001.jpg"])
def test_a_key_that_two_members_claim_is_refused_and_both_are_named(first, second, tmp_path, video, opened):
    names = (first, second)
    tar = write_tar(tmp_path / "x.tar", [(name, video if not name.endswith("jpg") else jpeg(0)) for name in names])
    rejection = refused(opened(tar), "abc")
    assert rejection.kind == "ambiguous_id"
    assert all(name in rejection.reason for name in names)


def test_an_id_without_its_folder_is_refused_where_two_keys_end_in_it(tmp_path, video, opened):
    source = opened(write_tar(tmp_path / "x.tar", [("a/abc.mp4", video), ("b/abc.mp4", video)]))
    assert refused(source, "abc").reason == "2 keys end in this id: a/abc and b/abc"
    assert numbers(source, "b/abc", [2]) == [5]
    assert source.unasked(["a/abc.mp4"]) == ["b/abc"]


def test_a_key_in_two_tars_is_refused(tmp_path, video, opened):
    for number in range(2):
        write_tar(tmp_path / f"x-{number}.tar", [("abc.mp4", video)])
    rejection = refused(opened(str(tmp_path / "x-{0,1}.tar")), "abc")
    assert rejection.reason == "two members claim this key: abc.mp4 in x-0.tar and abc.mp4 in x-1.tar"


def test_a_member_that_claims_ten_gigabytes_ends_the_tar_and_not_the_run(tmp_path, video, opened):
    member = tarfile.TarInfo("huge.mp4")
    member.size = 10 << 30
    with (tmp_path / "x.tar").open("wb") as file:
        good = tarfile.TarInfo("abc.mp4")
        good.size = len(video)
        file.write(
            good.tobuf() + video + bytes(-len(video) % 512) + member.tobuf(format=tarfile.GNU_FORMAT) + b"x" * 99
        )
    source = opened(tmp_path / "x.tar")
    assert numbers(source, "abc", [2]) == [5]
    assert not source.has("huge")
    assert "more than the tar holds" in source.skipped[0].reason


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_cut_tar_gives_what_came_before_the_cut(keep, tmp_path, video, opened):
    tar = write_tar(tmp_path / "x.tar", [("abc.mp4", video), ("second.mp4", video)])
    second = len(video) + 1024 + -len(video) % 512
    tar.write_bytes(tar.read_bytes()[: second + int(keep * len(video))])
    source = opened(tar)
    assert numbers(source, "abc", [2]) == [5]
    assert not source.has("second")
    assert source.skipped


def test_a_negative_size_does_not_loop_for_ever(tmp_path, video, opened):
    good = tarfile.TarInfo("abc.mp4")
    good.size = len(video)
    bad = bytearray(tarfile.TarInfo("bad.mp4").tobuf())
    bad[124:136] = b"\xff" * 8 + (2**32 - 512).to_bytes(4, "big")  # -512: the next header is this one
    bad[148:156] = b" " * 8
    bad[148:156] = b"%06o\0 " % sum(bad)
    (tmp_path / "x.tar").write_bytes(good.tobuf() + video + bytes(-len(video) % 512) + bytes(bad) + bytes(1024))
    source = opened(tmp_path / "x.tar")
    assert source.video_ids() == ["abc"]
    assert source.skipped


def test_what_is_no_tar_is_named_with_what_helps(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 99)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    for name in ("x.tar", "x.tar.gz"):
        with pytest.raises(ValueError, match="is not an uncompressed tar"):
            WebDatasetTars(tmp_path / name, fps=10)
    with pytest.raises(ValueError, match=r"there is no tar at .*\n.*--set data.videos=PATH"):
        WebDatasetTars(tmp_path / "nowhere.tar", fps=10)


@pytest.mark.parametrize(
    "url", ["pipe:touch {folder}/boom", "s3://bucket/x.tar", "gs://bucket/x.tar", "ftp://host/x.tar"]
)
def test_no_url_runs_a_program(url, tmp_path):
    with pytest.raises(ValueError, match="read from a path or http"):
        WebDatasetTars(url.format(folder=tmp_path), fps=10)
    assert not (tmp_path / "boom").exists()


class Served(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; every third request breaks off, and some paths answer with an error or lead elsewhere."""

    broken = 0

    def do_GET(self) -> None:
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.path.startswith("/flaky"):
            type(self).broken += 1
            data = (Path(self.directory) / "x.tar").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.broken >= 3 else data[: len(data) // 2])
        elif self.path.startswith("/always-broken"):
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(b"x" * 9)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, video: bytes) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    write_tar(tmp_path / "served" / "x.tar", [("abc.mp4", video)])
    write_tar(tmp_path / "served" / "y.tar", [(f"v.frame{k + 1:06d}.jpg", jpeg(k)) for k in range(5)])
    Served.broken = 0
    handler = partial(Served, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_tars_behind_http_are_fetched_read_and_removed(server, opened):
    source = opened(f"{server}/{{x,y}}.tar")
    spool = Path(source._spool.name)
    assert len(list(spool.iterdir())) == 2
    assert source.video_ids() == ["abc", "v"]
    assert numbers(source, "abc", [2]) == [5]
    assert numbers(source, "v", [2]) == [2]
    source.close()
    assert not spool.exists()


def test_a_download_that_breaks_off_is_tried_again_and_never_half_used(server, opened):
    assert opened(f"{server}/flaky.tar").video_ids() == ["abc"]
    assert Served.broken == 3
    with pytest.raises(OSError, match=r"bytes arrived|IncompleteRead"):
        opened(f"{server}/always-broken.tar")


@pytest.mark.parametrize("path", ["missing.tar", "away.tar"])
def test_a_failed_download_names_the_address_without_its_secrets(path, server, opened):
    address = server.replace("http://", "http://user:hunter2@")
    with pytest.raises(OSError, match="cannot be fetched") as caught:
        opened(f"{address}/{path}?X-Amz-Signature=hunter3")
    assert "hunter" not in str(caught.value)
    assert f"{server}/{path} cannot" in str(caught.value)


def test_a_file_url_is_a_path(tmp_path, video, opened):
    tar = write_tar(tmp_path / "a b.tar", [("abc.mp4", video)])
    assert opened(tar.as_uri()).video_ids() == ["abc"]


def test_the_config_opens_tars(tmp_path, video):
    tar = write_tar(tmp_path / "x.tar", [("abc.mp4", video)])
    source = open_source(DataConfig(videos=str(tar), source="webdataset", max_pixels=100))
    with pytest.raises(VideoRejected, match="96 × 48 pixels"):
        source.count_frames("abc")
    source.close()
