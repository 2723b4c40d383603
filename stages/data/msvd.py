"""MSVD-QA: one-word questions about short clips (MA-LMM's annotation layout and protocol)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotations import (
    SPLITS,
    AnnotationError,
    Problems,
    QaEntry,
    check_split,
    distinct_answers,
    leak_warnings,
    load_files,
    require_path,
    union_frames,
    validated,
)
from stages.data.sampling import grid_count, segment_draws, uniform_frames
from stages.types import Sample

PUBLISHED_QUESTIONS = {"train": 30_933, "val": 6_415, "test": 13_157}
PROMPT = "Question: {} Short answer:"  # MA-LMM, in training and in evaluation
_REMOVED = re.compile(r'[.!"()*#:;~]')  # MA-LMM's question cleaning


class MsvdQaDataset:
    """``data.annotations`` is a folder with qa_train.json (or qa_train_part1.json, ...), qa_val.json, qa_test.json.

    Training frames are ``data.draws`` seeded random draws per segment, the same for all questions of a video
    (MA-LMM draws anew each time: D23); validation and test frames are evenly spaced.
    """

    answer_rule: ClassVar[Literal["first_word"]] = "first_word"
    leaks: ClassVar[tuple[str, ...]] = ()  # one task

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg = cfg
        self._entries = read_qa(cfg.annotations)
        self.splits = tuple(self._entries)
        self.warnings = leak_warnings(self._entries)

    def samples(self, split: str) -> list[Sample]:
        """All questions of a split, in annotation order."""
        return qa_samples(self._entries[check_split(split, self.splits)], self.cfg, random_draws=split == "train")

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


def read_qa(annotations: str) -> dict[str, dict[str, QaEntry]]:
    """Questions by split and question id. Raises AnnotationError with every problem found."""
    folder = require_path(annotations)
    files = qa_files(folder)
    if not files:
        raise AnnotationError(str(folder), ["has none of qa_train*.json, qa_val.json, qa_test.json"])
    problems = Problems(str(folder))
    entries = validated(load_files(files, problems), QaEntry, problems)
    problems.raise_any()
    return entries


def qa_files(folder: Path) -> dict[str, list[Path]]:
    """``qa_<split>.json`` and ``qa_<split>_part<n>.json`` by split, in order of their names."""
    found = {}
    for split in SPLITS:
        pattern = re.compile(rf"qa_{split}(_part\d+)?\.json")
        if paths := sorted(path for path in folder.glob(f"qa_{split}*.json") if pattern.fullmatch(path.name)):
            found[split] = paths
    return found


def qa_samples(entries: Mapping[str, QaEntry], cfg: DataConfig, *, random_draws: bool) -> list[Sample]:
    """One sample per question. The questions of one video share one array of frames."""
    frames: dict[str, Int[np.ndarray, "K T"]] = {}
    samples = []
    for key, entry in entries.items():
        if entry.video not in frames:
            frames[entry.video] = _draws(entry, cfg, random_draws=random_draws)
        group = entry.answer_type or entry.question.split()[0].lower()
        prompt = PROMPT.format(clean_question(entry.question))
        samples.append(Sample(key, entry.video, frames[entry.video], prompt, entry.answer, group))
    return samples


def clean_question(question: str) -> str:
    """Lower case, without ``.!"()*#:;~``: the text MA-LMM puts into the prompt."""
    return _REMOVED.sub("", question.lower()).strip()


def _draws(entry: QaEntry, cfg: DataConfig, *, random_draws: bool) -> Int[np.ndarray, "K T"]:
    count = grid_count(entry.frame_length, cfg.fps)
    if random_draws:
        return segment_draws(count, cfg.num_frames, draws=cfg.draws, seed=cfg.draw_seed, video_id=entry.video)
    return uniform_frames(count, cfg.num_frames)[None]
