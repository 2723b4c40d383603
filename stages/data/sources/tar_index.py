"""What is inside a WebDataset tar: where each video or frame lies, and what was left out and why.

Keys and extensions are WebDataset's: ``folder/abc.frame000001.jpg`` has key ``folder/abc`` and extension
``frame000001.jpg`` (all after the first dot of the file name). Nothing is extracted, so no path is ever made from a
member's name; no member but a video or a numbered JPEG is looked at, so nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from stages.data.ids import unsafe_reason
from stages.data.sources.folder_ids import VIDEO_SUFFIX, key_of
from stages.data.sources.image_frames import MAX_IMAGE_BYTES, number_of, printable
from stages.data.sources.video_process import VideoPart


@dataclass(frozen=True)
class SkippedMember:
    """A member that could not be used."""

    tar: str
    member: str
    reason: str


@dataclass
class TarVideo:
    """What one key stands for: a video, or numbered JPEGs."""

    first: str  # the member that made it, for messages
    video: VideoPart | None = None
    suffix: str = ""  # the video's extension, without its dot
    frames: dict[int, tuple[str, VideoPart]] = field(default_factory=dict)  # number -> name and place
    clash: str = ""  # a later member that claims the same place; neither can be trusted then


def split_key(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name as WebDataset splits it, without a leading ``./``; None for other names."""
    match = re.fullmatch(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL)
    return (match[1], match[2]) if match else None


def add_tar(path: Path, shown: str, videos: dict[str, TarVideo], skipped: list[SkippedMember]) -> None:
    """Index one uncompressed tar into ``videos``. Unsafe members go to ``skipped``; a damaged tar ends where it breaks.

    Raises:
        ValueError: the file is no uncompressed tar at all.
    """
    total = path.stat().st_size
    try:
        archive = tarfile.open(path, mode="r:")  # noqa: SIM115 - closed below, after errors are told apart
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shown} is not an uncompressed tar ({error}). Random access needs one: gunzip it") from error
    with archive:
        position = -1
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, OSError, ValueError) as error:
                skipped.append(SkippedMember(shown, "(rest of the tar)", f"the tar is damaged: {error}"))
                return
            if member is None:
                return
            archive.members = []  # type: ignore[attr-defined] # a million frames would be kept in memory
            if member.offset <= position:  # bpo: a negative size makes tarfile read the same header for ever
                skipped.append(SkippedMember(shown, "(rest of the tar)", "the tar is damaged: its offsets go back"))
                return
            position = member.offset
            if member.isdir():
                continue
            if reason := why_skipped(member, total):
                skipped.append(SkippedMember(shown, printable(member.name), reason))
                continue
            add_member(member, path, shown, videos)


def why_skipped(member: tarfile.TarInfo, total: int) -> str:
    """Why a member is not used, or the empty string."""
    if member.issym() or member.islnk():
        return "it is a link"
    if not member.isreg() or member.issparse():
        return "it is a device, a pipe or a sparse file"
    if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
        return "its name is absolute or leaves the tar"
    if split := split_key(member.name):
        if reason := unsafe_reason(split[0]):
            return f"its key {reason}"
        if number_of(split[1]) is not None and member.size > MAX_IMAGE_BYTES:
            return f"{member.size} bytes are too many for one frame"
        if VIDEO_SUFFIX.fullmatch(os.path.splitext(split[1])[1]):
            return f"a key has no dot: WebDataset reads this as {split[0]!r} with extension {split[1]!r}"
    if member.size < 0 or member.offset_data + member.size > total:
        return f"it claims {member.size} bytes, more than the tar holds"
    return ""


def add_member(member: tarfile.TarInfo, path: Path, shown: str, videos: dict[str, TarVideo]) -> None:
    """Note a video or a numbered JPEG under its key; other members (captions, pickles, …) are never read."""
    split = split_key(member.name)
    number = number_of(split[1]) if split else None
    if split is None or (number is None and not VIDEO_SUFFIX.fullmatch(f".{split[1]}")):
        return
    name = f"{printable(member.name)} in {shown}"
    found = videos.setdefault(key_of(split[0]), TarVideo(name))
    place = VideoPart(str(path), member.offset_data, member.size)
    if found.video is not None or (found.frames and number is None) or number in found.frames:
        found.clash = found.clash or name
    elif number is None:
        found.video, found.suffix = place, split[1]
    else:
        found.frames[number] = (split[1], place)
