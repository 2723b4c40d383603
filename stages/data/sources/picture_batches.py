"""What the three frame sources share: checked indices, batches of one size, default limits, and whose fault it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Int, UInt8

from stages.config import DataConfig
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.limits import Limits
from stages.types import VideoRejected

MAX_BATCH_BYTES = 256 << 20  # 8K pictures come two at a time, whatever the batch size


def limits_of(cfg: DataConfig) -> Limits:
    """What one video may cost by these settings."""
    return Limits(cfg.max_pixels, cfg.max_duration_s, cfg.decode_timeout_s)


DEFAULT_LIMITS = limits_of(DataConfig())


@contextlib.contextmanager
def rejecting(video_id: str) -> Iterator[None]:
    """Names the video in a rejection that passes through: Rejected becomes VideoRejected."""
    try:
        yield
    except Rejected as error:
        raise VideoRejected(video_id, error.kind, error.reason) from error


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
