"""Which video ids may be joined to a root folder. Annotations are written by strangers."""

from __future__ import annotations

import unicodedata

MAX_ID_BYTES = 240  # a file name holds 255 bytes on common file systems; this leaves room for an extension


def safe_id(video_id: str) -> str:
    """Return ``video_id`` unchanged if it names something below a root folder, else raise ValueError with the reason.

    Spaces, quotes, a leading dash (YouTube ids) and any script are fine; ``/`` may separate plain parts.
    Refused: empty ids, absolute paths, ``.`` and ``..`` parts, backslashes, control characters, lone surrogates,
    and parts too long for a file system.
    """
    if reason := unsafe_reason(video_id):
        shown = video_id if len(video_id) <= 60 else f"{video_id[:57]}..."
        raise ValueError(f"video id {shown!r} {reason}")
    return video_id


def unsafe_reason(video_id: str) -> str:
    """Why an id is refused, or the empty string."""
    if not video_id.strip():
        return "is empty"
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in video_id):
        return "has control characters or broken Unicode"
    if video_id.startswith("/") or "\\" in video_id:
        return "is an absolute path or has a backslash"
    parts = video_id.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, '.' or '..' part"
    if any(len(part.encode()) > MAX_ID_BYTES for part in parts) or len(parts) > 16:
        return f"is too long: a part has more than {MAX_ID_BYTES} bytes, or there are more than 16 parts"
    return ""
