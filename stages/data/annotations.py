"""Reading MA-LMM's two annotation layouts, with every problem of every file reported at once.

LVU layout: ``{video_id: {"subset": "train", "duration": 133, "num_frames": 1628, "director": "steven", ...}}``.
QA layout: ``{question_id: {"question": ..., "answer": ..., "answer_type": "who", "video": id, "frame_length": 72}}``.
A byte order mark and Windows line ends are read as what they are; everything else that is not a clean JSON object of
such entries is named as ``file:key:field``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from stages.data.ids import unsafe_reason
from stages.data.sampling import ANNOTATION_FPS
from stages.types import Sample

SPLITS = ("train", "val", "test")
EVERY_SPLIT = ""  # the split of a file whose name does not say one
MAX_FILE_BYTES = 512 * 2**20  # MSVD-QA is 11 MB, MSRVTT-QA 100 MB
MAX_FRAMES = 2_000_000  # 55 hours at 10 fps: more is a typing error, and would make arrays of that length
SHOWN_PROBLEMS = 40
TOLERATED_MISSING_FRAMES = 20  # LVU has up to 7 frames less than 10 × duration


class AnnotationError(ValueError):
    """The annotations cannot be used. ``problems`` holds every one found; the message shows the first of them."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where, self.problems = where, list(problems)
        shown = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if more := len(self.problems) - len(shown):
            shown.append(f"  ... and {more} more")
        noun = "problem" if len(self.problems) == 1 else "problems"
        super().__init__("\n".join([f"{len(self.problems)} {noun} in {where}:", *shown]))

    def __reduce__(self) -> tuple[type[AnnotationError], tuple[str, list[str]]]:
        return type(self), (self.where, self.problems)


class Dataset(Protocol):
    """What every dataset of the registry offers; constructed with ``(cfg: DataConfig)``."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have annotations, in the order train, val, test."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the results should know, one sentence each."""

    @property
    def answer_rule(self) -> Literal["exact", "first_word"]:
        """How a prediction is compared with the answer: the whole string, or its first word (MSVD-QA)."""

    def samples(self, split: str) -> list[Sample]:
        """All samples of a split, in annotation order. Raises ValueError for an unknown split."""

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """Per video the sorted unique grid indices that the samples of these splits (default: all) need."""

    def labels(self, split: str) -> tuple[str, ...]:
        """The distinct answers of a split, sorted."""

    def published_n(self, split: str) -> int | None:
        """Number of samples behind the published figures, where known."""


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
FrameCount = Annotated[int, Field(ge=1, le=MAX_FRAMES)]


class Entry(BaseModel, ABC):
    """What both layouts share. Strict: a number written as text is a problem, not a guess."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    subset: Literal["train", "val", "test"] | None = None

    @abstractmethod
    def video_id(self, key: str) -> str:
        """The video this entry (stored under ``key``) is about."""

    @abstractmethod
    def count(self) -> int:
        """Number of frames of that video at 10 per second."""


class LvuEntry(Entry):
    """One video with its labels; every further text field is the label of the task it is named after."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    duration: float = Field(gt=0, le=MAX_FRAMES / ANNOTATION_FPS, allow_inf_nan=False)  # s, without the outro
    num_frames: FrameCount  # at 10 fps, with the outro

    def video_id(self, key: str) -> str:
        return key

    def count(self) -> int:
        return self.num_frames

    def label(self, task: str) -> str | None:
        """The label under ``task``, or None where this video has none."""
        value = (self.model_extra or {}).get(task)
        return value.strip() if isinstance(value, str) else None

    def tasks(self) -> list[str]:
        """Names of the fields that hold a label. ``<task>_answer`` is MA-LMM's multiple-choice letter, not a label."""
        extra = self.model_extra or {}
        return [name for name, value in extra.items() if isinstance(value, str) and not name.endswith("_answer")]


class QaEntry(Entry):
    """One question about one video."""

    question: Text
    answer: Text
    video: str
    frame_length: FrameCount  # at 10 fps
    answer_type: Annotated[str, StringConstraints(strip_whitespace=True, max_length=100)] = ""
    question_id: str | None = None
    dataset: str = "msvd"  # as MA-LMM's files say of themselves

    def video_id(self, key: str) -> str:  # noqa: ARG002 - the key is the question here
        return self.video

    def count(self) -> int:
        return self.frame_length


E = TypeVar("E", bound=Entry)


class _Object(dict[str, Any]):
    """A JSON object that remembers keys given twice (the last one wins in JSON, silently)."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


@dataclass(frozen=True)
class RawFile:
    """One parsed file: a split (or EVERY_SPLIT), where it was, and its objects."""

    split: str
    path: Path
    objects: dict[str, dict[str, Any]]


@dataclass
class Problems:
    """Collects findings of all files, to be raised together."""

    where: str
    found: list[str] = field(default_factory=list)

    def add(self, path: Path, message: str, *, key: str = "", name: str = "") -> None:
        place = ":".join(part for part in (path.name, _shown(key), name) if part)
        self.found.append(f"{place} {message}")

    def raise_any(self) -> None:
        """Raise AnnotationError if anything was found."""
        if self.found:
            raise AnnotationError(self.where, self.found)


def require_path(annotations: str) -> Path:
    """The path of ``data.annotations``; AnnotationError with the setting to give where there is nothing."""
    if not annotations:
        raise AnnotationError("data.annotations", ["is not set. Give it:  --set data.annotations=FOLDER_OR_FILE"])
    path = Path(annotations)
    if not path.exists():
        raise AnnotationError("data.annotations", [f"{path} does not exist. Give:  --set data.annotations=PATH"])
    return path


def load_files(files: Mapping[str, Sequence[Path]], problems: Problems) -> list[RawFile]:
    """Parse ``{split: [path, ...]}``; unreadable files become problems."""
    raw = []
    for split, paths in files.items():
        for path in paths:
            if (objects := _load_objects(path, problems)) is not None:
                raw.append(RawFile(split, path, objects))
    return raw


def validated(raw: Sequence[RawFile], model: type[E], problems: Problems) -> dict[str, dict[str, E]]:
    """Entries by split and key. A file of EVERY_SPLIT is divided by ``subset``, or used in every split without any.

    Problems: wrong fields, unsafe ids, a key twice in one split, one video with two lengths, subset against file name.
    """
    splits: dict[str, dict[str, E]] = {}
    counts: dict[str, tuple[int, str]] = {}  # video -> (frames, where it was said)
    for file in raw:
        entries = {
            key: e for key, value in file.objects.items() if (e := _entry(file.path, key, value, model, problems))
        }
        for key, entry in entries.items():
            place = f"{file.path.name}:{_shown(key)}"
            count, first = counts.setdefault(entry.video_id(key), (entry.count(), place))
            if count != entry.count():
                message = f"has {entry.count()} frames here and {count} in {first}"
                problems.add(file.path, f"video {_shown(entry.video_id(key))} {message}", key=key)
        for split, part in _divided(file, entries, problems).items():
            present = splits.setdefault(split, {})
            for key in present.keys() & part.keys():
                problems.add(file.path, f"is in another file of split {split!r} too", key=key)
            present.update(part)
    return {split: splits[split] for split in SPLITS if split in splits}


def leak_warnings(entries: Mapping[str, Mapping[str, Entry]]) -> tuple[str, ...]:
    """One sentence per split that shares videos with train."""
    ids = {split: {entry.video_id(key) for key, entry in part.items()} for split, part in entries.items()}
    shared = {split: sorted(ids[split] & ids.get("train", set())) for split in ids if split != "train"}
    return tuple(f"{len(v)} videos are in both train and {s}: {', '.join(v[:5])}" for s, v in shared.items() if v)


def union_frames(samples: Sequence[Sample]) -> dict[str, Int[np.ndarray, " n"]]:
    """Per video the sorted unique frames over all draws of all its samples."""
    chosen: dict[str, list[Int[np.ndarray, "K T"]]] = {}
    for sample in samples:
        draws = chosen.setdefault(sample.video_id, [])
        if not any(sample.draws is known for known in draws):  # the questions of one video share one array
            draws.append(sample.draws)
    return {video: np.unique(np.concatenate([d.ravel() for d in draws])) for video, draws in chosen.items()}


def distinct_answers(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Sorted set of answers."""
    return tuple(sorted({sample.answer for sample in samples}))


def check_split(split: str, splits: Sequence[str]) -> str:
    """``split`` if the annotations have it; ValueError naming those they have otherwise."""
    if split not in splits:
        raise ValueError(f"these annotations have no split {split!r}; they have {', '.join(splits) or 'none'}")
    return split


def _load_objects(path: Path, problems: Problems) -> dict[str, dict[str, Any]] | None:
    text = _read_text(path, problems)
    if text is None:
        return None
    try:
        value = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        problems.found.append(f"{path.name}:{error.lineno} is not JSON: {error.msg} (column {error.colno})")
        return None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        problems.add(path, f"is not usable JSON: {error}")
        return None
    if not isinstance(value, _Object):
        problems.add(path, f"must hold one JSON object with an entry per key, not a {type(value).__name__}")
        return None
    for key in value.repeated:
        problems.add(path, "appears more than once", key=key)
    objects: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        if not isinstance(item, _Object):
            problems.add(path, f"must be an object with fields, not {_value(item)}", key=key)
            continue
        for name in item.repeated:
            problems.add(path, "is given more than once", key=key, name=name)
        objects[key] = item
    if not value:
        problems.add(path, "holds no entries")
    return objects


def _read_text(path: Path, problems: Problems) -> str | None:
    try:
        if not path.is_file():
            problems.add(path, "is missing, or not a regular file")
        elif (size := path.stat().st_size) > MAX_FILE_BYTES:
            problems.add(path, f"has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        else:
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(path, f"is not UTF-8 text (byte {error.start})")
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    return None


def _entry(path: Path, key: str, value: dict[str, Any], model: type[E], problems: Problems) -> E | None:
    try:
        entry = model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = ".".join(str(part) for part in detail["loc"])
            got = "" if detail["type"] == "missing" else f"; got {_value(detail['input'])}"
            problems.add(path, f"{detail['msg']}{got}", key=key, name=name)
        return None
    if reason := unsafe_reason(entry.video_id(key)):
        problems.add(path, f"video id {_shown(entry.video_id(key))} {reason}", key=key)
        return None
    if message := _contradiction(key, entry):
        problems.add(path, message, key=key)
        return None
    return entry


def _contradiction(key: str, entry: Entry) -> str:
    """Fields that cannot both be true, in words, or the empty string."""
    if isinstance(entry, LvuEntry) and entry.num_frames + TOLERATED_MISSING_FRAMES < ANNOTATION_FPS * entry.duration:
        return f"num_frames counts 10 frames per second, so {entry.num_frames} is too few for {entry.duration:g} s"
    if isinstance(entry, QaEntry) and entry.question_id not in (None, key):
        return f"question_id {_value(entry.question_id)} differs from its key"
    return ""


def _divided(file: RawFile, entries: dict[str, E], problems: Problems) -> dict[str, dict[str, E]]:
    """One file's entries by split."""
    if file.split != EVERY_SPLIT:
        for key, entry in entries.items():
            if entry.subset not in (None, file.split):
                problems.add(file.path, f"says {entry.subset!r} in the file of {file.split!r}", key=key, name="subset")
        return {file.split: entries}
    if all(entry.subset is None for entry in entries.values()):
        return {split: dict(entries) for split in SPLITS}
    for key, entry in entries.items():
        if entry.subset is None:
            problems.add(file.path, "is missing here and given elsewhere in this file", key=key, name="subset")
    return {s: part for s in SPLITS if (part := {k: e for k, e in entries.items() if e.subset == s})}


def _shown(key: str) -> str:
    """A key or id, short enough for a message, on one line."""
    return _cut(key if key.isprintable() else repr(key))


def _value(value: object) -> str:
    """A value as Python writes it, so that "9" and 9 look different; short enough for a message."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
