"""WebDataset tars as a FrameSource: videos ``<key>.mp4``, or MA-LMM's JPEGs ``<key>.frame000001.jpg``.

Local tars are indexed once and read in place: a video goes to the decoder process as (file, offset, size), so nothing
is extracted. A tar behind http(s) is first fetched whole into a temporary folder, which needs that much room under
TMPDIR and is gone after ``close``; for sets larger than the local disk, fetch the tars yourself and name their paths.

The webdataset library expands braces. Its openers are not used, because a ``pipe:`` URL there is a shell command, and
its decoders are not used, because they unpickle; both is what WDS_SECURE=1 is for.
"""

from __future__ import annotations

import base64
import http.client
import logging
import math
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from cache_schema.report import SourceFile
from stages.data.ids import unsafe_reason
from stages.data.sources.folder_ids import key_of, near_misses, refuse_bad_id
from stages.data.sources.image_frames import (
    FOLDER_FPS,
    ImageSequence,
    StoredFrame,
    frames_of,
    image_decoder,
    image_rule,
)
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import DEFAULT_LIMITS, checked_index, rejecting
from stages.data.sources.tar_index import SkippedMember, TarVideo, add_tar
from stages.data.sources.video_files import VideoReader, file_of, video_rule
from stages.data.sources.video_process import VideoPart
from stages.types import Extent, VideoFrames, VideoRejected
from stages.urls import without_credentials

log = logging.getLogger(__name__)

CONNECT_S = 60.0
ATTEMPTS = 3


class WebDatasetTars:
    """Videos in one or more WebDataset tars; an id is a key, with or without a video's extension: ``folder/abc``.

    Where one key only ends in it, the name without its folder is an id too: ``abc``.

    Args:
        tars: a path or http(s) URL, with braces for many: ``/data/train-{000..009}.tar``.
        fps: the grid that indices count on.
        folder_fps: frames per second at which JPEG members were extracted.
        limits: what one video may cost.
        around_damage: give the frames before and after a damaged spot, instead of refusing the video (D81).
    """

    def __init__(
        self,
        tars: str | Path,
        *,
        fps: float | int,
        folder_fps: float | int = FOLDER_FPS,
        limits: Limits = DEFAULT_LIMITS,
        around_damage: bool = False,
    ) -> None:
        """Fetch what is remote and index all tars. Raises ValueError for what is no tar, OSError for a failed fetch."""
        self.fps, self.folder_fps = float(fps), float(folder_fps)
        self.limits, self.around_damage = limits, around_damage
        self._reader = VideoReader(limits, fps=self.fps, around_damage=around_damage)
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
        self._keys: dict[str, list[str]] = {}  # what an id may be -> keys
        for key, video in self._videos.items():
            names = {key, key.rpartition("/")[2]}
            if video.video is not None:
                names |= {f"{name}.{video.suffix}" for name in names}
            for name in names:
                self._keys.setdefault(name, []).append(key)
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
        return not unsafe_reason(video_id) and key_of(video_id) in self._keys

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames. Raises VideoRejected."""
        return self.extent(video_id).count

    def extent(self, video_id: str) -> Extent:
        """Which grid frames can be had: by packets, by frame numbers, or ``around_damage`` by decoding.

        Raises VideoRejected.
        """
        member = self._find(video_id)
        if member.video is not None:
            return self._reader.extent(video_id, member.video)
        with rejecting(video_id):
            return self._sequence(member).extent()

    def unasked(self, video_ids: Iterable[str]) -> list[str]:
        """Keys that none of these ids means."""
        asked = {key for video_id in video_ids for key in self._keys.get(key_of(video_id), ())}
        return [key for key in self.video_ids() if key not in asked]

    def frames(self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int) -> VideoFrames:
        """RGB frames in the order of ``frame_index``; up to two indices past the end give the last frame.

        Raises VideoRejected, also on the way; the frames already given are then void.
        """
        wanted = checked_index(frame_index)
        member = self._find(video_id)
        if member.video is not None:
            return VideoFrames(self._reader.frames(video_id, member.video, wanted, batch_size))
        with rejecting(video_id):
            return VideoFrames(frames_of(self._sequence(member), video_id, wanted, batch_size))

    def file(self, video_id: str) -> SourceFile:
        """The tar member, or the frames, as they are now. Raises VideoRejected."""
        member = self._find(video_id)
        if member.video is not None:
            return file_of(video_id, member.video)
        with rejecting(video_id):
            return self._sequence(member).file(math.inf)  # as for frame folders

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
        keys = self._keys.get(key_of(video_id), [])
        if key_of(video_id) in self._videos:
            keys = [key_of(video_id)]  # a whole key goes before the end of a longer one
        if not keys:
            near = near_misses(video_id, self.video_ids())
            left = f"; {len(self.skipped)} members were left out, see the log" if self.skipped else ""
            raise VideoRejected(video_id, "missing_file", f"no tar holds a video or frames under this key{near}{left}")
        if len(keys) > 1:
            raise VideoRejected(video_id, "ambiguous_id", f"{len(keys)} keys end in this id: {' and '.join(keys[:3])}")
        member = self._videos[keys[0]]
        if member.clash:
            reason = f"two members claim this key: {member.first} and {member.clash}"
            raise VideoRejected(video_id, "ambiguous_id", reason)
        return member

    def _sequence(self, member: TarVideo) -> ImageSequence:
        frames = {
            number: StoredFrame(name, place.size or 0, partial(read_part, place))
            for number, (name, place) in member.frames.items()
        }
        return ImageSequence(
            frames,
            fps=self.fps,
            folder_fps=self.folder_fps,
            limits=self.limits,
            around_damage=self.around_damage,
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
