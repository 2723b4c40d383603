"""Students on one pass against each of them alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_schema.store import FeatureStore
from stages.config import AlignConfig, TrainConfig
from stages.data.samples import CachedSamples
from stages.decode.llm import CausalLM
from stages.train import diagnostics
from stages.train.alignment import Alignment
from stages.train.grid import Dropped, Entrant, train_together
from stages.train.loop import Trainer, train
from stages.train.student import Student

Records, Saved = list[dict[str, Any]], list[tuple[int, dict[str, Tensor], dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]
ALIGN = {"levels": (3, 5)}

# Settings that the students of one pass may differ in: of TrainConfig, AlignConfig ("align") and StudentConfig.
GRID: dict[str, dict[str, Any]] = {
    "lambda 0": {"lambda_kd": 0.0},
    "lambda 1": {"lambda_kd": 1.0},
    "lambda 10": {"lambda_kd": 10.0},
    "all levels": {"align": {"levels": "1-5"}},
    "one level, last frame": {"align": {"levels": 5, "frames": "last"}},
    "other micro-batches": {"micro_batch": 1},
    "uniform": {"align": {"weights": "uniform", "uniform_weight": 0.5, **ALIGN}},
    "smaller, quicker, shorter": {"num_layers": 2, "align": {"levels": (2,)}, "lr": 1e-2, "max_steps": 3},
}


@pytest.fixture
def make_trainer(make_student: Callable[..., Student], decoder: CausalLM) -> MakeTrainer:
    """A trainer in float32 with dropout; every call builds the same one anew."""

    def make(*, align: dict[str, Any] = ALIGN, num_layers: int = 4, dropout: float = 0.1, **settings: Any) -> Trainer:
        base = {"epochs": 2, "batch_size": 3, "micro_batch": 2, "lr": 3e-3, "warmup_steps": 1, "drop_last": False}
        cfg = TrainConfig.model_validate({**base, "schedule": "cosine_steps", **settings})
        align_cfg = AlignConfig.model_validate(align)
        alignment = None
        if cfg.lambda_kd:
            with torch.random.fork_rng():
                torch.manual_seed(cfg.seed)
                alignment = Alignment(align_cfg, hidden_size=12, target_size=6)
        student = make_student(dtype=torch.float32, dropout=dropout, num_layers=num_layers)
        return Trainer(student, alignment, decoder, cfg, align_cfg)

    return make


class Record:
    """What a run logs and saves, as a disk would keep it."""

    def __init__(self) -> None:
        self.records: Records = []
        self.saved: Saved = []

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.saved.append((step, {name: tensor.clone() for name, tensor in tensors.items()}, state))

    def entrant(self, name: str, trainer: Trainer, **options: Any) -> Entrant:
        return Entrant(name, trainer, self.records.append, self.save, **options)


def alone(trainer: Trainer, data: CachedSamples, **options: Any) -> Record:
    """The reference: ``loop.train``; without lambda there is no teacher in its data."""
    record = Record()
    own = data if trainer.alignment is not None else CachedSamples(data.samples, data.tokens)
    train(trainer, own, log=record.records.append, save=record.save, **options)
    return record


def together(trainers: dict[str, Trainer], data: CachedSamples, **options: Any) -> dict[str, Record]:
    records = {name: Record() for name in trainers}
    train_together([records[name].entrant(name, trainer) for name, trainer in trainers.items()], data, **options)
    return records


def assert_same(one: Record, other: Record) -> None:
    """Bit for bit: every record, every checkpoint with the optimiser's moments, every state."""
    assert one.records == other.records
    assert [(step, state) for step, _, state in one.saved] == [(step, state) for step, _, state in other.saved]
    for (step, a, _), (_, b, _) in zip(one.saved, other.saved, strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == [], step


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("order", [1, -1])
def test_every_student_of_a_pass_is_bit_equal_to_itself_alone_after_every_step(
    make_trainer: MakeTrainer, cached: CachedSamples, seed: int, order: int
) -> None:
    settings = dict(list(GRID.items())[::order])
    common = {"seed": seed, "save_every": 1}
    records = together({name: make_trainer(**common, **own) for name, own in settings.items()}, cached)
    for name, own in settings.items():
        assert_same(records[name], alone(make_trainer(**common, **own), cached))
    weights = {name: record.saved[2][1]["student.llm_proj.weight"] for name, record in records.items()}
    assert len({tensor.numpy().tobytes() for tensor in weights.values()}) == len(GRID)  # they did differ


def test_a_step_reads_each_batch_once_however_many_students(
    make_trainer: MakeTrainer, cached: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, str]] = []
    original = FeatureStore.read_stored

    def counted(self: FeatureStore, video: str, *args: Any, **options: Any) -> Any:
        reads.append((self.modality, video))
        return original(self, video, *args, **options)

    monkeypatch.setattr(FeatureStore, "read_stored", counted)
    monkeypatch.setattr(diagnostics, "probe_due", lambda *_, **__: False)  # each looks at its own probe samples
    together({"1": make_trainer()}, cached)
    solo = list(reads)
    assert len(solo) <= 2 * 2 * 7  # both stores, two epochs, seven samples; those of one video in a batch at once
    assert {modality for modality, _ in solo} == {cached.tokens.modality, "pooled/layer8"}
    reads.clear()
    together({name: make_trainer(lambda_kd=float(name)) for name in "01234"}, cached)
    assert sorted(reads) == sorted(solo)


def test_a_pass_asks_for_the_order_once_a_step_and_reads_ahead_until_the_end(
    make_trainer: MakeTrainer, cached: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    cuts = Trainer.cuts

    def counted(self: Trainer, data: CachedSamples, step: int, schedule: Any) -> Any:
        asked.append((id(self), step))
        return cuts(self, data, step, schedule)

    monkeypatch.setattr(Trainer, "cuts", counted)
    monkeypatch.setattr(diagnostics, "probe_due", lambda *_, **__: False)  # it reads for itself
    monkeypatch.setattr(CachedSamples, "batch", None)
    records = together({"1": make_trainer(), "2": make_trainer(lambda_kd=2.0)}, cached)
    assert len(records["2"].records) == 6
    assert sorted(step for _, step in asked) == sorted([*range(6)] * 2)
    assert len(set(asked)) == 12
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("reader-")] == []
    asked.clear()
    train(make_trainer(), cached, log=lambda _: None, save=lambda *_: None)
    assert [step for _, step in asked] == [*range(6)]


@pytest.mark.parametrize("select", [[0.25, 0.5], [0.5, 0.25]])
def test_validation_and_the_best_epoch_are_those_of_the_run_alone(
    make_trainer: MakeTrainer, cached: CachedSamples, select: list[float]
) -> None:
    solo, shared, other = Record(), Record(), Record()
    answers = iter(select)
    train(make_trainer(), cached, log=solo.records.append, save=solo.save, validate=lambda: next(answers), best=0.3)
    again = iter(select)
    entrants = [
        other.entrant("other", make_trainer(lambda_kd=5.0)),
        shared.entrant("shared", make_trainer(), validate=lambda: next(again), best=0.3),
    ]
    train_together(entrants, cached)
    assert_same(shared, solo)
    assert [state["is_best"] for _, _, state in shared.saved] == [
        accuracy > 0.3 and accuracy == max(select[: i + 1]) for i, accuracy in enumerate(select)
    ]
    assert_same(other, alone(make_trainer(lambda_kd=5.0), cached))


@pytest.mark.parametrize("stops", [(2, 2, 2), (1, 3, 2), (0, 5, 6)])
def test_students_that_were_stopped_at_different_steps_catch_up_bit_for_bit(
    make_trainer: MakeTrainer, cached: CachedSamples, stops: tuple[int, ...]
) -> None:
    lambdas = {"a": 0.0, "b": 1.0, "c": 2.0}
    whole = {name: alone(make_trainer(lambda_kd=value, save_every=1), cached) for name, value in lambdas.items()}
    entrants, rest = [], {name: Record() for name in lambdas}
    for (name, value), stop in zip(lambdas.items(), stops, strict=True):
        trainer = make_trainer(lambda_kd=value, save_every=1)
        if stop:
            trainer.restore(dict(whole[name].saved[stop - 1][1]))
        entrants.append(rest[name].entrant(name, trainer, first_step=stop))
    train_together(entrants, cached)
    for name, stop in zip(lambdas, stops, strict=True):
        assert rest[name].records == whole[name].records[stop:]
        assert [step for step, _, _ in rest[name].saved] == list(range(stop + 1, 7))
        for (_, a, _), (_, b, _) in zip(rest[name].saved, whole[name].saved[stop:], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_student_that_turns_nan_leaves_with_its_reason_and_the_others_do_not_notice(
    make_trainer: MakeTrainer, cached: CachedSamples
) -> None:
    dropped: dict[str, Dropped] = {}
    trainers = {name: make_trainer(lambda_kd=float(name)) for name in ("1", "3", "2")}
    infinite = make_trainer(lambda_kd=3.0, lr=1e30, warmup_steps=0)  # its first step is finite, its second is not
    trainers["3"] = infinite
    records = together(trainers, cached, drop=dropped.__setitem__)
    assert list(dropped) == ["3"]
    assert (dropped["3"].kind, dropped["3"].step) == ("diverged", 1)
    assert "lower train.lr" in dropped["3"].reason
    assert len(records["3"].records) == 1
    for name in ("1", "2"):
        assert_same(records[name], alone(make_trainer(lambda_kd=float(name)), cached))


def test_a_student_that_finds_no_memory_leaves_and_the_others_do_not_notice(
    make_trainer: MakeTrainer, cached: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real failed allocation: the projection asks for 2^55 bytes at the second step."""
    monkeypatch.setattr(diagnostics, "probe_due", lambda *_, **__: False)  # it would call the projection too
    dropped: dict[str, Dropped] = {}
    greedy = make_trainer(lambda_kd=2.0)
    forward, calls = greedy.student.llm_proj.forward, iter(range(100))
    greedy.student.llm_proj.forward = lambda x: forward(x) if next(calls) < 2 else torch.empty(2**53)  # type: ignore[method-assign]
    records = together({"0": make_trainer(), "greedy": greedy}, cached, drop=dropped.__setitem__)
    assert dropped["greedy"].kind == "memory"
    assert "out of memory at step 2" in dropped["greedy"].reason
    assert not greedy.optimizer.state
    assert all(p.grad is None for p in greedy.trainable().values())
    assert_same(records["0"], alone(make_trainer(), cached))


def test_an_error_that_is_no_students_own_stops_the_pass(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    wrong = make_trainer()
    wrong.student.llm_proj.weight.data = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="shape"):
        together({"0": make_trainer(), "wrong": wrong}, cached)


@pytest.mark.parametrize("other", [{"seed": 2}, {"batch_size": 4}, {"group_windows": True}, {"drop_last": True}])
def test_students_that_would_read_other_batches_are_refused(
    make_trainer: MakeTrainer, cached: CachedSamples, other: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"train.{next(iter(other))} is"):
        together({"a": make_trainer(), "b": make_trainer(**other)}, cached)
    with pytest.raises(ValueError, match="no training samples"):
        together({"a": make_trainer()}, CachedSamples([], cached.tokens, cached.pooled))


def test_a_signal_waits_until_every_student_has_saved_the_same_step(
    make_trainer: MakeTrainer, cached: CachedSamples, stopped: type[Exception]
) -> None:
    records = {name: Record() for name in ("a", "b")}
    entrants = [record.entrant(name, make_trainer(epochs=3)) for name, record in records.items()]

    def progress(done: int, _total: int, _what: str) -> None:
        if done == 3:  # the end of the first epoch, which is saved as ever
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(stopped):
        train_together(entrants, cached, progress=progress)
    assert {name: [step for step, *_ in record.saved] for name, record in records.items()} == {"a": [3, 4], "b": [3, 4]}
