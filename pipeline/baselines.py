"""What needs no student: majority class and probes on the cached features, scored and kept like any run.

::

    OUT/baselines.json                 the scores of all of them
    OUT/<probe>/predictions.jsonl      the same lines as those of ``evaluate``, so that ``compare`` can pair them
    OUT/<probe>/probe.json             seed, rule, questions, what was chosen on val, and what could not be fitted
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import provenance, registry, scoring
from pipeline.errors import ConfigError
from pipeline.inputs import available_samples, load_dataset, open_stores, refuse_leaks, samples_of
from pipeline.locks import one_writer, replace_text
from pipeline.predictions import predictions_file
from pipeline.printing import to_json
from pipeline.progress import OnProgress
from stages.config import PipelineConfig
from stages.data.samples import few
from stages.decode.evaluate import line_of, read_predictions
from stages.decode.metrics import Prediction
from stages.train import probes
from stages.train.probes import ProbeRefused, Splits, TaskAnswers
from stages.types import Sample

KEPT_LABELS = 64  # up to here the scores of all labels are kept, so that windows of a video can be averaged
METHOD = 3  # of the probes: another number means that answers on disk are not those that would be given today


@one_writer("out")
def baselines(
    config: PipelineConfig,
    *,
    cache: StorePath,
    out: Path,
    split: str,
    names: Sequence[str],
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Fit the named baselines (default: all) on train, choose on val, answer ``split`` and score the answers."""
    fits = {name: registry.load("probe", name) for name in names or registry.PROBES}
    dataset = load_dataset(config)
    absent = [name for name in ("train", "val") if name not in dataset.splits]
    if absent:
        raise ConfigError(f"a baseline is fitted on train and chosen on val; the annotations have no {absent[0]} split")
    refuse_leaks(config, dataset.leaks)
    wanted = [samples_of(dataset, name) for name in ("train", "val", split)]
    if dry_run:
        sizes = {f"{name}_samples": len(part) for name, part in zip(("train", "val", split), wanted, strict=True)}
        return sizes | {"baselines": len(fits), "published_n": dataset.published_n(split)}
    stores = _stores(config, cache, needs_teacher=any(name.startswith("teacher") for name in fits))
    kept = [
        available_samples(config, part, list(stores.values()), cache, name)
        for name, part in zip(("train", "val", split), wanted, strict=True)
    ]
    labelled = few(kept[0].samples, config.train.max_samples, config.train.seed)  # those a student would learn from
    splits = Splits(labelled, kept[1].samples, kept[2].samples)
    done: dict[str, Any] = {}
    refused: dict[str, str] = {}
    fitted = 0
    for number, (name, probe) in enumerate(fits.items(), start=1):
        source = stores["teacher" if name.startswith("teacher") else "clip"]
        path, run = predictions_file(out / name, split), f"{name}:{_digest(config, source, splits)}"
        try:
            if not _is_there(path, run, splits.test):
                where = f"{name}, {number} of {len(fits)}"
                # A phase for each: a second of one is no measure of the next.
                log = partial(lambda where, done, total: progress(done, total, where), where)
                fits_of_tasks = probes.fit_tasks(probe, stores, splits, seed=config.train.seed, log=log)
                facts = {
                    "probe": name,
                    "seed": config.train.seed,
                    "match": dataset.answer_rule,
                    "data": config.data.model_dump(mode="json", exclude={"videos"}),
                    "chosen": {part.task: part.answers.chosen for part in fits_of_tasks},
                    "not_fitted": {
                        part.task: {"samples": len(part.samples), "reason": part.refused}
                        for part in fits_of_tasks
                        if part.refused
                    },
                }
                _write(path, _predictions(fits_of_tasks, run), facts)
                fitted += 1
        except ProbeRefused as error:
            refused[name] = str(error)
            continue
        facts = json.loads((out / name / "probe.json").read_text())
        done[name] = scoring.report(dataset, wanted[2], kept[2], split, path)
        done[name] |= {key: facts[key] for key in ("chosen", "not_fitted")}
    result = {
        "split": split,
        "held_out": scoring.held_out(dataset, split).to_json(),
        "train_samples": len(splits.train),
        "val_samples": len(splits.val),
        "baselines": done,
        "refused": refused,
        "fitted": fitted,
        "warnings": list(dataset.warnings),
        "out": str(out),
    }
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "baselines.json", to_json(result) + "\n")
    return result


def _stores(config: PipelineConfig, cache: StorePath, *, needs_teacher: bool) -> dict[str, FeatureStore]:
    opened = open_stores(config, cache, aligned=needs_teacher)
    return dict(zip(("clip", "teacher"), opened, strict=False))


def _predictions(fits_of_tasks: Sequence[TaskAnswers], run: str) -> list[Prediction]:
    predictions: list[Prediction] = []
    for part in fits_of_tasks:
        answers = part.answers
        for s, ranked, row in zip(part.samples, answers.ranked(KEPT_LABELS), answers.log_probs, strict=True):
            scores = tuple(sorted(row.tolist(), reverse=True)) if len(row) <= KEPT_LABELS else ()
            predictions.append(
                Prediction(
                    s.sample_id,
                    s.video_id,
                    s.group,
                    s.prompt,
                    s.answer,
                    ranked[:5],
                    run,
                    ranked if scores else (),
                    scores,
                )
            )
    return predictions


def _write(path: Path, predictions: Sequence[Prediction], facts: Mapping[str, Any]) -> None:
    """The predictions appear whole, and last: with them the baseline is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "probe.json").write_text(json.dumps(facts, sort_keys=True) + "\n")
    half = path.with_name(f".{path.name}")
    half.write_bytes(b"".join(map(line_of, predictions)))
    half.replace(path)


def _is_there(path: Path, run: str, samples: Sequence[Sample]) -> bool:
    if not path.exists():
        return False
    there = {(p.sample_id, p.run) for p in read_predictions(path)}
    return there == {(sample.sample_id, run) for sample in samples}


def _digest(config: PipelineConfig, store: FeatureStore, splits: Splits) -> str:
    """Names everything that an answer follows from: method, seed, features, and the samples of every split."""
    questions = [[provenance.sample_digest(sample) for sample in part] for part in splits]
    read = provenance.features(store, [sample for part in splits for sample in part])
    return provenance.digest_of([METHOD, config.train.seed, read, questions])
