"""Numbered JPEGs as a video: MA-LMM's ``frame%06d.jpg``, counted from 1, at 10 frames per second.

Index i of the grid is the JPEG on screen at i/fps seconds. JPEGs are decoded in full by Pillow: nothing but JPEG is
recognised, a damaged one is an error, no reduced-size decoding, and an EXIF orientation is ignored, as in MA-LMM.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

from cache_schema.report import SourceFile
from stages.data.sources.frame_grid import EPSILON, Rejected, as_rate, count_clamped, grid_count
from stages.types import SourceFacts

FOLDER_FPS = 10.0  # MA-LMM: ffmpeg -r 10
FRAME_NAME = re.compile(r"frame(\d{6}|[1-9]\d{6})\.jpg")
MAX_JPEG_BYTES = 256 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFrame:
    """One JPEG: its name, its size in bytes, and how to read it."""

    name: str
    size: int
    read: Callable[[], bytes]


def number_of(name: str) -> int | None:
    """The frame number in a file name, or None for other files."""
    match = FRAME_NAME.fullmatch(name)
    return int(match[1]) if match else None


def image_rule(fps: float, folder_fps: float) -> str:
    """How an index becomes a picture; part of the feature spec."""
    return f"{fps:g} fps grid on frame%06d.jpg at {folder_fps:g} fps, frame on screen, v1"


def image_decoder() -> str:
    """Pillow and its JPEG library with versions."""
    library = "libjpeg_turbo" if features.check_feature("libjpeg_turbo") else "jpg"
    return f"pillow {version('pillow')} {library} {features.version(library)}"


class ImageSequence:
    """The JPEGs of one video."""

    def __init__(
        self,
        frames: Mapping[int, StoredFrame],
        *,
        fps: float,
        folder_fps: float,
        max_pixels: int,
        max_duration_s: float,
    ) -> None:
        self.frames, self.max_pixels, self.max_duration_s = frames, max_pixels, max_duration_s
        self.rate, self.folder_rate = as_rate(fps), as_rate(folder_fps)

    def count(self) -> int:
        """Number of grid frames. Raises Rejected ``no_frames``, ``too_long``."""
        if not self.frames:
            raise Rejected("no_frames", "there is no frame000001.jpg or any other numbered frame")
        seconds = max(self.frames) / self.folder_rate
        if seconds > self.max_duration_s:
            raise Rejected(
                "too_long",
                f"its {max(self.frames)} frames last {float(seconds):.1f} s, the limit is {self.max_duration_s:g} s"
                " (data.max_duration_s)",
            )
        return grid_count(seconds, self.rate)

    def numbers(self, wanted: list[int]) -> tuple[list[int], int]:
        """The frame number that answers each index, and how many indices were clamped to the last frame.

        Raises:
            Rejected: ``past_the_end``, or ``missing_frame`` where a number inside the sequence does not exist.
        """
        clamped = count_clamped(wanted, self.count(), self.rate)
        last = max(self.frames)
        numbers = [min(last, int((Fraction(i) / self.rate + EPSILON) * self.folder_rate) + 1) for i in wanted]
        if absent := sorted(set(numbers) - set(self.frames)):
            raise Rejected("missing_frame", f"frame{absent[0]:06d}.jpg is not among the {last} frames of this video")
        return numbers, clamped

    def pictures(self, numbers: list[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """RGB of the numbered frames. Raises Rejected ``decode_error``, ``too_large``, ``unreadable``."""
        for number in numbers:
            frame = self.frames[number]
            try:
                data = frame.read()
            except OSError as error:
                raise Rejected("unreadable", f"{frame.name} cannot be read: {error.strerror}") from error
            yield rgb_of_jpeg(data, frame.name, self.max_pixels)

    def file(self, modified: float) -> SourceFile:
        """The sequence as one file: sizes together, the sha256 of the facts."""
        facts = self.facts("", [], 0)
        return SourceFile(facts.size, modified, lambda: facts.sha256)

    def facts(self, video_id: str, numbers: list[int], clamped: int) -> SourceFacts:
        """Facts of the sequence: its sha256 is of the names and sizes of all frames, in order."""
        if clamped:
            log.warning("%s: %d frames just past its end are its last one", video_id, clamped)
        ordered = [self.frames[number] for number in sorted(self.frames)]
        digest = hashlib.sha256("".join(f"{frame.name}\0{frame.size}\n" for frame in ordered).encode())
        times = tuple(round(float((number - 1) / self.folder_rate), 6) for number in numbers)
        return SourceFacts(sum(frame.size for frame in ordered), digest.hexdigest(), times, clamped)


def rgb_of_jpeg(data: bytes, name: str, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """Decode one JPEG. Its size is checked before its pixels are. Raises Rejected."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.width * image.height > max_pixels:
                raise Rejected(
                    "too_large",
                    f"{name} has {image.width} × {image.height} pixels, the limit is {max_pixels} (data.max_pixels)",
                )
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", f"{name} has more pixels than Pillow opens") from error
    except UnidentifiedImageError as error:
        raise Rejected("decode_error", f"{name} is not a JPEG") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Rejected("decode_error", f"{name} does not decode: {error}") from error
