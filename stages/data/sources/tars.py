"""WebDataset tars as a FrameSource: videos ``<key>.mp4``, or MA-LMM's JPEGs ``<key>.frame000001.jpg``.

Local tars are indexed once and read in place: a video goes to the decoder process as (file, offset, size), so nothing
is extracted. A tar behind http(s) is first fetched whole into a temporary folder, which needs that much room under
TMPDIR and is gone after ``close``; for sets larger than the local disk, fetch the tars yourself and name their paths.

The webdataset library expands braces. Its openers are not used, because a ``pipe:`` URL there is a shell command, and
its decoders are not used, because they unpickle; both is what WDS_SECURE=1 is for.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import logging
import math
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from cache_schema.report import SourceFile
from stages.data.sources.folder_ids import key_of, refuse_bad_id
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.image_frames import FOLDER_FPS, ImageSequence, StoredFrame, image_decoder, image_rule
from stages.data.sources.picture_batches import LastRead, checked_index, in_batches
from stages.data.sources.tar_index import SkippedMember, TarVideo, add_tar
from stages.data.sources.video_files import VideoReader, file_of, video_rule
from stages.data.sources.video_process import VideoLimits, VideoPart
from stages.types import SourceFacts, VideoRejected
from stages.urls import without_credentials

log = logging.getLogger(__name__)

CONNECT_S = 60.0
ATTEMPTS = 3


class WebDatasetTars:
    """Videos in one or more WebDataset tars; an id is a key without its folder.

    Args:
        tars: a path or http(s) URL, with braces for many: ``/data/train-{000..009}.tar``.
        fps: the grid that indices count on.
        folder_fps: frames per second at which JPEG members were extracted.
        max_pixels: width × height of one frame; larger ones are refused before anything is decoded.
        max_duration_s: seconds; longer videos are refused before anything is decoded.
        timeout_s: wall clock for one video in the decoder process.
    """

    def __init__(
        self,
        tars: str | Path,
        *,
        fps: float | int,
        folder_fps: float | int = FOLDER_FPS,
        max_pixels: int = 50_000_000,
        max_duration_s: float | int = 4 * 3600.0,
        timeout_s: float | int = 600.0,
    ) -> None:
        """Fetch what is remote and index all tars. Raises ValueError for what is no tar, OSError for a failed fetch."""
        self.fps, self.folder_fps = float(fps), float(folder_fps)
        self.max_pixels, self.max_duration_s = max_pixels, float(max_duration_s)
        self._reader = VideoReader(VideoLimits(max_pixels, float(max_duration_s), float(timeout_s)), fps=self.fps)
        self._last: LastRead = self._reader.last
        self._videos: dict[str, TarVideo] = {}
        self.skipped: list[SkippedMember] = []
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        try:
            for number, name in enumerate(expand(str(tars))):
                path, shown = self._local(name, number)
                add_tar(path, shown, self._videos, self.skipped)
        except BaseException:
            self.close()
            raise
        for member in self.skipped:
            log.warning("%s: %s is left out: %s", member.tar, member.member, member.reason)

    @property
    def frame_rule(self) -> str:
        """How an index becomes a picture. The same as for video files where the tars hold only those."""
        rules = {"": video_rule(self.fps), "frames": image_rule(self.fps, self.folder_fps)}
        return "; ".join(rules[kind] for kind in self._kinds())

    @property
    def decoder(self) -> str:
        """The decoders in use, with versions."""
        versions = {"": self._reader.decoder.versions, "frames": image_decoder}
        return "; ".join(versions[kind]() for kind in self._kinds())

    def video_ids(self) -> list[str]:
        """Keys found, sorted."""
        return sorted(self._videos)

    def has(self, video_id: str) -> bool:
        """Whether a tar holds a video or frames under this key."""
        with contextlib.suppress(VideoRejected):
            refuse_bad_id(video_id)
            return key_of(video_id) in self._videos
        return False

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames by packets or by the highest frame number. Raises VideoRejected."""
        found = self._find(video_id)
        if found.video is not None:
            return self._reader.count(video_id, found.video)
        try:
            return self._sequence(found).count()
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error

    def frames(
        self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int
    ) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
        """RGB frames in the order of ``frame_index``; up to two indices past the end give the last frame.

        Raises VideoRejected; the frames already given are then void.
        """
        wanted = checked_index(frame_index)
        self._last.forget()
        found = self._find(video_id)
        if found.video is not None:
            yield from self._reader.frames(video_id, found.video, wanted, batch_size)
            return
        try:
            sequence = self._sequence(found)
            numbers, clamped = sequence.numbers(wanted)
            yield from in_batches(sequence.pictures(numbers), batch_size)
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error
        self._last.remember(video_id, sequence.facts(video_id, numbers, clamped))

    def file(self, video_id: str) -> SourceFile:
        """The tar member, or the frames, as they are now. Raises VideoRejected."""
        found = self._find(video_id)
        if found.video is not None:
            return file_of(video_id, found.video)
        try:
            return self._sequence(found).file(math.inf)  # as for frame folders
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error

    def facts(self, video_id: str) -> SourceFacts:
        """Facts of the video whose frames were read last to the end. Raises KeyError for any other."""
        return self._last[video_id]

    def close(self) -> None:
        """End the decoder processes and remove fetched tars."""
        self._reader.decoder.close()
        if self._spool is not None:
            self._spool.cleanup()
            self._spool = None

    def _kinds(self) -> list[str]:
        kinds = sorted({"" if video.video is not None else "frames" for video in self._videos.values()})
        return kinds or [""]

    def _find(self, video_id: str) -> TarVideo:
        refuse_bad_id(video_id)
        found = self._videos.get(key_of(video_id))
        if found is None:
            left = f"; {len(self.skipped)} members were left out, see the log" if self.skipped else ""
            raise VideoRejected(video_id, "missing_file", f"no tar holds a video or frames under this key{left}")
        if found.clash:
            reason = f"two members claim this key: {found.first} and {found.clash}"
            raise VideoRejected(video_id, "ambiguous_id", reason)
        return found

    def _sequence(self, found: TarVideo) -> ImageSequence:
        frames = {
            number: StoredFrame(name, place.size or 0, partial(read_part, place))
            for number, (name, place) in found.frames.items()
        }
        return ImageSequence(
            frames,
            fps=self.fps,
            folder_fps=self.folder_fps,
            max_pixels=self.max_pixels,
            max_duration_s=self.max_duration_s,
        )

    def _local(self, name: str, number: int) -> tuple[Path, str]:
        """The tar on disk, and its name for messages (a URL without user, password and query)."""
        parts = urllib.parse.urlsplit(name)
        if parts.scheme in ("http", "https"):
            if self._spool is None:
                self._spool = tempfile.TemporaryDirectory(prefix="diff-lmm-tars-")
            path = Path(self._spool.name) / f"{number:06d}.tar"
            shown = without_credentials(name)
            fetch(name, path, shown)
            return path, shown
        if parts.scheme == "file":
            name = urllib.request.url2pathname(parts.path)
        elif parts.scheme and not Path(name).exists():
            raise ValueError(
                f"tars are read from a path or http(s), not from {parts.scheme}: URLs.\n"
                "Fetch them first and name the path: --set data.videos=PATH"
            )
        if not Path(name).is_file():
            raise ValueError(f"there is no tar at {name}.\nName it with --set data.videos=PATH")
        return Path(name), Path(name).name


def expand(tars: str) -> list[str]:
    """Brace patterns as WebDataset writes them; a path that exists is taken as it is."""
    if Path(tars).exists():
        return [tars]
    from webdataset.shardlists import expand_urls  # imports torch

    names: list[str] = expand_urls(tars)
    return names


def read_part(place: VideoPart) -> bytes:
    """The bytes of a tar member."""
    with open(place.path, "rb") as tar:
        return os.pread(tar.fileno(), place.size or 0, place.offset)


def _request(url: str) -> urllib.request.Request:
    """A request without user and password in its host; they go into a header that no redirection takes along."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    if at:
        plain = urllib.parse.unquote(user).encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(plain).decode()}")
    return request


def fetch(url: str, path: Path, shown: str) -> None:
    """Copy an http(s) resource to ``path``, checking its length; three attempts. Raises OSError."""
    opener = urllib.request.OpenerDirector()  # http and https only, also after a redirect
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with opener.open(_request(url), timeout=CONNECT_S) as response, path.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
                promised = response.headers.get("Content-Length")
            if promised is None or path.stat().st_size == int(promised):
                return
            failure = f"{path.stat().st_size} of {promised} bytes arrived"
        except urllib.error.HTTPError as error:
            failure = f"the server answers {error.code}"
            if error.code < 500:
                break
        except (http.client.InvalidURL, ValueError):  # its text may hold the password
            failure = "that is not a URL; a slash in a password is written %2F, an @ is written %40"
            break
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        if attempt == ATTEMPTS:
            break
    raise OSError(f"{shown} cannot be fetched: {failure}")
