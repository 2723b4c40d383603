"""Videos whose every picture carries its own number, so that a test can read which frame it was given."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stages.types import FrameSource, SourceFacts

BITS, ROWS, CELL = 12, 2, 16
WIDTH, HEIGHT = CELL * BITS // ROWS, CELL * ROWS + 16  # 96 × 48; the lower third is plain grey
MILLISECONDS, H264_CLOCK = Fraction(1, 1000), Fraction(1, 90_000)


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[h, w, 3]: the number in black and white blocks, most significant first, on grey."""
    rgb = np.full((height, width, 3), 128, dtype=np.uint8)
    for bit in range(BITS):
        row, column = divmod(bit, BITS // ROWS)
        value = 235 if number >> (BITS - 1 - bit) & 1 else 20
        rgb[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = value
    return rgb


def number_in(rgb: np.ndarray) -> int:
    """Read it back."""
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, BITS // ROWS)
        block = rgb[row * CELL + 4 : (row + 1) * CELL - 4, column * CELL + 4 : (column + 1) * CELL - 4]
        number = number << 1 | int(block.mean() > 128)
    return number


def write_video(
    path: Path,
    pts: Sequence[int],
    *,
    time_base: Fraction = H264_CLOCK,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 25,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    audio_first: bool = False,
    container_format: str | None = None,
) -> Path:
    """Write one picture per entry of ``pts`` (in ``time_base``), numbered 0, 1, 2, …"""
    with av.open(str(path), "w", options=container_options or {}, format=container_format) as container:
        sound = container.add_stream("aac", rate=16_000) if audio_first else None
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = time_base
        stream.options = options or {}
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16_000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        for number, time in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def facts_of(source: FrameSource, video_id: str, index: object) -> SourceFacts:
    """The facts that come with these frames."""
    reading = source.frames(video_id, np.asarray(index, dtype=np.int64), batch_size=8)
    for _ in reading:
        pass
    return reading.facts


def on_screen(pts: Sequence[int], time_base: Fraction, index: int, fps: float) -> int:
    """The frame rule by construction: number of the last picture due at index/fps seconds, give or take 1 ms."""
    moment = Fraction(index) / Fraction(str(fps)) + Fraction(1, 1000)
    return max(number for number, time in enumerate(pts) if (time - pts[0]) * time_base <= moment)
