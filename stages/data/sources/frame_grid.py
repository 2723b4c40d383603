"""The frame rule in numbers: which picture answers grid index i.

Index i on a grid of ``fps`` is the picture on screen i/fps seconds after the first one: the last picture whose
presentation time is at most i/fps + EPSILON. Pure integers and fractions; the decoder process imports this file, so
it needs nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

# Matroska counts in milliseconds, so a picture due at 0.1 s may be stamped 0.101 s after the first one.
EPSILON = Fraction(1, 1000)
# MA-LMM's frame counts differ by 1–2 between ffmpeg versions (MA-LMM#37), so up to two grid steps past the end are
# answered with the last picture and counted. Two steps, not a time: it is a miscount of grid frames, at any fps.
CLAMP_STEPS = 2
AROUND_DAMAGE = "To use the frames around it: a new --cache, with --set data.around_damage=true"


class Rejected(Exception):
    """A video that gives no trustworthy frames, before its id is known (see ``stages.types.VideoRejected``)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def as_rate(fps: float | int) -> Fraction:
    """Frames per second as the fraction that the user wrote: 29.97 is 2997/100, not a binary neighbour."""
    rate = Fraction(str(fps)).limit_denominator(1_000_000)
    if rate <= 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    return rate


def grid_count(duration: Fraction, rate: Fraction) -> int:
    """Number of grid indices inside ``duration`` seconds; a video has at least one."""
    return max(1, math.ceil((duration - EPSILON) * rate))


def ticks_at(index: int, rate: Fraction, time_base: Fraction) -> int:
    """Latest time after the first picture, in units of ``time_base``, that a picture answering ``index`` may have."""
    return math.floor((Fraction(index) / rate + EPSILON) / time_base)


def count_clamped(wanted: Sequence[int], count: int, rate: Fraction) -> int:
    """How many of the sorted indices lie just past the end and get the last picture.

    Raises:
        Rejected: ``past_the_end`` where one lies more than CLAMP_STEPS past the last grid index.
    """
    if wanted and wanted[-1] >= count + CLAMP_STEPS:
        raise Rejected(
            "past_the_end",
            f"frame {wanted[-1]} (at {float(wanted[-1] / rate):.1f} s) was asked for, "
            f"the video ends after {count} frames ({float(count / rate):.1f} s)",
        )
    return sum(1 for index in wanted if index >= count)


def runs_of(index: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """(first, last) of each run of consecutive numbers in a sorted sequence."""
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and runs[-1][1] == i - 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return tuple(runs)
