"""Predictions files of a run folder: which one an evaluation writes to, and which one a table may use.

::

    predictions.jsonl, predictions-val.jsonl   the run's own answers: its settings, the checkpoint that it stands for
    predictions-SPLIT-<digest>.jsonl           all others: another checkpoint, other settings, or own ones of the past

What a file was made from is in ``provenance/``, under the digest that every line of the file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from pipeline.provenance import AnswersProvenance
from pipeline.runs import RunFolder
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import Prediction


@dataclass(frozen=True)
class PredictionsFile:
    """A predictions file, read.

    Attributes:
        path: the file.
        predictions: its lines.
        provenance: what they were made from; None where that is not recorded, as for a baseline.
        digest: what its lines say about that.
        problems: why a table should not use them; empty where nothing is wrong.
    """

    path: Path
    predictions: Sequence[Prediction] = field(repr=False)
    provenance: AnswersProvenance | None
    digest: str
    problems: tuple[str, ...] = ()


def predictions_file(folder: Path, split: str) -> Path:
    """Where a run's or a baseline's own answers to a split are kept."""
    return folder / ("predictions.jsonl" if split == "test" else f"predictions-{split}.jsonl")


def place(run: RunFolder, facts: AnswersProvenance) -> tuple[Path, list[str]]:
    """The file for answers made from ``facts``, and what to tell about the file that was there.

    Nothing is overwritten: own answers that were made from something else are renamed after it, and return to their
    place when it is asked for again.
    """
    own, named = predictions_file(run.path, facts.split), _named(run.path, facts.split, facts.digest)
    before = _digest_in(own)
    if before == facts.digest:  # also where the same files were named in another way
        if facts.own or run.answers_provenance(facts.digest) is None:
            run.keep_answers_provenance(facts)
        return own, []
    if not facts.own:
        run.keep_answers_provenance(facts)
        return named, []
    notes = []
    if before is not None:
        aside = _free(_named(run.path, facts.split, before))
        own.replace(aside)
        notes.append(
            f"earlier answers were made from something else and are kept in {aside.name}{_why(run, facts, aside)}"
        )
    run.keep_answers_provenance(facts)
    if named.exists() and _digest_in(own) is None:
        named.replace(own)
    return own, notes


def read_own(run: RunFolder, split: str) -> PredictionsFile:
    """The run's own answers to a split, with what is wrong with them.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a line is damaged.
    """
    path = predictions_file(run.path, split)
    predictions = read_predictions(path)
    digest = predictions[0].run if predictions else ""
    facts = run.answers_provenance(digest)
    return PredictionsFile(path, predictions, facts, digest, tuple(_problems(run, facts, predictions, split)))


def _problems(
    run: RunFolder, facts: AnswersProvenance | None, predictions: Sequence[Prediction], split: str
) -> list[str]:
    again = f"answer again:  pipeline evaluate --run {quote(str(run.path))} --split {split}"
    if run.provenance is None:
        return []
    if len({prediction.run for prediction in predictions}) > 1:
        return [f"its answers were made from several things; {again}"]
    if facts is None:
        return [f"nothing is recorded of what its answers were made from; {again}"]
    problems = []
    if not facts.own:
        problems.append(f"its answers were given with other settings ({', '.join(facts.changed)}); {again}")
    if facts.checkpoint["sha256"] != (now := run.tensors_sha256()):
        what = "a checkpoint that is not there any more" if now is None else "an earlier checkpoint"
        problems.append(f"its answers are those of {what} (step {facts.checkpoint['step']}); {again}")
    if unknown := [p.sample_id for p in predictions if p.sample_id not in facts.questions.samples]:
        problems.append(f"{len(unknown)} of its answers belong to no question of the {split} split; {again}")
    return problems


def unanswered(file: PredictionsFile) -> int:
    """Questions of the split without an answer: the evaluation was interrupted, or the cache lacks their videos."""
    return 0 if file.provenance is None else len(file.provenance.questions.samples) - len(file.predictions)


def _named(folder: Path, split: str, digest: str) -> Path:
    return folder / f"predictions-{split}-{digest[:8]}.jsonl"


def _digest_in(path: Path) -> str | None:
    """What the lines of a file were made from; None where it is absent or holds no whole line."""
    if not path.is_file():
        return None
    digests = {prediction.run for prediction in read_predictions(path)}
    if len(digests) > 1:
        return "mixed"
    return (digests.pop() or "unknown") if digests else None


def _free(path: Path) -> Path:
    """The path, or a name like it that nothing has."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))
    return next(free for free in (path, *others) if not free.exists())


def _why(run: RunFolder, facts: AnswersProvenance, aside: Path) -> str:
    before = run.answers_provenance(read_predictions(aside)[0].run)
    lines = [] if before is None else facts.differences(before)
    return f": {'; '.join(lines)}" if lines else ""
