"""The three stages, one function a command: what happens between reading the options and printing the result.

Every function returns the dict that ``--json`` prints. What it reads is put together in ``inputs``, a training run in
``training``. The stages meet here and on disk, nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cache_schema.errors import CacheMismatch
from cache_schema.objects import StorePath, locate
from cache_schema.store import FeatureStore
from pipeline import inputs, predictions, provenance, scoring, training
from pipeline.errors import ConfigError
from pipeline.inputs import BOTH, SamplesFrom, Which
from pipeline.locks import one_writer
from pipeline.overrides import apply
from pipeline.progress import OnProgress, Stopwatch
from pipeline.provenance import AnswersProvenance
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.lvu import LvuDataset
from stages.data.manifest import coverage, estimate
from stages.data.samples import Availability, CachedSamples, few
from stages.decode.evaluate import ClosedSets, by_window, resume
from stages.decode.evaluate import evaluate as answer
from stages.extract.run import Job
from stages.extract.run import extract as run_extraction
from stages.train import diagnostics
from stages.train.loop import make_schedule, module_weights
from stages.train.loop import train as run_training
from stages.train.student import load_trained
from stages.types import Decoder, Sample

MAX_LABELS = 256  # a label set; open questions have thousands of answers


# ---------------------------------------------------------------- stage 1


def extract(
    config: PipelineConfig,
    *,
    which: Which | Literal["both"],
    cache: StorePath,
    workers: int,
    retry_failed: bool,
    part: tuple[int, int] = (1, 1),
    splits: Sequence[str],
    device: str,
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Features of one encoder, or of both from one pass, for every video that the dataset wants."""
    encoders = BOTH if which == "both" else (which,)
    dataset = inputs.load_dataset(config)
    wanted = dataset.wanted(list(splits) or None)
    if dry_run:
        inputs.check_stores(config, cache, encoders)
        sizes = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize
            for encoder in encoders
            for name, (shape, dtype) in inputs.shapes(config, encoder)
        }
        return estimate(wanted, sizes).to_json()
    if not wanted:
        raise ConfigError(f"data.videos={config.data.videos!r} and data.annotations name no video")
    job = make_job(config, which=which, cache=cache, device=device)
    # LVU's windows leave out an outro of 30 s and what is left of the last stride.
    unseen_s = 30.0 + config.data.stride_s if isinstance(dataset, LvuDataset) else 2.0
    options: dict[str, Any] = {"workers": workers, "retry_failed": retry_failed, "part": part, "unseen_s": unseen_s}
    try:
        report = run_extraction(job, wanted, **options, progress=progress)
    except CacheMismatch as error:  # the same command would end here again
        told = str(error).removesuffix(f"\n  {error.help_command}") if error.help_command else str(error)
        command = inputs.other_cache_command("extract", config, cache)
        raise CacheMismatch(told, help_command=command, differences=error.differences) from error
    failed, untried = report.failures, {*report.missing, *report.elsewhere}
    missing = set(report.missing)
    per_split = {name: dataset.wanted([name]) for name in (list(splits) or dataset.splits)} or {"all": wanted}
    status = {video: failed.get(video) for video in wanted if video not in untried}
    covered = coverage(per_split, has=lambda video: video not in missing, status=status)
    return report.to_json() | {
        "coverage": {name: part.to_json() for name, part in covered.items()},
        "warnings": [*dataset.warnings, *inputs.unannotated(config, dataset)],
        "cache": str(cache),
        "repair": inputs.extract_command("cache repair --sources", config, cache),
    }


def make_job(config: PipelineConfig, *, which: Which | Literal["both"], cache: StorePath, device: str) -> Job:
    """What an extraction with one encoder, or with both from one pass, needs to know."""
    encoders, command = (BOTH, "extract") if which == "both" else ((which,), f"extract-{which}")
    builders = tuple(inputs.builder_of(config, encoder) for encoder in encoders)
    return Job(config, builders, cache, device, help_command=inputs.extract_command(command, config, cache))


# ---------------------------------------------------------------- stage 2


@one_writer("out")
def train(
    config: PipelineConfig, *, cache: StorePath, out: Path, device: str, dry_run: bool, progress: OnProgress
) -> dict[str, Any]:
    """Train the student of a run folder, or go on with it; scored on val after every epoch where that selects."""
    dataset = inputs.load_dataset(config)
    samples = inputs.samples_of(dataset, "train")
    inputs.refuse_leaks(config, dataset.leaks)
    aligned = config.train.lambda_kd > 0
    if dry_run:
        inputs.check_stores(config, cache, BOTH if aligned else BOTH[:1])
        return training.training_estimate(config, few(samples, config.train.max_samples, config.train.seed))
    stores = inputs.open_stores(config, cache, aligned=aligned)
    data = inputs.available_samples(config, samples, stores, cache, "train")
    val = training.validation_samples(config, dataset, stores, cache)
    learned = {"train": data.samples} | ({} if val is None else {"val": val})
    touched = inputs.refuse_changed_sources(config, stores[0], {s.video_id for s in data.samples}, cache)
    run = RunFolder.create(out, config, provenance=provenance.of_run(config, stores, learned, cache=cache, out=out))
    readers = config.data.reader_threads
    train_set = CachedSamples(few(data.samples, config.train.max_samples, config.train.seed), *stores, readers=readers)
    trainer = training.build_trainer(config, train_set, device)
    state = training.resume_run(run, trainer)
    total = make_schedule(config.train, len(train_set)).total_steps
    recording = training.recording(run, train_set, command="train-student", first_step=state["step"], total=total)
    with recording as (log, save):
        summary = run_training(
            trainer,
            train_set,
            log=log,
            save=save,
            first_step=state["step"],
            best=state["best"],
            validate=training.validation(config, dataset, val, stores[0], trainer),
            progress=progress,
        )
    alarm = diagnostics.saturation(run.metrics()) if config.align.weights == "adaptive" else None
    warnings = [*dataset.warnings, *touched, *data.summary(), *([str(alarm)] if alarm is not None else [])]
    return summary | {"run": str(out), "dropped": data.dropped, "warnings": warnings}


# ---------------------------------------------------------------- stage 3


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation reads, before any model is loaded.

    Attributes:
        config: the run's, with the settings that were changed for this evaluation.
        samples: the whole split.
        available: what the cache can serve of it.
        tokens: the CLIP store.
        closed: label sets, where they are asked about too.
        made_from: the provenance of its answers.
    """

    config: PipelineConfig
    dataset: Any
    samples: Sequence[Sample]
    available: Availability
    tokens: FeatureStore
    closed: ClosedSets | None
    made_from: AnswersProvenance


def evaluation(
    run: RunFolder,
    *,
    split: str,
    cache: StorePath,
    sets: Sequence[str] = (),
    checkpoint: str = "",
    dataset: Any = None,
) -> Evaluation:
    """Find out what an evaluation of ``run`` reads, and what its answers are therefore made from.

    Args:
        run: the run.
        split: to answer.
        cache: the feature store.
        sets: settings that are others than the run's, as typed.
        checkpoint: by name; "" is the one that the run stands for.
        dataset: what ``data`` of the configuration names, where it is loaded already.

    Raises:
        ConfigError: no such split, checkpoint or setting; a setting that no evaluation reads.
        cache_schema.errors.CacheError: the cache lacks features, or has others than the run read.
    """
    ineffective = [item for item in sets if item.startswith(provenance.IGNORED)]
    if ineffective:
        raise ConfigError(f"{ineffective[0]} is not read by an evaluation; train with it in a folder of its own")
    config = apply(run.located_config, sets)
    dataset = inputs.load_dataset(config) if dataset is None else dataset
    samples = inputs.samples_of(dataset, split)
    tokens = inputs.open_stores(config, cache, aligned=False)[0]
    if not any(item.startswith("clip.") for item in sets):
        inputs.refuse_features_of_another_run(run, tokens)
    available = inputs.available_samples(config, samples, [tokens], cache, split)
    closed = _closed_sets(config, dataset, available.samples)
    same = "train" in dataset.splits and provenance.learned_from(run, "train", dataset.samples("train"))
    held = scoring.held_out(dataset, split)
    if not same and run.provenance is not None:  # what it shares with others says nothing about this run
        why = "the train questions are not those that the run learned from"
        held = replace(held, shared={}, unknown=why)
    made_from = provenance.of_answers(
        run,
        config,
        split=split,
        samples=samples,
        available=available.samples,
        tokens=tokens,
        labels=None if closed is None else closed.labels,
        checkpoint=checkpoint,
        changed=provenance.changed_settings(apply(run.config, sets), run, same_questions=same),
        held_out=held.to_json(),
    )
    return Evaluation(config, dataset, samples, available, tokens, closed, made_from)


@one_writer("run_path", create=False)
def evaluate(
    run_path: Path,
    *,
    cache: StorePath | None = None,
    sets: Sequence[str] = (),
    split: str,
    checkpoint: str | None,
    device: str,
    dry_run: bool,
    progress: OnProgress,
    decoder: Decoder | None = None,
    samples_from: SamplesFrom | None = None,
    dataset: Any = None,
) -> dict[str, Any]:
    """Answer a split with the student of a run folder, write predictions, score them.

    Args:
        run_path: the run folder.
        cache: the feature store; None: the one that the run read.
        sets: settings that are others than the run's, as typed. Their answers are kept in a file of their own.
        split: to answer.
        checkpoint: by name; None is the one that the run stands for.
        device: for student and language model.
        dry_run: only count.
        progress: told of the samples that are answered.
        decoder: the language model that the configuration names, where it is loaded already.
        samples_from: how features are read.
        dataset: what the configuration names, where it is loaded already.
    """
    run = RunFolder.open(run_path)
    if dry_run:
        config = apply(run.located_config, sets)
        dataset = inputs.load_dataset(config)
        samples = inputs.samples_of(dataset, split)
        published = dataset.published_n(split)
        if cache is not None or run.provenance is not None:
            inputs.check_stores(config, locate(run.cache) if cache is None else cache, BOTH[:1])
        return {"samples": len(samples), "videos": len({s.video_id for s in samples}), "published_n": published}
    cache = locate(run.cache) if cache is None else cache
    todo = evaluation(run, split=split, cache=cache, sets=sets, checkpoint=checkpoint or "", dataset=dataset)
    config, tokens, available = todo.config, todo.tokens, todo.available.samples
    data = (samples_from or inputs.reading_ahead(config))(available, tokens)
    loaded = run.load_checkpoint(checkpoint or "")
    watch = Stopwatch()
    decoder = decoder or training.build_decoder(config, device)
    student = training.build_student(config, tokens.spec.frame_shape[-1], decoder.width, device).eval()
    load_trained(student, module_weights("student", loaded.tensors), source=loaded.path)
    write, notes = predictions.place(run, todo.made_from)
    answered = resume(write, todo.made_from.digest)
    missing = by_window(data.samples, (i for i, s in enumerate(data.samples) if s.sample_id not in answered))
    progress(len(answered), len(data), split)
    answer(
        lambda batch: student(batch.f, batch.prompts, windows=batch.windows, lengths=batch.lengths).prefix,
        decoder,
        inputs.batches(data, missing, config.decode.batch_size),
        write=write,
        log=lambda done: progress(len(answered) + done, len(data), split),
        run=todo.made_from.digest,
        closed=todo.closed,
    )
    if missing:
        run.note_session({"command": "evaluate", "split": split, "samples": len(missing), **watch.cost()})
    report = scoring.report(todo.dataset, todo.samples, todo.available, split, write)
    never = decoder.unreachable([sample.answer for sample in available])
    if never:
        shown = ", ".join(map(repr, never[:5]))
        report["warnings"].append(f"{len(never)} answers need more than decode.max_new_tokens, such as {shown}")
    report["warnings"] += notes
    return report | {
        "held_out": dict(todo.made_from.held_out),
        "questions": todo.made_from.questions.digest,
        "seed": config.train.seed,
        "checkpoint": loaded.path.name,
        "predictions": str(write),
        "made_from": todo.made_from.digest,
        "changed": dict(todo.made_from.changed),
        "resumed": len(answered),
    }


def _closed_sets(config: PipelineConfig, dataset: Any, samples: Sequence[Sample]) -> ClosedSets | None:
    """The answers of the training set by group (of the samples themselves where there is no training set)."""
    if not config.decode.closed_set:
        return None
    labels: dict[str, set[str]] = {sample.group: set() for sample in samples}
    for sample in dataset.samples("train") if "train" in dataset.splits else samples:
        labels.setdefault(sample.group, set()).add(sample.answer)
    for group, found in labels.items():
        if not 0 < len(found) <= MAX_LABELS:
            raise ConfigError(
                f"decode.closed_set: {group!r} has {len(found):,} training answers, which is no closed set "
                f"(1 to {MAX_LABELS}).\nEvaluate without it:  --set decode.closed_set="
            )
    return ClosedSets({group: sorted(found) for group, found in labels.items()}, config.decode.closed_set)
