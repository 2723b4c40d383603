"""From decoded frames to the square picture that a frozen encoder sees: one function for CLIP and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize_image

Geometry = Literal["squash", "shortest_center"]


@dataclass(frozen=True)
class Resize:
    """Antialiased uint8 resize to ``size`` × ``size`` on the CPU; ``str()`` of it is the spec field ``resize``.

    ``squash`` maps the whole frame onto the square (MA-LMM's evaluation view). ``shortest_center`` takes the largest
    centred square. It crops before it resizes, so CLIP at 224 px and the teacher at 256 px see the same picture to
    the pixel, and a very long frame costs no more than a square one.

    uint8 on a channels_last tensor is both the closest to PIL (landscape frames: over 99 % of pixels equal, the rest
    1–2 levels off) and the fastest (models.md §3). Floats, or no antialiasing, would give other features.
    """

    size: int
    geometry: Geometry = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, frames: UInt8[np.ndarray, "b h w 3"]) -> UInt8[Tensor, "b 3 size size"]:
        """RGB frames -> resized RGB, in channels_last memory. Raises ValueError for anything but uint8 RGB frames."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be uint8 [b, h, w, 3] RGB, got {frames.dtype} {list(frames.shape)}")
        if self.geometry == "shortest_center":
            height, width = frames.shape[1:3]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            frames = frames[:, top : top + side, left : left + side]
        frames = np.ascontiguousarray(frames)
        if not frames.flags.writeable:  # torch has no read-only tensors and warns about them
            frames = frames.copy()
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)  # a view: [b, 3, h, w] in channels_last strides
        mode = InterpolationMode.BICUBIC if self.interpolation == "bicubic" else InterpolationMode.BILINEAR
        resized: Tensor = resize_image(images, [self.size, self.size], interpolation=mode, antialias=True)
        return resized

    def __str__(self) -> str:
        return f"{self.geometry} {self.size} {self.interpolation} antialias uint8"
