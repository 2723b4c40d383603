"""Messages between a frame source and its decoder process: a length, a JSON header, and raw bytes.

    4 bytes big-endian: length of the header · the header, JSON with ``bytes`` = length of what follows · raw bytes

JSON and raw bytes only, because the decoder process reads hostile files: what it sends is data, whatever it became.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable

Message = dict[str, object]
MAX_HEADER = 64 * 1024 * 1024  # a request lists its indices: 4 h at 30 fps is 4 MB of JSON
_LENGTH = struct.Struct(">I")


def header_of(message: Message, payload_bytes: int = 0) -> bytes:
    """Length and header; ``payload_bytes`` raw bytes have to follow."""
    header = json.dumps({**message, "bytes": payload_bytes}).encode()
    return _LENGTH.pack(len(header)) + header


def send(fd: int, message: Message, payload: memoryview | None = None) -> None:
    """Send one message, however long the reader takes. Raises BrokenPipeError where nobody reads any more."""
    for part in (memoryview(header_of(message, payload.nbytes if payload is not None else 0)), payload):
        while part:
            part = part[os.write(fd, part) :]


def receive(read_exactly: Callable[[int], bytes]) -> Message:
    """Read one header; its ``bytes`` raw bytes are still to be read. Raises ValueError where it is no message."""
    (length,) = _LENGTH.unpack(read_exactly(_LENGTH.size))
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    message = json.loads(read_exactly(length))
    if not isinstance(message, dict):
        raise ValueError("a header that is not an object")
    return message
