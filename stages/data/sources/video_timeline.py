"""Open a video with an allow-list, choose its stream, and read its timeline without decoding.

Runs in the decoder process. Every packet is demuxed once before anything is decoded: that is cheap, gives the true
length, finds a truncated file whatever frames are wanted, and lets the decoder stop after the last wanted one.

Which pictures there are, is what a player shows, in three rules: the stream (``choose_stream``); its packets that no
edit list hides, from the first key frame on (``first_shown``), at the times that libav gives them after edit lists and
start offsets; joined on one clock where the format lets it jump (``Splice``). Index 0 is the first of them, whatever
its time: a delayed start (an empty edit, sound before the picture) shows nothing, so there is nothing to count.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from stages.data.sources.frame_grid import Rejected
from stages.data.sources.limits import Limits
from stages.data.sources.video_sniff import Boxes, Window, walk_boxes, why_unknown

# Demuxers that read one file and nothing else. No playlist, image, device, network or raw elementary format.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf"
# Formats whose header states a duration that was measured when the file was written. For the others libav guesses it.
HEADER_DURATION = ("matroska", "avi", "flv", "asf")
GENPTS = 0x0001  # AVFMT_FLAG_GENPTS
TS_DISCONT = 0x0200  # AVFMT_TS_DISCONT: the clock may jump inside the file (MPEG-TS, MPEG-PS, Ogg)
JUMP_BACK = Fraction(1, 10)  # ffmpeg's own thresholds for a clock that jumped (ffmpeg -dts_delta_threshold)
JUMP_AHEAD = Fraction(10)
SLACK_S, SLACK_PART = Fraction(1), Fraction(1, 100)  # a header may over-report by 1 s or 1 %, whichever is more
READ_BUFFER = 128 * 1024
DEFAULT_RATE = Fraction(25)


@dataclass(frozen=True)
class Timeline:
    """The timeline of one stream, in units of ``time_base``, from packets alone.

    Where a packet has no presentation time (H.264 in AVI), ``by_pts`` is False and all times are decoding times, which
    are the same up to a constant for a constant frame rate; the decoder's order then stands for the order of showing.
    """

    time_base: Fraction
    times: array[int]  # sorted, of the packets that are shown
    start: int  # of the first key frame
    end: int  # when the last picture leaves the screen
    step: int  # one average frame, at least 1
    by_pts: bool
    has_keys: bool  # whether any packet is marked as a key frame

    @property
    def duration(self) -> Fraction:
        """Seconds from the first picture to the end of the last."""
        return (self.end - self.start) * self.time_base


def open_container(window: Window, limits: Limits) -> InputContainer:
    """Open the file behind ``window`` with the demuxers of FORMATS only, and with no protocol at all.

    No protocol is allowed because the file is already open: whatever a container names can then not be opened.

    Raises:
        Rejected: ``not_a_video``, ``no_index``, ``truncated`` or ``damaged_container``.
    """
    options = {
        "format_whitelist": FORMATS,
        "protocol_whitelist": "none",
        "enable_drefs": "0",  # MOV data references name other files
        "max_pixels": str(limits.allocation),  # while libav probes
    }
    window.seek(0)
    try:
        # metadata_errors: a 3GP title in a national encoding must not make the video unreadable
        container = av.open(window, mode="r", options=options, metadata_errors="replace", buffer_size=READ_BUFFER)
    except (av.error.FFmpegError, UnicodeError) as error:
        raise why_unknown(window) from error
    container.flags &= ~GENPTS  # PyAV's default; it invents times for H.264 in AVI, and wrong ones
    if not set(container.format.name.split(",")) & set(FORMATS.split(",")):
        raise Rejected("not_a_video", f"its container format ({container.format.name}) is not one that is read here")
    return container


def choose_stream(container: InputContainer, limits: Limits) -> VideoStream:
    """The stream that a player shows: the first that is marked as default, else the first.

    Cover pictures, thumbnails and streams without a decoder do not count. An MP4 track that is disabled is not marked.

    Raises:
        Rejected: ``no_video_stream``, ``no_decoder``, ``too_large``.
    """
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    found = container.streams.video
    moving = [stream for stream in found if not stream.disposition & pictures]
    if not moving:
        kinds = "a still picture" if found else " and ".join(sorted({stream.type for stream in container.streams}))
        only = f"only {kinds}" if kinds else "and no other either"
        raise Rejected("no_video_stream", f"there is no video stream in it, {only}")
    for stream in sorted(moving, key=lambda stream: not stream.disposition & Disposition.default):
        if getattr(stream, "codec_context", None) is not None:  # None: this build of libavcodec cannot decode it
            refuse_large(stream.codec_context.width, stream.codec_context.height, limits)
            return stream
    raise Rejected("no_decoder", "the codec of its video stream has no decoder here")


def refuse_large(width: int, height: int, limits: Limits) -> None:
    """Raise Rejected ``too_large`` where one frame has more pixels than allowed."""
    if width * height > limits.max_pixels:
        raise Rejected(
            "too_large",
            f"its frames have {width} × {height} pixels, the limit is {limits.max_pixels} (data.max_pixels)",
        )


def refuse_long(seconds: Fraction, limits: Limits) -> None:
    """Raise Rejected ``too_long``."""
    if seconds > limits.max_duration_s:
        raise Rejected(
            "too_long",
            f"it lasts {float(seconds):.1f} s, the limit is {limits.max_duration_s:g} s (data.max_duration_s)",
        )


class Splice:
    """Puts the packets of one demux pass on one continuous clock, in place.

    Where the format allows the clock to jump (two transport streams joined by ``cat``), the new part starts where the
    old one ended, as ffmpeg does. Elsewhere the packets stay as they are.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.active = bool(container.format.flags & TS_DISCONT)
        self.back, self.ahead = JUMP_BACK / base_of(stream), JUMP_AHEAD / base_of(stream)
        self.step = step_of(stream)
        self.shift = 0  # added to every time
        self.due: int | None = None  # decoding time at which the next packet is expected

    def __call__(self, packet: Packet[Any]) -> None:
        """Shift the times of the next packet of the stream."""
        if not self.active or packet.dts is None:
            return
        dts = packet.dts + self.shift
        if self.due is not None and not self.due - self.back <= dts <= self.due + self.ahead:
            self.shift += self.due - dts
            dts = self.due
        packet.dts = dts
        if packet.pts is not None:
            packet.pts += self.shift
        self.due = dts + (packet.duration or self.step)


def packets(container: InputContainer, stream: VideoStream, *, every: bool = False) -> Iterator[Packet[Any]]:
    """Demux: packets with data, of one stream (``every``: of all), on one clock.

    Raises:
        Rejected: ``damaged_container`` where reading stops before the end.
    """
    splice = Splice(container, stream)
    try:
        for packet in container.demux() if every else container.demux(stream):
            if packet.size:  # empty ones are libav's end marker, or a picture that an AVI writer dropped
                if packet.stream.index == stream.index:
                    splice(packet)
                yield packet
    except av.error.FFmpegError as error:
        raise Rejected("damaged_container", f"reading the container fails part-way: {error.strerror}") from error
    except IndexError:  # PyAV's end markers count streams that only appeared on the way: the end is reached
        return


def read_timeline(container: InputContainer, stream: VideoStream, window: Window, limits: Limits) -> Timeline:
    """Demux the whole file and check it against its header.

    A packet that has not even a decoding time comes one frame after the packet before it.

    Raises:
        Rejected: ``truncated``, ``too_long``, ``no_frames``, ``not_a_video`` (a GIF of one picture),
            ``damaged_container``.
    """
    time_base = base_of(stream)
    is_mov = container.format.name.startswith("mov")
    boxes = walk_boxes(window) if is_mov else None
    header = header_duration(container, stream, boxes)
    refuse_long(header or Fraction(0), limits)
    longest = int(limits.max_duration_s / time_base)
    step = step_of(stream)
    shown_at, decoded_at, lengths = array("q"), array("q"), array("q")  # of every packet of the stream
    by_pts, shown, keys = True, bytearray(), bytearray()
    other: dict[int, int] = {}  # when each other stream ends, on its own clock
    for packet in packets(container, stream, every=header is not None and not is_mov):
        if packet.stream.index != stream.index:
            stop = (packet.pts or 0) + (packet.duration or 0)
            other[packet.stream.index] = max(other.get(packet.stream.index, 0), stop)
            continue
        if packet.is_corrupt and is_mov:  # the demuxer could not read all of its bytes
            raise truncated(header, (max(shown_at, default=0) - min(shown_at, default=0)) * time_base, boxes)
        by_pts &= packet.pts is not None
        expected = decoded_at[-1] + step if decoded_at else 0
        decoded_at.append(packet.dts if packet.dts is not None else expected)
        shown_at.append(packet.pts if packet.pts is not None else decoded_at[-1])
        lengths.append(packet.duration or step)
        shown.append(not packet.is_discard)  # an edit list may hide packets that others need
        keys.append(packet.is_keyframe)
        if decoded_at[-1] - decoded_at[0] > longest:
            refuse_long((decoded_at[-1] - decoded_at[0]) * time_base, limits)
    if not any(shown):
        raise Rejected("no_frames", "the video stream holds no pictures")
    if container.format.name == "gif":
        check_gif(window, len(shown))
    times = shown_at if by_pts else decoded_at
    last = max(time + length for time, length in zip(times, lengths, strict=True))
    found = [(last - min(times)) * time_base]
    if not is_mov:  # these headers count from 0, and the longest stream sets the length
        found += [last * time_base, *(stop * base_of(container.streams[at]) for at, stop in other.items())]
    check_header(header, max(found), boxes)
    visible = [at for at, show in enumerate(shown) if show]
    start = first_shown(times, shown, keys)
    end = max(times[at] + lengths[at] for at in visible)
    refuse_long((end - start) * time_base, limits)
    return Timeline(time_base, array("q", sorted(times[at] for at in visible)), start, end, step, by_pts, any(keys))


def first_shown(times: Sequence[int], shown: Sequence[int], keys: Sequence[int]) -> int:
    """When the first picture is shown, from what is known of all packets in the order in which they are stored.

    Pictures start at the first key frame, be it hidden (an edit list that starts between two key frames decodes from
    the one before). What is stored before it cannot be decoded; what is stored after it and shown before it may need
    what was cut off. Of the rest the first that no edit list hides is the first picture.
    """
    key = next((at for at, is_key in enumerate(keys) if is_key), 0)
    after = [times[at] for at in range(key, len(times)) if shown[at]]
    return min((time for time in after if not any(keys) or time >= times[key]), default=min(after, default=times[key]))


def base_of(stream: Stream) -> Fraction:
    """Seconds per tick of a stream's clock."""
    return stream.time_base or Fraction(1, 90_000)


def step_of(stream: VideoStream) -> int:
    """One average frame in ticks, at least 1."""
    return max(1, round(1 / (stream.average_rate or DEFAULT_RATE) / base_of(stream)))


def header_duration(container: InputContainer, stream: VideoStream, boxes: Boxes | None) -> Fraction | None:
    """The duration that the file's header promises for what is in this file; None where it promises nothing.

    A fragmented MP4 (``moof``) states the length of the whole presentation, of which this file may be one piece.
    """
    if boxes is not None:
        known = stream.duration if not boxes.has("moof") else None
        return known * base_of(stream) if known else None
    if not set(container.format.name.split(",")) & set(HEADER_DURATION) or container.duration is None:
        return None
    return Fraction(container.duration, av.time_base)


def check_header(header: Fraction | None, found: Fraction, boxes: Boxes | None) -> None:
    """Raise Rejected ``truncated`` where the file holds clearly less than its header, or its last box, promises."""
    if header is not None and header - found > max(SLACK_S, header * SLACK_PART):
        raise truncated(header, found, boxes)
    if boxes is not None and boxes.has("moof") and boxes.missing_bytes:
        raise truncated(None, found, boxes)


def truncated(header: Fraction | None, found: Fraction, boxes: Boxes | None) -> Rejected:
    """The rejection of a file that ends too early."""
    promise = f"its header says {float(header):.1f} s, " if header is not None else ""
    cut = f" ({boxes.shortfall()})" if boxes is not None and boxes.missing_bytes else ""
    return Rejected("truncated", f"the file is cut off: {promise}only {float(found):.1f} s can be read{cut}")


def check_gif(window: Window, pictures: int) -> None:
    """A GIF is a video only if it moves, and complete only if it ends with its trailer (GIF89a §27)."""
    if pictures == 1:
        raise Rejected("not_a_video", "the file is a GIF image of one picture, not a video")
    if not window.at(max(0, window.size - 64), 64).rstrip(b"\x00").endswith(b"\x3b"):
        raise Rejected("truncated", "the file is cut off: this GIF ends without its trailer")
