"""The three stages, one function a command: what happens between reading the options and printing the result.

Every function returns the dict that ``--json`` prints. What it reads is put together in ``inputs``, a training run in
``training``. The stages meet here and on disk, nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cache_schema.objects import StorePath
from pipeline import inputs, scoring, training
from pipeline.errors import ConfigError
from pipeline.inputs import BOTH, SamplesFrom, Which
from pipeline.progress import OnProgress, Stopwatch
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.manifest import coverage, estimate
from stages.data.samples import CachedSamples, few
from stages.decode.evaluate import ClosedSets, by_window, resume
from stages.decode.evaluate import evaluate as answer
from stages.extract.run import Job
from stages.extract.run import extract as run_extraction
from stages.train import diagnostics
from stages.train.loop import make_schedule, module_weights
from stages.train.loop import train as run_training
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
        sizes = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize
            for encoder in encoders
            for name, (shape, dtype) in inputs.shapes(config, encoder)
        }
        return estimate(wanted, sizes).to_json()
    if not wanted:
        raise ConfigError(f"data.videos={config.data.videos!r} and data.annotations name no video")
    job = make_job(config, which=which, cache=cache, device=device)
    report = run_extraction(job, wanted, workers=workers, retry_failed=retry_failed, part=part, progress=progress)
    failed, untried = report.failures, {*report.missing, *report.elsewhere}
    missing = set(report.missing)
    per_split = {name: dataset.wanted([name]) for name in (list(splits) or dataset.splits)} or {"all": wanted}
    status = {video: failed.get(video) for video in wanted if video not in untried}
    covered = coverage(per_split, has=lambda video: video not in missing, status=status)
    return report.to_json() | {
        "coverage": {name: part.to_json() for name, part in covered.items()},
        "warnings": list(dataset.warnings),
        "cache": str(cache),
    }


def make_job(config: PipelineConfig, *, which: Which | Literal["both"], cache: StorePath, device: str) -> Job:
    """What an extraction with one encoder, or with both from one pass, needs to know."""
    encoders, command = (BOTH, "extract") if which == "both" else ((which,), f"extract-{which}")
    builders = tuple(inputs.builder_of(config, encoder) for encoder in encoders)
    return Job(config, builders, cache, device, help_command=inputs.extract_command(command, config, cache))


# ---------------------------------------------------------------- stage 2


def train(
    config: PipelineConfig, *, cache: StorePath, out: Path, device: str, dry_run: bool, progress: OnProgress
) -> dict[str, Any]:
    """Train the student of a run folder, or go on with it; scored on val after every epoch where that selects."""
    dataset = inputs.load_dataset(config)
    samples = inputs.samples_of(dataset, "train")
    inputs.refuse_leaks(config, dataset.leaks)
    if dry_run:
        return training.training_estimate(config, few(samples, config.train.max_samples, config.train.seed))
    aligned = config.train.lambda_kd > 0
    stores = inputs.open_stores(config, cache, aligned=aligned)
    data = inputs.available_samples(config, samples, stores, cache, "train")
    run = RunFolder.create(out, config)
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
            validate=training.validation(config, dataset, stores, cache, trainer),
            progress=progress,
        )
    alarm = diagnostics.saturation(run.metrics()) if config.align.weights == "adaptive" else None
    warnings = [*dataset.warnings, *([str(alarm)] if alarm is not None else [])]
    return summary | {"run": str(out), "dropped": data.dropped, "warnings": warnings}


# ---------------------------------------------------------------- stage 3


def evaluate(
    config: PipelineConfig | None,
    *,
    cache: StorePath,
    out: Path,
    split: str,
    checkpoint: str | None,
    device: str,
    dry_run: bool,
    progress: OnProgress,
    decoder: Decoder | None = None,
    samples_from: SamplesFrom | None = None,
) -> dict[str, Any]:
    """Answer a split with the student of a run folder, write predictions, score them.

    ``config`` replaces the run's own, for example to decode otherwise; sizes of the student must be those of the run.
    A ``decoder`` that is given must be the one that the configuration names.
    """
    run = RunFolder.open(out)
    config = config or run.config
    dataset = inputs.load_dataset(config)
    samples = inputs.samples_of(dataset, split)
    published = dataset.published_n(split)
    if dry_run:
        return {"samples": len(samples), "videos": len({s.video_id for s in samples}), "published_n": published}
    stores = inputs.open_stores(config, cache, aligned=False)
    found = inputs.available_samples(config, samples, stores, cache, split)
    data = (samples_from or inputs.reading_ahead(config))(found.samples, stores[0])
    loaded = run.load_checkpoint(checkpoint or "")
    watch = Stopwatch()
    decoder = decoder or training.build_decoder(config, device)
    student = training.build_student(config, stores[0].spec.frame_shape[-1], decoder.width, device).eval()
    student.load_state_dict(module_weights("student", loaded.tensors), strict=True)
    write = scoring.predictions_file(run.path, split)
    made_by = _digest(loaded.path, config)
    answered = resume(write, made_by)
    todo = by_window(data.samples, (i for i, s in enumerate(data.samples) if s.sample_id not in answered))
    progress(len(answered), len(data), split)
    answer(
        lambda batch: student(batch.f, batch.prompts, windows=batch.windows, lengths=batch.lengths).prefix,
        decoder,
        inputs.batches(data, todo, config.decode.batch_size),
        write=write,
        log=lambda done: progress(len(answered) + done, len(data), split),
        run=made_by,
        closed=_closed_sets(config, dataset, found.samples),
    )
    if todo:
        run.note_session({"command": "evaluate", "split": split, "samples": len(todo), **watch.cost()})
    report = scoring.report(dataset, samples, found, split, write)
    never = decoder.unreachable([sample.answer for sample in found.samples])
    if never:
        shown = ", ".join(map(repr, never[:5]))
        report["warnings"].append(f"{len(never)} answers need more than decode.max_new_tokens, such as {shown}")
    return report | {
        "seed": config.train.seed,
        "checkpoint": loaded.path.name,
        "predictions": str(write),
        "resumed": len(answered),
    }


def _closed_sets(config: PipelineConfig, dataset: Any, samples: Sequence[Sample]) -> ClosedSets | None:
    """The answers of the training set by group (of the samples themselves where there is no training set)."""
    if not config.decode.closed_set:
        return None
    labels: dict[str, set[str]] = {sample.group: set() for sample in samples}
    for sample in dataset.samples("train") if "train" in dataset.splits else samples:
        labels.setdefault(sample.group, set()).add(sample.answer)
    for group, answers in labels.items():
        if not 0 < len(answers) <= MAX_LABELS:
            raise ConfigError(
                f"decode.closed_set: {group!r} has {len(answers):,} training answers, which is no closed set "
                f"(1 to {MAX_LABELS}).\nEvaluate without it:  --set decode.closed_set="
            )
    return ClosedSets({group: sorted(answers) for group, answers in labels.items()}, config.decode.closed_set)


def _digest(checkpoint: Path, config: PipelineConfig) -> str:
    """Names checkpoint and every setting that can change an answer, so that two runs never share a predictions file."""
    facts = {
        "checkpoint": json.loads((checkpoint / "state.json").read_text())["tensors"]["sha256"],
        "decode": config.decode.model_dump(mode="json", exclude={"batch_size"}),
        "data": config.data.model_dump(mode="json", exclude={"videos", "annotations", "io", "reader_threads"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
