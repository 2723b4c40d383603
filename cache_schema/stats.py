"""Mean and variance of small features, kept in shard footers and combined over shards."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class FeatureStats:
    """Of every element of a frame, over all committed frames. ``variance`` is the population variance."""

    count: int
    mean: npt.NDArray[np.float64]  # [*frame_shape]
    variance: npt.NDArray[np.float64]  # [*frame_shape]


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of every element, in float64 (Welford; Chan et al. to combine)."""

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> Moments:
        """Of no frames."""
        return cls(0, np.zeros(shape), np.zeros(shape))

    def plus_frame(self, frame: npt.NDArray[Any]) -> Moments:
        """With one frame more. Frame by frame, so that the result does not depend on the batch size."""
        x = frame.astype(np.float64)
        count = self.count + 1
        delta = x - self.mean
        mean = self.mean + delta / count
        return Moments(count, mean, self.m2 + delta * (x - mean))

    def plus(self, other: Moments) -> Moments:
        """Of both sets of frames together."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))

    def to_json(self) -> dict[str, object]:
        """Arrays as base64 of little-endian float64."""
        encoded = {name: base64.b64encode(getattr(self, name).astype("<f8").tobytes()) for name in ("mean", "m2")}
        return {"count": self.count, **{name: text.decode("ascii") for name, text in encoded.items()}}

    @classmethod
    def from_json(cls, entry: object, shape: tuple[int, ...]) -> Moments:
        """Inverse of ``to_json``. Raises ValueError."""
        if not isinstance(entry, dict) or type(entry.get("count")) is not int or entry["count"] < 0:
            raise ValueError("stats.count is not a count")
        arrays = []
        for name in ("mean", "m2"):
            text = entry.get(name)
            raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
            if len(raw) != 8 * int(np.prod(shape)):
                raise ValueError(f"stats.{name} does not have the shape of a frame")
            arrays.append(np.frombuffer(raw, "<f8").reshape(shape).astype(np.float64))
        return cls(entry["count"], *arrays)
