"""LVU: 100-second windows of film clips, one label per task (MA-LMM's annotation layout and protocol)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotations import (
    SPLITS,
    AnnotationError,
    LvuEntry,
    Problems,
    check_split,
    distinct_answers,
    leak_warnings,
    load_files,
    require_path,
    union_frames,
    validated,
)
from stages.data.sampling import grid_count, window_frames, window_starts
from stages.types import Sample

# Test windows behind every LVU figure of MA-LMM and Diff-LMM (Table 1): all 14 are k / n at these n.
PUBLISHED_TEST_WINDOWS = {
    "relationship": 91,
    "way_speaking": 473,
    "scene": 218,
    "director": 268,
    "genre": 1291,
    "writer": 432,
    "year": 337,
}
PAPER_WORDS = {"way_speaking": "speaking style", "year": "release year"}  # §4.2; the other tasks are named as they are

LvuEntries = Mapping[str, Mapping[str, LvuEntry]]  # split -> video -> entry


class LvuDataset:
    """One task of LVU. ``data.annotations`` is a folder with train.json, val.json and test.json (any of them).

    A sample is one window of one video; every window of a video has the video's label.
    """

    answer_rule: ClassVar[Literal["exact"]] = "exact"

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg = cfg
        self._entries = read_lvu(cfg.annotations)
        check_task(cfg.task, self._entries, cfg.annotations)
        self.splits = tuple(self._entries)
        self.warnings = leak_warnings(with_task(self._entries, cfg.task))

    def samples(self, split: str) -> list[Sample]:
        """Windows of the videos that have a label for the task, in annotation order."""
        return lvu_samples(self._entries[check_split(split, self.splits)], self.cfg)

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """Sorted unique grid indices per video, over the windows of these splits (default: all)."""
        chosen = self.splits if splits is None else splits
        return union_frames([sample for split in chosen for sample in self.samples(split)])

    def labels(self, split: str) -> tuple[str, ...]:
        """The label set of a split, sorted."""
        return distinct_answers(self.samples(split))

    def published_n(self, split: str) -> int | None:
        """Number of test windows behind the published figures of this task; None for other splits and tasks."""
        return PUBLISHED_TEST_WINDOWS.get(self.cfg.task) if split == "test" else None


def read_lvu(annotations: str) -> dict[str, dict[str, LvuEntry]]:
    """Entries of all tasks by split and video id. Raises AnnotationError with every problem found."""
    folder = require_path(annotations)
    paths = {split: folder / f"{split}.json" for split in SPLITS if (folder / f"{split}.json").exists()}
    problems = Problems(str(folder))
    if not paths:
        raise AnnotationError(str(folder), ["has none of train.json, val.json, test.json"])
    entries = validated(load_files({s: [p] for s, p in paths.items()}, problems), LvuEntry, problems)
    problems.raise_any()
    return entries


def check_task(task: str, entries: LvuEntries, where: str) -> None:
    """Raise AnnotationError if no video has a label for ``task``, or if some label of it is not a text."""
    problems = Problems(where)
    for split, part in entries.items():
        for video, entry in part.items():
            if task in (entry.model_extra or {}) and not entry.label(task):
                got = (entry.model_extra or {})[task]
                problems.found.append(
                    f"{split}:{video}:{task} a label must be a text that is not empty; got {got!r:.60}"
                )
    problems.raise_any()
    known = sorted({name for part in entries.values() for entry in part.values() for name in entry.tasks()})
    if task not in known:
        near = get_close_matches(task, known, n=3) or known
        message = f"no video has a label for task {task!r}. Give:  --set data.task={' | '.join(near) or 'NAME'}"
        raise AnnotationError(where, [message])


def with_task(entries: LvuEntries, task: str) -> dict[str, dict[str, LvuEntry]]:
    """Only the videos that have a label for ``task``."""
    return {split: {v: e for v, e in part.items() if e.label(task)} for split, part in entries.items()}


def lvu_samples(entries: Mapping[str, LvuEntry], cfg: DataConfig) -> list[Sample]:
    """Every window of every video with a label for ``cfg.task``."""
    prompt = lvu_prompt(cfg.task, cfg.prompt_style)
    samples = []
    for video, entry in entries.items():
        if (label := entry.label(cfg.task)) is None:
            continue
        count = grid_count(entry.num_frames, cfg.fps)
        for start in window_starts(entry.duration, history_s=cfg.history_s, stride_s=cfg.stride_s):
            frames = window_frames(
                start,
                duration_s=entry.duration,
                num_frames=count,
                fps=cfg.fps,
                history_s=cfg.history_s,
                length=cfg.num_frames,
            )
            samples.append(Sample(f"{video}@{start}s", video, frames[None], prompt, label, cfg.task))
    return samples


def lvu_prompt(task: str, style: Literal["malmm", "paper"]) -> str:
    """The question about a task: MA-LMM's raw key in lower case, or the sentence and words of §4.2 (D16)."""
    if style == "malmm":
        return f"what is the {task} of the movie?"
    return f"What is the {PAPER_WORDS.get(task, task.replace('_', ' '))} of the movie?"


def cross_task_videos(annotations: str) -> tuple[str, ...]:
    """Videos that train one task and test another (204 in LVU): a student trained on several tasks has seen them."""
    entries = read_lvu(annotations)
    return tuple(sorted(entries.get("train", {}).keys() & entries.get("test", {}).keys()))
