"""Scores of predictions, from text alone: no model, no torch.

MA-LMM's rules (its LVU and MSVD-QA evaluation): a prediction counts when it equals the label as a string,
case-sensitive, after stripping. Top-1 looks at the best beam, top-5 at any of the first five.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution

Match = Literal["exact", "first_word"]
"""``exact``: the whole string (LVU). ``first_word``: up to the first space (MSVD-QA, whose answers are one word)."""


@dataclass(frozen=True)
class Prediction:
    """What one sample was asked, what is true, and what the model said (``beams``, best first).

    ``run`` names the checkpoint and settings that made it, so that a resumed evaluation never mixes two.
    """

    sample_id: str
    video_id: str
    group: str
    prompt: str
    answer: str
    beams: tuple[str, ...]
    run: str = ""


@dataclass(frozen=True)
class Tally:
    """Counts of one set of predictions, and the shares that follow from them (fractions; None where n is 0)."""

    n: int
    correct: int  # by the best beam
    correct5: int  # by any of the first five beams
    majority_correct: int  # by always saying the most frequent answer of this very set

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
        }


@dataclass(frozen=True)
class Report:
    """Everything said about one evaluation.

    ``per_class`` keys are true answers (so ``top1`` there is the recall of that class, and its majority is 1 by
    definition); ``per_group`` keys are question types or LVU tasks. Both are sorted by key.
    """

    match: Match
    overall: Tally
    videos: int
    majority_answer: str | None
    train_majority: float | None  # share right by always saying the answer that the training set has most often
    macro: float | None  # mean recall over the classes that occur
    per_class: Mapping[str, Tally]
    per_group: Mapping[str, Tally]

    def to_json(self) -> dict[str, object]:
        """The overall numbers at the top level, the rest beside them."""
        return {
            **self.overall.to_json(),
            "match": self.match,
            "videos": self.videos,
            "majority_answer": self.majority_answer,
            "train_majority": self.train_majority,
            "macro": self.macro,
            "per_class": {
                name: {k: v for k, v in tally.to_json().items() if k != "majority"}
                for name, tally in self.per_class.items()
            },
            "per_group": {name: tally.to_json() for name, tally in self.per_group.items()},
        }


def score(records: Sequence[Prediction], match: Match, *, train_majority: str | None = None) -> Report:
    """Score predictions.

    Args:
        records: one per sample; order does not matter.
        match: the rule of the dataset.
        train_majority: the most frequent answer of the training set, where it is known.
    """
    overall = tally(records, match)
    classes = _grouped(records, [r.answer.strip() for r in records])
    per_class = {name: tally(members, match) for name, members in classes.items()}
    recalls = [share for t in per_class.values() if (share := t.top1) is not None]
    always = None if train_majority is None else sum(r.answer.strip() == train_majority.strip() for r in records)
    return Report(
        match=match,
        overall=overall,
        videos=len({r.video_id for r in records}),
        majority_answer=most_frequent([r.answer for r in records]),
        train_majority=None if always is None else _share(always, len(records)),
        macro=math.fsum(recalls) / len(recalls) if recalls else None,
        per_class=per_class,
        per_group={name: tally(m, match) for name, m in _grouped(records, [r.group for r in records]).items()},
    )


def tally(records: Sequence[Prediction], match: Match) -> Tally:
    """Count one set of predictions."""
    hits = [[is_correct(beam, r.answer, match) for beam in r.beams[:5]] for r in records]
    answers = Counter(r.answer.strip() for r in records)
    return Tally(
        n=len(records),
        correct=sum(any(h[:1]) for h in hits),
        correct5=sum(any(h) for h in hits),
        majority_correct=max(answers.values(), default=0),
    )


def is_correct(beam: str, answer: str, match: Match) -> bool:
    """Whether one beam is the answer: case-sensitive, no normalisation beyond stripping (MA-LMM)."""
    said = beam.strip()
    if match == "first_word":
        said = said.split(" ")[0]
    return said == answer.strip()


def most_frequent(answers: Sequence[str]) -> str | None:
    """The most frequent answer, the first in sorting order among equals; None where there are none."""
    counts = Counter(answer.strip() for answer in answers)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=None)


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float] | None:
    """Wilson's score interval of a share (1927): good for small n and for shares near 0 and 1. None where n is 0."""
    if n == 0:
        return None
    share, z2 = correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _grouped(records: Sequence[Prediction], keys: Sequence[str]) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for key, record in sorted(zip(keys, records, strict=True), key=lambda pair: pair[0]):
        groups.setdefault(key, []).append(record)
    return groups


def _share(part: int, n: int) -> float | None:
    return part / n if n else None
