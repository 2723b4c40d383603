"""Which entry of a folder an id means. Ids come from annotations; no path is ever built from one.

The folder is listed once, and an id is looked up in that list: the full file name, or the name without its extension.
Names are compared in Unicode NFC, so an annotation in NFC finds a file that a Mac wrote in NFD.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from stages.data.ids import unsafe_reason
from stages.types import VideoRejected

VIDEO_SUFFIX = re.compile(
    r"\.(mp4|m4v|mov|qt|3gp|3g2|f4v|mkv|webm|avi|divx|mpe?g|m1v|m2v|vob|ts|mts|m2ts|flv|asf|wmv|ogv|ogg|ogm|gif|ivf)",
    re.IGNORECASE,
)


def refuse_bad_id(video_id: str) -> None:
    """Raise VideoRejected ``bad_id`` for an id that could leave a folder or break a line (see ids.py)."""
    if reason := unsafe_reason(video_id):
        raise VideoRejected(video_id, "bad_id", f"the id {reason}")


def is_video_name(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is called like a video. What it is, is found out when it is read."""
    return VIDEO_SUFFIX.fullmatch(os.path.splitext(entry.name)[1]) is not None


class FolderIds:
    """The entries of one folder by id. Hidden entries (a leading dot) do not count."""

    def __init__(
        self,
        root: str | Path,
        *,
        counts: Callable[[os.DirEntry[str]], bool],
        id_of: Callable[[str], str],
        follow_symlinks: bool,
    ) -> None:
        """List ``root`` once. Raises ValueError where it is no folder.

        Args:
            root: the folder.
            counts: which entries count.
            id_of: the short id of an entry's name; the full name is an id too.
            follow_symlinks: allow links that leave ``root``.
        """
        self.root = Path(root)
        self.follow_symlinks = follow_symlinks
        try:
            with os.scandir(self.root) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and counts(entry))
        except OSError as error:
            raise ValueError(
                f"{self.root} cannot be listed: {error.strerror}.\nName the folder with --set data.videos=DIR"
            ) from error
        self.names: dict[str, list[str]] = {}  # key -> file names; more than one is a clash
        self.ids = sorted({key_of(id_of(name)) for name in names})
        for name in names:
            for key in {key_of(name), key_of(id_of(name))}:
                self.names.setdefault(key, []).append(name)

    def __contains__(self, video_id: str) -> bool:
        return not unsafe_reason(video_id) and key_of(video_id) in self.names

    def path(self, video_id: str) -> Path:
        """The one entry that an id means.

        Raises:
            VideoRejected: ``bad_id``, ``missing_file``, ``ambiguous_id`` (two entries answer to it),
                ``outside_root`` (a link that leaves the folder).
        """
        refuse_bad_id(video_id)
        names = self.names.get(key_of(video_id), [])
        if not names:
            raise VideoRejected(video_id, "missing_file", f"nothing in {self.root} has this name")
        if len(names) > 1:
            shown = " and ".join(repr(os.fsencode(name).decode("utf-8", "backslashreplace")) for name in names)
            raise VideoRejected(video_id, "ambiguous_id", f"{len(names)} entries answer to this id: {shown}")
        path = self.root / names[0]
        self.refuse_outside(video_id, path)
        return path

    def refuse_outside(self, video_id: str, path: Path) -> None:
        """Raise VideoRejected ``outside_root`` where a link leads out of the folder and links are not followed."""
        if not self.follow_symlinks and not path.resolve().is_relative_to(self.root.resolve()):
            raise VideoRejected(
                video_id,
                "outside_root",
                f"{path.name} is a link that leaves {self.root}; allow that with --set data.follow_symlinks=true",
            )


def without_suffix(name: str) -> str:
    """``a.b.mp4`` -> ``a.b``."""
    return os.path.splitext(name)[0]


def key_of(name: str) -> str:
    """How names are compared: NFC; bytes that are not UTF-8 become replacement characters."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))
