"""Which entry below a folder an id means. Ids come from annotations; no path is ever built from one.

A folder is listed when an id first asks for it, and each part of an id is looked up in such a list: ``a/b/1.mp4`` is
the entry ``1.mp4`` of the entry ``b`` of the entry ``a``. The last part may lack a video's extension. Names are
compared in Unicode NFC, so an annotation in NFC finds a file that a Mac wrote in NFD.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.data.ids import unsafe_reason
from stages.types import VideoRejected

log = logging.getLogger(__name__)

VIDEO_SUFFIX = re.compile(
    r"\.(mp4|m4v|mov|qt|3gp|3g2|f4v|mkv|webm|avi|divx|mpe?g|m1v|m2v|vob|ts|mts|m2ts|flv|asf|wmv|ogv|ogg|ogm|gif|ivf)",
    re.IGNORECASE,
)
MAX_COMPARED = 2_000  # ids that a missing one is compared with letter by letter


def refuse_bad_id(video_id: str) -> None:
    """Raise VideoRejected ``bad_id`` for an id that could leave a folder or break a line (see ids.py)."""
    if reason := unsafe_reason(video_id):
        raise VideoRejected(video_id, "bad_id", f"the id {reason}")


def is_video_name(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is called like a video. What it is, is found out when it is read."""
    return VIDEO_SUFFIX.fullmatch(os.path.splitext(entry.name)[1]) is not None


@dataclass
class Listing:
    """One folder: names by key. A key with several names is a clash. ``videos`` are the names that count as videos."""

    by_key: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    videos: list[str] = field(default_factory=list)


class FolderIds:
    """The entries below a folder by id. Hidden entries (a leading dot) do not count."""

    def __init__(
        self,
        root: str | Path,
        *,
        counts: Callable[[os.DirEntry[str]], bool],
        id_of: Callable[[str], str],
        is_branch: Callable[[Path], bool],
        follow_symlinks: bool,
    ) -> None:
        """List ``root``. Raises ValueError where it is not a directory.

        Args:
            root: the folder.
            counts: which entries are videos.
            id_of: the short id of an entry's name; the full name is an id too.
            is_branch: whether a sub-folder is looked into for further videos.
            follow_symlinks: allow links that leave ``root``, and look into linked folders.
        """
        self.root, self.counts, self.id_of, self.is_branch = Path(root), counts, id_of, is_branch
        self.follow_symlinks = follow_symlinks
        self._listings: dict[str, Listing] = {}
        try:
            self._list("")
        except OSError as error:
            raise ValueError(
                f"{self.root} cannot be listed: {error.strerror}.\nName the folder with --set data.videos=DIR"
            ) from error

    @functools.cached_property
    def names(self) -> list[str]:
        """Paths of all videos below the root, relative to it, sorted. Walks the whole tree, once."""
        return sorted(self._walk("", set()))

    @functools.cached_property
    def ids(self) -> list[str]:
        """Short ids of ``names``, sorted. What no annotation could name (a line break) is left out, with a warning."""
        ids = {key_of(self._short(name)) for name in self.names}
        for unsafe in sorted(video_id for video_id in ids if unsafe_reason(video_id)):
            log.warning("%r in %s is left out: its name %s", unsafe, self.root, unsafe_reason(unsafe))
        return sorted(video_id for video_id in ids if not unsafe_reason(video_id))

    def __contains__(self, video_id: str) -> bool:
        with contextlib.suppress(VideoRejected):
            return bool(self._find(video_id))
        return False

    def path(self, video_id: str) -> Path:
        """The one entry that an id means.

        Raises:
            VideoRejected: ``bad_id``, ``missing_file``, ``ambiguous_id`` (two entries answer to it),
                ``outside_root`` (a link that leaves the folder).
        """
        names = self._find(video_id)
        if not names:
            raise VideoRejected(video_id, "missing_file", self._why_missing(video_id))
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

    def unasked(self, video_ids: Iterable[str]) -> list[str]:
        """Ids of the videos that none of these ids means."""
        asked: set[str] = set()
        for video_id in video_ids:
            with contextlib.suppress(VideoRejected):
                asked.update(self._find(video_id))
        return [key_of(self._short(name)) for name in self.names if name not in asked]

    def _find(self, video_id: str) -> list[str]:
        refuse_bad_id(video_id)
        *parents, last = map(key_of, video_id.split("/"))
        folders = [""]
        for part in parents:
            folders = [os.path.join(at, name) for at in folders for name in self._list(at).folders.get(part, ())]
            for folder in folders:
                self.refuse_outside(video_id, self.root / folder)
        return [os.path.join(at, name) for at in folders for name in self._list(at).by_key.get(last, ())]

    def _list(self, folder: str) -> Listing:
        if folder in self._listings:
            return self._listings[folder]
        listing = Listing()
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    listing.folders.setdefault(key_of(entry.name), []).append(entry.name)
                if self.counts(entry):
                    listing.videos.append(entry.name)
                    for key in {key_of(entry.name), key_of(self.id_of(entry.name))}:
                        listing.by_key.setdefault(key, []).append(entry.name)
        self._listings[folder] = listing
        return listing

    def _walk(self, folder: str, above: set[str]) -> Iterator[str]:
        """Videos at and below a folder. ``above``: the real folders on the way, so that links never lead in rings."""
        listing = self._list(folder)
        branches = []
        for name in (name for names in listing.folders.values() for name in names):
            path = self.root / folder / name
            if (self.follow_symlinks or not path.is_symlink()) and self.is_branch(path):
                branches.append(name)
        yield from (os.path.join(folder, name) for name in listing.videos if name not in branches)
        for name in branches:
            real = os.path.realpath(self.root / folder / name)
            if real not in above:
                with contextlib.suppress(PermissionError):
                    yield from self._walk(os.path.join(folder, name), above | {real})

    def _short(self, name: str) -> str:
        head, tail = os.path.split(name)
        return os.path.join(head, self.id_of(tail))

    def _why_missing(self, video_id: str) -> str:
        same_name = self.id_of("x.mp4") == "x.mp4"
        looked_for = "no folder" if same_name else "no file, with or without a video's extension,"
        return f"{looked_for} in {self.root} has this name{near_misses(video_id, self.ids)}"


def near_misses(video_id: str, ids: Sequence[str]) -> str:
    """Up to three ids that may be meant, for a message: the same name in another place, else one spelt alike."""

    def bare(name: str) -> str:
        return os.path.splitext(name.rpartition("/")[2])[0].casefold()

    wanted = bare(key_of(video_id))
    alike = [name for name in ids if bare(name) == wanted]
    if not alike and len(ids) <= MAX_COMPARED:
        alike = difflib.get_close_matches(video_id, ids, n=3)
    return f"; close to it: {', '.join(map(repr, alike[:3]))}" if alike else ""


def without_suffix(name: str) -> str:
    """``a.b.mp4`` -> ``a.b``."""
    return os.path.splitext(name)[0]


def key_of(name: str) -> str:
    """How names are compared: NFC; bytes that are not UTF-8 become replacement characters."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))
