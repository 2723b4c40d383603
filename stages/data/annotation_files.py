"""Annotation files as they lie on a disk: which of them belong to which split, and the entries that they hold.

What a file is, its content tells: a JSON object, a JSON list, JSON Lines, or a table with a header, any of them
compressed with gzip or not. A file's split is in its name (``qa_train_part1.json``, ``val.csv``), or in the name of a
folder around it (``train/scene1.json``).
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
EVERY_SPLIT = ""  # the split of a file whose name does not say one
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HALVES = {"q": "[qa]", "a": "[qa]", **dict.fromkeys(("question", "questions", "answer", "answers"), "*")}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
DEPTH = 3  # how far below a folder files are looked for
MAX_FILE_BYTES = 512 * 2**20  # MSVD-QA is 11 MB, MSRVTT-QA 100 MB
SHOWN_PROBLEMS = 40
_SPLIT_AND_PART = re.compile(rf"(?i)(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])([_-]?(part)?[_-]?\d+)?")
_HALF = re.compile(rf"(?i)(?<![a-z])({'|'.join(HALVES)})(?![a-z])")
MAPPING_LINE = re.compile(r"(?P<name>\S+)\s+vid(?P<number>\d+)")

# One example of each layout: shown where a file has none of them. The tests read every one.
LAYOUTS = {
    "questions in an object, by id (MA-LMM)": (
        '{"0": {"video": "v1", "question": "what is it?", "answer": "nut", "frame_length": 72}}'
    ),
    "questions in a list (MSVD-QA, MSRVTT-QA)": (
        '[{"id": 0, "video_id": 1451, "question": "who is it?", "answer": "someone"}]'
    ),
    "questions, one a line (JSON Lines)": '{"video": "v1", "question": "what is it?", "answer": "nut"}',
    "questions in a table": "video_id,question,answer",
    "questions and answers apart (ActivityNet-QA)": (
        '[{"question_id": "v_x_1", "video_name": "x", "question": "is it?"}] beside '
        '[{"question_id": "v_x_1", "answer": "no"}]'
    ),
    "labels in an object, by video (LVU, Breakfast)": (
        '{"v1": {"duration": 133, "num_frames": 1628, "director": "steven"}}'
    ),
    "labels in a table": "video,label",
}


class AnnotationError(ValueError):
    """The annotations cannot be used. ``problems`` holds every one found; the message shows the first of them.

    ``hint`` ends the message: what to type, or what the layouts are.
    """

    def __init__(self, where: str, problems: Sequence[str], hint: str = "") -> None:
        self.where, self.problems, self.hint = where, list(problems), hint
        shown = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if more := len(self.problems) - len(shown):
            shown.append(f"  ... and {more} more")
        noun = "problem" if len(self.problems) == 1 else "problems"
        title = f"{len(self.problems)} {noun} in {where}:"
        super().__init__("\n".join([title, *shown, *([hint] if hint else [])]))

    def __reduce__(self) -> tuple[type[AnnotationError], tuple[str, list[str], str]]:
        return type(self), (self.where, self.problems, self.hint)


@dataclass
class Problems:
    """Collects findings of all files, to be raised together."""

    where: str
    found: list[str] = field(default_factory=list)
    hint: str = ""

    def add(self, path: Path, message: str, *, key: str = "", name: str = "") -> None:
        """Note a finding by file, entry and field."""
        place = ":".join(part for part in (path.name, shown_id(key), name) if part)
        self.found.append(f"{place} {message}")

    def raise_any(self) -> None:
        """Raise AnnotationError if anything was found."""
        if self.found:
            raise AnnotationError(self.where, self.found, self.hint)


@dataclass(frozen=True)
class RawFile:
    """One parsed file: its split (or EVERY_SPLIT) and its entries. A key is None where the file gives none."""

    split: str
    path: Path
    rows: tuple[tuple[str | None, dict[str, Any]], ...]
    is_text: bool = False  # a table: every value is text


class _Object(dict[str, Any]):
    """A JSON object that remembers keys given twice (the last one wins in JSON, silently)."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


# ---------------------------------------------------------------- which files


def require_path(annotations: str) -> Path:
    """The path of ``data.annotations``, which may be a pattern; AnnotationError with the setting to give otherwise."""
    if not annotations:
        raise AnnotationError("data.annotations", ["is not set. Give it:  --set data.annotations=FOLDER_OR_FILE"])
    path = Path(annotations)
    if not path.exists() and not glob.glob(annotations):
        raise AnnotationError("data.annotations", [f"{path} does not exist. Give:  --set data.annotations=PATH"])
    return path


def find_files(annotations: str) -> dict[str, list[Path]]:
    """Annotation files by split, in order of their names.

    A file that is named is taken, whatever its name. Of a folder, those files whose name or folder says a split; or its
    only file. Raises AnnotationError where there is none.
    """
    path = require_path(annotations)
    if path.is_file():
        return {split_of(path, path.parent): _with_other_half(path)}
    if not path.is_dir():
        root, paths = path.parent, sorted(p for p in map(Path, glob.glob(annotations)) if not p.is_dir())
    else:
        root, paths = path, sorted(_annotation_files(path, DEPTH))
    by_split: dict[str, list[Path]] = {}
    for file in paths:
        by_split.setdefault(split_of(file, root), []).append(file)
    unnamed = by_split.pop(EVERY_SPLIT, [])
    if by_split:
        return {split: by_split[split] for split in SPLITS if split in by_split}
    if len(unnamed) == 1:
        return {EVERY_SPLIT: unnamed}
    shown = f"; it has {', '.join(file.name for file in unnamed[:5])}" if unnamed else ""
    raise AnnotationError(
        str(path),
        [f"has no file whose name says a split, such as train.json, qa_val.json or test.csv{shown}"],
        "Name one file:  --set data.annotations=FILE",
    )


def split_of(path: Path, root: Path) -> str:
    """The split in a file's name, or in that of the nearest folder below ``root``; EVERY_SPLIT where there is none."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    for name in (path.name, *reversed(folders)):
        splits = {SPLIT_WORDS[word] for word in _words(name) if word in SPLIT_WORDS}
        if splits:
            return splits.pop() if len(splits) == 1 else EVERY_SPLIT
    return EVERY_SPLIT


def refuse_mixture(files: Sequence[RawFile], problems: Problems) -> None:
    """Note a problem where one split is annotated by files of different kinds: its questions would count twice."""
    for split in dict.fromkeys(file.split for file in files):
        patterns: dict[str, list[str]] = {}
        for file in files:
            if file.split == split:
                patterns.setdefault(_pattern(file.path), []).append(file.path.name)
        if len(patterns) > 1:
            told = " and by ".join(", ".join(names) for names in patterns.values())
            problems.found.append(f"{split} is annotated by {told}; choose one of them")
            first = shlex.quote(f"data.annotations={files[0].path.parent / next(iter(patterns))}")
            problems.hint = f"Choose by a pattern:  --set {first}"


def _annotation_files(folder: Path, depth: int) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.name.lower().removesuffix(".gz").endswith(SUFFIXES):
            yield entry
        elif depth and entry.is_dir() and not entry.is_symlink():
            yield from _annotation_files(entry, depth - 1)


def _with_other_half(path: Path) -> list[Path]:
    """The file, and the answers or questions beside it where it is one half of ActivityNet-QA's pairs."""
    others = (path.with_name(path.name.replace(*pair)) for pair in (("_q.", "_a."), ("_a.", "_q.")))
    return sorted({path, *(other for other in others if other.is_file())})


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _pattern(path: Path) -> str:
    """A file's name with ``*`` for its split and part: files of one kind share it."""
    if not any(word in SPLIT_WORDS for word in _words(path.name)):
        return f"*{path.suffix}"  # its folder says the split
    general = _SPLIT_AND_PART.sub("*", path.name)
    return _HALF.sub(lambda match: HALVES[match[0].lower()], general)


# ---------------------------------------------------------------- what they hold


def load_files(files: Mapping[str, Sequence[Path]], problems: Problems) -> list[RawFile]:
    """Parse ``{split: [path, ...]}``; unreadable files become problems."""
    raw = []
    for split, paths in files.items():
        for path in paths:
            if (text := _read_text(path, problems)) is None:
                continue
            is_table = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
            rows = _table(path, text, problems) if is_table else _json(path, text, problems)
            if rows is not None:
                raw.append(RawFile(split, path, tuple(rows), is_table))
    return raw


def find_mapping(files: Iterable[RawFile]) -> tuple[str, dict[str, str]]:
    """Name and content of MSVD-QA's ``youtube_mapping.txt`` beside the files: number -> name of the video.

    It is recognised by its lines, ``NAME vidNUMBER``. ("", {}) where there is none.
    """
    for folder in dict.fromkeys(file.path.parent for file in files):
        for path in sorted(folder.glob("*.txt")):
            if not path.is_file() or path.stat().st_size > 2**20:
                continue
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
            matches = [MAPPING_LINE.fullmatch(line) for line in lines if line]
            if matches and all(matches):
                return path.name, {match["number"]: match["name"] for match in matches if match}
    return "", {}


def _json(path: Path, text: str, problems: Problems) -> list[tuple[str | None, dict[str, Any]]] | None:
    try:
        value = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        if (lines := _json_lines(path, text, problems)) is not None:
            return lines
        problems.found.append(f"{path.name}:{error.lineno} is not JSON: {error.msg} (column {error.colno})")
        return None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        problems.add(path, f"is not usable JSON: {error}")
        return None
    if isinstance(value, list):
        return _objects(path, [(None, item) for item in value], problems)
    if not isinstance(value, _Object):
        problems.add(path, f"must hold entries, in an object or a list, not a {type(value).__name__}")
        return None
    if {"question", "answer"} <= {
        key.lower() for key in value
    }:  # one entry: the first line of JSON Lines, and its last
        return _objects(path, [(None, value)], problems)
    for key in value.repeated:
        problems.add(path, "appears more than once", key=key)
    return _objects(path, list(value.items()), problems)


def _json_lines(path: Path, text: str, problems: Problems) -> list[tuple[str | None, dict[str, Any]]] | None:
    """The objects of JSON Lines; None where the first line is no object, so that the file is something else."""
    items: list[tuple[str | None, object]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            items.append((None, json.loads(line, object_pairs_hook=_Object)))
        except (ValueError, RecursionError) as error:
            if not items:
                return None
            told = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.found.append(f"{path.name}:{number} is not JSON: {told}")
        else:
            if not isinstance(items[0][1], _Object):
                return None
    return _objects(path, items, problems) if items else None


def _objects(
    path: Path, items: Sequence[tuple[str | None, object]], problems: Problems
) -> list[tuple[str | None, dict[str, Any]]]:
    rows: list[tuple[str | None, dict[str, Any]]] = []
    for number, (key, item) in enumerate(items, start=1):
        place = f"#{number}" if key is None else key
        if not isinstance(item, _Object):
            problems.add(path, f"must be an object with fields, not {shown_value(item)}", key=place)
            continue
        for name in item.repeated:
            problems.add(path, "is given more than once", key=place, name=name)
        rows.append((key, item))
    if not items:
        problems.add(path, "holds no entries")
    return rows


def _table(path: Path, text: str, problems: Problems) -> list[tuple[str | None, dict[str, Any]]] | None:
    """Rows of a table whose header names the columns; they are parted by commas, semicolons or tabs."""
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str | None, dict[str, Any]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if repeated := {name for name in header if header.count(name) > 1}:
            problems.add(path, f"names a column more than once: {', '.join(sorted(repeated))}")
            return None
        for cells in reader:
            if not cells or not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                told = f"has {len(cells)} cells, and the header {len(header)} names"
                problems.found.append(f"{path.name}:{reader.line_num} {told}")
                continue
            rows.append((None, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}))
    except csv.Error as error:
        problems.found.append(f"{path.name}:{reader.line_num} is no table: {error}")
        return None
    if not rows and not problems.found:
        problems.add(path, "holds no entries")
    return rows


def _read_text(path: Path, problems: Problems) -> str | None:
    try:
        if not path.is_file():
            problems.add(path, "is missing, or not a regular file")
            return None
        size = path.stat().st_size
        if size <= MAX_FILE_BYTES:
            with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            if len(raw) <= MAX_FILE_BYTES:
                return raw.decode("utf-8-sig")
            size = len(raw)
        problems.add(path, f"has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    except UnicodeDecodeError as error:
        problems.add(path, f"is not UTF-8 text (byte {error.start})")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.add(path, f"is not a whole gzip file: {error}")
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    return None


# ---------------------------------------------------------------- words


def shown_id(key: str) -> str:
    """A key or id, short enough for a message, on one line."""
    return _cut(key if key.isprintable() else repr(key))


def shown_value(value: object) -> str:
    """A value as Python writes it, so that "9" and 9 look different; short enough for a message."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
