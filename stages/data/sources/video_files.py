"""A folder of video files as a FrameSource: PyAV in a process of its own, sequential, by presentation time."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from cache_schema.report import SourceFile
from stages.data.sources.folder_ids import FolderIds, is_video_name, without_suffix
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import DEFAULT_LIMITS, checked_index, in_batches, rejecting
from stages.data.sources.video_process import ReadFacts, VideoDecoder, VideoPart
from stages.data.sources.video_sniff import open_window, sha256_of
from stages.types import Extent, SourceFacts, VideoFrames

log = logging.getLogger(__name__)


def video_rule(fps: float) -> str:
    """How an index becomes a picture of a video; part of the feature spec."""
    return f"{fps:g} fps grid from first pts, frame on screen, rotation applied, v2"


def file_of(video_id: str, part: VideoPart) -> SourceFile:
    """A video on disk as it is now. Its sha256 is the one that the facts hold. Raises VideoRejected."""

    def sha256() -> str:
        with open_window(part.path, part.offset, part.size) as window:
            return sha256_of(window)

    with rejecting(video_id), open_window(part.path, part.offset, part.size) as window:
        return SourceFile(window.size, os.fstat(window.fd).st_mtime, sha256)


class VideoReader:
    """Frames of videos wherever they lie on disk, as a FrameSource gives them. Used for files and for tar members."""

    def __init__(self, limits: Limits, *, fps: float, around_damage: bool) -> None:
        self.decoder = VideoDecoder(limits, fps=fps, around_damage=around_damage)

    def extent(self, video_id: str, part: VideoPart) -> Extent:
        """Which grid frames can be had. Raises VideoRejected."""
        with rejecting(video_id):
            return self.decoder.extent(part)

    def frames(
        self, video_id: str, part: VideoPart, wanted: list[int], batch_size: int
    ) -> Generator[UInt8[np.ndarray, "b h w 3"], None, SourceFacts]:
        """Batches, then the facts. Raises VideoRejected."""
        times: list[float] = []
        ends: list[ReadFacts] = []

        def pictures() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
            for item in self.decoder.pictures(part, wanted):
                if isinstance(item, ReadFacts):
                    ends.append(item)
                    continue
                index, pts, rgb = item
                times.extend([pts] * len(index))
                yield from [rgb] * len(index)

        with rejecting(video_id):
            yield from in_batches(pictures(), batch_size)
        (end,) = ends
        if end.clamped:
            log.warning("%s: %d frames just past its end are its last one", video_id, end.clamped)
        if end.hdr:
            log.warning("%s: its %s colours are read as ordinary ones (D82)", video_id, end.hdr)
        return SourceFacts(end.size, end.sha256, tuple(times), end.clamped, end.count, end.damaged, end.hdr)


class VideoFiles:
    """Video files below a folder. An id is a file's path from there, with or without its extension: ``a/b/1``.

    Index i is the picture on screen i/``fps`` seconds after the first. See frame_grid.py and video_decode.py for the
    rule, video_child.py for how a hostile file is kept away from this process.

    Args:
        root: the folder.
        fps: the grid that indices count on.
        limits: what one video may cost.
        around_damage: give the frames before and after a damaged spot, instead of refusing the video (D81).
        follow_symlinks: allow links that leave ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float | int,
        limits: Limits = DEFAULT_LIMITS,
        around_damage: bool = False,
        follow_symlinks: bool = False,
    ) -> None:
        self.fps = float(fps)
        self._folder = FolderIds(
            root,
            counts=is_video_name,
            id_of=without_suffix,
            is_branch=lambda _: True,
            follow_symlinks=follow_symlinks,
        )
        self._reader = VideoReader(limits, fps=self.fps, around_damage=around_damage)

    @property
    def frame_rule(self) -> str:
        """How an index becomes a picture; part of the feature spec."""
        return video_rule(self.fps)

    @property
    def decoder(self) -> str:
        """PyAV and its libraries with versions, as the decoder process reports them."""
        return self._reader.decoder.versions()

    def video_ids(self) -> list[str]:
        """Ids found in the folder, sorted: names without extensions."""
        return list(self._folder.ids)

    def has(self, video_id: str) -> bool:
        """Whether a file answers to this id (not whether it decodes)."""
        return video_id in self._folder

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames. Raises VideoRejected."""
        return self.extent(video_id).count

    def extent(self, video_id: str) -> Extent:
        """Which grid frames can be had: by packets, or ``around_damage`` by decoding. Raises VideoRejected."""
        return self._reader.extent(video_id, self._part(video_id))

    def unasked(self, video_ids: Iterable[str]) -> list[str]:
        """Ids of the files that none of these ids means."""
        return self._folder.unasked(video_ids)

    def frames(self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int) -> VideoFrames:
        """RGB frames in the order of ``frame_index``; up to two indices past the end give the last frame.

        Raises VideoRejected, also on the way; the frames already given are then void.
        """
        wanted = checked_index(frame_index)
        return VideoFrames(self._reader.frames(video_id, self._part(video_id), wanted, batch_size))

    def file(self, video_id: str) -> SourceFile:
        """The file as it is now, without decoding. Raises VideoRejected."""
        return file_of(video_id, self._part(video_id))

    def close(self) -> None:
        """End the decoder processes."""
        self._reader.decoder.close()

    def _part(self, video_id: str) -> VideoPart:
        return VideoPart(str(self._folder.path(video_id)))
