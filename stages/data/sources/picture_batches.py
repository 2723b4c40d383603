"""What the three frame sources share: checked indices, batches of one size, and the facts of the video read last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Int, UInt8

from stages.types import SourceFacts

MAX_BATCH_BYTES = 256 << 20  # 8K pictures come two at a time, whatever the batch size


def checked_index(frame_index: Int[np.ndarray, " n"]) -> list[int]:
    """The indices as ints. Raises ValueError unless they are sorted, unique and not negative."""
    index = [int(value) for value in frame_index]
    if any(first >= second for first, second in pairwise(index)) or (index and index[0] < 0):
        raise ValueError("frame indices must be sorted, unique and not negative")
    return index


def in_batches(
    pictures: Iterable[UInt8[np.ndarray, "h w 3"]], batch_size: int
) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    """Stack pictures of one size, at most ``batch_size`` and at most MAX_BATCH_BYTES at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    held: list[UInt8[np.ndarray, "h w 3"]] = []
    for picture in pictures:
        full = len(held) == batch_size or (len(held) + 1) * picture.nbytes > MAX_BATCH_BYTES
        if held and (full or held[0].shape != picture.shape):
            yield np.stack(held)
            held = []
        held.append(picture)
    if held:
        yield np.stack(held)


class LastRead:
    """Facts of the one video whose frames were read last to the end."""

    def __init__(self) -> None:
        self._known: dict[str, SourceFacts] = {}

    def forget(self) -> None:
        """A new video is being read."""
        self._known = {}

    def remember(self, video_id: str, facts: SourceFacts) -> None:
        """Its last frame was given."""
        self._known = {video_id: facts}

    def __getitem__(self, video_id: str) -> SourceFacts:
        """Raises KeyError for any other video."""
        if video_id not in self._known:
            raise KeyError(f"{video_id}: its frames were not the last ones read to the end")
        return self._known[video_id]
