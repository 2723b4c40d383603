"""MA-LMM's frame folders as a FrameSource: ``<root>/<video_id>/frame%06d.jpg``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from cache_schema.report import SourceFile
from stages.data.sources.folder_ids import FolderIds
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.image_frames import (
    FOLDER_FPS,
    MAX_JPEG_BYTES,
    ImageSequence,
    StoredFrame,
    image_decoder,
    image_rule,
    number_of,
)
from stages.data.sources.picture_batches import LastRead, checked_index, in_batches
from stages.types import SourceFacts, VideoRejected


class FrameFolders:
    """One folder of JPEGs per video, extracted at ``folder_fps``; an id is the name of its folder.

    Args:
        root: the folder of those folders.
        fps: the grid that indices count on; where it is not ``folder_fps``, indices map by time.
        folder_fps: frames per second at which the JPEGs were extracted.
        max_pixels: width × height of one JPEG; larger ones are refused before they are decoded.
        max_duration_s: seconds; longer sequences are refused.
        follow_symlinks: allow links that leave ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float | int = FOLDER_FPS,
        folder_fps: float | int = FOLDER_FPS,
        max_pixels: int = 50_000_000,
        max_duration_s: float | int = 4 * 3600.0,
        follow_symlinks: bool = False,
    ) -> None:
        self.fps, self.folder_fps = float(fps), float(folder_fps)
        self.max_pixels, self.max_duration_s = max_pixels, float(max_duration_s)
        self._folder = FolderIds(root, counts=os.DirEntry.is_dir, id_of=str, follow_symlinks=follow_symlinks)
        self._last = LastRead()

    @property
    def frame_rule(self) -> str:
        """How an index becomes a picture; part of the feature spec."""
        return image_rule(self.fps, self.folder_fps)

    @property
    def decoder(self) -> str:
        """Pillow and its JPEG library with versions."""
        return image_decoder()

    def video_ids(self) -> list[str]:
        """Ids found, sorted."""
        return list(self._folder.ids)

    def has(self, video_id: str) -> bool:
        """Whether a folder answers to this id."""
        return video_id in self._folder

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames by the highest frame number. Raises VideoRejected."""
        try:
            return self._sequence(video_id).count()
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
        try:
            sequence = self._sequence(video_id)
            numbers, clamped = sequence.numbers(wanted)
            yield from in_batches(sequence.pictures(numbers), batch_size)
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error
        self._last.remember(video_id, sequence.facts(video_id, numbers, clamped))

    def file(self, video_id: str) -> SourceFile:
        """Names and sizes of the frames as they are now. Raises VideoRejected."""
        try:
            # Facts are of names and sizes alone, so their hash costs nothing and needs no time to be asked for.
            return self._sequence(video_id).file(math.inf)
        except Rejected as error:
            raise VideoRejected(video_id, error.kind, error.reason) from error

    def facts(self, video_id: str) -> SourceFacts:
        """Facts of the video whose frames were read last to the end. Raises KeyError for any other."""
        return self._last[video_id]

    def close(self) -> None:
        """Nothing is held open."""

    def _sequence(self, video_id: str) -> ImageSequence:
        folder = self._folder.path(video_id)
        frames: dict[int, StoredFrame] = {}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    number = number_of(entry.name)
                    if number is None:
                        continue
                    if entry.is_symlink():
                        self._folder.refuse_outside(video_id, Path(entry.path))
                    if not entry.is_file():
                        raise Rejected("not_a_file", f"{entry.name} is not a regular file")
                    size = entry.stat().st_size
                    if size > MAX_JPEG_BYTES:
                        raise Rejected("too_large", f"{entry.name} has {size} bytes, too many for one frame")
                    frames[number] = StoredFrame(entry.name, size, partial(Path(entry.path).read_bytes))
        except OSError as error:
            raise Rejected("unreadable", f"the folder cannot be listed: {error.strerror}") from error
        return ImageSequence(
            frames,
            fps=self.fps,
            folder_fps=self.folder_fps,
            max_pixels=self.max_pixels,
            max_duration_s=self.max_duration_s,
        )
