"""The stages put together: what each command does between reading its options and printing its result.

Every function returns the dict that ``--json`` prints. The stages meet here and on disk, nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cache_schema.errors import CacheMismatch
from cache_schema.spec import FeatureSpec
from cache_schema.store import FeatureStore
from pipeline import presets, registry
from pipeline.errors import ConfigError
from pipeline.overrides import flatten
from pipeline.progress import OnProgress
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.clips import ClipsDataset
from stages.data.frames import open_source
from stages.data.manifest import coverage, estimate, majority_answer
from stages.data.samples import Availability, Batch, CachedSamples, Request, available
from stages.decode.evaluate import evaluate as answer
from stages.decode.evaluate import read_predictions, resume
from stages.decode.metrics import is_correct, score
from stages.extract.run import Job
from stages.extract.run import extract as run_extraction
from stages.train.alignment import Alignment
from stages.train.loop import Trainer, make_schedule, module_weights
from stages.train.loop import train as run_training
from stages.train.student import Student
from stages.types import Decoder, Sample

Which = Literal["clip", "teacher"]


# ---------------------------------------------------------------- stage 1


def extract(
    config: PipelineConfig,
    *,
    which: Which,
    cache: Path,
    workers: int,
    retry_failed: bool,
    splits: Sequence[str],
    device: str,
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Features of one encoder for every video that the dataset wants."""
    dataset = _dataset(config)
    wanted = dataset.wanted(list(splits) or None)
    if dry_run:
        sizes = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in _shapes(config, which)
        }
        return estimate(wanted, sizes).to_json()
    if not wanted:
        raise ConfigError(f"data.videos={config.data.videos!r} and data.annotations name no video")
    job = Job(config, _builder(config, which), cache, device, help_command=_command(f"extract-{which}", config, cache))
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


def _dataset(config: PipelineConfig) -> Any:
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


def _shapes(config: PipelineConfig, which: Which) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Modality, frame shape and dtype, without loading any weights."""
    module = importlib.import_module(_builder(config, which).partition(":")[0])
    yield from module.describe(config).items()


def _command(command: str, config: PipelineConfig, cache: Path) -> str:
    """What the user would type: the preset, and every setting that differs from it and matters to an extraction."""
    base, ours = flatten(presets.get(config.preset)), flatten(config)
    rooms = ("data.", "clip.") if command == "extract-clip" else ("data.", "teacher.")
    sets = [f"{key}={_typed(ours[key])}" for key in ours if ours[key] != base[key] and key.startswith(rooms)]
    parts = ["pipeline", command, "--preset", config.preset, "--cache", str(cache)]
    return shlex.join(parts + [part for item in sets for part in ("--set", item)])


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- stage 2


def train(
    config: PipelineConfig, *, cache: Path, out: Path, device: str, dry_run: bool, progress: OnProgress
) -> dict[str, Any]:
    """Train the student of a run folder, or go on with it; scored on val after every epoch where that selects."""
    dataset = _dataset(config)
    samples = _samples(dataset, "train")
    if dry_run:
        return _training_estimate(config, samples)
    aligned = config.train.lambda_kd > 0
    stores = open_stores(config, cache, aligned=aligned)
    data = _available(config, samples, stores, cache, "train")
    run = RunFolder.create(out, config)
    checkpoint = run.load_latest()
    train_set = CachedSamples(data.samples, *stores, readers=config.data.reader_threads)
    trainer = build_trainer(config, train_set, device)
    state: dict[str, Any] = {"step": 0, "best": -1.0}
    if checkpoint is not None:
        trainer.restore(checkpoint.tensors)
        state |= checkpoint.state
    run.rewind(state["step"])
    validate = _validation(config, dataset, stores, cache, trainer)
    total = make_schedule(config.train, len(train_set)).total_steps
    board = run.board(first_step=state["step"])

    def log(record: dict[str, Any]) -> None:
        run.log(record)
        for key, value in record.items():
            if key not in ("step", "epoch"):
                board.add_scalar(key, value, record["step"])

    def save(step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        mark = [name for name, due in (("best", facts["is_best"]), ("final", step == total)) if due]
        run.save_checkpoint(step, tensors, facts, mark=tuple(mark))

    try:
        summary = run_training(
            trainer,
            train_set,
            log=log,
            save=save,
            first_step=state["step"],
            best=state["best"],
            validate=validate,
            progress=progress,
        )
    finally:
        board.close()
    return summary | {"run": str(out), "dropped": data.dropped, "warnings": list(dataset.warnings)}


def build_trainer(config: PipelineConfig, data: CachedSamples, device: str) -> Trainer:
    """Frozen language model, student and (where lambda_kd > 0) alignment on one device."""
    decoder: Decoder = registry.load("decoder", config.decode.name)(config.decode, device=device)
    student = _student(config, data.tokens.spec, decoder, device)
    alignment = None
    if data.pooled is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)  # heads and weight net start from the run's seed
            alignment = Alignment(
                config.align,
                hidden_size=config.student.hidden_size,
                target_size=int(np.prod(data.pooled.spec.frame_shape)),
                target_mean=data.target_mean() if config.align.target_norm == "center" else None,
            ).to(device)
    return Trainer(student, alignment, decoder, config.train, config.align)


def open_stores(config: PipelineConfig, cache: Path, *, aligned: bool) -> list[FeatureStore]:
    """The CLIP store and, where aligned, the teacher's; refused when their features are not those of ``config``."""
    opened = []
    for which in ("clip", "teacher") if aligned else ("clip",):
        names = [name for name, _ in _shapes(config, which)]
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
    shape, dtype = dict(_shapes(config, which))[store.modality]
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


def _student(config: PipelineConfig, spec: FeatureSpec, decoder: Decoder, device: str) -> Student:
    build: Callable[..., Student] = registry.load("student", config.student.name)
    return build(config.student, clip_width=spec.frame_shape[-1], llm_width=decoder.width).to(device)


def _samples(dataset: Any, split: str) -> list[Sample]:
    if not dataset.splits:
        raise ConfigError("without annotations there is nothing to learn or score; give data.annotations")
    samples: list[Sample] = dataset.samples(split)
    if not samples:
        raise ConfigError(f"the {split} split has no samples")
    return samples


def _available(
    config: PipelineConfig, samples: Sequence[Sample], stores: Sequence[FeatureStore], cache: Path, split: str
) -> Availability:
    found = available(samples, stores)
    if not config.data.allow_missing:
        gaps = {reason.partition(":")[0] for reason in found.missing.values()}
        which = "extract-clip" if "tokens" in gaps else "extract-teacher"
        found.require_all(_command(which, config, cache))
    if not found.samples:
        command = _command("extract-clip", config, cache)
        raise ConfigError(f"the cache holds nothing of the {split} split.\nFill it:  {command}")
    return found


def _validation(
    config: PipelineConfig,
    dataset: Any,
    stores: Sequence[FeatureStore],
    cache: Path,
    trainer: Trainer,
) -> Callable[[], float] | None:
    """Top-1 on the val split, or None where there is none or the last epoch is taken."""
    if config.train.select == "last" or "val" not in dataset.splits:
        return None
    found = _available(config, _samples(dataset, "val"), stores[:1], cache, "val")
    data = CachedSamples(found.samples, stores[0], readers=config.data.reader_threads)

    def top1() -> float:
        correct = 0
        for batch in _batches(data, range(len(data)), config.decode.batch_size):
            with torch.inference_mode():
                beams = trainer.decoder.generate(trainer.student(batch.f, batch.prompts).prefix, batch.prompts)
            rule = dataset.answer_rule
            correct += sum(is_correct(b[0], s.answer, rule) for b, s in zip(beams, batch.samples, strict=True) if b)
        return correct / len(data)

    return top1


def _batches(data: CachedSamples, positions: Sequence[int], size: int) -> Iterator[Batch]:
    cuts = [list(positions[first : first + size]) for first in range(0, len(positions), size)]
    return data.batches(Request(cut, [0] * len(cut)) for cut in cuts)


def _training_estimate(config: PipelineConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    schedule = make_schedule(config.train, len(samples))
    per_frame = sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for which in (("clip", "teacher") if config.train.lambda_kd > 0 else ("clip",))
        for _, (shape, dtype) in list(_shapes(config, which))[:1]
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
    cache: Path,
    out: Path,
    split: str,
    checkpoint: str | None,
    device: str,
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Answer a split with the student of a run folder, write predictions, score them.

    ``config`` replaces the run's own, for example to decode otherwise; sizes of the student must be those of the run.
    """
    run = RunFolder.open(out)
    config = config or run.config
    dataset = _dataset(config)
    samples = _samples(dataset, split)
    published = dataset.published_n(split)
    if dry_run:
        return {"samples": len(samples), "videos": len({s.video_id for s in samples}), "published_n": published}
    stores = open_stores(config, cache, aligned=False)
    found = _available(config, samples, stores, cache, split)
    data = CachedSamples(found.samples, stores[0], readers=config.data.reader_threads)
    loaded = run.load_checkpoint(checkpoint or "")
    decoder: Decoder = registry.load("decoder", config.decode.name)(config.decode, device=device)
    student = _student(config, stores[0].spec, decoder, device).eval()
    student.load_state_dict(module_weights("student", loaded.tensors), strict=True)
    write = run.predictions if split == "test" else run.path / f"predictions-{split}.jsonl"
    made_by = _digest(loaded.path, config)
    answered = resume(write, made_by)
    todo = [i for i, sample in enumerate(data.samples) if sample.sample_id not in answered]
    progress(len(answered), len(data), split)
    answer(
        lambda batch: student(batch.f, batch.prompts).prefix,
        decoder,
        _batches(data, todo, config.decode.batch_size),
        write=write,
        log=lambda done: progress(len(answered) + done, len(data), split),
        run=made_by,
    )
    report = _report(config, dataset, found, split, write, published)
    never = decoder.unreachable([sample.answer for sample in found.samples])
    if never:
        shown = ", ".join(map(repr, never[:5]))
        report["warnings"].append(f"{len(never)} answers need more than decode.max_new_tokens, such as {shown}")
    return report | {
        "checkpoint": loaded.path.name,
        "predictions": str(write),
        "resumed": len(answered),
    }


def _report(
    config: PipelineConfig, dataset: Any, found: Availability, split: str, write: Path, published: int | None
) -> dict[str, Any]:
    """Scores from the predictions file alone, and how they relate to the published protocol."""
    wanted = {sample.sample_id for sample in found.samples}
    predictions = [p for p in read_predictions(write) if p.sample_id in wanted]
    train_majority = majority_answer(dataset.samples("train")) if "train" in dataset.splits else None
    report = score(predictions, dataset.answer_rule, train_majority=train_majority).to_json()
    return report | {
        "split": split,
        "missing_samples": found.dropped,
        "published_n": published,
        "matches_published_n": None if published is None else published == len(predictions),
        "seed": config.train.seed,
        "warnings": list(dataset.warnings),
    }


def _digest(checkpoint: Path, config: PipelineConfig) -> str:
    """Names checkpoint and every setting that can change an answer, so that two runs never share a predictions file."""
    facts = {
        "checkpoint": json.loads((checkpoint / "state.json").read_text())["tensors"]["sha256"],
        "decode": config.decode.model_dump(mode="json", exclude={"batch_size"}),
        "data": config.data.model_dump(mode="json", exclude={"videos", "annotations"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
