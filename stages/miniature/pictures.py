"""Single pictures of many small videos, in the sizes that the frozen models see: what they are trained on.

The worlds they come from have seeds that no user's world has (``synth --seed`` counts from 0), so no frozen model has
seen a test picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize_image

from stages.miniature.videos import SIZE, VideoSpec, render, specs

FIRST_HIDDEN_SEED = 1_000_000  # worlds of the frozen models


@dataclass(frozen=True)
class Pictures:
    """``frames`` [n, 96, 96, 3]; ``specs[i]`` and ``times[i]`` say what picture i shows."""

    specs: list[VideoSpec]
    times: list[float]
    frames: UInt8[np.ndarray, "n h w 3"]

    def sized(self, size: int) -> UInt8[torch.Tensor, "n 3 size size"]:
        """The pictures as the extractors resize them (squash, bicubic, antialias, uint8)."""
        return torch.cat([_resized(self.frames[i : i + 512], size) for i in range(0, len(self.frames), 512)])


def pictures(seed: int, *, videos: int, per_video: int) -> Pictures:
    """``per_video`` random moments of each of ``videos`` videos. Deterministic."""
    found = [spec for spec in specs(videos, FIRST_HIDDEN_SEED + seed) for _ in range(per_video)]
    draw = random.Random(f"moments {seed}")
    times = [draw.uniform(0, spec.seconds - 0.25) for spec in found]
    frames = np.empty((len(found), SIZE, SIZE, 3), np.uint8)
    for first in range(0, len(found), per_video):
        frames[first : first + per_video] = render(found[first], times[first : first + per_video])
    return Pictures(found, times, frames)


def _resized(frames: UInt8[np.ndarray, "n h w 3"], size: int) -> UInt8[torch.Tensor, "n 3 size size"]:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return resize_image(images, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)  # type: ignore[no-any-return]
