"""Numbered images as a video: MA-LMM's ``frame%06d.jpg``, counted from 1, at 10 frames per second.

In a folder any one numbering will do: a prefix, digits, and ``.jpg``, ``.jpeg`` or ``.png``, ordered by number and
counted from 1, or from 0 where there is a 0. Beside ``frame%06d.jpg`` other numbered files do not count (thumbnails,
masks); without it, two numberings are refused. In tars only ``frame%06d.jpg`` counts.

Index i of the grid is the image on screen at i/fps seconds. Images are decoded in full by Pillow: nothing but what the
name says is recognised, a damaged one is an error, no reduced-size decoding, and an EXIF orientation is ignored, as in
MA-LMM.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

from cache_schema.report import SourceFile
from stages.data.sources.frame_grid import (
    AROUND_DAMAGE,
    EPSILON,
    Rejected,
    as_rate,
    count_clamped,
    grid_count,
    runs_of,
)
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import in_batches, rejecting
from stages.types import Extent, Runs, SourceFacts

FOLDER_FPS = 10.0  # MA-LMM: ffmpeg -r 10
FRAME_NAME = re.compile(r"frame(\d{6}|[1-9]\d{6})\.jpg")
NUMBERED = re.compile(r"(.*?)(\d{1,12})(\.(?:jpg|jpeg|png))", re.DOTALL | re.IGNORECASE | re.ASCII)
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
WANTED = "frame000001.jpg, frame000002.jpg, … (or any prefix, digits, and .jpg, .jpeg or .png)"
MAX_IMAGE_BYTES = 256 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFrame:
    """One image: its name, its size in bytes, and how to read it."""

    name: str
    size: int
    read: Callable[[], bytes]


def number_of(name: str) -> int | None:
    """The frame number in a file name, or None for other files."""
    match = FRAME_NAME.fullmatch(name)
    return int(match[1]) if match else None


def one_numbering(names: Iterable[str]) -> dict[int, str]:
    """Number -> name of the images of one folder. Raises Rejected ``no_frames``, ``unclear_frames``."""
    numberings: dict[tuple[str, str], dict[int, list[str]]] = {}
    others: list[str] = []
    for name in sorted(names):
        if number_of(name) is not None:
            prefix, digits, suffix = "frame%06d", name[5:-4], ".jpg"  # no name of a file has this prefix by chance
        elif match := NUMBERED.fullmatch(name):
            prefix, digits, suffix = match.groups()
        else:
            others.append(name)
            continue
        numberings.setdefault((prefix, suffix), {}).setdefault(int(digits), []).append(name)
    frames = numberings.get(("frame%06d", ".jpg"))
    if frames is None and len(numberings) > 1:
        shown = " and ".join(repr(next(iter(part.values()))[0]) for part in list(numberings.values())[:2])
        raise Rejected("unclear_frames", f"its images are numbered in {len(numberings)} ways, such as {shown}")
    if frames is None and not numberings:
        found = f"it holds {len(others)} other files, such as {printable(others[0])!r}" if others else "it is empty"
        raise Rejected("no_frames", f"there are no numbered images in this folder: {found}. Wanted: {WANTED}")
    frames = frames or next(iter(numberings.values()))
    for number, claims in frames.items():
        if len(claims) > 1:
            raise Rejected("unclear_frames", f"{claims[0]!r} and {claims[1]!r} are both number {number}")
    return {number: claims[0] for number, claims in frames.items()}


def printable(name: str) -> str:
    """A file's name for a message."""
    text = os.fsencode(name).decode("utf-8", "replace")[:200]
    return "".join(char if char.isprintable() else "�" for char in text)


def image_rule(fps: float, folder_fps: float) -> str:
    """How an index becomes a picture; part of the feature spec."""
    return f"{fps:g} fps grid on frame%06d.jpg at {folder_fps:g} fps, frame on screen, v1"


def image_decoder() -> str:
    """Pillow and its JPEG library with versions."""
    library = "libjpeg_turbo" if features.check_feature("libjpeg_turbo") else "jpg"
    return f"pillow {version('pillow')} {library} {features.version(library)}"


class ImageSequence:
    """The images of one video."""

    def __init__(
        self,
        frames: Mapping[int, StoredFrame],
        *,
        fps: float,
        folder_fps: float,
        limits: Limits,
        around_damage: bool = False,
    ) -> None:
        """Raises Rejected ``no_frames``, ``too_long``."""
        if not frames:
            raise Rejected("no_frames", f"there are no numbered images. Wanted: {WANTED}")
        self.frames, self.limits, self.around_damage = frames, limits, around_damage
        self.rate, self.folder_rate = as_rate(fps), as_rate(folder_fps)
        self.first = 0 if 0 in frames else 1  # the number of the picture at 0 s
        self.last = max(frames)
        seconds = (self.last - self.first + 1) / self.folder_rate
        if seconds > limits.max_duration_s:
            raise Rejected(
                "too_long",
                f"frames numbered up to {self.last} last {float(seconds):.1f} s, the limit is "
                f"{limits.max_duration_s:g} s (data.max_duration_s)",
            )
        self.count = grid_count(seconds, self.rate)

    def extent(self) -> Extent:
        """All grid frames; ``around_damage`` without those whose number does not exist."""
        return Extent(self.count, self._damaged(self.count))

    def _damaged(self, count: int) -> Runs:
        if not self.around_damage or len(self.frames) == self.last - self.first + 1:
            return ()
        return runs_of(i for i in range(count) if self._number(i) not in self.frames)

    def _number(self, index: int) -> int:
        return min(self.last, int((Fraction(index) / self.rate + EPSILON) * self.folder_rate) + self.first)

    def numbers(self, wanted: list[int]) -> tuple[list[int], int]:
        """The frame number that answers each index, and how many indices were clamped to the last frame.

        Raises:
            Rejected: ``past_the_end``, or ``missing_frame`` where a number inside the sequence does not exist.
        """
        clamped = count_clamped(wanted, self.count, self.rate)
        numbers = [self._number(index) for index in wanted]
        if absent := sorted(set(numbers) - set(self.frames)):
            raise Rejected(
                "missing_frame",
                f"number {absent[0]} is missing: there are {len(self.frames)} frames, numbered up to {self.last}. "
                f"{AROUND_DAMAGE}",
            )
        return numbers, clamped

    def pictures(self, numbers: list[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """RGB of the numbered frames. Raises Rejected ``decode_error``, ``too_large``, ``unreadable``."""
        for number in numbers:
            frame = self.frames[number]
            try:
                data = frame.read()
            except OSError as error:
                raise Rejected("unreadable", f"{frame.name} cannot be read: {error.strerror}") from error
            yield rgb_of_image(data, frame.name, self.limits)

    def file(self, modified: float) -> SourceFile:
        """The sequence as one file: sizes together, the sha256 of the facts."""
        facts = self.facts("", [], [], 0)
        return SourceFile(facts.size, modified, lambda: facts.sha256)

    def facts(self, video_id: str, wanted: list[int], numbers: list[int], clamped: int) -> SourceFacts:
        """Facts of the sequence: its sha256 is of the names and sizes of all frames, in order."""
        if clamped:
            log.warning("%s: %d frames just past its end are its last one", video_id, clamped)
        ordered = [self.frames[number] for number in sorted(self.frames)]
        digest = hashlib.sha256("".join(f"{frame.name}\0{frame.size}\n" for frame in ordered).encode())
        times = tuple(round(float((number - self.first) / self.folder_rate), 6) for number in numbers)
        damaged = self._damaged(min(self.count, wanted[-1] + 1)) if wanted else ()
        return SourceFacts(
            sum(frame.size for frame in ordered), digest.hexdigest(), times, clamped, self.count, damaged
        )


def frames_of(
    sequence: ImageSequence, video_id: str, wanted: list[int], batch_size: int
) -> Generator[UInt8[np.ndarray, "b h w 3"], None, SourceFacts]:
    """Batches, then the facts. Raises VideoRejected."""
    with rejecting(video_id):
        numbers, clamped = sequence.numbers(wanted)
        yield from in_batches(sequence.pictures(numbers), batch_size)
    return sequence.facts(video_id, wanted, numbers, clamped)


def rgb_of_image(data: bytes, name: str, limits: Limits) -> UInt8[np.ndarray, "h w 3"]:
    """Decode one JPEG or PNG, as its name says. Its size is checked before its pixels are. Raises Rejected."""
    kind = FORMATS[os.path.splitext(name)[1].lower()]
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            if image.width * image.height > limits.max_pixels:
                raise Rejected(
                    "too_large",
                    f"{name} has {image.width} × {image.height} pixels, the limit is {limits.max_pixels} "
                    "(data.max_pixels)",
                )
            if image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
                raise Rejected("decode_error", f"{name} has more than 8 bits per colour")
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", f"{name} has more pixels than Pillow opens") from error
    except UnidentifiedImageError as error:
        raise Rejected("decode_error", f"{name} is not a {kind}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Rejected("decode_error", f"{name} does not decode: {error}") from error
