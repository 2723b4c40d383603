"""The stages put together: what each command does between reading its options and printing its result.

Every function returns the dict that ``--json`` prints. The stages meet here and on disk, nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cache_schema.errors import CacheMismatch
from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import presets, registry, scoring
from pipeline.errors import ConfigError
from pipeline.overrides import flatten
from pipeline.progress import OnProgress
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.clips import ClipsDataset
from stages.data.frames import open_source
from stages.data.manifest import coverage, estimate
from stages.data.samples import Availability, Batch, CachedSamples, Request, available, few
from stages.decode.evaluate import ClosedSets, by_window, resume
from stages.decode.evaluate import evaluate as answer
from stages.decode.metrics import is_correct
from stages.extract.run import Job
from stages.extract.run import extract as run_extraction
from stages.train import diagnostics
from stages.train.alignment import Alignment
from stages.train.loop import Log, Save, Trainer, make_schedule, module_weights
from stages.train.loop import train as run_training
from stages.train.student import Student
from stages.types import Decoder, Sample

Which = Literal["clip", "teacher"]
SamplesFrom = Callable[[Sequence[Sample], FeatureStore], CachedSamples]  # how an evaluation reads
MAX_LABELS = 256  # a label set; open questions have thousands of answers
BOTH: tuple[Which, ...] = ("clip", "teacher")


# ---------------------------------------------------------------- stage 1


def extract(
    config: PipelineConfig,
    *,
    which: Which | Literal["both"],
    cache: StorePath,
    workers: int,
    retry_failed: bool,
    splits: Sequence[str],
    device: str,
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Features of one encoder, or of both from one pass, for every video that the dataset wants."""
    encoders = BOTH if which == "both" else (which,)
    dataset = load_dataset(config)
    wanted = dataset.wanted(list(splits) or None)
    if dry_run:
        sizes = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize
            for encoder in encoders
            for name, (shape, dtype) in shapes(config, encoder)
        }
        return estimate(wanted, sizes).to_json()
    if not wanted:
        raise ConfigError(f"data.videos={config.data.videos!r} and data.annotations name no video")
    job = make_job(config, which=which, cache=cache, device=device)
    report = run_extraction(job, wanted, workers=workers, retry_failed=retry_failed, progress=progress)
    failed, missing = report.failures, set(report.missing)
    per_split = {name: dataset.wanted([name]) for name in (list(splits) or dataset.splits)} or {"all": wanted}
    status = {video: failed.get(video) for video in wanted if video not in missing}
    covered = coverage(per_split, has=lambda video: video not in missing, status=status)
    return report.to_json() | {
        "coverage": {name: part.to_json() for name, part in covered.items()},
        "warnings": list(dataset.warnings),
        "cache": str(cache),
    }


def make_job(config: PipelineConfig, *, which: Which | Literal["both"], cache: StorePath, device: str) -> Job:
    """What an extraction with one encoder, or with both from one pass, needs to know."""
    encoders, command = (BOTH, "extract") if which == "both" else ((which,), f"extract-{which}")
    builders = tuple(_builder(config, encoder) for encoder in encoders)
    return Job(config, builders, cache, device, help_command=_command(command, config, cache))


def load_dataset(config: PipelineConfig) -> Any:
    """The dataset that ``data.name`` names; a plain folder of videos lists and measures them itself."""
    build = registry.load("dataset", config.data.name)
    if build is ClipsDataset and not config.data.annotations:
        with contextlib.closing(open_source(config.data)) as source:
            dataset = build(config.data, list_videos=source.video_ids, count_frames=source.count_frames)
            lengths = dataset.wanted()  # asked now, while the source is open
        return build(config.data, list_videos=lambda: list(lengths), count_frames=lambda video: len(lengths[video]))
    return build(config.data)


def _builder(config: PipelineConfig, which: Which) -> str:
    if which == "clip":
        registry.load("encoder", config.clip.source)
        return registry.ENCODERS[config.clip.source]
    registry.load("teacher", config.teacher.name)
    return registry.TEACHERS[config.teacher.name]


def shapes(config: PipelineConfig, which: Which) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Modality, frame shape and dtype, without loading any weights."""
    module = importlib.import_module(_builder(config, which).partition(":")[0])
    yield from module.describe(config).items()


def _command(command: str, config: PipelineConfig, cache: StorePath) -> str:
    """What the user would type: the preset, and every setting that differs from it and matters to an extraction."""
    base, ours = flatten(presets.get(config.preset)), flatten(config)
    rooms = ("data.", *(f"{which}." for which in BOTH if command in ("extract", f"extract-{which}")))
    sets = [f"{key}={_typed(ours[key])}" for key in ours if ours[key] != base[key] and key.startswith(rooms)]
    parts = ["pipeline", command, "--preset", config.preset, "--cache", str(cache)]
    return shlex.join(parts + [part for item in sets for part in ("--set", item)])


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- stage 2


def train(
    config: PipelineConfig, *, cache: StorePath, out: Path, device: str, dry_run: bool, progress: OnProgress
) -> dict[str, Any]:
    """Train the student of a run folder, or go on with it; scored on val after every epoch where that selects."""
    dataset = load_dataset(config)
    samples = samples_of(dataset, "train")
    refuse_leaks(config, dataset.leaks)
    if dry_run:
        return training_estimate(config, few(samples, config.train.max_samples, config.train.seed))
    aligned = config.train.lambda_kd > 0
    stores = open_stores(config, cache, aligned=aligned)
    data = available_samples(config, samples, stores, cache, "train")
    run = RunFolder.create(out, config)
    readers = config.data.reader_threads
    train_set = CachedSamples(few(data.samples, config.train.max_samples, config.train.seed), *stores, readers=readers)
    trainer = build_trainer(config, train_set, device)
    state = resume_run(run, trainer)
    total = make_schedule(config.train, len(train_set)).total_steps
    begun, done = _now(), state["step"]
    try:
        with recording(run, first_step=state["step"], total=total) as (log, save):

            def counted(record: dict[str, Any]) -> None:
                nonlocal done
                log(record)
                done = record["step"]

            summary = run_training(
                trainer,
                train_set,
                log=counted,
                save=save,
                first_step=state["step"],
                best=state["best"],
                validate=validation(config, dataset, stores, cache, trainer),
                progress=progress,
            )
    finally:
        if done > state["step"]:
            read = (done - state["step"]) * min(config.train.batch_size, len(train_set)) * _sample_bytes(config, stores)
            run.note_session(
                {"command": "train-student", "first_step": state["step"], "steps": done}
                | {"bytes_read": read, "features": _fingerprints(stores), **_cost_since(begun)}
            )
    alarm = diagnostics.saturation(run.metrics()) if config.align.weights == "adaptive" else None
    warnings = [*dataset.warnings, *([str(alarm)] if alarm is not None else [])]
    return summary | {"run": str(out), "dropped": data.dropped, "warnings": warnings}


def resume_run(run: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """Put the newest whole checkpoint into the trainer, where there is one; returns its step and best accuracy."""
    state: dict[str, Any] = {"step": 0, "best": -1.0}
    checkpoint = run.load_latest()
    if checkpoint is not None:
        trainer.restore(checkpoint.tensors)
        state |= checkpoint.state
    run.rewind(state["step"])
    return state


@contextlib.contextmanager
def recording(run: RunFolder, *, first_step: int, total: int) -> Iterator[tuple[Log, Save]]:
    """What a training run calls to log a record and to save a checkpoint."""
    board = run.board(first_step=first_step)

    def log(record: dict[str, Any]) -> None:
        run.log(record)
        for key, value in record.items():
            if key not in ("step", "epoch"):
                board.add_scalar(key, value, record["step"])

    def save(step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        mark = [name for name, due in (("best", facts["is_best"]), ("final", step == total)) if due]
        run.save_checkpoint(step, tensors, facts, mark=tuple(mark))

    try:
        yield log, save
    finally:
        board.close()


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _cost_since(begun: tuple[float, float]) -> dict[str, float]:
    """Seconds on the clock, and of this process's threads."""
    seconds, cpu_seconds = (now - then for now, then in zip(_now(), begun, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def _sample_bytes(config: PipelineConfig, stores: Sequence[FeatureStore]) -> int:
    """What one sample takes in the cache, all modalities that are read."""
    frame = sum(store.spec.frame_bytes for store in stores)
    return config.data.num_frames * frame


def _fingerprints(stores: Sequence[FeatureStore]) -> dict[str, dict[str, Any]]:
    """Which features were read: enough to find out whether two runs read the same ones."""
    return {
        store.modality: {"digest": store.spec.digest(), "encoder": store.spec.encoder, "weights": store.spec.weights}
        | {"layer": store.spec.layer, "dtype": store.spec.dtype, "frame_shape": list(store.spec.frame_shape)}
        for store in stores
    }


def build_trainer(config: PipelineConfig, data: CachedSamples, device: str, decoder: Decoder | None = None) -> Trainer:
    """Frozen language model (unless given), student and (where lambda_kd > 0) alignment on one device."""
    decoder = decoder or build_decoder(config, device)
    student = build_student(config, data.tokens.spec.frame_shape[-1], decoder.width, device)
    alignment = None
    if data.pooled is not None:
        mean, covariance = data.target_moments() if config.align.target_norm != "none" else (None, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)  # heads and weight net start from the run's seed
            alignment = Alignment(
                config.align,
                hidden_size=config.student.hidden_size,
                target_size=int(np.prod(data.pooled.spec.frame_shape)),
                target_mean=mean,
                target_covariance=covariance,
            ).to(device)
    return Trainer(student, alignment, decoder, config.train, config.align)


def build_decoder(config: PipelineConfig, device: str) -> Decoder:
    """The frozen language model."""
    decoder: Decoder = registry.load("decoder", config.decode.name)(config.decode, device=device)
    return decoder


def open_stores(config: PipelineConfig, cache: StorePath, *, aligned: bool) -> list[FeatureStore]:
    """The CLIP store and, where aligned, the teacher's; refused when their features are not those of ``config``."""
    opened = []
    for which in ("clip", "teacher") if aligned else ("clip",):
        names = [name for name, _ in shapes(config, which)]
        name = names[0] if which == "clip" else f"pooled/layer{config.teacher.layer}{_grid(config)}"
        command = _command(f"extract-{which}", config, cache)
        store = FeatureStore.open(cache, name, help_command=command, io=config.data.io)
        _refuse_other_features(store, config, which, command)
        opened.append(store)
    return opened


def _grid(config: PipelineConfig) -> str:
    return f"_grid{config.teacher.grid}" if config.teacher.grid > 1 else ""


def _refuse_other_features(store: FeatureStore, config: PipelineConfig, which: Which, command: str) -> None:
    """Compare what can be told without loading the encoder's weights; extraction compares everything.

    Some fields of a spec hold more than their setting says (a resize also names its size), so their beginnings count.
    """
    part = config.clip if which == "clip" else config.teacher
    shape, dtype = dict(shapes(config, which))[store.modality]
    expected: dict[str, object] = {
        "layer": config.clip.layer if which == "clip" else config.teacher.layer,
        "frame_shape": tuple(shape),
        "dtype": dtype,
        "compute_dtype": part.compute_dtype,
    }
    beginnings = {"frame_rule": f"{config.data.fps:g} fps ", "resize": f"{part.geometry} "}
    if which == "teacher":
        expected["timestep"] = config.teacher.timestep
        beginnings["latent"] = f"{config.teacher.posterior}*"
    elif config.clip.source == "open_clip":  # two models may have tokens of one shape, such as EVA-g and EVA-g-plus
        beginnings["encoder"] = f"open_clip:{config.clip.model}#"
    wrong = {key: value for key, value in expected.items() if getattr(store.spec, key) != value}
    for key, start in beginnings.items():
        if not f"{getattr(store.spec, key)}#".startswith(start):  # a digest may follow an encoder's name
            wrong[key] = f"{start.rstrip('#')}…"
    if wrong:
        lines = [f"  {key}: {getattr(store.spec, key)!r} there, {value!r} here" for key, value in wrong.items()]
        title = f"{store.path}, {store.modality} was made with other settings:"
        raise CacheMismatch("\n".join([title, *lines]), help_command=command)


def build_student(config: PipelineConfig, clip_width: int, llm_width: int, device: str) -> Student:
    """The trainable part, as it starts."""
    build: Callable[..., Student] = registry.load("student", config.student.name)
    return build(config.student, clip_width=clip_width, llm_width=llm_width).to(device)


def refuse_leaks(config: PipelineConfig, leaks: Sequence[str]) -> None:
    """Raise ConfigError where a test video of one task trains another, unless ``data.allow_leak`` asks for that."""
    if leaks and not config.data.allow_leak:
        raise ConfigError(
            f"data.task={config.data.task}: {len(leaks)} test videos of one task are training videos of another, "
            f"such as {', '.join(leaks[:3])}; a student trained on all tasks has seen its test videos.\n"
            f"Train one task at a time, or accept it:  --set data.allow_leak=true"
        )


def samples_of(dataset: Any, split: str) -> list[Sample]:
    """The samples of a split. Raises ConfigError when there are none."""
    if not dataset.splits:
        raise ConfigError("without annotations there is nothing to learn or score; give data.annotations")
    samples: list[Sample] = dataset.samples(split)
    if not samples:
        raise ConfigError(f"the {split} split has no samples")
    return samples


def available_samples(
    config: PipelineConfig, samples: Sequence[Sample], stores: Sequence[FeatureStore], cache: StorePath, split: str
) -> Availability:
    """What the cache can serve of a split; CacheMissing unless that is everything or ``data.allow_missing`` is set."""
    found = available(samples, stores)
    if not config.data.allow_missing:
        gaps = {reason.partition(":")[0] for reason in found.missing.values()}
        which = "extract-clip" if "tokens" in gaps else "extract-teacher"
        found.require_all(_command(which, config, cache))
    if not found.samples:
        command = _command("extract-clip", config, cache)
        raise ConfigError(f"the cache holds nothing of the {split} split.\nFill it:  {command}")
    return found


def validation(
    config: PipelineConfig,
    dataset: Any,
    stores: Sequence[FeatureStore],
    cache: StorePath,
    trainer: Trainer,
    samples_from: SamplesFrom | None = None,
) -> Callable[[], float] | None:
    """Top-1 on the val split, or None where there is none or the last epoch is taken."""
    if config.train.select == "last" or "val" not in dataset.splits:
        return None
    found = available_samples(config, samples_of(dataset, "val"), stores[:1], cache, "val")
    data = (samples_from or _reading_ahead(config))(found.samples, stores[0])

    def top1() -> float:
        correct = 0
        for batch in _batches(data, range(len(data)), config.decode.batch_size):
            with torch.inference_mode():
                prefix = trainer.student(batch.f, batch.prompts, windows=batch.windows, lengths=batch.lengths).prefix
                beams = trainer.decoder.generate(prefix, batch.prompts)
            rule = dataset.answer_rule
            correct += sum(is_correct(b[0], s.answer, rule) for b, s in zip(beams, batch.samples, strict=True) if b)
        return correct / len(data)

    return top1


def _reading_ahead(config: PipelineConfig) -> SamplesFrom:
    return functools.partial(CachedSamples, readers=config.data.reader_threads)


def _batches(data: CachedSamples, positions: Sequence[int], size: int) -> Iterator[Batch]:
    cuts = [list(positions[first : first + size]) for first in range(0, len(positions), size)]
    return data.batches(Request(cut, [0] * len(cut)) for cut in cuts)


def training_estimate(config: PipelineConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Sizes of a training run, without reading anything."""
    schedule = make_schedule(config.train, len(samples))
    per_frame = sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for which in (("clip", "teacher") if config.train.lambda_kd > 0 else ("clip",))
        for _, (shape, dtype) in list(shapes(config, which))[:1]
    )
    read = schedule.total_steps * min(config.train.batch_size, len(samples)) * config.data.num_frames * per_frame
    return {
        "samples": len(samples),
        "videos": len({sample.video_id for sample in samples}),
        "frames": len(samples) * config.data.num_frames,
        "steps_per_epoch": schedule.steps_per_epoch,
        "steps": schedule.total_steps,
        "bytes_read_from_cache": read,
    }


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
    dataset = load_dataset(config)
    samples = samples_of(dataset, split)
    published = dataset.published_n(split)
    if dry_run:
        return {"samples": len(samples), "videos": len({s.video_id for s in samples}), "published_n": published}
    stores = open_stores(config, cache, aligned=False)
    found = available_samples(config, samples, stores, cache, split)
    data = (samples_from or _reading_ahead(config))(found.samples, stores[0])
    loaded = run.load_checkpoint(checkpoint or "")
    begun = _now()
    decoder = decoder or build_decoder(config, device)
    student = build_student(config, stores[0].spec.frame_shape[-1], decoder.width, device).eval()
    student.load_state_dict(module_weights("student", loaded.tensors), strict=True)
    write = scoring.predictions_file(run.path, split)
    made_by = _digest(loaded.path, config)
    answered = resume(write, made_by)
    todo = by_window(data.samples, (i for i, s in enumerate(data.samples) if s.sample_id not in answered))
    progress(len(answered), len(data), split)
    answer(
        lambda batch: student(batch.f, batch.prompts, windows=batch.windows, lengths=batch.lengths).prefix,
        decoder,
        _batches(data, todo, config.decode.batch_size),
        write=write,
        log=lambda done: progress(len(answered) + done, len(data), split),
        run=made_by,
        closed=_closed_sets(config, dataset, found.samples),
    )
    if todo:
        run.note_session({"command": "evaluate", "split": split, "samples": len(todo), **_cost_since(begun)})
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
        "data": config.data.model_dump(mode="json", exclude={"videos", "annotations"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
