"""Annotations: what the files of a dataset say about its videos, with every problem of every file reported at once.

Two kinds of entry come out, ``LvuEntry`` (a video with labels) and ``QaEntry`` (a question about a video), from any of
the layouts in ``annotation_files.LAYOUTS``: those of MA-LMM, those in which MSVD-QA, MSRVTT-QA and ActivityNet-QA are
published, JSON Lines and tables. Which one a file has, its content tells. Fields may have the names in ``QA_NAMES``
and ``LABEL_NAMES``; numbers where a text is meant (an answer, an id, a label) are read as that text. Everything else
that is not a clean entry is named as ``file:key:field``.

Where an annotation does not say how long its video is (all but MA-LMM's), the videos are asked, and an id may have the
prefix under which the videos of these datasets are kept: ``v_ID``, ``videoN``, ``vidN``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from stages.data.annotation_files import (
    EVERY_SPLIT,
    LAYOUTS,
    SPLITS,
    AnnotationError,
    Problems,
    RawFile,
    find_files,
    find_mapping,
    load_files,
    refuse_mixture,
    shown_id,
    shown_value,
)
from stages.data.ids import unsafe_reason
from stages.data.sampling import ANNOTATION_FPS, grid_count
from stages.types import Sample, VideoRejected

MAX_FRAMES = 2_000_000  # 55 hours at 10 fps: more is a typing error, and would make arrays of that length
TOLERATED_MISSING_FRAMES = 20  # LVU has up to 7 frames less than 10 × duration
PREFIXES = ("v_", "video", "vid")  # ActivityNet, MSRVTT, MSVD: how files are called that annotations call otherwise
CORRECT = "Correct that, then give the same command again."

Layout = Literal["lvu", "qa"]

# Field -> the names under which it is published, best first.
VIDEO_NAMES = ("video", "video_id", "video_name", "vid", "video_path", "filename")
LABEL_NAMES: dict[str, tuple[str, ...]] = {
    "video": VIDEO_NAMES,
    "subset": ("subset", "split"),
    "num_frames": ("num_frames", "frame_length"),
}
QA_NAMES: dict[str, tuple[str, ...]] = {
    "video": VIDEO_NAMES,
    "question": ("question",),
    "answer": ("answer",),
    "question_id": ("question_id", "qid", "id"),
    "answer_type": ("answer_type", "type", "question_type"),
    "subset": ("subset", "split"),
    "frame_length": ("frame_length", "num_frames"),
}
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".gif", ".ts")
NUMBERS = ("num_frames", "frame_length", "duration")  # what a table holds as text
SUBSETS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}


class Dataset(Protocol):
    """What every dataset of the registry offers; constructed with ``(cfg: DataConfig, videos: Videos | None)``."""

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


@runtime_checkable
class Videos(Protocol):
    """What a dataset asks about the videos themselves (every frame source answers): which there are, and how long."""

    def video_ids(self) -> list[str]:
        """Ids of all of them, sorted."""

    def has(self, video_id: str) -> bool:
        """Whether there is something under this id."""

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames, without decoding. Raises VideoRejected."""


def _text_of(value: object) -> object:
    """A whole number as text: ids and answers are often written as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _subset_of(value: object) -> object:
    name = value.strip().lower() if isinstance(value, str) else value
    return SUBSETS.get(name, name) if isinstance(name, str) else value


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000), BeforeValidator(_text_of)
]
VideoId = Annotated[str, StringConstraints(strip_whitespace=True), BeforeValidator(_text_of)]
FrameCount = Annotated[int, Field(ge=1, le=MAX_FRAMES)]


class Entry(BaseModel, ABC):
    """What both kinds share. Strict: a number of frames written as text is a problem, not a guess."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    video: VideoId
    subset: Annotated[Literal["train", "val", "test"] | None, BeforeValidator(_subset_of)] = None

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Number of frames of the video at 10 per second; None where the annotation does not say."""


class LvuEntry(Entry):
    """One video with its labels; every further text field is the label of the task it is named after."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    duration: float | None = Field(None, gt=0, le=MAX_FRAMES / ANNOTATION_FPS, allow_inf_nan=False)  # s, without outro
    num_frames: FrameCount | None = None  # at 10 fps, with the outro

    @property
    def count(self) -> int | None:
        return self.num_frames

    def label(self, task: str) -> str | None:
        """The label under ``task``, or None where this video has none."""
        value = _text_of((self.model_extra or {}).get(task))
        return value.strip() if isinstance(value, str) else None

    def tasks(self) -> list[str]:
        """Names of the fields that hold a label. ``<task>_answer`` is MA-LMM's multiple-choice letter, not a label."""
        return [
            name for name in self.model_extra or {} if self.label(name) is not None and not name.endswith("_answer")
        ]


class QaEntry(Entry):
    """One question about one video."""

    question: Text
    answer: Text
    frame_length: FrameCount | None = None  # at 10 fps
    answer_type: Annotated[str, StringConstraints(strip_whitespace=True, max_length=100), BeforeValidator(_text_of)] = (
        ""
    )
    question_id: Annotated[str, BeforeValidator(_text_of)] | None = None
    dataset: str = ""  # as MA-LMM's files say of themselves

    @property
    def count(self) -> int | None:
        return self.frame_length


E = TypeVar("E", bound=Entry)
Entries = Mapping[str, Mapping[str, E]]  # split -> key -> entry; the key is the video or the question id


@dataclass(frozen=True)
class Annotations:
    """What the files of a dataset say.

    Attributes:
        layout: ``lvu`` or ``qa``: which of the two tables of entries is filled.
        labels, questions: split -> key -> entry, in the order of the files.
        frames: video -> its number of frames on the grid.
        repeated: one file stands for every split.
        warnings: what a reader of the results should know.
    """

    layout: Layout
    labels: dict[str, dict[str, LvuEntry]]
    questions: dict[str, dict[str, QaEntry]]
    frames: dict[str, int]
    repeated: bool
    warnings: tuple[str, ...]

    @property
    def entries(self) -> Mapping[str, Mapping[str, Entry]]:
        """The table that is filled."""
        return self.labels if self.layout == "lvu" else self.questions


def read_annotations(
    annotations: str,
    *,
    fps: float,
    layout: Layout | None = None,
    tasks: Sequence[str] = (),
    videos: Videos | None = None,
) -> Annotations:
    """Read a file, the files of a folder, or those of a pattern.

    Args:
        annotations: ``data.annotations``.
        fps: of the grid that ``Annotations.frames`` counts on.
        layout: the only one that is wanted.
        tasks: names of label fields, by which a table of labels is recognised too.
        videos: asked for what the annotations do not say.

    Raises:
        AnnotationError: with every problem found.
    """
    problems = Problems(annotations, hint=CORRECT)
    raw = load_files(find_files(annotations), problems)
    if problems.found and not raw:
        problems.raise_any()
    raw, chosen, left_out = _of_one_layout(raw, layout, tasks, problems)
    refuse_mixture(raw, problems)
    raw = [_named(file, LABEL_NAMES if chosen == "lvu" else QA_NAMES) for file in raw]
    labels: dict[str, dict[str, LvuEntry]] = {}
    questions: dict[str, dict[str, QaEntry]] = {}
    if chosen == "lvu":
        labels = validated(_keyed(raw, "video", problems), LvuEntry, problems)
    else:
        raw = _with_video_names(_joined(raw, problems), problems)
        if not raw:
            problems.raise_any()
        questions = validated(_keyed(raw, "question_id", problems), QaEntry, problems)
    problems.raise_any()
    if chosen == "lvu":
        labels, frames = _with_lengths(labels, annotations, fps, videos)
    else:
        questions, frames = _with_lengths(questions, annotations, fps, videos)
    repeated = raw[0].split == EVERY_SPLIT and all("subset" not in row for _, row in raw[0].rows)
    return Annotations(chosen, labels, questions, frames, repeated, left_out)


# ---------------------------------------------------------------- layouts


def _of_one_layout(
    raw: Sequence[RawFile], wanted: Layout | None, tasks: Sequence[str], problems: Problems
) -> tuple[list[RawFile], Layout, tuple[str, ...]]:
    """The files of the layout that is wanted (of the only one, where none is), it, and what is said of the others."""
    layouts = [_layout_of(file, tasks) for file in raw]
    known = {layout for layout in layouts if layout is not None}
    if wanted is None and len(known) > 1:
        problems.found.append(f"{', '.join(file.path.name for file in raw)} have different layouts")
        problems.hint = f"Give one of them:  --set data.annotations={raw[0].path}"
        problems.raise_any()
    chosen: Layout | None = wanted or next(iter(known), None)
    kept = [file for file, layout in zip(raw, layouts, strict=True) if layout is not None and layout == chosen]
    if not kept or chosen is None:
        _refuse_layout(raw, known, problems)
        raise AssertionError("refused")
    splits = {file.split for file in kept}
    left = [file for file, layout in zip(raw, layouts, strict=True) if layout != chosen]
    for file in left:
        if file.split not in splits and not problems.found:
            problems.add(file.path, f"has another layout than {kept[0].path.name}")
    return kept, chosen, tuple(f"{file.path.name} holds no annotations of this kind and is left out" for file in left)


def _refuse_layout(raw: Sequence[RawFile], known: Iterable[str], problems: Problems) -> None:
    for other in sorted(known):
        names = {"lvu": "labels of videos (data.name=lvu)", "qa": "questions (data.name=msvd_qa)"}
        problems.found.append(f"{raw[0].path.name} holds {names[other]}, which this dataset does not read")
        problems.hint = "Take the dataset that reads every layout:  --set data.name=clips"
    if not problems.found:
        for file in raw:
            fields = dict.fromkeys(name for _, row in file.rows[:20] for name in row)
            problems.add(file.path, f"has none of the known layouts; its fields are {', '.join(fields) or '(none)'}")
        examples = "\n".join(f"  {name}:\n    {example}" for name, example in LAYOUTS.items())
        problems.hint = (
            f"The layouts, each in a file whose name says its split, or with a field `subset`:\n{examples}\n"
            "A field of another name that holds the label is named with  --set data.task=NAME"
        )
    problems.raise_any()


def _layout_of(file: RawFile, tasks: Sequence[str]) -> Layout | None:
    """The layout that most fields of the file belong to."""
    fields = {
        "lvu": {"duration", "num_frames", "label", "class_name", *map(str.lower, tasks)},
        "qa": {"question", "answer"},
    }
    names = [{name.strip().lower() for name in row} for _, row in file.rows]
    lengths = sum("frame_length" in row for row in names)  # of either
    hits = {layout: sum(len(part & row) for row in names) for layout, part in fields.items()}
    best: Layout = "qa" if hits["qa"] > hits["lvu"] else "lvu"
    if not hits[best] and not lengths:
        return None
    return best if hits[best] else "qa"


def _named(file: RawFile, names: Mapping[str, Sequence[str]]) -> RawFile:
    """The file with its fields under our names, in any case; in a table, numbers as numbers."""
    plans: dict[tuple[str, ...], dict[str, str]] = {}  # the entries of a file have few sets of fields
    rows = []
    for key, row in file.rows:
        fields = tuple(row)
        plan = plans.get(fields) or plans.setdefault(fields, _renaming(fields, names))
        values = {ours: row[theirs] for ours, theirs in plan.items()}
        if file.is_text:
            values |= {name: _number_of(values[name]) for name in NUMBERS if name in values}
        rows.append((key, values))
    return replace(file, rows=tuple(rows))


def _renaming(fields: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Our name -> theirs, for every field of an entry; of several names for one field the best."""
    lower = {field.strip().lower(): field for field in fields}
    aliases = {name for others in names.values() for name in others}
    plan = {field.strip(): field for field in fields if field.strip().lower() not in aliases}
    for ours, others in names.items():
        if (theirs := next((lower[name] for name in others if name in lower), None)) is not None:
            plan[ours] = theirs
    return plan


def _number_of(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _joined(raw: Sequence[RawFile], problems: Problems) -> list[RawFile]:
    """Questions with the answers that ActivityNet-QA keeps in a file of their own."""
    answers = {id(file) for file in raw if file.rows and not any("question" in row for _, row in file.rows)}
    asked = {file.split for file in raw if id(file) not in answers}
    for file in raw:
        if id(file) in answers and file.split not in asked:
            problems.add(file.path, "has answers, and no file of questions is beside it")
    result = []
    for file in raw:
        if id(file) in answers:
            continue
        if any("answer" in row for _, row in file.rows):
            result.append(file)
            continue
        others = [other for other in raw if id(other) in answers and other.split == file.split]
        for other in others:
            times = Counter(_key(row) for _, row in other.rows)
            for key in (key for key, count in times.items() if key is not None and count > 1):
                problems.add(other.path, "appears more than once", key=key)
        by_id = {_key(row): row for other in others for _, row in other.rows}
        lacking = [_key(row) for _, row in file.rows if _key(row) not in by_id]
        if not others:
            problems.add(file.path, "has questions without answers, and no file of answers is beside it")
        elif lacking:
            message = f"has {len(lacking)} questions without an answer in {others[0].path.name}, such as "
            problems.add(file.path, message + shown_id(str(lacking[0])))
        elif more := len(by_id) - len(file.rows):
            problems.add(others[0].path, f"has {more} answers more than {file.path.name} has questions")
        else:
            result.append(replace(file, rows=tuple((key, by_id[_key(row)] | row) for key, row in file.rows)))
    return result


def _key(row: Mapping[str, Any]) -> str | None:
    return str(row["question_id"]).strip() if "question_id" in row else None


def _with_video_names(raw: Sequence[RawFile], problems: Problems) -> list[RawFile]:
    """The rows with the names that MSVD-QA's mapping file gives to its numbers."""
    name, mapping = find_mapping(raw)
    if not mapping:
        return list(raw)

    def named(file: RawFile, key: str | None, row: dict[str, Any]) -> dict[str, Any]:
        number = str(_text_of(row.get("video"))).strip()
        if number.removeprefix("vid").isdigit():
            if (video := mapping.get(number.removeprefix("vid"))) is not None:
                return row | {"video": video, "dataset": "msvd"}
            problems.add(file.path, f"{number} is not in {name}", key=key or _key(row) or "", name="video")
        return row

    return [replace(file, rows=tuple((key, named(file, key, row)) for key, row in file.rows)) for file in raw]


def _keyed(raw: Sequence[RawFile], field: str, problems: Problems) -> list[tuple[RawFile, dict[str, dict[str, Any]]]]:
    """Every file's entries by key: that of the JSON object, else the field, else the number of the entry."""
    result = []
    for file in raw:
        rows: dict[str, dict[str, Any]] = {}
        for number, (outer, row) in enumerate(file.rows, start=1):
            key = outer
            if key is None:
                given = _text_of(row.get(field))
                key = given.strip() if isinstance(given, str) and given.strip() else f"#{number}"
                if key in rows:
                    problems.add(file.path, "appears more than once", key=key)
            elif field == "video":
                row = {"video": key.strip()} | row
            rows[key] = row
        result.append((file, rows))
    return result


# ---------------------------------------------------------------- entries


def validated(
    raw: Sequence[tuple[RawFile, Mapping[str, dict[str, Any]]]], model: type[E], problems: Problems
) -> dict[str, dict[str, E]]:
    """Entries by split and key. A file of EVERY_SPLIT is divided by ``subset``, or used in every split without any.

    Problems: wrong fields, unsafe ids, a key twice in one split, one video with two lengths, subset against file name.
    """
    splits: dict[str, dict[str, E]] = {}
    counts: dict[str, tuple[int, str]] = {}  # video -> (frames, where it was said)
    for file, rows in raw:
        entries = {key: e for key, row in rows.items() if (e := _entry(file.path, key, row, model, problems))}
        given = any(entry.count is not None for entry in entries.values())
        for key, entry in entries.items():
            if entry.count is None:
                if given:
                    name = "num_frames" if isinstance(entry, LvuEntry) else "frame_length"
                    problems.add(file.path, "Field required", key=key, name=name)
                continue
            count, first = counts.setdefault(entry.video, (entry.count, f"{file.path.name}:{shown_id(key)}"))
            if count != entry.count:
                message = f"has {entry.count} frames here and {count} in {first}"
                problems.add(file.path, f"video {shown_id(entry.video)} {message}", key=key)
        for split, part in _divided(file, entries, problems).items():
            present = splits.setdefault(split, {})
            for key in present.keys() & part.keys():
                problems.add(file.path, f"is in another file of split {split!r} too", key=key)
            present.update(part)
    return {split: splits[split] for split in SPLITS if split in splits}


def leak_warnings(entries: Mapping[str, Mapping[str, Entry]]) -> tuple[str, ...]:
    """One sentence per split that shares videos with train; ``a.mp4`` and ``a`` are one video."""
    ids = {split: {without_suffix(entry.video) for entry in part.values()} for split, part in entries.items()}
    shared = {split: sorted(ids[split] & ids.get("train", set())) for split in ids if split != "train"}
    return tuple(f"{len(v)} videos are in both train and {s}: {', '.join(v[:5])}" for s, v in shared.items() if v)


def spelling_warnings(answers: Iterable[str]) -> tuple[str, ...]:
    """A sentence where answers differ in upper and lower case alone: exact match takes them for different ones."""
    spellings: dict[str, Counter[str]] = {}
    for answer in answers:
        spellings.setdefault(answer.casefold(), Counter())[answer] += 1
    several = [counts for counts in spellings.values() if len(counts) > 1]
    if not several:
        return ()
    shown = ", ".join(f"{answer!r} ({count} times)" for answer, count in several[0].most_common(3))
    return (f"{len(several)} answers are written in several ways, which count as different answers: {shown}",)


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
        hint = f"\nTake one of them:  --split {splits[0]}" if splits else ""
        raise ValueError(f"these annotations have no split {split!r}; they have {', '.join(splits) or 'none'}{hint}")
    return split


def count_or_one(videos: Videos, video: str) -> int:
    """Grid frames of a video; 1 where they cannot be counted, so that extraction tries it and records the reason."""
    try:
        return max(videos.count_frames(video), 1)
    except VideoRejected:
        return 1


def _with_lengths(
    entries: dict[str, dict[str, E]], where: str, fps: float, videos: Videos | None
) -> tuple[dict[str, dict[str, E]], dict[str, int]]:
    """The entries under the names of their videos, and every video's frames on the grid."""
    given = {e.video: grid_count(e.count, fps) for part in entries.values() for e in part.values() if e.count}
    asked = list(dict.fromkeys(e.video for part in entries.values() for e in part.values() if e.video not in given))
    if not asked:
        return entries, given
    hint = "Name the folder of the videos, which tell it:  --set data.videos=DIR"
    if videos is None:
        raise AnnotationError(
            where, [f"does not say how many frames {len(asked)} videos have, such as {asked[0]}"], hint
        )
    names = {video: _name_of(video, videos) for video in asked}
    if not given and all(name is None for name in names.values()):
        tried = ", ".join(_names_of(asked[0]))
        message = f"none of the {len(asked)} videos that it asks about is in data.videos; looked for {tried}, …"
        mapping = "The names behind MSVD-QA's numbers are in its youtube_mapping.txt: put it beside the annotations."
        raise AnnotationError(where, [message], f"{mapping}\n{hint}" if asked[0].isdigit() else hint)
    final = {video: name or video for video, name in names.items()}
    counts = {name: count_or_one(videos, name) for name in dict.fromkeys(final.values())}

    def renamed(key: str, entry: E) -> tuple[str, E]:
        name = final.get(entry.video, entry.video)
        if name == entry.video:
            return key, entry
        return name if key == entry.video else key, entry.model_copy(update={"video": name})

    return {split: dict(renamed(*item) for item in part.items()) for split, part in entries.items()}, given | counts


def _name_of(video: str, videos: Videos) -> str | None:
    """The id under which the videos hold it, or None."""
    return next((name for name in _names_of(video) if videos.has(name)), None)


def _names_of(video: str) -> list[str]:
    return [video, *(prefix + video for prefix in PREFIXES if prefix == "v_" or video.isdigit())]


def without_suffix(video: str) -> str:
    """An id without what looks like the suffix of a video file: either names the same video."""
    name, dot, suffix = video.rpartition(".")
    return name if dot and name and f".{suffix}".lower() in VIDEO_SUFFIXES else video


def _entry(path: Path, key: str, value: dict[str, Any], model: type[E], problems: Problems) -> E | None:
    video = value.get("video")
    if isinstance(video, str) and (reason := unsafe_reason(video.strip())):
        problems.add(path, f"video id {shown_id(video)} {reason}", key=key)
        return None
    try:
        entry = model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = ".".join(str(part) for part in detail["loc"])
            got = "" if detail["type"] == "missing" else f"; got {shown_value(detail['input'])}"
            problems.add(path, f"{detail['msg']}{got}", key=key, name=name)
        return None
    if isinstance(entry, LvuEntry) and entry.duration is not None and entry.num_frames is None:
        problems.add(path, "Field required", key=key, name="num_frames")
        return None
    if message := _contradiction(key, entry):
        problems.add(path, message, key=key)
        return None
    return entry


def _contradiction(key: str, entry: Entry) -> str:
    """Fields that cannot both be true, in words, or the empty string."""
    if isinstance(entry, LvuEntry) and entry.duration is not None and entry.num_frames is not None:
        missing = ANNOTATION_FPS * entry.duration - entry.num_frames
        if missing > TOLERATED_MISSING_FRAMES:
            return f"num_frames counts 10 frames per second, so {entry.num_frames} is too few for {entry.duration:g} s"
    if isinstance(entry, QaEntry) and entry.question_id is not None and entry.question_id.strip() != key.strip():
        return f"question_id {shown_value(entry.question_id)} differs from its key"
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
