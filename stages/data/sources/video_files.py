"""A folder of video files as a FrameSource: PyAV in a process of its own, sequential, by presentation time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from cache_schema.report import SourceFile
from stages.data.sources.folder_ids import FolderIds, is_video_name, without_suffix
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.picture_batches import LastRead, checked_index, in_batches
from stages.data.sources.video_process import ReadFacts, VideoDecoder, VideoLimits, VideoPart
from stages.data.sources.video_sniff import open_window, sha256_of
from stages.types import SourceFacts, VideoRejected

log = logging.getLogger(__name__)


def video_rule(fps: float) -> str:
    """How an index becomes a picture of a video; part of the feature spec."""
    return f"{fps:g} fps grid from first pts, frame on screen, rotation applied, v1"


def file_of(video_id: str, part: VideoPart) -> SourceFile:
    """A video on disk as it is now. Its sha256 is the one that the facts hold. Raises VideoRejected."""

    def sha256() -> str:
        with open_window(part.path, part.offset, part.size) as window:
            return sha256_of(window)

    try:
        with open_window(part.path, part.offset, part.size) as window:
            return SourceFile(window.size, os.fstat(window.fd).st_mtime, sha256)
    except Rejected as error:
        raise VideoRejected(video_id, error.kind, error.reason) from error


class VideoReader:
    """Frames of videos wherever they lie on disk, as a FrameSource gives them. Used for files and for tar members."""

    def __init__(self, limits: VideoLimits, *, fps: float) -> None:
        self.decoder = VideoDecoder(limits, fps=fps)
        self.last = LastRead()

    def count(self, video_id: str, part: VideoPart) -> int:
        """Number of grid frames by the packets' times. Raises VideoRejected."""
        try:
            return self.decoder.count(part)
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error

    def frames(self, video_id: str, part: VideoPart, wanted: list[int], batch_size: int) -> Iterator[np.ndarray]:
        """Batches [b, h, w, 3]; the facts are known after the last. Raises VideoRejected."""
        self.last.forget()
        times: list[float] = []
        found: list[ReadFacts] = []

        def pictures() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
            for item in self.decoder.pictures(part, wanted):
                if isinstance(item, ReadFacts):
                    found.append(item)
                    continue
                index, pts, rgb = item
                times.extend([pts] * len(index))
                yield from [rgb] * len(index)

        try:
            yield from in_batches(pictures(), batch_size)
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error
        (facts,) = found
        if facts.clamped:
            log.warning("%s: %d frames just past its end are its last one", video_id, facts.clamped)
        self.last.remember(video_id, SourceFacts(facts.size, facts.sha256, tuple(times), facts.clamped))


class VideoFiles:
    """Video files in one folder (not its sub-folders). An id is a file's name with or without its extension.

    Index i is the picture on screen i/``fps`` seconds after the first. See frame_grid.py and video_decode.py for the
    rule, video_child.py for how a hostile file is kept away from this process.

    Args:
        root: the folder.
        fps: the grid that indices count on.
        max_pixels: width × height of one frame; larger ones are refused before anything is decoded.
        max_duration_s: seconds; longer videos are refused before anything is decoded.
        timeout_s: wall clock for one video in the decoder process.
        follow_symlinks: allow links that leave ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float | int,
        max_pixels: int = 50_000_000,
        max_duration_s: float | int = 4 * 3600.0,
        timeout_s: float | int = 600.0,
        follow_symlinks: bool = False,
    ) -> None:
        self.fps = float(fps)
        self._folder = FolderIds(root, counts=is_video_name, id_of=without_suffix, follow_symlinks=follow_symlinks)
        self._reader = VideoReader(VideoLimits(max_pixels, float(max_duration_s), float(timeout_s)), fps=self.fps)

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
        """Number of grid frames by the packets' times, without decoding. Raises VideoRejected."""
        return self._reader.count(video_id, self._part(video_id))

    def frames(
        self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int
    ) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
        """RGB frames in the order of ``frame_index``; up to two indices past the end give the last frame.

        Raises VideoRejected; the frames already given are then void.
        """
        wanted = checked_index(frame_index)
        yield from self._reader.frames(video_id, self._part(video_id), wanted, batch_size)

    def file(self, video_id: str) -> SourceFile:
        """The file as it is now, without decoding. Raises VideoRejected."""
        return file_of(video_id, self._part(video_id))

    def facts(self, video_id: str) -> SourceFacts:
        """Facts of the video whose frames were read last to the end. Raises KeyError for any other."""
        return self._reader.last[video_id]

    def close(self) -> None:
        """End the decoder processes."""
        self._reader.decoder.close()

    def _part(self, video_id: str) -> VideoPart:
        return VideoPart(str(self._folder.path(video_id)))
