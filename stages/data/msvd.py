"""MSVD-QA: one-word questions about short clips (MA-LMM's protocol)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotations import (
    QaEntry,
    Videos,
    check_split,
    distinct_answers,
    leak_warnings,
    read_annotations,
    spelling_warnings,
    union_frames,
)
from stages.data.sampling import segment_draws, uniform_frames
from stages.types import Sample

PUBLISHED_QUESTIONS = {"train": 30_933, "val": 6_415, "test": 13_157}
PROMPT = "Question: {} Short answer:"  # MA-LMM, in training and in evaluation
_REMOVED = re.compile(r'[.!"()*#:;~]')  # MA-LMM's question cleaning


class MsvdQaDataset:
    """``data.annotations`` is a folder with one file of questions per split, in any layout: MA-LMM's, or the authors'.

    Training frames are ``data.draws`` seeded random draws per segment, the same for all questions of a video
    (MA-LMM draws anew each time: D23); validation and test frames are evenly spaced. ``videos`` are asked what the
    annotations do not say.
    """

    answer_rule: ClassVar[Literal["first_word"]] = "first_word"
    leaks: ClassVar[tuple[str, ...]] = ()  # one task

    def __init__(self, cfg: DataConfig, videos: Videos | None = None) -> None:
        self.cfg = cfg
        read = read_annotations(cfg.annotations, fps=cfg.fps, layout="qa", videos=videos)
        self._entries, self._frames = read.questions, read.frames
        self.splits = tuple(self._entries)
        answers = (entry.answer for part in self._entries.values() for entry in part.values())
        self.warnings = (*read.warnings, *leak_warnings(self._entries), *spelling_warnings(answers))

    def samples(self, split: str) -> list[Sample]:
        """All questions of a split, in annotation order."""
        entries = self._entries[check_split(split, self.splits)]
        return qa_samples(entries, self._frames, self.cfg, random_draws=split == "train")

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """Sorted unique grid indices per video, over the samples of these splits (default: all)."""
        chosen = self.splits if splits is None else splits
        return union_frames([sample for split in chosen for sample in self.samples(split)])

    def labels(self, split: str) -> tuple[str, ...]:
        """The distinct answers of a split, sorted."""
        return distinct_answers(self.samples(split))

    def published_n(self, split: str) -> int | None:
        """Number of questions in the published split; None where the annotations are of other videos than MSVD's."""
        if any(entry.dataset != "msvd" for entry in self._entries.get(split, {}).values()):
            return None
        return PUBLISHED_QUESTIONS.get(split)


def qa_samples(
    entries: Mapping[str, QaEntry], frames_of: Mapping[str, int], cfg: DataConfig, *, random_draws: bool
) -> list[Sample]:
    """One sample per question. The questions of one video share one array of frames.

    ``frames_of`` is the number of grid frames of each video.
    """
    frames: dict[str, Int[np.ndarray, "K T"]] = {}
    samples = []
    for key, entry in entries.items():
        if entry.video not in frames:
            frames[entry.video] = _draws(entry.video, frames_of[entry.video], cfg, random_draws=random_draws)
        group = entry.answer_type or entry.question.split()[0].lower()
        prompt = PROMPT.format(clean_question(entry.question))
        samples.append(Sample(key, entry.video, frames[entry.video], prompt, entry.answer, group))
    return samples


def clean_question(question: str) -> str:
    """Lower case, without ``.!"()*#:;~``: the text MA-LMM puts into the prompt."""
    return _REMOVED.sub("", question.lower()).strip()


def _draws(video: str, count: int, cfg: DataConfig, *, random_draws: bool) -> Int[np.ndarray, "K T"]:
    if random_draws:
        return segment_draws(count, cfg.num_frames, draws=cfg.draws, seed=cfg.draw_seed, video_id=video)
    return uniform_frames(count, cfg.num_frames)[None]
