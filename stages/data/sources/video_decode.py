"""Decode a video in order and pick the pictures that grid indices ask for. Runs in the decoder process."""

from __future__ import annotations

import errno
import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TypeVar

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stages.data.sources.frame_grid import AROUND_DAMAGE, Rejected, count_clamped, grid_count, runs_of, ticks_at
from stages.data.sources.limits import Limits
from stages.data.sources.video_rgb import Rgb, ToRgb
from stages.data.sources.video_sniff import Window
from stages.data.sources.video_timeline import (
    TS_DISCONT,
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


class Damage:
    """Stretches [from, until) of time, in ticks, whose pictures do not decode."""

    def __init__(self) -> None:
        self.spots: list[tuple[int, int]] = []
        self.since: int | None = None  # of a spot whose end is not known yet

    def begin(self, last: int | None, timeline: Timeline) -> None:
        """Decoding failed after the picture at ``last``. Where its successor belongs, nobody knows: from there on."""
        if self.since is None:
            self.since = timeline.start if last is None else last + timeline.step

    def end(self, until: int) -> None:
        """Pictures are whole again from here on."""
        if self.since is not None and until > self.since:
            self.spots.append((self.since, until))
        self.since = None

    def hides(self, moment: int) -> bool:
        """Whether the picture on screen at this time is lost."""
        return any(since <= moment < until for since, until in self.spots)


class Selection:
    """The pictures of one video that answer ``wanted`` (sorted, unique), in order.

    Known at the end: ``clamped``, ``count`` (grid frames of the video), ``damaged`` (runs of grid frames up to the last
    wanted one that do not decode) and ``hdr``.
    """

    def __init__(
        self, window: Window, wanted: Sequence[int], rate: Fraction, limits: Limits, *, around_damage: bool = False
    ) -> None:
        self.window, self.wanted, self.rate, self.limits = window, wanted, rate, limits
        self.around_damage = around_damage
        self.clamped, self.count, self.hdr = 0, 0, ""
        self.damaged: tuple[tuple[int, int], ...] = ()

    def __iter__(self) -> Iterator[Picture]:
        """Decode up to the last wanted picture. Raises Rejected."""
        timeline = self._timeline()
        with open_container(self.window, self.limits) as container:  # again from the start: not all formats seek
            yield from self._pictures(container, choose_stream(container, self.limits), timeline)

    def extent(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Number of grid frames by the packets' times, and runs of those that do not decode. Raises Rejected.

        Without ``around_damage`` nothing is decoded, and nothing is known to be damaged.
        """
        timeline = self._timeline()
        count = grid_count(timeline.duration, self.rate)
        if not (self.around_damage and timeline.by_pts):
            return count, ()
        damage, shown = Damage(), timeline.start
        with open_container(self.window, self.limits) as container:
            stream = choose_stream(container, self.limits)
            for upcoming, _ in in_order(decoded(container, stream, timeline, self.limits, damage), timeline):
                note_gap(damage, shown, upcoming, timeline)
                shown = upcoming
        note_gap(damage, shown, timeline.end, timeline)
        return count, self._damaged_runs(damage, timeline.start, count, timeline)

    def _timeline(self) -> Timeline:
        with open_container(self.window, self.limits) as container:
            return read_timeline(container, choose_stream(container, self.limits), self.window, self.limits)

    def _damaged_runs(self, damage: Damage, first: int, count: int, timeline: Timeline) -> tuple[tuple[int, int], ...]:
        if not damage.spots:
            return ()
        moments = (first + ticks_at(index, self.rate, timeline.time_base) for index in range(count))
        return runs_of(index for index, moment in enumerate(moments) if damage.hides(moment))

    def _pictures(self, container: InputContainer, stream: VideoStream, timeline: Timeline) -> Iterator[Picture]:
        damage = Damage() if self.around_damage and timeline.by_pts else None
        frames = in_order(decoded(container, stream, timeline, self.limits, damage), timeline)
        first, newest = next(frames, (0, None))
        if newest is None:
            raise Rejected("no_frames", "no picture of the video stream can be decoded")
        self.hdr = hdr_of(newest)
        if damage is not None:
            first = min(first, *(since for since, _ in damage.spots), first)
        # Decoding times run ahead of the pictures by a constant, so they give a length but not an end.
        length = timeline.end - (first if timeline.by_pts else timeline.start)
        self.count = grid_count(length * timeline.time_base, self.rate)
        self.clamped = count_clamped(self.wanted, self.count, self.rate)
        to_rgb = ToRgb()
        shown = (first, newest)
        due = [(index, first + ticks_at(index, self.rate, timeline.time_base)) for index in self.wanted]
        at = 0
        while at < len(due):
            upcoming = next(frames, None)
            answered = at
            while answered < len(due) and (upcoming is None or due[answered][1] < upcoming[0]):
                refuse_gap(shown[0], due[answered][1], timeline)
                if damage is not None and damage.hides(due[answered][1]):
                    raise Rejected("decode_error", f"frame {due[answered][0]} lies in a damaged spot")
                answered += 1
            if answered > at:
                pts = round(float(shown[0] * timeline.time_base), 6)
                yield Picture([index for index, _ in due[at:answered]], pts, to_rgb(shown[1]))
                at = answered
            if upcoming is not None:
                shown = upcoming
        if damage is not None and self.wanted:
            self.damaged = self._damaged_runs(damage, first, min(self.count, self.wanted[-1] + 1), timeline)


def decoded(
    container: InputContainer, stream: VideoStream, timeline: Timeline, limits: Limits, damage: Damage | None = None
) -> Iterator[tuple[int, VideoFrame]]:
    """Every picture with its presentation time in ticks, in the decoder's order.

    A picture without a time follows the one before it by an average frame.
    What comes before the first key frame may fail: a recording of a broadcast starts anywhere.
    With ``damage``, a failure is noted there and decoding goes on at the next key frame.

    Raises:
        Rejected: ``decode_error`` at the first packet that does not decode or picture that had to be patched up, unless
            ``damage`` is given; ``too_large``.
    """
    codec = stream.codec_context
    codec.thread_count = 1  # workers run in parallel, one video each
    codec.options = {"max_pixels": str(limits.allocation)}
    may_start_broken = bool(container.format.flags & TS_DISCONT)
    key_seen, last = not timeline.has_keys, None
    earliest: int | None = None  # after damage: pictures before the key frame may need what was lost
    for packet in chain(packets(container, stream), [None]):  # None: the decoder gives what it still holds
        if damage is not None and damage.since is not None and earliest is None:
            if packet is None or not packet.is_keyframe or packet.pts is None:
                continue
            codec.flush_buffers()
            earliest = packet.pts
        try:
            key_seen |= packet is not None and packet.is_keyframe
            frames = codec.decode(packet)
        except av.error.FFmpegError as error:
            if last is None and not key_seen and isinstance(error, av.error.InvalidDataError):
                continue
            refuse_large(codec.width, codec.height, limits)
            if error.errno == errno.ENOMEM:
                raise MemoryError from error
            if damage is None:
                raise failed_at(last, timeline, error.strerror or type(error).__name__) from error
            damage.begin(last, timeline)
            earliest = None
            continue
        for frame in frames:
            refuse_large(frame.width, frame.height, limits)
            if frame.is_corrupt:
                if last is None and may_start_broken:
                    continue
                if damage is None:
                    raise failed_at(last, timeline, "the decoder had to make up parts of a damaged picture")
                damage.begin(last, timeline)
                earliest = None
                break
            known = frame.pts if timeline.by_pts else frame.dts
            time = known if known is not None else (timeline.start if last is None else last + timeline.step)
            if earliest is not None and damage is not None:
                if time < earliest:
                    continue
                damage.end(time)
                earliest = None
            last = time
            yield time, frame
    if damage is not None:
        damage.end(timeline.end)


def failed_at(last: int | None, timeline: Timeline, why: str) -> Rejected:
    """The rejection of a video that stops decoding after the picture at ``last``."""
    at = 0.0 if last is None else float((last + timeline.step - timeline.start) * timeline.time_base)
    return Rejected(
        "decode_error",
        f"decoding fails at {at:.1f} s of {float(timeline.duration):.1f} s: {why}. {AROUND_DAMAGE}",
    )


def hdr_of(frame: VideoFrame) -> str:
    """The transfer function or gamut that RGB of an ordinary screen lacks, by ITU-T H.273, or the empty string."""
    transfer = {16: "PQ", 18: "HLG"}.get(int(frame.color_trc), "")
    return transfer or ("BT.2020" if int(frame.color_primaries) == 9 else "")


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
        raise Rejected("decode_error", f"nothing decodes between {begin:.1f} s and {end:.1f} s. {AROUND_DAMAGE}")


def note_gap(damage: Damage, shown: int, upcoming: int, timeline: Timeline) -> None:
    """Note as damage what ``refuse_gap`` refuses between two pictures."""
    promised = timeline.times[max(0, bisect_left(timeline.times, upcoming) - 1)]
    if (promised - shown) * timeline.time_base > MAX_GAP:
        damage.spots.append((shown + timeline.step, upcoming))
