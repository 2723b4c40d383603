"""Frame folders as a FrameSource: MA-LMM's ``<root>/<video_id>/frame%06d.jpg``, or another numbering."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from cache_schema.report import SourceFile
from stages.data.sources.folder_ids import FolderIds
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.image_frames import (
    FOLDER_FPS,
    MAX_IMAGE_BYTES,
    NUMBERED,
    ImageSequence,
    StoredFrame,
    frames_of,
    image_decoder,
    image_rule,
    one_numbering,
)
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import DEFAULT_LIMITS, checked_index, rejecting
from stages.types import Extent, VideoFrames


class FrameFolders:
    """One folder of images per video, extracted at ``folder_fps``; an id is the path of its folder: ``a/b``.

    Args:
        root: the folder of those folders.
        fps: the grid that indices count on; where it is not ``folder_fps``, indices map by time.
        folder_fps: frames per second at which the images were extracted.
        limits: what one video may cost.
        around_damage: give the frames before and after a gap, instead of refusing the video (D81).
        follow_symlinks: allow links that leave ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float | int = FOLDER_FPS,
        folder_fps: float | int = FOLDER_FPS,
        limits: Limits = DEFAULT_LIMITS,
        around_damage: bool = False,
        follow_symlinks: bool = False,
    ) -> None:
        self.fps, self.folder_fps = float(fps), float(folder_fps)
        self.limits, self.around_damage = limits, around_damage
        self._folder = FolderIds(
            root,
            counts=os.DirEntry.is_dir,
            id_of=str,
            is_branch=holds_folders_only,
            follow_symlinks=follow_symlinks,
        )

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
        return self.extent(video_id).count

    def extent(self, video_id: str) -> Extent:
        """Which grid frames can be had, by the numbers of the files. Raises VideoRejected."""
        with rejecting(video_id):
            return self._sequence(video_id).extent()

    def unasked(self, video_ids: Iterable[str]) -> list[str]:
        """Ids of the folders that none of these ids means."""
        return self._folder.unasked(video_ids)

    def frames(self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int) -> VideoFrames:
        """RGB frames in the order of ``frame_index``; up to two indices past the end give the last frame.

        Raises VideoRejected, also on the way; the frames already given are then void.
        """
        wanted = checked_index(frame_index)
        with rejecting(video_id):
            return VideoFrames(frames_of(self._sequence(video_id), video_id, wanted, batch_size))

    def file(self, video_id: str) -> SourceFile:
        """Names and sizes of the frames as they are now. Raises VideoRejected."""
        with rejecting(video_id):
            # Facts are of names and sizes alone, so their hash costs nothing and needs no time to be asked for.
            return self._sequence(video_id).file(math.inf)

    def close(self) -> None:
        """Nothing is held open."""

    def _sequence(self, video_id: str) -> ImageSequence:
        folder = self._folder.path(video_id)
        sizes: dict[str, int] = {}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not NUMBERED.fullmatch(entry.name):
                        sizes[entry.name] = 0
                        continue
                    if entry.is_symlink():
                        self._folder.refuse_outside(video_id, Path(entry.path))
                    if not entry.is_file():
                        raise Rejected("not_a_file", f"{entry.name} is not a regular file")
                    sizes[entry.name] = entry.stat().st_size
        except OSError as error:
            raise Rejected("unreadable", f"the folder cannot be listed: {error.strerror}") from error
        frames: dict[int, StoredFrame] = {}
        for number, name in one_numbering(sizes).items():
            if sizes[name] > MAX_IMAGE_BYTES:
                raise Rejected("too_large", f"{name} has {sizes[name]} bytes, too many for one frame")
            frames[number] = StoredFrame(name, sizes[name], (folder / name).read_bytes)
        return ImageSequence(
            frames, fps=self.fps, folder_fps=self.folder_fps, limits=self.limits, around_damage=self.around_damage
        )


def holds_folders_only(folder: Path) -> bool:
    """Whether a folder has sub-folders and no numbered image: it is not a video itself, but may hold some."""
    sub_folders = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if NUMBERED.fullmatch(entry.name):
                return False
            sub_folders |= not entry.name.startswith(".") and entry.is_dir()
    return sub_folders
