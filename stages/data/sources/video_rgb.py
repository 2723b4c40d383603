"""What a decoded picture looks like, as an array. Runs in the decoder process.

The decoder's cropped frame, turned and mirrored as the display matrix says (to the nearest quarter turn), converted by
swscale to 8-bit RGB with the colour matrix and range that the stream names (unnamed: BT.601, limited range). Sample
aspect ratio is ignored: pixels are as stored. Alpha is dropped, interlaced frames stay woven, HDR is not tone-mapped.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import cast

import av
import numpy as np
from av.buffer import Buffer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from stages.data.sources.frame_grid import Rejected

Rgb = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # display matrices, counterclockwise


class ToRgb:
    """Turns the frames of one video into RGB as a viewer shows them."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._seen: tuple[int, int, int] | None = None
        self._matrix = QUARTER_TURNS[0]

    def __call__(self, frame: VideoFrame) -> Rgb:
        """[h, w, 3], contiguous. Raises Rejected ``decode_error``, MemoryError."""
        try:
            rgb = cast("Rgb", self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        except (av.error.FFmpegError, ValueError) as error:
            if isinstance(error, av.error.FFmpegError) and error.errno == errno.ENOMEM:
                raise MemoryError from error
            reason = f"its pixel format ({frame.format.name}) cannot be turned into RGB"
            raise Rejected("decode_error", reason) from error
        # PyAV's side data and frame refer to each other, so a frame asked for it is only freed by the garbage
        # collector, after hundreds of frames: ask again only when the picture changes its shape.
        if self._seen != (shape := (frame.rotation, frame.width, frame.height)):
            self._seen, self._matrix = shape, display_matrix(frame)
        return np.ascontiguousarray(as_displayed(rgb, self._matrix))


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y). No matrix: identity."""
    try:
        side_data = cast("Mapping[SideDataType, Buffer]", frame.side_data)
        values = np.frombuffer(bytes(side_data[SideDataType.DISPLAYMATRIX]), dtype=np.int32)  # 3 × 3, 16.16, native
    except KeyError:
        return 1, 0, 0, 1
    except ValueError:  # side data of a kind that this PyAV has no name for hides the others; the angle is still there
        return QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if values.size != 9 or not values[[0, 1, 3, 4]].any():
        return 1, 0, 0, 1
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def as_displayed(rgb: Rgb, matrix: tuple[int, int, int, int]) -> Rgb:
    """Apply a display matrix to [h, w, 3], rounded to the nearest quarter turn, mirrored or not."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        rgb = rgb.transpose(1, 0, 2)  # [w, h, 3]
        across, down = c, b
    return rgb[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
