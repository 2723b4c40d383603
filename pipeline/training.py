"""One training run, put together: its models, where it goes on, what it records, how it is validated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import inputs, registry
from pipeline.inputs import SamplesFrom
from pipeline.progress import Stopwatch
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.samples import CachedSamples
from stages.decode.metrics import is_correct
from stages.train.alignment import Alignment
from stages.train.loop import Log, Save, Trainer, make_schedule
from stages.train.student import Student
from stages.types import Decoder, Sample

# ---------------------------------------------------------------- models


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


def build_student(config: PipelineConfig, clip_width: int, llm_width: int, device: str) -> Student:
    """The trainable part, as it starts."""
    build: Callable[..., Student] = registry.load("student", config.student.name)
    return build(config.student, clip_width=clip_width, llm_width=llm_width).to(device)


# ---------------------------------------------------------------- run folder and validation


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
def recording(
    run: RunFolder, data: CachedSamples, *, command: str, first_step: int, total: int, students: int = 1
) -> Iterator[tuple[Log, Save]]:
    """What a training run calls to log a record and to save a checkpoint; at the end its cost goes to sessions.jsonl.

    Where several students learn on one pass over ``data``, each is charged an equal share of the pass, so that the
    costs of all of them add up to what was spent.
    """
    board = run.board(first_step=first_step)
    watch, done = Stopwatch(), first_step

    def log(record: dict[str, Any]) -> None:
        nonlocal done
        run.log(record)
        for key, value in record.items():
            if key not in ("step", "epoch"):
                board.add_scalar(key, value, record["step"])
        done = record["step"]

    def save(step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        mark = [name for name, due in (("best", facts["is_best"]), ("final", step == total)) if due]
        run.save_checkpoint(step, tensors, facts, mark=tuple(mark))

    try:
        yield log, save
    finally:
        board.close()
        if done > first_step:  # also where it is interrupted: lost work cost too
            spent = {"bytes_read": _bytes_read(run.config, data, done - first_step), **watch.cost()}
            run.note_session(
                {"command": command, "first_step": first_step, "steps": done, "students": students}
                | {key: value / students for key, value in spent.items()}
            )


def _bytes_read(config: PipelineConfig, data: CachedSamples, steps: int) -> int:
    """What the batches of so many steps take in the cache."""
    stores = [data.tokens] if data.pooled is None else [data.tokens, data.pooled]
    sample = config.data.num_frames * sum(store.spec.frame_bytes for store in stores)
    return steps * min(config.train.batch_size, len(data)) * sample


def validation_samples(
    config: PipelineConfig, dataset: Any, stores: Sequence[FeatureStore], cache: StorePath
) -> tuple[Sample, ...] | None:
    """What the cache can serve of the val split; None where there is none or the last epoch is taken."""
    if config.train.select == "last" or "val" not in dataset.splits:
        return None
    return inputs.available_samples(config, inputs.samples_of(dataset, "val"), stores[:1], cache, "val").samples


def validation(
    config: PipelineConfig,
    dataset: Any,
    samples: Sequence[Sample] | None,
    tokens: FeatureStore,
    trainer: Trainer,
    samples_from: SamplesFrom | None = None,
) -> Callable[[], float] | None:
    """Top-1 on the samples of ``validation_samples``; None where there are none."""
    if samples is None:
        return None
    data = (samples_from or inputs.reading_ahead(config))(samples, tokens)

    def top1() -> float:
        correct = 0
        for batch in inputs.batches(data, range(len(data)), config.decode.batch_size):
            with torch.inference_mode():
                prefix = trainer.student(batch.f, batch.prompts, windows=batch.windows, lengths=batch.lengths).prefix
                beams = trainer.decoder.generate(prefix, batch.prompts)
            rule = dataset.answer_rule
            correct += sum(is_correct(b[0], s.answer, rule) for b, s in zip(beams, batch.samples, strict=True) if b)
        return correct / len(data)

    return top1


def training_estimate(config: PipelineConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Sizes of a training run, without reading anything."""
    schedule = make_schedule(config.train, len(samples))
    per_frame = sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize
        for which in (("clip", "teacher") if config.train.lambda_kd > 0 else ("clip",))
        for _, (shape, dtype) in list(inputs.shapes(config, which))[:1]
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
