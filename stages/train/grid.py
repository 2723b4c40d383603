"""Many students on one pass over the cache: each batch is read, decoded and put on the device once (D60).

Students take turns on every micro-batch, each with its own weights, optimiser, learning rate and dropout masks. The
frozen language model is one object that all of them are given. Nothing of a student's arithmetic knows of the others:
its weights after any step are bit-equal to those of ``loop.train`` alone (on CPU), which the tests hold it to.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import TrainConfig
from stages.data.samples import Batch, CachedSamples, Request
from stages.stopping import whole_steps
from stages.train import diagnostics
from stages.train.loop import (
    STEPS_AHEAD,
    Cuts,
    Log,
    Save,
    Schedule,
    Trainer,
    TrainingDiverged,
    add,
    make_schedule,
)

# What decides which samples a step reads. Everything else may differ between the students of a pass.
SHARED = ("seed", "batch_size", "drop_last", "group_windows")


@dataclass
class Entrant:
    """One student of a pass; the fields are the arguments of ``loop.train``."""

    name: str
    trainer: Trainer
    log: Log
    save: Save
    first_step: int = 0
    best: float = -1.0
    validate: Callable[[], float] | None = None
    logged: dict[str, float] = field(default_factory=dict, repr=False)  # of the step in work


@dataclass(frozen=True)
class Dropped:
    """Why a student left its pass: ``kind`` is "diverged" or "memory"."""

    kind: str
    reason: str
    step: int


def train_together(
    entrants: Sequence[Entrant],
    data: CachedSamples,
    *,
    drop: Callable[[str, Dropped], None] = lambda _name, _why: None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Run the remaining steps of all of them; returns what was logged last, by name.

    A student that is further than the others waits until they have caught up: after a kill, checkpoints of one pass may
    be one save apart. One whose loss is not finite, or that finds no memory, leaves with its last checkpoint on disk.

    Args:
        entrants: they agree in ``SHARED``; those with an alignment need ``data`` with a teacher, the others ignore it.
        data: what all of them learn from, in the order that ``loop.train`` takes.
        drop: told of every student that leaves, at once.

    Raises:
        ValueError: no samples, or students that would read different batches.
    """
    if not len(data):
        raise ValueError("no training samples: the split is empty, or nothing of it is cached")
    refuse_other_batches([entrant.trainer.cfg for entrant in entrants])
    running = list(entrants)
    schedules = {entrant.name: make_schedule(entrant.trainer.cfg, len(data)) for entrant in entrants}
    for entrant in entrants:
        entrant.trainer.student.train()
    started, last = time.monotonic(), dict[str, dict[str, Any]]()
    end = max((schedule.total_steps for schedule in schedules.values()), default=0)

    def leave(entrant: Entrant, why: Dropped) -> None:
        running.remove(entrant)
        drop(entrant.name, why)

    first_step = min((entrant.first_step for entrant in entrants), default=0)
    order = _Order(running, data, schedules, first_step, end)
    with whole_steps() as asked_to_stop, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: order.close())  # the one that is there then
        for step in range(first_step, end):
            if order.names != [entrant.name for entrant in running]:  # one has left: others may read otherwise now
                order.close()
                order = _Order(running, data, schedules, step, end)
            active = [e for e in running if e.first_step <= step < schedules[e.name].total_steps]
            for entrant in active:
                entrant.logged = {}
                entrant.trainer.begin(schedules[entrant.name].lr(step))
            for cuts, members in order.groups(step):
                _turns(list(members), data, step, cuts, order.batches, leave)
            stopping = asked_to_stop()  # asked once, so that all of them stop after the same step
            for entrant in [e for e in active if e in running]:
                try:
                    last[entrant.name] = _end_step(entrant, data, step, schedules[entrant.name], stopping=stopping)
                except (MemoryError, RuntimeError) as error:
                    why = why_dropped(error, step)
                    if why is None:
                        raise
                    leave(entrant, why)
            progress(step + 1, end, f"{len(running)} students")
            if stopping:
                break
    seconds = time.monotonic() - started
    return {name: {"steps": schedules[name].total_steps, "seconds": seconds, **facts} for name, facts in last.items()}


def refuse_other_batches(configs: Sequence[TrainConfig]) -> None:
    """Raise ValueError unless all of them read the same samples at every step."""
    for key in SHARED:
        values = {getattr(cfg, key) for cfg in configs}
        if len(values) > 1:
            raise ValueError(f"one pass reads one order of batches, but train.{key} is {sorted(values)}")


class _Order:
    """What a pass of these students reads from a step on, read ahead. ``close`` it."""

    def __init__(
        self,
        entrants: Sequence[Entrant],
        data: CachedSamples,
        schedules: dict[str, Schedule],
        first_step: int,
        end: int,
    ) -> None:
        members = list(entrants)
        self.names = [entrant.name for entrant in members]
        self.groups = functools.lru_cache(STEPS_AHEAD)(lambda step: _groups(members, data, step, schedules))
        cuts = (cut for step in range(first_step, end) for cuts, _ in self.groups(step) for cut in cuts)
        self.batches = data.batches(Request(*cut) for cut in cuts)

    def close(self) -> None:
        """End the threads that read."""
        self.batches.close()


def _groups(
    entrants: Sequence[Entrant], data: CachedSamples, step: int, schedules: dict[str, Schedule]
) -> list[tuple[Cuts, list[Entrant]]]:
    """The students at work in a step, by the micro-batches that they read."""
    groups: dict[str, tuple[Cuts, list[Entrant]]] = {}
    for entrant in entrants:
        schedule = schedules[entrant.name]
        if entrant.first_step <= step < schedule.total_steps:
            cuts = entrant.trainer.cuts(data, step, schedule)
            # Under train.memory a smaller student takes larger micro-batches; those of one size share what is read.
            groups.setdefault(repr([len(positions) for positions, _ in cuts]), (cuts, []))[1].append(entrant)
    return list(groups.values())


def _turns(
    members: list[Entrant],
    data: CachedSamples,
    step: int,
    cuts: Cuts,
    batches: Iterator[Batch],
    leave: Callable[[Entrant, Dropped], None],
) -> None:
    """One optimiser step of students that take micro-batches of one size."""
    first = members[0].trainer
    answers = [data.samples[i].answer for positions, _ in cuts for i in positions]
    answer_tokens = first.decoder.count_answer_tokens(answers)
    starts = list(itertools.accumulate((len(positions) for positions, _ in cuts), initial=0))
    for part, read in enumerate(itertools.islice(batches, len(cuts))):
        batch = _on_device(read, first.student.query_tokens.device)
        for entrant in list(members):
            failed = _take_turn(
                entrant,
                batch,
                is_last=part == len(cuts) - 1,
                step=step,
                first=starts[part],
                answer_tokens=answer_tokens,
                num_samples=len(answers),
            )
            if failed is not None:
                members.remove(entrant)
                leave(entrant, failed)
                _give_back(entrant.trainer)


def _take_turn(entrant: Entrant, batch: Batch, *, is_last: bool, step: int, **facts: int) -> Dropped | None:
    """One micro-batch for one student, and its optimiser step behind the last one; why it failed, where it did."""
    trainer = entrant.trainer
    try:
        add(entrant.logged, trainer.accumulate(batch, step=step, **facts))
        if is_last:
            entrant.logged |= trainer.finish()
            # Now, not at the next step: else the gradients of all students would be in memory together.
            trainer.optimizer.zero_grad(set_to_none=True)
    except (TrainingDiverged, MemoryError, RuntimeError) as error:
        why = why_dropped(error, step)
        if why is None:
            raise
        return why
    return None


def _end_step(
    entrant: Entrant, data: CachedSamples, step: int, schedule: Schedule, *, stopping: bool
) -> dict[str, Any]:
    """Validation, record, diagnostics and checkpoint, as ``loop.train`` does them."""
    done, cfg = step + 1, entrant.trainer.cfg
    epoch_ends = done % schedule.steps_per_epoch == 0 or done == schedule.total_steps
    record: dict[str, Any] = {"step": done, "epoch": step // schedule.steps_per_epoch, **entrant.logged}
    is_best = False
    if epoch_ends and entrant.validate is not None:
        entrant.trainer.student.eval()
        record["val_top1"] = accuracy = entrant.validate()
        entrant.trainer.student.train()
        is_best, entrant.best = accuracy > entrant.best, max(accuracy, entrant.best)
    if diagnostics.probe_due(done, schedule.total_steps, batch_size=cfg.batch_size, num_samples=len(data)):
        record |= entrant.trainer.probe(data)
    entrant.log(record)
    due = done % cfg.save_every == 0 if cfg.save_every else epoch_ends
    if due or is_best or done == schedule.total_steps or stopping:
        state = {"step": done, "best": entrant.best, "is_best": is_best}
        entrant.save(done, entrant.trainer.checkpoint(), state)
    return record


def _on_device(batch: Batch, device: torch.device) -> Batch:
    y_star = None if batch.y_star is None else batch.y_star.to(device)
    return replace(batch, f=batch.f.to(device), y_star=y_star)


def why_dropped(error: BaseException, step: int) -> Dropped | None:
    """The reason that a student leaves for; None for an error that is not the student's own."""
    if isinstance(error, TrainingDiverged):
        return Dropped("diverged", str(error), step)
    # torch raises a bare RuntimeError where the CPU's memory ends.
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Dropped("memory", f"out of memory at step {step + 1}: {text.splitlines()[0] if text else ''}", step)
    return None


def _give_back(trainer: Trainer) -> None:
    """What a failed attempt holds goes back to the device before the next student needs it."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- memory, planned before a pass starts


def state_bytes(modules: Iterable[nn.Module]) -> int:
    """What a student keeps between steps: weights and, of the trainable ones, two moments of AdamW."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.nbytes * (3 if tensor.requires_grad else 1) for tensor in tensors)


def step_bytes(trainer: Trainer, data: CachedSamples) -> int:
    """What the turn of one student takes and gives back: its graph, its gradients and the batch. Measured by one turn.

    The students of a pass take turns, so however many they are, this counts once. Nothing of the trainer is changed.
    """
    schedule = make_schedule(trainer.cfg, len(data))
    cuts = trainer.cuts(data, 0, schedule)
    batch = data.batch(*cuts[0])
    frozen = getattr(trainer.decoder, "model", None)
    modules = [*trainer.modules.values(), *([frozen] if isinstance(frozen, nn.Module) else [])]
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    graph: dict[int, int] = {}

    def seen(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            graph[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.student.train()
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        trainer.accumulate(
            batch, step=0, first=0, answer_tokens=1, num_samples=sum(len(positions) for positions, _ in cuts)
        )
    gradients = sum(p.grad.nbytes for p in trainer.trainable().values() if p.grad is not None)
    trainer.optimizer.zero_grad(set_to_none=True)
    features = batch.f.nbytes + (0 if batch.y_star is None else batch.y_star.nbytes)
    return sum(graph.values()) + gradients + features


def plan_rounds(states: Sequence[int], step: int, limit: int) -> list[list[int]]:
    """Students by number, in rounds that fit: the states of a round and one step stay below ``limit`` bytes.

    A student that does not fit alone still gets a round of its own: the plan may be wrong, and where it is right, the
    student leaves with that reason.
    """
    rounds: list[list[int]] = []
    used = 0
    for number, state in enumerate(states):
        if not rounds or used + state > limit - step:
            rounds.append([])
            used = 0
        rounds[-1].append(number)
        used += state
    return rounds
