"""Look into a finished run: ``diagnostics.json`` of its run folder, which ``report`` draws.

The numbers come from ``stages.train.diagnostics``; here they meet the run, the cache and the frozen encoders.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cache_schema.errors import CacheMismatch, CacheMissing
from cache_schema.objects import StorePath, locate
from cache_schema.store import FeatureStore
from pipeline import registry
from pipeline.inputs import available_samples, load_dataset, open_stores, refuse_features_of_another_run, samples_of
from pipeline.locks import one_writer, replace_text
from pipeline.printing import in_one_line
from pipeline.progress import OnProgress
from pipeline.provenance import Questions, features
from pipeline.runs import RunFolder
from pipeline.training import build_trainer
from stages.config import PipelineConfig
from stages.data.frames import open_source
from stages.data.samples import Batch, CachedSamples
from stages.train import diagnostics
from stages.train.diagnostics import Observed
from stages.train.loop import Trainer, module_weights
from stages.train.student import Student
from stages.types import Sample

FORMAT = 2


@one_writer("run_path", create=False)
def diagnose(
    run_path: Path,
    *,
    cache: StorePath | None = None,
    split: str,
    samples: int,
    checkpoint: str,
    device: str,
    progress: OnProgress,
) -> dict[str, Any]:
    """Diagnostics of one checkpoint over ``samples`` evenly spaced samples of a split.

    ``cache`` is the feature store; None: the one that the run read.

    Runs without an alignment (lambda_kd = 0) are compared with the teacher's targets too, where the cache has them.
    """
    run = RunFolder.open(run_path)
    config = run.located_config
    cache = locate(run.cache) if cache is None else cache
    tokens, pooled = _stores(config, cache)
    for store in (tokens, pooled):
        if store is not None:
            refuse_features_of_another_run(run, store)
    dataset = load_dataset(config)
    stores = [store for store in (tokens, pooled) if store is not None]
    found = available_samples(config, samples_of(dataset, split), stores, cache, split)
    fitting, others = alike(found.samples)
    chosen = [fitting[i] for i in evenly(len(fitting), samples)]
    data = CachedSamples(chosen, tokens, pooled)
    loaded = run.load_checkpoint(checkpoint)
    aligned = config.train.lambda_kd > 0
    trainer = build_trainer(config, CachedSamples(chosen, tokens, pooled if aligned else None), device)
    for room, module in trainer.modules.items():
        module.load_state_dict(module_weights(room, loaded.tensors), strict=True)
    size = min(config.decode.batch_size, config.train.micro_batch or config.decode.batch_size)
    batches = [data.batch(range(first, min(first + size, len(data)))) for first in range(0, len(data), size)]
    progress(0, 3, "levels")
    seen = diagnostics.observe(trainer.student, trainer.alignment, batches)
    progress(1, 3, "banks and attention")
    readings = _readings(trainer.student, batches)
    progress(2, 3, "operations")
    result: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": loaded.path.name,
        "made_from": {
            "checkpoint": loaded.sha256,
            "questions": Questions.of(split, chosen).digest,
            "features": {store.modality: features(store, chosen) for store in stores},
        },
        "split": split,
        "samples": len(chosen),
        "num_frames": chosen[0].draws.shape[1],
        "levels": _levels(seen, _target(batches)),
        "per_frame": {str(u): _rounded(cosine.mean(0)) for u, cosine in _cosines(seen).items()},
        "starts": None if not readings else _rounded(torch.cat([r.starts for r in readings]).mean(0)),
        "per_sample": _per_sample(data, seen, readings),
        "operations": _operations(config, trainer, data),
    }
    text = json.dumps(_strict(result), allow_nan=False)
    replace_text(run.diagnostics, text + "\n")
    progress(3, 3, "")
    return {
        "diagnostics": str(run.diagnostics),
        "checkpoint": loaded.path.name,
        "samples": len(chosen),
        "constant": result["levels"]["constant"],
        "cosine": result["levels"]["cosine"],
        "centred": result["levels"]["centred"],
        "similarity_of_levels": result["levels"]["similarity"],
        "warnings": [*dataset.warnings, *([others] if others else [])],
    }


def alike(samples: Sequence[Sample]) -> tuple[list[Sample], str]:
    """The samples with the most frequent number of frames, so that frame t means one thing; a word on the others."""
    counts = Counter(sample.draws.shape[1] for sample in samples)
    length, number = counts.most_common(1)[0]
    others = len(samples) - number
    said = f"{others} samples with another number of frames than {length} are not looked at" if others else ""
    return [sample for sample in samples if sample.draws.shape[1] == length], said


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` positions of ``count``, evenly spaced, the first among them."""
    taken = min(count, wanted)
    return [i * count // taken for i in range(taken)]


def _stores(config: PipelineConfig, cache: StorePath) -> tuple[FeatureStore, FeatureStore | None]:
    if config.train.lambda_kd > 0:
        tokens, pooled = open_stores(config, cache, aligned=True)
        return tokens, pooled
    try:
        tokens, pooled = open_stores(config, cache, aligned=True)
    except (CacheMissing, CacheMismatch):
        return open_stores(config, cache, aligned=False)[0], None
    return tokens, pooled


def _target(batches: Sequence[Batch]) -> Tensor | None:
    """Raw targets [B, T, D], as cached."""
    targets = [batch.per_sample(batch.y_star).flatten(2).float() for batch in batches if batch.y_star is not None]
    return torch.cat(targets) if targets else None


def _cosines(seen: Observed) -> dict[int, Tensor]:
    return {} if seen.target is None else seen.cosine()


def _levels(seen: Observed, raw: Tensor | None) -> dict[str, Any]:
    """One number per level, and the similarities of all of them. ``cka`` ends with the teacher where there is one."""
    cka = seen.cka(*([] if raw is None else [raw]))
    number = len(seen.hidden)
    target = seen.target
    return {
        "levels": list(seen.hidden),
        "cka": [row[:number] for row in cka[:number]],
        "similarity": diagnostics.mean_similarity([row[:number] for row in cka[:number]]),
        "cka_teacher": [] if raw is None else cka[-1][:number],
        "constant": None if target is None else diagnostics.constant_cosine(target.flatten(0, 1)),
        "cosine": {str(u): float(c.mean()) for u, c in _cosines(seen).items()},
        "centred": {}
        if target is None
        else {str(u): diagnostics.centred_cosine(z.flatten(0, 1), target.flatten(0, 1)) for u, z in seen.z.items()},
        "weight": {str(u): float(w.mean()) for u, w in seen.w.items()},
        "saturated": {str(u): diagnostics.saturated_share(w) for u, w in seen.w.items()},
    }


def _readings(student: Student, batches: Sequence[Batch]) -> list[diagnostics.Reading]:
    """Empty for students that have no memory banks."""
    if type(student) is not Student:
        return []
    return [diagnostics.read_frames(student, batch.per_sample(batch.f), batch.prompts) for batch in batches]


def _per_sample(
    data: CachedSamples, seen: Observed, readings: Sequence[diagnostics.Reading]
) -> dict[str, dict[str, Any]]:
    """By sample id: cosine per level and frame, attention per frame, and the frames of each slot."""
    cosines = _cosines(seen)
    rows = [(reading, i) for reading in readings for i in range(len(reading.mass))]
    found: dict[str, dict[str, Any]] = {}
    for number, sample in enumerate(data.samples):
        facts: dict[str, Any] = {"frame_index": sample.frame_index.tolist()}
        if cosines:
            facts["cosine"] = {str(u): _rounded(cosine[number]) for u, cosine in cosines.items()}
        if rows:
            reading, i = rows[number]
            frames = len(sample.frame_index)
            sizes, mass = reading.all_sizes[i : i + 1], reading.mass[i : i + 1].mean(1)
            facts["attention"] = _rounded(diagnostics.frame_attention(mass, sizes, frames)[0])
            facts["attention_slots"] = _rounded(mass[0].sum(-1))
            facts["slots"] = _rounded(diagnostics.slot_frames(sizes, frames)[0])
        found[sample.sample_id] = facts
    return found


def _operations(config: PipelineConfig, trainer: Trainer, data: CachedSamples) -> dict[str, Any]:
    """Counted floating-point operations (2 per multiply-add): one frame of each encoder, one sample of training.

    Counted by torch's FlopCounterMode while the real modules run: matrix products, convolutions and attention count,
    elementwise work does not.
    """

    def one_sample() -> None:
        batch = CachedSamples(data.samples[:1], data.tokens, data.pooled if trainer.alignment else None).batch([0])
        tokens = trainer.decoder.count_answer_tokens(batch.answers)
        trainer.student.train()
        trainer.accumulate(batch, step=0, first=0, answer_tokens=tokens, num_samples=1)

    counted: dict[str, Any] = {"training_sample": _count(one_sample)}
    for kind, name in (("encoder", config.clip.source), ("teacher", config.teacher.name)):
        try:
            source = open_source(config.data)
            rule, decoder = source.frame_rule, source.decoder
            source.close()
            encoder = registry.load(kind, name)(config, frame_rule=rule, decoder=decoder)
        except (ValueError, OSError) as error:  # no weights or no videos here: the cache is enough for the rest
            counted[f"{kind}_frame"], counted[f"{kind}_reason"] = None, in_one_line(error)
            continue
        frame = np.zeros((1, 64, 64, 3), np.uint8)
        counted[f"{kind}_frame"] = _count(partial(encoder, frame))
    return counted


def _count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _rounded(values: Tensor) -> Any:
    """Four decimals: what a picture needs."""
    return np.round(values.double().numpy(), 4).tolist()


def _strict(value: Any) -> Any:
    """NaN, which undefined similarities are, becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list) else value
