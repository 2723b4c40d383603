"""int8 with two-level scales: half the bytes of float16, about 1 % error.

A frame [*tokens, C] is stored as one float16 scale a token, then one int8 a number:

    x[token, c]  ≈  q[token, c] · token_scale[token] · channel_scale[c]

``channel_scale`` is the standard deviation of every channel over a few hundred frames, fixed for the whole array; the
scale of a token is the largest of its numbers, so divided, over 127. One scale a token alone is unsafe: a ViT has
channels 20 times as large as the others, and they take the resolution from all of them (14 % error instead of 1 %).
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CODEC_NAME = "diff_lmm.int8"
LIMIT = 0.015  # error on frames that the calibration did not see, above which int8 is refused
MIN_FRAMES = 16  # of a calibration: half of them are held out when there are few
HELD_OUT = 5  # every fifth frame is held out

Array = npt.NDArray[Any]


class TooInexact(ValueError):
    """The features lose more than ``LIMIT`` as int8; store float16."""


@dataclass(frozen=True, eq=False)
class ChannelScale:
    """The scales that all frames of an array share, and what they cost on held-out frames.

    ``error`` is the relative L2 error after every channel was divided by its scale, so that large channels do not hide
    what is lost in small ones; ``min_cosine`` the smallest cosine of a token with its stored form.
    """

    values: npt.NDArray[np.float32]  # [C], positive
    frames: int = 0  # that they were taken from
    error: float = 0.0
    min_cosine: float = 1.0

    def __post_init__(self) -> None:
        good = self.values.ndim == 1 and self.values.dtype == np.float32 and len(self.values)
        if not good or not (np.isfinite(self.values) & (self.values > 0)).all():
            raise ValueError("channel scales must be one list of positive float32 numbers")

    @property
    def digest(self) -> str:
        """sha256 of the scales: a shard names those it was made with."""
        return hashlib.sha256(self.values.astype("<f4").tobytes()).hexdigest()

    def to_json(self) -> str:
        """Base64 of little-endian float32."""
        return base64.b64encode(self.values.astype("<f4").tobytes()).decode("ascii")

    @classmethod
    def from_json(cls, text: object, channels: int, **measured: Any) -> ChannelScale:
        """Inverse of ``to_json``. Raises ValueError."""
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        if len(raw) != 4 * channels:
            raise ValueError(f"channel_scale must hold {channels} float32 numbers")
        return cls(np.frombuffer(raw, "<f4").astype(np.float32), **measured)

    def quantize(self, features: Array) -> npt.NDArray[np.uint8]:
        """Stored rows [n, frame_bytes] of finite features [n, *frame_shape]."""
        count, tokens = len(features), math.prod(features.shape[1:-1])
        scaled = features.reshape(count, tokens, -1).astype(np.float32) / self.values  # [n, P, C]
        token_scale = (np.abs(scaled).max(axis=2) / np.float32(127)).astype("<f2")  # [n, P]
        if not np.isfinite(token_scale).all():
            raise TooInexact("a channel is more than 8 million of its standard deviations away from zero")
        divisor = np.where(token_scale > 0, token_scale, 1).astype(np.float32)[..., None]
        q = np.clip(np.rint(scaled / divisor), -127, 127).astype(np.int8)
        parts = (token_scale.view(np.uint8).reshape(count, -1), q.view(np.uint8).reshape(count, -1))
        return np.concatenate(parts, axis=1)

    def dequantize(self, rows: npt.NDArray[np.uint8], out: Array) -> None:
        """Features float16 [n, *frame_shape] from stored rows. In float32, token scale first: every reader does so."""
        token_scale, q = split(rows, out.shape[1:])
        for at in range(len(rows)):  # one frame at a time stays in the processor's cache
            frame = q[at].astype(np.float32) * token_scale[at].astype(np.float32)[..., None]
            frame *= self.values
            out[at] = frame


def row_bytes(frame_shape: Sequence[int]) -> int:
    """Bytes of one stored frame: two a token, one a number."""
    return 2 * math.prod(frame_shape[:-1]) + math.prod(frame_shape)


def split(rows: npt.NDArray[np.uint8], frame_shape: Sequence[int]) -> tuple[Array, Array]:
    """Views of stored rows: token scales float16 [n, *tokens] and int8 [n, *frame_shape]."""
    scale_bytes = 2 * math.prod(frame_shape[:-1])
    token_scale = rows[:, :scale_bytes].view("<f2").reshape(len(rows), *frame_shape[:-1])
    return token_scale, rows[:, scale_bytes:].view(np.int8).reshape(len(rows), *frame_shape)


def calibrate(frames: Array) -> ChannelScale:
    """Channel scales from features [n, *tokens, C], measured on every fifth frame, which they are not taken from.

    Raises:
        TooInexact: the held-out error is above 1.5 %.
        ValueError: fewer than 16 frames, or a number that is not finite.
    """
    if len(frames) < MIN_FRAMES or not np.isfinite(frames).all():
        raise ValueError(
            f"a calibration of int8 needs {MIN_FRAMES} or more frames of finite features, not {len(frames)}.\n"
            "Store float16:  --set clip.dtype=float16"
        )
    held_out = np.arange(len(frames)) % HELD_OUT == HELD_OUT - 1
    seen = frames[~held_out].reshape(-1, frames.shape[-1])
    std = np.array([seen[:, channel].std(dtype=np.float64) for channel in range(seen.shape[1])])
    floor = max(float(std.max()) * 1e-6, 1e-12)  # a channel that never moved must not divide by zero
    scale = ChannelScale(np.maximum(std, floor).astype(np.float32))
    error, cosine = measure(scale, frames[held_out])
    found = ChannelScale(scale.values, int((~held_out).sum()), error, cosine)
    if error > LIMIT:
        raise TooInexact(
            f"int8 would change the features by {100 * error:.2f} % (limit {100 * LIMIT:.1f} %), measured on "
            f"{int(held_out.sum())} frames that the scales were not taken from (smallest cosine {cosine:.5f}).\n"
            "Store float16:  --set clip.dtype=float16"
        )
    return found


def measure(scale: ChannelScale, frames: Array) -> tuple[float, float]:
    """(normalised relative error, smallest cosine of a token) of these frames as int8."""
    stored = np.empty(frames.shape, np.float16)
    scale.dequantize(scale.quantize(frames), stored)
    wanted = frames.reshape(-1, frames.shape[-1]).astype(np.float64)
    got = stored.reshape(-1, frames.shape[-1]).astype(np.float64)
    lost, all_of_it = (float(np.linalg.norm(x / scale.values)) for x in (got - wanted, wanted))
    length = np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1)
    cosine = (wanted * got).sum(1)[length > 0] / length[length > 0]
    return lost / max(all_of_it, 1e-300), float(cosine.min(initial=1.0))
