"""Any folder of videos with annotations in any of the layouts, or with none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotation_files import SPLITS, AnnotationError
from stages.data.annotations import (
    Annotations,
    Entry,
    Videos,
    check_split,
    count_or_one,
    distinct_answers,
    leak_warnings,
    read_annotations,
    spelling_warnings,
)
from stages.data.lvu import check_task, cross_task_videos, labels_of, lvu_samples, tasks_of
from stages.data.msvd import qa_samples
from stages.types import Sample


class ClipsDataset:
    """``data.annotations`` is one file, a folder with one file per split, or nothing.

    The layout is recognised by the fields of the entries. ``subset`` of an entry (either layout) names its split; a
    single file without any puts every entry into every split, and ``warnings`` says so. All grid frames of every
    annotated video are wanted, so that windows, T or the task can change without a new extraction. In the QA layout
    frames are evenly spaced in training too, unless ``data.draws`` asks for more than one choice.

    Without annotations there are no samples, and all videos are wanted whole. A video whose length is refused
    (VideoRejected) wants frame 0, so that extraction tries it and records the reason.

    Args:
        videos: asked for ids and lengths that no annotation says.
    """

    answer_rule: ClassVar[Literal["exact"]] = "exact"

    def __init__(self, cfg: DataConfig, videos: Videos | None = None) -> None:
        self.cfg = cfg
        self._read: Annotations | None = None
        if cfg.annotations:
            self._read = read_annotations(cfg.annotations, fps=cfg.fps, tasks=tasks_of(cfg), videos=videos)
            if self._read.layout == "lvu":
                check_task(cfg, self._read.labels, cfg.annotations)
            self._frames = self._read.frames
        elif videos is not None:
            self._frames = {video: count_or_one(videos, video) for video in videos.video_ids()}
        else:
            raise AnnotationError(
                "data.annotations", ["are not set, and neither are the videos"], "Name them:  --set data.videos=DIR"
            )
        self.splits = tuple(self._entries)
        self.leaks = () if self._read is None else cross_task_videos(self._read.labels, tasks_of(cfg))
        self.warnings = self._collect_warnings()

    @property
    def layout(self) -> Literal["lvu", "qa", "none"]:
        """What the annotations are, ``none`` without any."""
        return "none" if self._read is None else self._read.layout

    @property
    def _entries(self) -> Mapping[str, Mapping[str, Entry]]:
        return {} if self._read is None else self._read.entries

    def samples(self, split: str) -> list[Sample]:
        """Windows (LVU layout) or questions (QA layout) of a split, in annotation order."""
        check_split(split, self.splits)
        assert self._read is not None, "no splits without annotations"
        if self._read.layout == "lvu":
            return lvu_samples(self._read.labels[split], self._frames, self.cfg)
        random_draws = split == "train" and self.cfg.draws > 1
        return qa_samples(self._read.questions[split], self._frames, self.cfg, random_draws=random_draws)

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """All grid indices of every video in these splits (default: all splits; without annotations, all videos)."""
        if self._read is None:
            videos = list(self._frames)
        else:
            chosen = [check_split(split, self.splits) for split in (self.splits if splits is None else splits)]
            videos = [entry.video for split in chosen for entry in self._entries[split].values()]
        return {video: np.arange(self._frames[video], dtype=np.int64) for video in dict.fromkeys(videos)}

    def labels(self, split: str) -> tuple[str, ...]:
        """The distinct answers of a split, sorted."""
        return distinct_answers(self.samples(split))

    def published_n(self, split: str) -> int | None:  # noqa: ARG002 - nothing is published about a folder of clips
        """None: there is no published protocol."""
        return None

    def _collect_warnings(self) -> tuple[str, ...]:
        if self._read is None:
            return ("no annotations: features can be extracted, nothing can be trained or scored",)
        if self._read.layout == "lvu":
            answers = labels_of(self._read.labels, tasks_of(self.cfg))
        else:
            answers = [entry.answer for part in self._read.questions.values() for entry in part.values()]
        said = (*self._read.warnings, *spelling_warnings(answers))
        if self._read.repeated:
            name = Path(self.cfg.annotations).name
            return (
                *said,
                f"{name} names no splits: train, val and test are the same samples, so scores measure memory",
            )
        absent = [split for split in SPLITS if split not in self.splits]
        missing = (f"the annotations have no {split} split" for split in absent)
        return (*said, *missing, *leak_warnings(self._entries))
