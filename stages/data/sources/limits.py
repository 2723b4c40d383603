"""What one video may cost. Both sides of the decoder process import this file: standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is refused (pixels and length before anything is decoded), and when a decoder is given up."""

    max_pixels: int  # width × height of one frame
    max_duration_s: float  # seconds of video
    timeout_s: float  # wall clock for one video in the decoder process

    @property
    def allocation(self) -> int:
        """Pixels of the largest picture that libav may allocate; it pads what it decodes, so more than is allowed."""
        return 2 * self.max_pixels + 1_000_000
