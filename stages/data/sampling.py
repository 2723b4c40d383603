"""Which frames of a video a sample looks at: pure integers, no I/O, no global state.

Annotations count frames at 10 per second (MA-LMM's extraction). A *grid* index counts frames at ``DataConfig.fps``
from the start of the video; the two agree when fps is 10.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from jaxtyping import Int

ANNOTATION_FPS = 10  # MA-LMM: ffmpeg -r 10


def grid_count(num_frames: int, fps: int | float) -> int:
    """Grid frames of a video that has ``num_frames`` frames at 10 per second.

    The last 10-fps frame stands at (num_frames - 1) / 10 s; every grid point up to there is counted.
    """
    if num_frames < 1 or fps <= 0:
        raise ValueError(f"a video has at least one frame and a positive rate; got {num_frames} frames at {fps} fps")
    return math.floor((num_frames - 1) * fps / ANNOTATION_FPS + 1e-9) + 1  # 1e-9: 3 * 0.1 must not lose a frame


def window_starts(duration_s: int | float, *, history_s: int, stride_s: int) -> list[int]:
    """Start seconds of the windows of one video (MA-LMM on LVU): 0, then every stride while a full window fits."""
    return [0, *range(stride_s, math.floor(duration_s) - history_s + 1, stride_s)]


def window_frames(
    start_s: int, *, duration_s: int | float, num_frames: int, fps: int | float, history_s: int, length: int
) -> Int[np.ndarray, " T"]:
    """Grid indices of one window: ``length`` points from its start to its end, rounded half to even.

    The window ends at second ``start + history - 1``, at the annotated duration (LVU clips carry a 30 s outro after
    it), or at the last frame, whichever is first. ``num_frames`` counts on the grid. A full window at length =
    history = 100 s is exactly 1 frame per second. Sorted; repeats where the window has fewer frames than ``length``.
    """
    last = min(fps * min(start_s + history_s - 1, duration_s), num_frames - 1)
    return _rounded_linspace(min(fps * start_s, last), last, length)


def uniform_frames(num_frames: int, length: int) -> Int[np.ndarray, " T"]:
    """``length`` grid indices from the first to the last frame: MA-LMM's evaluation rule on MSVD-QA."""
    return _rounded_linspace(0, num_frames - 1, length)


def segment_draws(num_frames: int, length: int, *, draws: int, seed: int, video_id: str) -> Int[np.ndarray, "K T"]:
    """``draws`` random choices of one frame in each of ``length`` equal segments: MA-LMM's training rule on MSVD-QA.

    Every number is a hash of (seed, video, draw, segment): it depends neither on order, nor on Python's hash seed,
    nor on the NumPy version, and more draws only add rows. An empty segment (a video shorter than ``length``) gives
    the frame where it lies.
    """
    bounds = np.linspace(0, num_frames, length + 1, dtype=np.int64)
    low = np.minimum(bounds[:-1], num_frames - 1)
    width = np.maximum(bounds[1:] - bounds[:-1], 1)
    noise = np.array([_hashes(f"{seed}\0{video_id}\0{draw}", length) for draw in range(draws)], dtype=np.uint64)
    chosen: Int[np.ndarray, "K T"] = low + (noise % width.astype(np.uint64)).astype(np.int64)
    return chosen


def _rounded_linspace(first: int | float, last: int | float, length: int) -> Int[np.ndarray, " T"]:
    points: Int[np.ndarray, " T"] = np.rint(np.linspace(first, last, length)).astype(np.int64)
    return points


def _hashes(text: str, count: int) -> list[int]:
    """``count`` uniform 64-bit numbers that depend on the text only; a longer list starts with the shorter one."""
    numbers: list[int] = []
    for block in range(0, count, 4):
        digest = hashlib.sha256(f"{text}\0{block}".encode()).digest()
        numbers.extend(int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    return numbers[:count]
