"""Scores of predictions, from text alone: no model, no torch.

MA-LMM's rules (its LVU and MSVD-QA evaluation): a prediction counts when it equals the label as a string,
case-sensitive, after stripping. Top-1 looks at the best beam, top-5 at any of the first five. That is the headline;
everything else (one answer per video, the label set ranked by likelihood, constrained decoding) stands beside it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stages.decode.statistics import Interval, share_interval, wilson

MAX_CLASSES = 64  # up to here a confusion matrix is made, and every class has an interval over videos
OTHER = "(other)"  # column of the confusion matrix for answers that are no label
TOP_ANSWERS = 5  # answers listed with their counts
NOTABLE = 0.01  # share of answers that only their form makes wrong, above which it is a warning
UNIFORM = 0.95  # share of samples that are given one answer, from which on it is a warning
ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}

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
class Normalised:
    """What exact match leaves out: answers that are right but for case, punctuation, articles or a number's spelling.

    ``more`` is their number, ``correct`` that of all that are right then, ``example`` one of them: said, true.
    """

    correct: int
    more: int
    example: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, object]:
        """Plain values; ``example`` is None where there is none."""
        return {"correct": self.correct, "more": self.more, "example": list(self.example) if self.more else None}


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
    normalised: Normalised
    answers: tuple[tuple[str, int], ...]  # what was said most often, with counts
    other: Mapping[str, tuple[tuple[str, int], ...]]  # true class -> what was said most often that is no label

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the accuracy must know, one sentence each."""
        n, said = self.overall.n, []
        if self.normalised.more > NOTABLE * n:
            beam, answer = self.normalised.example
            said.append(
                f"{self.normalised.more} more of {n} would be right after normalisation (case, punctuation, articles, "
                f"two = 2), such as {beam!r} for {answer!r}; the headline stays MA-LMM's exact match"
            )
        if n > 1 and self.answers and self.answers[0][1] >= UNIFORM * n > self.overall.majority_correct:
            answer, count = self.answers[0]
            said.append(f"{count} of {n} samples are given one answer, {answer!r}: it may not depend on the video")
        return tuple(said)

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
            else {
                "labels": [*self.per_class, OTHER],
                "counts": [list(row) for row in self.confusion],
                "other": {name: _pairs(said) for name, said in self.other.items()},
            },
            "normalised": self.normalised.to_json(),
            "answers": _pairs(self.answers),
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
        normalised=_normalised(records, match),
        answers=_most_said(records, match),
        other={name: others for name, part in classes.items() if (others := _most_said(part, match, but=classes))}
        if few
        else {},
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


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, numbers up to twelve as digits; other words as they are."""
    words = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).casefold()).replace("_", " ").split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES)


def _normalised(records: Sequence[Prediction], match: Match) -> Normalised:
    """Best beams that are right by the rule, or after normalisation of the whole beam and the answer."""
    right, missed = 0, []
    for record, hit in zip(records, hits(records, match), strict=True):
        right += hit
        said, true = normalise(record.beams[0]) if record.beams else "", normalise(record.answer)
        if not hit and true and spoken(said, match) == spoken(true, match):
            missed.append((record.beams[0], record.answer))
    return Normalised(right + len(missed), len(missed), missed[0] if missed else ("", ""))


def _most_said(records: Sequence[Prediction], match: Match, *, but: Container[str] = ()) -> tuple[tuple[str, int], ...]:
    """The answers given most often, with counts; of equals the first in sorting order."""
    counts = Counter(said for record in records if (said := _said(record, match)) is not None and said not in but)
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP_ANSWERS])


def _pairs(counts: Sequence[tuple[str, int]]) -> list[list[object]]:
    return [[answer, count] for answer, count in counts]


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
