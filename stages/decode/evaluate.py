"""Evaluation: answer every question once, write each answer down as it comes, score what was written.

``predictions.jsonl`` is the result; every number of the report follows from it (``rescore``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.data.samples import Batch
from stages.decode.metrics import Match, Prediction, Report, score
from stages.stopping import STOP, whole_steps
from stages.types import Decoder, Sample


@dataclass(frozen=True)
class ClosedSets:
    """The label set of every group (LVU task, question type), and what to ask beside the free answer (D51).

    ``rank``: log-likelihood of every label. ``constrained``: a search that can give labels only.
    """

    labels: Mapping[str, Sequence[str]]
    ways: Sequence[str]


def evaluate(
    student_fn: Callable[[Batch], Float[Tensor, "B Q V"]],
    decoder: Decoder,
    batches: Iterable[Batch],
    *,
    write: Path,
    log: Callable[[int], None] = lambda _done: None,
    run: str = "",
    closed: ClosedSets | None = None,
) -> list[Prediction]:
    """Answer every sample and append the answers to ``write``.

    Samples that ``write`` already answers for the same ``run`` are not answered again; predictions of another run are
    moved aside to ``<write>.old``. Killing this at any moment loses at most the batch in work; a stop signal waits
    until that one is written.

    Args:
        student_fn: batch -> prefix. Called without gradients; putting the student into eval mode is the caller's part.
        decoder: the frozen language model.
        batches: the samples with their features. Leave out what ``resume`` returns to save reading its features.
        write: the predictions file.
        log: told the number of samples done so far, after every batch.
        run: names the checkpoint and every setting that changes an answer, for example a digest of both.
        closed: label sets to rank or to decode in, beside the free answer.

    Returns:
        One prediction per sample, in the order of ``batches``.

    Raises:
        ValueError: a sample id occurs twice; ``write`` holds another question under the same id and run, or a
            damaged line; the student gives a prefix that is not finite.
    """
    done = resume(write, run)
    seen: set[str] = set()
    result: list[Prediction] = []
    with write.open("ab") as file, whole_steps(STOP) as stopping:
        for batch in batches:
            for sample in batch.samples:
                if sample.sample_id in seen:
                    raise ValueError(f"sample id {sample.sample_id!r} occurs twice in this evaluation")
                seen.add(sample.sample_id)
            open_rows = [row for row, sample in enumerate(batch.samples) if sample.sample_id not in done]
            if open_rows:
                for prediction in _answer(student_fn, decoder, batch, open_rows, run, closed):
                    done[prediction.sample_id] = prediction
                    file.write(line_of(prediction))
                file.flush()
            result += [_checked(done[sample.sample_id], sample, write) for sample in batch.samples]
            log(len(result))
            if stopping():
                break
        os.fsync(file.fileno())
    return result


def by_window(samples: Sequence[Sample], positions: Iterable[int]) -> list[int]:
    """``positions`` in the order in which they cost least: the questions of one window of a video follow each other.

    So a batch reads few videos (``CachedSamples.batch`` reads each once), and equal questions about equal frames meet
    in one batch, where they are answered once. Within a window long prompts come together, since a batch is padded to
    its longest. Windows keep the order in which they first occur.
    """
    windows: dict[tuple[str, bytes], list[int]] = {}
    for position in positions:
        windows.setdefault(_window(samples[position]), []).append(position)
    return [
        position
        for window in windows.values()
        for position in sorted(window, key=lambda at: (len(samples[at].prompt), samples[at].prompt))
    ]


def resume(path: Path, run: str = "") -> dict[str, Prediction]:
    """Answers that ``path`` already holds for ``run``, by sample id; makes the file ready to append to.

    A half-written last line is cut off. A file of another run is renamed to ``<path>.old`` (one is kept).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    whole = _whole_lines(path.read_bytes())
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    predictions = read_predictions(path)
    if any(p.run != run for p in predictions):
        os.replace(path, path.with_name(path.name + ".old"))
        return {}
    return {p.sample_id: p for p in predictions}


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file; a half-written last line is left out.

    Raises:
        ValueError: a line is not a prediction, or a sample id occurs twice; names file and line.
    """
    raw = path.read_bytes()
    result: dict[str, Prediction] = {}
    for number, line in enumerate(raw[: _whole_lines(raw)].splitlines(), start=1):
        try:
            prediction = _parse(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not a prediction: {error}\nMove the file away and evaluate again."
            ) from error
        if prediction.sample_id in result:
            raise ValueError(f"{path}, line {number} answers {prediction.sample_id!r} a second time")
        result[prediction.sample_id] = prediction
    return list(result.values())


def rescore(path: Path, match: Match, *, train_majority: str | None = None) -> Report:
    """Score a predictions file again, without any model."""
    return score(read_predictions(path), match, train_majority=train_majority)


def _answer(
    student_fn: Callable[[Batch], Tensor],
    decoder: Decoder,
    batch: Batch,
    rows: list[int],
    run: str,
    closed: ClosedSets | None,
) -> list[Prediction]:
    # An answer follows from frames and prompt alone. (The prefix does too: the Q-Former reads the prompt, so it cannot
    # be shared between different questions about one window.)
    first: dict[tuple[tuple[str, bytes], str], int] = {}
    same = [first.setdefault((_window(batch.samples[row]), batch.samples[row].prompt), row) for row in rows]
    asked = list(first.values())
    samples = [batch.samples[row] for row in asked]
    with torch.no_grad():
        prefix = student_fn(_part(batch, asked))
    broken = [s.sample_id for s, ok in zip(samples, prefix.isfinite().all(-1).all(-1).tolist(), strict=True) if not ok]
    if broken:
        raise ValueError(f"the student's prefix is not finite for samples {broken[:5]}; the checkpoint has diverged")
    place = {row: number for number, row in enumerate(asked)}
    said = decoder.generate(prefix, [sample.prompt for sample in samples])
    predictions = [
        Prediction(s.sample_id, s.video_id, s.group, s.prompt, s.answer, tuple(said[place[row]]), run)
        for s, row in zip((batch.samples[row] for row in rows), same, strict=True)
    ]
    if closed is None:
        return predictions
    return _among_labels(decoder, prefix[[place[row] for row in same]], predictions, closed)


def _among_labels(
    decoder: Any, prefix: Float[Tensor, "B N V"], predictions: list[Prediction], closed: ClosedSets
) -> list[Prediction]:
    """The same predictions with ``ranked`` and ``scores``, ``constrained``, or both.

    ``decoder`` also has ``score_answers(prefix, prompts, labels) -> [B, n]`` and ``generate(…, allowed=labels)``.
    """
    result = list(predictions)
    for group in dict.fromkeys(p.group for p in predictions):
        rows, labels = [i for i, p in enumerate(predictions) if p.group == group], list(closed.labels[group])
        prompts = [predictions[i].prompt for i in rows]
        if "rank" in closed.ways:
            for i, scores in zip(rows, decoder.score_answers(prefix[rows], prompts, labels).tolist(), strict=True):
                order = sorted(range(len(labels)), key=lambda n: (-scores[n], labels[n]))
                ranked, values = tuple(labels[n] for n in order), tuple(float(scores[n]) for n in order)
                result[i] = replace(result[i], ranked=ranked, scores=values)
        if "constrained" in closed.ways:
            for i, beams in zip(rows, decoder.generate(prefix[rows], prompts, allowed=labels), strict=True):
                result[i] = replace(result[i], constrained=tuple(beams))
    return result


def _part(batch: Batch, rows: list[int]) -> Batch:
    """Some samples of a batch, with the windows that they ask about and no others."""
    samples = tuple(batch.samples[row] for row in rows)
    if len(rows) == len(batch.samples):
        return Batch(samples, batch.f, None, batch.windows, batch.lengths)
    read = [row if batch.windows is None else batch.windows[row] for row in rows]
    kept = list(dict.fromkeys(read))
    lengths = None if batch.lengths is None else tuple(batch.lengths[row] for row in kept)
    return Batch(samples, batch.f[kept], None, tuple(kept.index(window) for window in read), lengths)


def _window(sample: Sample) -> tuple[str, bytes]:
    """What a sample sees: equal windows have equal features."""
    return sample.video_id, sample.frame_index.tobytes()


def _checked(prediction: Prediction, sample: Sample, path: Path) -> Prediction:
    asked = (sample.video_id, sample.group, sample.prompt, sample.answer)
    if asked != (prediction.video_id, prediction.group, prediction.prompt, prediction.answer):
        raise ValueError(
            f"{path} holds another question under the sample id {sample.sample_id!r}.\n"
            f"Move the file away, or write to another folder with --out."
        )
    return prediction


def line_of(prediction: Prediction) -> bytes:
    """One line of a predictions file: ASCII JSON, so that no character in a text can end the line."""
    values = {key: value for key, value in asdict(prediction).items() if value != () or key == "beams"}
    return json.dumps(values, ensure_ascii=True).encode("ascii") + b"\n"


LISTS = {"beams": str, "ranked": str, "scores": float, "constrained": str}  # what each holds
OPTIONAL = {"run", "ranked", "scores", "constrained"}


def _parse(line: bytes) -> Prediction:
    values = json.loads(line)
    names = {field.name for field in fields(Prediction)}
    if not isinstance(values, dict) or not names - OPTIONAL <= values.keys() <= names:
        raise ValueError(f"expected the keys {', '.join(sorted(names))}")
    for key, kind in LISTS.items():
        part = values.get(key, [])
        if not isinstance(part, list) or not all(isinstance(item, kind) for item in part):
            raise ValueError(f"{key} is not a list of {'numbers' if key == 'scores' else 'texts'}")
        values[key] = tuple(part)
    if not all(isinstance(text, str) for key, text in values.items() if key not in LISTS):
        raise ValueError("every value that is no list is a text")
    if len(values["scores"]) not in (0, len(values["ranked"])):
        raise ValueError("scores has another length than ranked")
    return Prediction(**values)


def _whole_lines(raw: bytes) -> int:
    """Length of the part of a file that ends with its last line break."""
    return raw.rfind(b"\n") + 1
