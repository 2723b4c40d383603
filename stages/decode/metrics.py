"""Scores of predictions, from text alone: no model, no torch.

MA-LMM's rules (its LVU and MSVD-QA evaluation): a prediction counts when it equals the label as a string,
case-sensitive, after stripping. Top-1 looks at the best beam, top-5 at any of the first five. That is the headline;
everything else (one answer per video, the label set ranked by likelihood, constrained decoding) stands beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stages.decode.statistics import Interval, share_interval, wilson

MAX_CLASSES = 64  # up to here a confusion matrix is made, and every class has an interval over videos
OTHER = "(other)"  # column of the confusion matrix for answers that are no label;

Match = Literal["exact", "first_word"]
"""``exact``: the whole string (LVU). ``first_word``: up to the first space (MSVD-QA, whose answers are one word)."""


@dataclass(frozen=True)
class Prediction:
    """What one sample was asked, what is true, and what the model said (``beams``, best first).

    ``run`` names the checkpoint and settings that made it, so that a resumed evaluation never mixes two. The last three
    exist where the answers form a closed set and the evaluation was asked for them (``decode.closed_set``).
    """

    sample_id: str
    video_id: str
    group: str
    prompt: str
    answer: str
    beams: tuple[str, ...]
    run: str = ""
    ranked: tuple[str, ...] = ()  # the label set, most likely first
    scores: tuple[float, ...] = ()  # log-likelihood of each of ``ranked``
    constrained: tuple[str, ...] = ()  # beams of a search that can give labels only, best first


@dataclass(frozen=True)
class Tally:
    """Counts of one set of predictions, and the shares that follow from them (fractions; None where n is 0)."""

    n: int
    correct: int  # by the best beam
    correct5: int  # by any of the first five beams
    majority_correct: int  # by always saying the most frequent answer of this very set
    by_video: Interval | None = None  # of ``top1``, drawing whole videos

    @property
    def top1(self) -> float | None:
        """Share answered by the best beam."""
        return _share(self.correct, self.n)

    @property
    def top5(self) -> float | None:
        """Share answered by one of the first five beams."""
        return _share(self.correct5, self.n)

    @property
    def majority(self) -> float | None:
        """What a model gets that always says the most frequent answer: the number to beat."""
        return _share(self.majority_correct, self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of ``top1`` (Wilson), as if samples were independent; windows of one video are not."""
        return wilson(self.correct, self.n)

    def to_json(self) -> dict[str, object]:
        """Plain values under the names that ``evaluate --json`` promises."""
        return {
            "n": self.n,
            "correct": self.correct,
            "top1": self.top1,
            "top5": self.top5,
            "majority": self.majority,
            "interval": None if self.interval is None else list(self.interval),
            "by_video": None if self.by_video is None else self.by_video.to_json(),
        }


@dataclass(frozen=True)
class ClassScore:
    """One true answer: ``tally.top1`` is its recall. A prediction counts for the class that it says (by the rule)."""

    tally: Tally
    said: int  # predictions that say this answer, rightly or not

    @property
    def precision(self) -> float | None:
        """Share of the predictions saying this answer that are right; None where none says it."""
        return _share(self.tally.correct, self.said)

    @property
    def f1(self) -> float:
        """2 · correct / (said + true)."""
        return 2 * self.tally.correct / (self.said + self.tally.n)

    def to_json(self) -> dict[str, object]:
        """Recall under ``top1``, with precision and F1; no majority, which is 1 by definition."""
        counts = {key: value for key, value in self.tally.to_json().items() if key != "majority"}
        return counts | {"said": self.said, "precision": self.precision, "f1": self.f1}


@dataclass(frozen=True)
class Report:
    """Everything said about one evaluation.

    ``per_class`` keys are the true answers; ``per_group`` keys are question types or LVU tasks. Both are sorted by key.
    ``video_level`` holds one answer per video and question; it is empty where each question is asked once. ``closed``
    holds the scores of ``ranked`` and ``constrained``, where every prediction has them.
    """

    match: Match
    overall: Tally
    videos: int
    majority_answer: str | None
    train_majority: float | None  # share right by always saying the answer that the training set has most often
    macro: float | None  # mean recall over the classes that occur
    macro_f1: float | None  # mean F1 over the classes that occur
    per_class: Mapping[str, ClassScore]
    per_group: Mapping[str, Tally]
    confusion: tuple[tuple[int, ...], ...] | None  # rows: true classes; columns: the same, then OTHER
    video_level: Mapping[str, Tally]
    closed: Mapping[str, Tally]

    def to_json(self) -> dict[str, object]:
        """The overall numbers at the top level, the rest beside them."""
        return {
            **self.overall.to_json(),
            "match": self.match,
            "videos": self.videos,
            "majority_answer": self.majority_answer,
            "train_majority": self.train_majority,
            "macro": self.macro,
            "macro_f1": self.macro_f1,
            "per_class": {name: part.to_json() for name, part in self.per_class.items()},
            "per_group": {name: tally.to_json() for name, tally in self.per_group.items()},
            "confusion": None
            if self.confusion is None
            else {"labels": [*self.per_class, OTHER], "counts": [list(row) for row in self.confusion]},
            "video_level": {name: tally.to_json() for name, tally in self.video_level.items()},
            "closed": {name: tally.to_json() for name, tally in self.closed.items()},
        }


def score(records: Sequence[Prediction], match: Match, *, train_majority: str | None = None) -> Report:
    """Score predictions.

    Args:
        records: one per sample; order does not matter.
        match: the rule of the dataset.
        train_majority: the most frequent answer of the training set, where it is known.
    """
    classes = _grouped(records, [r.answer.strip() for r in records])
    said = Counter(_said(r, match) for r in records)
    few = len(classes) <= MAX_CLASSES
    per_class = {name: ClassScore(tally(part, match, by_video=few), said[name]) for name, part in classes.items()}
    recalls = [share for part in per_class.values() if (share := part.tally.top1) is not None]
    always = None if train_majority is None else sum(r.answer.strip() == train_majority.strip() for r in records)
    return Report(
        match=match,
        overall=tally(records, match),
        videos=len({r.video_id for r in records}),
        majority_answer=most_frequent([r.answer for r in records]),
        train_majority=None if always is None else _share(always, len(records)),
        macro=_mean(recalls),
        macro_f1=_mean([part.f1 for part in per_class.values()]),
        per_class=per_class,
        per_group={name: tally(m, match) for name, m in _grouped(records, [r.group for r in records]).items()},
        confusion=_confusion(classes, match) if few else None,
        video_level=_video_level(records, match),
        closed=_closed(records, match),
    )


def tally(records: Sequence[Prediction], match: Match, *, by_video: bool = True) -> Tally:
    """Count one set of predictions."""
    hits = [[is_correct(beam, r.answer, match) for beam in r.beams[:5]] for r in records]
    answers = Counter(r.answer.strip() for r in records)
    right = [any(h[:1]) for h in hits]
    return Tally(
        n=len(records),
        correct=sum(right),
        correct5=sum(any(h) for h in hits),
        majority_correct=max(answers.values(), default=0),
        by_video=share_interval(np.array(right, dtype=float), [r.video_id for r in records]) if by_video else None,
    )


def hits(records: Sequence[Prediction], match: Match) -> list[int]:
    """1 where the best beam is right, 0 where it is not."""
    return [int(any(is_correct(beam, r.answer, match) for beam in r.beams[:1])) for r in records]


def one_per_video(records: Sequence[Prediction], match: Match, by: Literal["vote", "mean"]) -> list[Prediction]:
    """One prediction for all windows of a video that share a question.

    ``vote``: the answer that most windows give first; among equals the one with the larger sum of 1 / rank over all
    beams, then the first in alphabetical order. ``mean``: the label with the best mean of ``scores``.
    """
    together: dict[tuple[str, str, str], list[Prediction]] = {}
    for record in records:
        together.setdefault((record.video_id, record.prompt, record.answer), []).append(record)
    ranking = _by_vote if by == "vote" else _by_mean
    return [replace(windows[0], beams=ranking(windows, match)) for windows in together.values()]


def _by_vote(windows: Sequence[Prediction], match: Match) -> tuple[str, ...]:
    votes = Counter(_said(w, match) for w in windows if w.beams)
    ranks: dict[str, float] = {}
    for window in windows:
        for rank, beam in enumerate(window.beams, start=1):
            answer = spoken(beam, match)
            ranks[answer] = ranks.get(answer, 0.0) + 1 / rank
    return tuple(sorted(ranks, key=lambda answer: (-votes[answer], -ranks[answer], answer)))


def _by_mean(windows: Sequence[Prediction], match: Match) -> tuple[str, ...]:
    del match  # the label set holds whole answers
    sums: dict[str, float] = {}
    for window in windows:
        for answer, value in zip(window.ranked, window.scores, strict=True):
            sums[answer] = sums.get(answer, 0.0) + value
    return tuple(sorted(sums, key=lambda answer: (-sums[answer], answer)))


def _video_level(records: Sequence[Prediction], match: Match) -> dict[str, Tally]:
    votes = one_per_video(records, match, "vote")
    if len(votes) == len(records):
        return {}
    levels = {"vote": tally(votes, match)}
    if all(r.scores for r in records):
        levels["mean"] = tally(one_per_video(records, match, "mean"), match)
    return levels


def _closed(records: Sequence[Prediction], match: Match) -> dict[str, Tally]:
    tallies = {}
    if records and all(r.ranked for r in records):
        tallies["ranked"] = tally([replace(r, beams=r.ranked) for r in records], match)
    if records and all(r.constrained for r in records):
        tallies["constrained"] = tally([replace(r, beams=r.constrained) for r in records], match)
    return tallies


def _confusion(classes: Mapping[str, Sequence[Prediction]], match: Match) -> tuple[tuple[int, ...], ...]:
    rows = []
    for members in classes.values():
        said = Counter(_said(r, match) for r in members)
        row = [said[name] for name in classes]
        rows.append((*row, len(members) - sum(row)))
    return tuple(rows)


def _said(record: Prediction, match: Match) -> str | None:
    return spoken(record.beams[0], match) if record.beams else None


def spoken(beam: str, match: Match) -> str:
    """The part of a beam that the rule compares: case-sensitive, no normalisation beyond stripping (MA-LMM)."""
    said = beam.strip()
    return said.split(" ")[0] if match == "first_word" else said


def is_correct(beam: str, answer: str, match: Match) -> bool:
    """Whether one beam is the answer."""
    return spoken(beam, match) == answer.strip()


def most_frequent(answers: Sequence[str]) -> str | None:
    """The most frequent answer, the first in sorting order among equals; None where there are none."""
    counts = Counter(answer.strip() for answer in answers)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=None)


def _grouped(records: Sequence[Prediction], keys: Sequence[str]) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for key, record in sorted(zip(keys, records, strict=True), key=lambda pair: pair[0]):
        groups.setdefault(key, []).append(record)
    return groups


def _share(part: int, n: int) -> float | None:
    return part / n if n else None


def _mean(shares: Sequence[float]) -> float | None:
    return math.fsum(shares) / len(shares) if shares else None
