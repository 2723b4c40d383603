"""LVU: 100-second windows of film clips, one label per task (MA-LMM's protocol)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotation_files import AnnotationError, Problems, shown_value
from stages.data.annotations import (
    CORRECT,
    LvuEntry,
    Videos,
    check_split,
    distinct_answers,
    leak_warnings,
    read_annotations,
    spelling_warnings,
    union_frames,
)
from stages.data.sampling import window_frames, window_starts
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
    """One task of LVU, or several. ``data.annotations`` is a folder with train.json, val.json, test.json (any of them).

    A sample is one window of one video; every window of a video has the video's label. ``leaks`` names the videos that
    train one of several tasks and test another. ``videos`` are asked what the annotations do not say.
    """

    answer_rule: ClassVar[Literal["exact"]] = "exact"

    def __init__(self, cfg: DataConfig, videos: Videos | None = None) -> None:
        self.cfg = cfg
        tasks = tasks_of(cfg)
        read = read_annotations(cfg.annotations, fps=cfg.fps, layout="lvu", tasks=tasks, videos=videos)
        self._entries, self._frames = read.labels, read.frames
        check_task(cfg, self._entries, cfg.annotations)
        self.splits = tuple(self._entries)
        self.leaks = cross_task_videos(self._entries, tasks)
        self.warnings = (
            *read.warnings,
            *leak_warnings(with_task(self._entries, tasks)),
            *spelling_warnings(labels_of(self._entries, tasks)),
        )

    def samples(self, split: str) -> list[Sample]:
        """Windows of the videos that have a label for the task, in annotation order."""
        return lvu_samples(self._entries[check_split(split, self.splits)], self._frames, self.cfg)

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """Sorted unique grid indices per video, over the windows of these splits (default: all)."""
        chosen = self.splits if splits is None else splits
        return union_frames([sample for split in chosen for sample in self.samples(split)])

    def labels(self, split: str) -> tuple[str, ...]:
        """The label set of a split, sorted."""
        return distinct_answers(self.samples(split))

    def published_n(self, split: str) -> int | None:
        """Number of test windows behind the published figures of these tasks; None for other splits and tasks."""
        if split != "test" or not set(tasks_of(self.cfg)) <= PUBLISHED_TEST_WINDOWS.keys():
            return None
        return sum(PUBLISHED_TEST_WINDOWS[task] for task in tasks_of(self.cfg))


def tasks_of(cfg: DataConfig) -> tuple[str, ...]:
    """The label keys that ``data.task`` names, in its order, each once."""
    return tuple(dict.fromkeys(name.strip() for name in cfg.task.split(",")))


def check_task(cfg: DataConfig, entries: LvuEntries, where: str) -> None:
    """Raise AnnotationError if no video has a label for one of the tasks, or if some label of it is not a text."""
    problems = Problems(where, hint=CORRECT)
    tasks = tasks_of(cfg)
    for split, part in entries.items():
        for video, entry in part.items():
            for task in tasks:
                if task in (entry.model_extra or {}) and not entry.label(task):
                    got = (entry.model_extra or {})[task]
                    problems.found.append(
                        f"{split}:{video}:{task} a label must be a text that is not empty; got {shown_value(got)}"
                    )
    problems.raise_any()
    known = sorted({name for part in entries.values() for entry in part.values() for name in entry.tasks()})
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, n=3) or known
            message = f"no video has a label for task {task!r}; the tasks are {', '.join(known[:20]) or 'none'}"
            raise AnnotationError(where, [message], f"Take the nearest:  --set data.task={near[0]}" if near else "")


def labels_of(entries: LvuEntries, tasks: Sequence[str]) -> list[str]:
    """Every label of the tasks, as often as it is given."""
    given = (entry.label(task) for part in entries.values() for entry in part.values() for task in tasks)
    return [label for label in given if label]


def with_task(entries: LvuEntries, tasks: Sequence[str]) -> dict[str, dict[str, LvuEntry]]:
    """Only the videos that have a label for one of the tasks."""
    return {
        split: {video: entry for video, entry in part.items() if any(entry.label(task) for task in tasks)}
        for split, part in entries.items()
    }


def lvu_samples(entries: Mapping[str, LvuEntry], frames_of: Mapping[str, int], cfg: DataConfig) -> list[Sample]:
    """Every window of every video with a label for ``cfg.task``; of several tasks, one after another.

    ``frames_of`` is the number of grid frames of each video. With several tasks an id ends in its task, since a window
    is then asked more than once.
    """
    tasks = tasks_of(cfg)
    marks = {task: f"#{task}" if len(tasks) > 1 else "" for task in tasks}
    return [sample for task in tasks for sample in _windows(entries, frames_of, cfg, task, marks[task])]


def _windows(
    entries: Mapping[str, LvuEntry], frames_of: Mapping[str, int], cfg: DataConfig, task: str, mark: str
) -> list[Sample]:
    prompt = lvu_prompt(task, cfg.prompt_style)
    samples = []
    for entry in entries.values():
        if (label := entry.label(task)) is None:
            continue
        video = entry.video
        count = frames_of[video]
        duration = count / cfg.fps if entry.duration is None else entry.duration
        for start in window_starts(duration, history_s=cfg.history_s, stride_s=cfg.stride_s):
            frames = window_frames(
                start,
                duration_s=duration,
                num_frames=count,
                fps=cfg.fps,
                history_s=cfg.history_s,
                length=cfg.num_frames,
            )
            samples.append(Sample(f"{video}@{start}s{mark}", video, frames[None], prompt, label, task))
    return samples


def lvu_prompt(task: str, style: Literal["malmm", "paper"]) -> str:
    """The question about a task: MA-LMM's raw key in lower case, or the sentence and words of §4.2 (D16)."""
    if style == "malmm":
        return f"what is the {task} of the movie?"
    return f"What is the {PAPER_WORDS.get(task, task.replace('_', ' '))} of the movie?"


def cross_task_videos(entries: LvuEntries, tasks: Sequence[str]) -> tuple[str, ...]:
    """Videos that train one task and test another: a student trained on all of them has seen its test videos.

    None for one task. All seven tasks of LVU: 204.
    """
    if len(tasks) < 2:
        return ()
    chosen = with_task(entries, tasks)
    train, test = ({entry.video for entry in chosen.get(split, {}).values()} for split in ("train", "test"))
    return tuple(sorted(train & test))
