"""Decode a video in order and pick the pictures that grid indices ask for. Runs in the decoder process."""

from __future__ import annotations

import errno
import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TypeVar

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stages.data.sources.frame_grid import Rejected, count_clamped, grid_count, ticks_at
from stages.data.sources.video_rgb import Rgb, ToRgb
from stages.data.sources.video_sniff import Window
from stages.data.sources.video_timeline import (
    TS_DISCONT,
    Limits,
    Timeline,
    choose_stream,
    open_container,
    packets,
    read_timeline,
    refuse_large,
)

Frame = TypeVar("Frame")
REORDER_DEPTH = 16  # pictures held back at most while an earlier one may still come; H.264 reorders no deeper
MAX_GAP = Fraction(1)  # seconds of packets that may give no picture before the answer is no longer trusted


@dataclass(frozen=True)
class Picture:
    """One decoded picture and the grid indices that it answers."""

    index: list[int]
    pts: float  # seconds on the container's own clock
    rgb: Rgb  # [h, w, 3]


class Selection:
    """The pictures of one video that answer ``wanted`` (sorted, unique), in order; ``clamped`` is known at the end."""

    def __init__(self, window: Window, wanted: Sequence[int], rate: Fraction, limits: Limits) -> None:
        self.window, self.wanted, self.rate, self.limits = window, wanted, rate, limits
        self.clamped = 0

    def __iter__(self) -> Iterator[Picture]:
        """Decode up to the last wanted picture. Raises Rejected."""
        with open_container(self.window, self.limits) as container:
            timeline = read_timeline(container, choose_stream(container, self.limits), self.window, self.limits)
        with open_container(self.window, self.limits) as container:  # again from the start: not all formats seek
            yield from self._pictures(container, choose_stream(container, self.limits), timeline)

    def _pictures(self, container: InputContainer, stream: VideoStream, timeline: Timeline) -> Iterator[Picture]:
        frames = in_order(decoded(container, stream, timeline, self.limits), timeline)
        first, newest = next(frames, (0, None))
        if newest is None:
            raise Rejected("no_frames", "no picture of the video stream can be decoded")
        # Decoding times run ahead of the pictures by a constant, so they give a length but not an end.
        length = timeline.end - (first if timeline.by_pts else timeline.start)
        self.clamped = count_clamped(self.wanted, grid_count(length * timeline.time_base, self.rate), self.rate)
        to_rgb = ToRgb()
        shown = (first, newest)
        due = [(index, first + ticks_at(index, self.rate, timeline.time_base)) for index in self.wanted]
        at = 0
        while at < len(due):
            upcoming = next(frames, None)
            answered = at
            while answered < len(due) and (upcoming is None or due[answered][1] < upcoming[0]):
                refuse_gap(shown[0], due[answered][1], timeline)
                answered += 1
            if answered > at:
                pts = round(float(shown[0] * timeline.time_base), 6)
                yield Picture([index for index, _ in due[at:answered]], pts, to_rgb(shown[1]))
                at = answered
            if upcoming is not None:
                shown = upcoming


def decoded(
    container: InputContainer, stream: VideoStream, timeline: Timeline, limits: Limits
) -> Iterator[tuple[int, VideoFrame]]:
    """Every picture with its presentation time in ticks, in the decoder's order.

    A picture without a time follows the one before it by an average frame.
    What comes before the first key frame may fail: a recording of a broadcast starts anywhere.

    Raises:
        Rejected: ``decode_error`` at the first packet that does not decode or picture that had to be patched up;
            ``too_large``.
    """
    codec = stream.codec_context
    codec.thread_count = 1  # workers run in parallel, one video each
    codec.options = {"max_pixels": str(limits.allocation)}
    may_start_broken = bool(container.format.flags & TS_DISCONT)
    key_seen, last = not timeline.has_keys, None
    for packet in chain(packets(container, stream), [None]):  # None: the decoder gives what it still holds
        try:
            key_seen |= packet is not None and packet.is_keyframe
            frames = codec.decode(packet)
        except av.error.FFmpegError as error:
            if last is None and not key_seen and isinstance(error, av.error.InvalidDataError):
                continue
            refuse_large(codec.width, codec.height, limits)
            if error.errno == errno.ENOMEM:
                raise MemoryError from error
            raise failed_at(last, timeline, error.strerror or type(error).__name__) from error
        for frame in frames:
            refuse_large(frame.width, frame.height, limits)
            if frame.is_corrupt:
                if last is None and may_start_broken:
                    continue
                raise failed_at(last, timeline, "the decoder had to make up parts of a damaged picture")
            known = frame.pts if timeline.by_pts else frame.dts
            last = known if known is not None else (timeline.start if last is None else last + timeline.step)
            yield last, frame


def failed_at(last: int | None, timeline: Timeline, why: str) -> Rejected:
    """The rejection of a video that stops decoding after the picture at ``last``."""
    at = 0.0 if last is None else float((last + timeline.step - timeline.start) * timeline.time_base)
    return Rejected("decode_error", f"decoding fails at {at:.1f} s of {float(timeline.duration):.1f} s: {why}")


def in_order(frames: Iterable[tuple[int, Frame]], timeline: Timeline) -> Iterator[tuple[int, Frame]]:
    """Pictures sorted by presentation time. Decoders nearly always give them so; then nothing is held back.

    A picture is held while the packets promise an earlier one, but never more than REORDER_DEPTH of them. One that
    comes too late for that is dropped: its time is over. Where packets carry no times, the decoder's order stands.
    """
    held: list[tuple[int, int, Frame]] = []
    newest = None
    for serial, (pts, frame) in enumerate(frames):
        heapq.heappush(held, (pts, serial, frame))
        while held and (len(held) > REORDER_DEPTH or not timeline.by_pts or held[0][0] <= due_after(newest, timeline)):
            pts, _, frame = heapq.heappop(held)
            if newest is None or pts >= newest:
                newest = pts
                yield pts, frame
    for pts, _, frame in sorted(held, key=lambda item: item[:2]):
        if newest is None or pts >= newest:
            yield pts, frame


def due_after(newest: int | None, timeline: Timeline) -> int:
    """Presentation time of the packet that follows ``newest``; with nothing shown yet, of the first picture."""
    if newest is None:
        return timeline.start
    position = bisect_right(timeline.times, newest)
    return timeline.times[position] if position < len(timeline.times) else newest + (1 << 62)


def refuse_gap(shown: int, due: int, timeline: Timeline) -> None:
    """Raise Rejected ``decode_error`` where packets say that the screen changed long after the picture we have."""
    if not timeline.by_pts:
        return
    promised = timeline.times[max(0, bisect_right(timeline.times, due) - 1)]
    if (promised - shown) * timeline.time_base > MAX_GAP:
        begin, end = (float((time - timeline.start) * timeline.time_base) for time in (shown, promised))
        raise Rejected("decode_error", f"nothing decodes between {begin:.1f} s and {end:.1f} s")


def count_grid_frames(window: Window, rate: Fraction, limits: Limits) -> int:
    """Number of grid frames by the packets' times, without decoding. Raises Rejected."""
    with open_container(window, limits) as container:
        stream = choose_stream(container, limits)
        return grid_count(read_timeline(container, stream, window, limits).duration, rate)
