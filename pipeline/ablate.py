"""``pipeline ablate``: many variants on one pass over the cache, each left behind as an ordinary run folder.

Variants that read the same batches (same data, seed and batch size) share a pass; those of another seed get a pass of
their own. A pass is cut into rounds where its students do not fit into memory together. The frozen language model is
loaded once for all of them.

``OUT/ablation.json`` is the table; ``OUT/<variant>/`` is what ``train-student`` and ``evaluate`` would have left.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import compose, inputs, overrides, predictions, provenance, training
from pipeline.ledger import Ledger
from pipeline.locks import one_writer, writing
from pipeline.progress import OnProgress
from pipeline.provenance import RunProvenance
from pipeline.runs import RunFolder
from pipeline.scoring import Answers, held_out
from pipeline.variants import MATCHED, Variant
from stages import weights
from stages.config import PipelineConfig
from stages.data.samples import Batch, CachedSamples, Request, few
from stages.decode.evaluate import read_predictions
from stages.train import grid
from stages.train.alignment import Alignment
from stages.train.loop import Trainer, make_schedule
from stages.types import Decoder, Sample

KEPT_SHARE = 4  # a quarter of the memory may keep features of val and test between students; the rest is for students


@one_writer("out")
def ablate(
    variants: Sequence[Variant],
    *,
    cache: StorePath,
    out: Path,
    device: str,
    memory: int | None,
    dry_run: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Train and score every variant that is not done yet, and return the table of all that ``out`` knows.

    Args:
        memory: bytes for students, their steps and kept features, beside the language model; None: what is free.

    Raises:
        ConfigError: ``out`` holds something else, or a run with other settings under the name of a variant.
        cache_schema.errors.CacheError: as for ``train-student``, before anything is trained.
    """
    sources = Sources(cache)
    passes = _passes(variants, sources, wanted=dry_run)
    if dry_run:
        return _estimate(variants, passes, sources)
    complete = [variant for variant in variants if variant.needs is None]
    for variant in complete:
        if (out / variant.name / "config.json").exists():
            # Refuses other settings, questions and features, before anything is changed.
            sources.run_folder(out, variant)
    # The table comes before the first run folder: it marks ``out`` as ours, whenever this is killed.
    ledger = Ledger.create(out, variants, rule=sources.dataset(variants[0].config).answer_rule)
    for variant in complete:
        sources.run_folder(out, variant)
    todo = [[v for v in members if not sources.is_settled(ledger, v)] for members in passes]
    for variant in (variant for members in todo for variant in members):
        if ledger.rows[variant.name]["status"] == "done":
            ledger.note(variant.name, status="waiting", reason="what it answered has changed")
    runner = Runner(sources, ledger, device, memory, progress)
    started = time.monotonic()
    for members in todo:
        runner.run([variant for variant in members if variant.needs is None])
    for members in todo:  # a matched arm is complete only when the adaptive arm of its seed has been scored
        matched = [_matched(variant, ledger, sources) for variant in members if variant.needs is not None]
        runner.run([variant for variant in matched if variant is not None])
    cost = {"rounds": runner.rounds, "llm_loads": runner.llm_loads, "seconds": time.monotonic() - started}
    done_before = len(variants) - sum(map(len, todo))
    held = held_out(sources.dataset(variants[0].config), "test").to_json()
    return ledger.result() | {"out": str(out), "held_out": held, "done_before": done_before, **cost}


class Sources:
    """What the cache gives to each configuration; asked once for all that are alike."""

    def __init__(self, cache: StorePath) -> None:
        self.cache = cache
        self._datasets: dict[str, Any] = {}
        self._stores: dict[str, list[FeatureStore]] = {}
        self._samples: dict[str, tuple[Sample, ...]] = {}
        self._learned: dict[str, RunProvenance] = {}

    def dataset(self, config: PipelineConfig) -> Any:
        """The dataset that ``data`` names."""
        key = _text(config, "data")
        if key not in self._datasets:
            self._datasets[key] = inputs.load_dataset(config)
        return self._datasets[key]

    def stores(self, config: PipelineConfig) -> list[FeatureStore]:
        """The CLIP store, and the teacher's where lambda_kd > 0."""
        aligned = config.train.lambda_kd > 0
        key = f"{aligned}{_text(config, 'data', 'clip', 'teacher')}"
        if key not in self._stores:
            self._stores[key] = inputs.open_stores(config, self.cache, aligned=aligned)
        return self._stores[key]

    def samples(self, config: PipelineConfig, *, wanted: bool = False) -> tuple[Sample, ...]:
        """The training samples in the order of a run alone; with ``wanted``, whether or not the cache has them."""
        key = f"{wanted}{config.train.lambda_kd > 0}{_text(config, 'data', 'clip', 'teacher', 'train')}"
        if key not in self._samples:
            inputs.refuse_leaks(config, self.dataset(config).leaks)
            found = inputs.samples_of(self.dataset(config), "train")
            if not wanted:
                stores = self.stores(config)
                found = list(inputs.available_samples(config, found, stores, self.cache, "train").samples)
                inputs.refuse_changed_sources(config, stores[0], {s.video_id for s in found}, self.cache)
            self._samples[key] = few(found, config.train.max_samples, config.train.seed)
        return self._samples[key]

    def run_folder(self, out: Path, variant: Variant) -> RunFolder:
        """The variant's run folder, made or opened. Raises ConfigError where it learned from something else."""
        config, folder = variant.config, out / variant.name
        key = f"{config.train.lambda_kd > 0}{_text(config, 'data', 'clip', 'teacher')}{config.train.select}"
        if key not in self._learned:
            stores = self.stores(config)
            train = inputs.available_samples(
                config, inputs.samples_of(self.dataset(config), "train"), stores, self.cache, "train"
            ).samples
            val = self.validation_samples(config)
            self._learned[key] = provenance.of_run(
                config, stores, {"train": train} | ({} if val is None else {"val": val}), cache=self.cache, out=folder
            )
        known = replace(
            self._learned[key],
            settings=provenance.settings_of(config),
            frozen=provenance.frozen(config),
            cache=provenance.seen_from(folder, self.cache),
            started_in=provenance.seen_from(folder, Path.cwd()),
        )
        return RunFolder.create(folder, config, provenance=known, out=out)

    def validation_samples(self, config: PipelineConfig) -> tuple[Sample, ...] | None:
        """What selects the checkpoint; None where the last one is taken."""
        return training.validation_samples(config, self.dataset(config), self.stores(config), self.cache)

    def is_settled(self, ledger: Ledger, variant: Variant) -> bool:
        """Whether another start has nothing to do: what was answered is what would be answered today."""
        if not ledger.is_settled(variant.name):
            return False
        if ledger.rows[variant.name]["status"] != "done":
            return True
        run = RunFolder.open(ledger.out / variant.name)
        dataset = self.dataset(variant.config)
        now = compose.evaluation(run, split="test", cache=self.cache, dataset=dataset)
        answered = predictions.read_own(run, "test")
        whole = len(answered.predictions) >= len(now.available.samples)
        told = ledger.rows[variant.name].get("made_from")
        return whole and told == answered.digest == now.made_from.digest

    def train_set(self, configs: Sequence[PipelineConfig]) -> CachedSamples:
        """What the runs of one pass learn from; with a teacher as soon as one of them has one."""
        aligned = next((config for config in configs if config.train.lambda_kd > 0), configs[0])
        return CachedSamples(self.samples(aligned), *self.stores(aligned))


def _passes(variants: Sequence[Variant], sources: Sources, *, wanted: bool) -> list[list[Variant]]:
    """Variants that read the same batches, in the order of their first member."""
    passes: dict[str, list[Variant]] = {}
    for variant in variants:
        config = variant.config
        shared = {name: getattr(config.train, name) for name in (*grid.SHARED, "max_samples")}
        # Without a teacher more samples may be available, where data.allow_missing is set: another order.
        ids = _digest([sample.sample_id for sample in sources.samples(config, wanted=wanted)])
        key = json.dumps([shared, ids, _text(config, "data", "clip", "teacher", "decode")])
        passes.setdefault(key, []).append(variant)
    return list(passes.values())


def _matched(variant: Variant, ledger: Ledger, sources: Sources) -> Variant | None:
    """The variant with the weight that its adaptive twin used on average; None where that one has failed."""
    assert variant.needs is not None
    means = [
        value
        for record in RunFolder.open(ledger.out / variant.needs).metrics()
        for key, value in record.items()
        if key.startswith("w/")
    ]
    if ledger.rows[variant.needs]["status"] != "done" or not means:
        ledger.drop(variant.name, "needs", f"its weight comes from {variant.needs}, which was not finished")
        return None
    weight = round(float(np.mean(means)), 6)
    config = overrides.apply(variant.config, [f"align.uniform_weight={weight}"])
    variant = replace(variant, config=config, needs=None)
    sources.run_folder(ledger.out, variant)
    ledger.note(variant.name, settings={**variant.settings, "align.uniform_weight": f"{weight:g} ({MATCHED})"})
    return variant


@dataclass
class Runner:
    """Trains and scores the variants of one pass after the other, with one language model."""

    sources: Sources
    ledger: Ledger
    device: str
    memory: int | None
    progress: OnProgress
    llm_loads: int = 0
    rounds: int = 0
    _decoder: tuple[str, Decoder] | None = None
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a student's state, and of its turn
    _kept: Kept | None = None

    def run(self, variants: Sequence[Variant]) -> None:
        """One pass: train what is not trained, then score."""
        if not variants:
            return
        data = self.sources.train_set([variant.config for variant in variants])
        decoder = self._load(variants[0].config)
        limit = self.memory or free_memory(self.device)
        self._kept = kept = self._kept or Kept(limit // KEPT_SHARE)
        untrained = [variant for variant in variants if not self._is_trained(variant, len(data))]
        rounds = self._plan(untrained, data, decoder, limit - limit // KEPT_SHARE)
        for number, members in enumerate(rounds, start=1):
            self._train(members, data, decoder, kept, f"seed {members[0].seed}, round {number} of {len(rounds)}")
            gc.collect()
        self.rounds += len(rounds)
        for number, variant in enumerate(variants):
            if self.ledger.rows[variant.name]["status"] != "dropped":
                self.progress(number, len(variants), f"scoring {variant.name}")
                self._score(variant, decoder, kept)
        self.progress(len(variants), len(variants), "scored")

    def _load(self, config: PipelineConfig) -> Decoder:
        key = _text(config, "decode")
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # the old one goes before the new one comes
            self._decoder = (key, training.build_decoder(config, self.device))
            self.llm_loads += 1
        return self._decoder[1]

    def _is_trained(self, variant: Variant, num_samples: int) -> bool:
        total = make_schedule(variant.config.train, num_samples).total_steps
        run = RunFolder.open(self.ledger.out / variant.name)
        self.ledger.note(variant.name, step=run.step_at("latest"), steps=total)
        return run.step_at("final") == total

    def _plan(
        self, variants: Sequence[Variant], data: CachedSamples, decoder: Decoder, limit: int
    ) -> list[list[Variant]]:
        """Rounds that fit. Students that are built alike are measured once."""
        for variant in variants:
            key = _size_key(variant.config)
            if key not in self._sizes:
                with self._dropping(variant):
                    trainer = self._trainer(variant, data, decoder)
                    self._sizes[key] = (grid.state_bytes(trainer.modules.values()), grid.step_bytes(trainer, data))
                    del trainer
                gc.collect()
        able = [v for v in variants if self.ledger.rows[v.name]["status"] != "dropped"]
        if not able:
            return []
        sizes = [self._sizes[_size_key(variant.config)] for variant in able]
        states, step = [state for state, _ in sizes], max(turn for _, turn in sizes)
        self.ledger.memory = {"limit": limit, "per_student": max(states), "per_step": step}
        return [[able[i] for i in members] for members in grid.plan_rounds(states, step, limit)]

    def _trainer(self, variant: Variant, data: CachedSamples, decoder: Decoder) -> Trainer:
        """As ``train-student`` builds it: without lambda there is no teacher."""
        own = data if variant.config.train.lambda_kd > 0 else CachedSamples(data.samples, data.tokens)
        return training.build_trainer(variant.config, own, self.device, decoder)

    def _train(
        self, variants: Sequence[Variant], data: CachedSamples, decoder: Decoder, kept: Kept, where: str
    ) -> None:
        ready: list[tuple[Variant, RunFolder, Trainer, dict[str, Any]]] = []
        with contextlib.ExitStack() as stack:
            for variant in variants:
                with self._dropping(variant):
                    trainer = self._trainer(variant, data, decoder)
                    stack.enter_context(writing(self.ledger.out / variant.name))
                    run = RunFolder.open(self.ledger.out / variant.name)
                    ready.append((variant, run, trainer, training.resume_run(run, trainer)))
            entrants = []
            for variant, run, trainer, state in ready:
                recording = training.recording(
                    run,
                    data,
                    command="ablate",
                    first_step=state["step"],
                    total=make_schedule(variant.config.train, len(data)).total_steps,
                    students=len(ready),
                )
                log, save = stack.enter_context(recording)
                validate = self._validation(variant.config, trainer, kept)
                entrants.append(grid.Entrant(variant.name, trainer, log, save, state["step"], state["best"], validate))
            grid.train_together(
                entrants,
                data,
                drop=lambda name, why: self.ledger.drop(name, why.kind, why.reason, why.step),
                progress=lambda done, total, what: self.progress(done, total, f"{what} ({where})"),
            )

    def _validation(self, config: PipelineConfig, trainer: Trainer, kept: Kept) -> Callable[[], float] | None:
        dataset, tokens = self.sources.dataset(config), self.sources.stores(config)[0]
        val = self.sources.validation_samples(config)
        return training.validation(config, dataset, val, tokens, trainer, samples_from=kept.samples)

    def _score(self, variant: Variant, decoder: Decoder, kept: Kept) -> None:
        with self._dropping(variant):
            found = compose.evaluate(
                self.ledger.out / variant.name,
                cache=self.sources.cache,
                split="test",
                checkpoint=None,
                device=self.device,
                dry_run=False,
                progress=lambda *_: None,
                decoder=decoder,
                samples_from=kept.samples,
                dataset=self.sources.dataset(variant.config),
            )
            self._tell(variant, found)

    def _tell(self, variant: Variant, found: Mapping[str, Any]) -> None:
        """The scores of a variant, and of its arm over the seeds that are there."""
        ledger = self.ledger
        numbers = {"k": found["correct"], "n": found["n"], "accuracy": found["top1"], "interval": found["interval"]}
        row = ledger.rows[variant.name]
        row |= {"status": "done", "step": row["steps"], **numbers, "by_video": found["by_video"], "reason": None}
        row |= {key: found[key] for key in ("made_from", "questions")}
        for other in ledger.rows.values():  # one table is about one set of questions
            if other["status"] == "done" and other.get("questions") != row["questions"]:
                other |= {"status": "waiting", "reason": "it has answered other questions"}
                ledger.arms.pop(other["arm"], None)
        rows = [row for row in ledger.rows.values() if row["arm"] == variant.arm and row["status"] == "done"]
        ledger.arms[variant.arm] = _over_seeds(rows, ledger)
        ledger.write()

    @contextlib.contextmanager
    def _dropping(self, variant: Variant) -> Iterator[None]:
        """A student that finds no memory, or whose weights are not finite, is taken out with that reason."""
        try:
            yield
        except (ValueError, MemoryError, RuntimeError) as error:
            why = grid.why_dropped(error, 0)
            if why is not None:
                self.ledger.drop(variant.name, why.kind, why.reason)
            elif isinstance(error, ValueError) and "not finite" in str(error):
                self.ledger.drop(variant.name, "diverged", str(error))
            else:
                raise


def _over_seeds(rows: Sequence[Mapping[str, Any]], ledger: Ledger) -> dict[str, Any]:
    """One arm over its seeds."""
    rule: Any = ledger.rule
    files = [ledger.out / row["variant"] / "predictions.jsonl" for row in rows]
    answers = Answers.of([(row["seed"], read_predictions(file)) for row, file in zip(rows, files, strict=True)], rule)
    interval, per_seed = answers.interval, [row["accuracy"] for row in rows]
    return {
        "seeds": [row["seed"] for row in rows],
        "k": sum(row["k"] for row in rows),
        "n": sum(row["n"] for row in rows),
        "accuracy": sum(row["k"] for row in rows) / sum(row["n"] for row in rows),
        "interval": None if interval is None else [interval.low, interval.high],
        "videos": 0 if interval is None else interval.videos,
        "per_seed": per_seed,
        "seed_sd": answers.seed_sd,
    }


class Kept:
    """Val and test features that one student has read stay for the next, up to a number of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._open: dict[str, CachedSamples] = {}

    def samples(self, samples: Sequence[Sample], store: FeatureStore) -> CachedSamples:
        """The same object for the same samples of the same store."""
        key = _digest([str(store.path), store.modality, *(s.sample_id + s.draws.tobytes().hex() for s in samples)])
        return self._open.setdefault(key, _KeptSamples(samples, store, self))


class _KeptSamples(CachedSamples):
    """Keeps what it has read while the budget lasts; what comes later is read again."""

    def __init__(self, samples: Sequence[Sample], store: FeatureStore, kept: Kept) -> None:
        super().__init__(samples, store)
        self._kept, self._batches = kept, dict[tuple[int, ...], Batch]()

    def batch(self, positions: Sequence[int], draws: Sequence[int] | None = None) -> Batch:
        key = tuple(positions)
        if draws is None and key in self._batches:
            return self._batches[key]
        batch = super().batch(positions, draws)
        if draws is None and batch.f.nbytes <= self._kept.budget:
            self._kept.budget -= batch.f.nbytes
            self._batches[key] = batch
        return batch

    def batches(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """One by one, since most are kept; an evaluation looks at the first frame draw."""
        for request in requests:
            yield self.batch(request.positions)


# ---------------------------------------------------------------- sizes


def free_memory(device: str) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine within the limits of its control group."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    from distributed.system import MEMORY_LIMIT

    pages = {"available": 0}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        pages = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    available = pages.get("MemAvailable", os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return int(min(available, MEMORY_LIMIT))


def _estimate(variants: Sequence[Variant], passes: Sequence[Sequence[Variant]], sources: Sources) -> dict[str, Any]:
    """What ``--dry-run`` says: arithmetic only, and the size of a student where its files are on this machine."""
    one_by_one = together = steps = 0
    for members in passes:
        alone = [training.training_estimate(v.config, sources.samples(v.config, wanted=True)) for v in members]
        one_by_one += sum(part["bytes_read_from_cache"] for part in alone)
        together += max(part["bytes_read_from_cache"] for part in alone)
        steps += sum(part["steps"] for part in alone)
    most = max(passes, key=len)
    states: list[int] | None = None
    with contextlib.suppress(weights.WeightsMissing):
        sizes = {key: _planned_state(v.config) for v in most for key in [_size_key(v.config)]}
        states = [sizes[_size_key(v.config)] for v in most]
    return {
        "variants": len(variants),
        "passes": len(passes),
        "students_in_a_pass": len(most),
        "steps": steps,
        "bytes_read_in_training": together,
        "bytes_read_one_by_one": one_by_one,
        "bytes_of_students_in_a_pass": None if states is None else sum(states),
        "names": [variant.name for variant in variants],
    }


def _planned_state(config: PipelineConfig) -> int:
    """``state_bytes`` before any feature exists; rounds also count a step, which only a start can measure."""
    cfg = config.decode
    folder = weights.resolve(cfg.llm_config or cfg.llm, cfg.revision, patterns=["config.json"], local_only=True)
    llm_width = int(json.loads((folder / "config.json").read_text())["hidden_size"])
    clip_width = next(shape for _, (shape, _) in inputs.shapes(config, "clip"))[-1]
    modules: list[torch.nn.Module] = [training.build_student(config, clip_width, llm_width, "cpu")]
    if config.train.lambda_kd > 0:
        target = int(np.prod(next(shape for _, (shape, _) in inputs.shapes(config, "teacher"))))
        zero, one = torch.zeros(target), torch.eye(target)
        modules.append(
            Alignment(
                config.align,
                hidden_size=config.student.hidden_size,
                target_size=target,
                target_mean=zero,
                target_covariance=one,
            )
        )
    return grid.state_bytes(modules)


def _size_key(config: PipelineConfig) -> str:
    """Equal for students whose states and graphs are of one size."""
    align = config.align.model_dump(mode="json") if config.train.lambda_kd > 0 else None
    return json.dumps([config.student.model_dump(mode="json"), align, config.train.micro_batch, config.train.memory])


def _text(config: PipelineConfig, *sections: str) -> str:
    return json.dumps([getattr(config, section).model_dump(mode="json") for section in sections])


def _digest(parts: Sequence[str] | Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
