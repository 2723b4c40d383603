"""What a file is by its own bytes, before any demuxer sees it, and why a broken MP4 does not open.

The demuxer allow-list (video_timeline.py) is what keeps a playlist from being followed; this file refuses it one step
earlier and gives refusals a true reason. Nothing here trusts a length it reads.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass

from stages.data.sources.frame_grid import Rejected

HEAD_BYTES = 4096
HASH_BLOCK = 1 << 20
IMAGE_MAGIC = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"BM": "a BMP image",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"8BPS": "a Photoshop image",
}
STILL_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1")  # the MP4 box layout, but a picture
OTHER_MAGIC = {b"%PDF": "a PDF", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"ID3": "an MP3"}
PLAYLISTS = {
    b"ffconcat": "an ffconcat list",
    b"#extm3u": "an HLS playlist",
    b"<mpd": "a DASH manifest",
    b"v=0": "an SDP session",
    b"<asx": "an ASX playlist",
    b"[playlist]": "a PLS playlist",
    b"[reference]": "an ASF reference file",
    b"rtsptext": "an RTSP reference",
}
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot", b"uuid")


class Window:
    """Read-only file object over ``size`` bytes from ``offset`` of an open file: a whole file, or a tar member.

    Handed to PyAV in place of a name, so that no name is ever parsed as a URL, a pattern or a protocol.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self.fd, self.offset, self.size, self.position = fd, offset, size, 0

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, count: int = -1) -> bytes:
        """Up to ``count`` bytes from the current position; empty at the end."""
        left = max(0, self.size - self.position)
        data = os.pread(self.fd, left if count < 0 else min(count, left), self.offset + self.position)
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move; like a file, past the end is allowed and before the start is not."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if base + position < 0:
            raise ValueError("a position before the start of the file")
        self.position = base + position
        return self.position

    def tell(self) -> int:
        """The current position."""
        return self.position

    def at(self, position: int, count: int) -> bytes:
        """``count`` bytes at ``position`` without moving."""
        return os.pread(self.fd, max(0, min(count, self.size - position)), self.offset + position)


def open_window(path: str, offset: int, size: int | None) -> Window:
    """Open a regular file, or ``size`` bytes of it.

    Raises:
        Rejected: ``missing_file``, ``unreadable``, ``not_a_file`` (a pipe, a device, a folder) or ``empty_file``.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: opening a FIFO must not wait
    except FileNotFoundError as error:
        raise Rejected("missing_file", "there is no file behind this name any more") from error
    except OSError as error:
        raise Rejected("unreadable", f"the file cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise Rejected("not_a_file", "this is not a regular file (a pipe, socket, device or folder)")
    length = status.st_size - offset if size is None else size
    if length == 0:
        os.close(fd)
        raise Rejected("empty_file", "the file is empty (0 bytes)")
    return Window(fd, offset, length)


def sha256_of(window: Window) -> str:
    """sha256 of the file, or of the tar member, as hex."""
    digest = hashlib.sha256()
    window.seek(0)
    while block := window.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def refuse_what_is_no_video(window: Window) -> None:
    """Raise Rejected ``not_a_video`` for images, playlists and other files that say what they are."""
    head = window.at(0, HEAD_BYTES)
    for magic, name in (IMAGE_MAGIC | OTHER_MAGIC).items():
        if head.startswith(magic):
            raise Rejected("not_a_video", f"the file is {name}, not a video")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        raise Rejected("not_a_video", "the file is a WebP image, not a video")
    if head[4:8] == b"ftyp" and head[8:12] in STILL_BRANDS:
        raise Rejected("not_a_video", "the file is a HEIF or AVIF image, not a video")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, name in PLAYLISTS.items():
        if text.startswith(start) or (start == b"<mpd" and text.startswith(b"<?xml") and b"<mpd" in text):
            raise Rejected("not_a_video", f"the file is {name}, which names other files; these are never followed")


def why_unknown(window: Window) -> Rejected:
    """The reason for a file that no allowed demuxer recognises."""
    if window.at(4, 4) in MP4_BOXES:
        boxes = walk_boxes(window)
        if not boxes.has("moov"):
            cut = f"; {boxes.shortfall()}" if boxes.missing_bytes else ""
            return Rejected("no_index", f"the MP4 index (moov box) is missing, so nothing can be located{cut}")
        if boxes.missing_bytes:
            return Rejected("truncated", f"the file is cut off: {boxes.shortfall()}")
        return Rejected("damaged_container", "the MP4 index (moov box) is damaged")
    head = window.at(0, HEAD_BYTES)
    printable = sum(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head)
    if printable >= 0.95 * len(head):
        return Rejected("not_a_video", "the file is text, not a video")
    return Rejected("not_a_video", "no video container that is read here (MP4, Matroska, AVI, MPEG, …) is recognised")


@dataclass(frozen=True)
class Boxes:
    """The top-level boxes of an MP4, and by how much the last one overruns the file."""

    names: tuple[str, ...]
    missing_bytes: int
    size: int

    def has(self, name: str) -> bool:
        """Whether a box of this type stands at the top level."""
        return name in self.names

    def shortfall(self) -> str:
        """The overrun in words."""
        return f"its last box ({self.names[-1]}) promises {self.size + self.missing_bytes} bytes, there are {self.size}"


def walk_boxes(window: Window) -> Boxes:
    """Walk the top-level boxes of an MP4 (ISO 14496-12 §4.2); stops at what is no box, such as trailing junk."""
    names: list[str] = []
    position = 0
    while position + 8 <= window.size and len(names) < 100_000:
        header = window.at(position, 16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # to the end of the file
            length = window.size - position
        if length < 8 or not name.isalnum():
            break
        names.append(name.decode("ascii"))
        position += length
    return Boxes(tuple(names), max(0, position - window.size), window.size)
