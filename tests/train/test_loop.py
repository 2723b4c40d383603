"""One step, many steps, and a stop after any of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stages.config import AlignConfig, TrainConfig
from stages.data.samples import CachedSamples
from stages.decode.llm import CausalLM
from stages.stopping import whole_steps
from stages.train import plan
from stages.train.alignment import Alignment
from stages.train.budget import fixed_bytes, peak_bytes
from stages.train.loop import Schedule, Trainer, TrainingDiverged, batch_positions, make_schedule, micro_batches, train
from stages.train.plan import MergePlan, merge_plan
from stages.train.student import Student

ALIGN = AlignConfig(levels=(3, 5))
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(make_student: Callable[..., Student], decoder: CausalLM) -> MakeTrainer:
    """A trainer of a small student in float32; settings of TrainConfig may be replaced."""

    def make(
        *,
        dropout: float = 0.0,
        align: AlignConfig | None = ALIGN,
        student: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Trainer:
        base = {"epochs": 2, "batch_size": 4, "lr": 3e-3, "schedule": "cosine_steps", "warmup_steps": 1}
        cfg = TrainConfig.model_validate({**base, "drop_last": False, "select": "last", **settings})
        made = make_student(dtype=torch.float32, dropout=dropout, **student or {})
        alignment = None
        if align is not None:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                alignment = Alignment(align, hidden_size=12, target_size=6)
        return Trainer(made, alignment, decoder, cfg, align or ALIGN)

    return make


def run(trainer: Trainer, data: CachedSamples, **options: Any) -> tuple[list[dict[str, Any]], list[tuple[int, dict]]]:
    """Train to the end; returns the log and what was saved."""
    records: list[dict[str, Any]] = []
    saved: list[tuple[int, dict[str, torch.Tensor]]] = []

    def save(step: int, tensors: dict[str, torch.Tensor], _state: dict[str, Any]) -> None:
        saved.append((step, {name: tensor.clone() for name, tensor in tensors.items()}))  # as a disk would

    train(trainer, data, log=records.append, save=save, **options)
    return records, saved


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_after_any_step_continues_bit_for_bit(
    make_trainer: MakeTrainer, cached: CachedSamples, stop: int
) -> None:
    whole, saved = run(make_trainer(dropout=0.1, save_every=1), cached)
    assert [step for step, _ in saved] == [1, 2, 3, 4]
    resumed = make_trainer(dropout=0.1, save_every=1)
    resumed.restore(dict(saved[stop - 1][1]))
    rest, saved_after = run(resumed, cached, first_step=stop)
    assert rest == whole[stop:]
    assert equal(saved_after[-1][1], saved[-1][1])


def test_dropout_is_on_and_a_different_seed_gives_another_run(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    losses = [run(make_trainer(dropout=p, seed=s), cached)[0][0]["loss_ce"] for p, s in ((0.0, 1), (0.1, 1), (0.1, 2))]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    make_trainer: MakeTrainer, cached: CachedSamples, micro_batch: int
) -> None:
    """Under dropout too: a sample's masks do not depend on its batch."""
    gradients, logs = [], []
    for size in (0, micro_batch):
        trainer = make_trainer(batch_size=7, micro_batch=size, dropout=0.1)
        for module in trainer.modules.values():
            module.double()
        trainer.decoder.model.double()  # type: ignore[attr-defined]
        logs.append(trainer.step(cached, 0, make_schedule(trainer.cfg, len(cached))))
        gradients.append({n: p.grad.clone() for n, p in trainer.trainable().items() if p.grad is not None})
        trainer.decoder.model.float()  # type: ignore[attr-defined]
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12 * largest)
    for key, value in logs[0].items():
        assert logs[1][key] == pytest.approx(value, rel=1e-6), key  # the loss itself is float32


def test_frames_are_averaged_per_sample_where_samples_have_different_numbers(
    make_trainer: MakeTrainer, cached: CachedSamples
) -> None:
    """One batch of T = 4 and T = 2 gives the gradients of single samples, each with its own mean over frames."""
    samples = [replace(s, draws=s.draws[:, :2]) if i % 3 else s for i, s in enumerate(cached.samples)]
    mixed = CachedSamples(samples, cached.tokens, cached.pooled)
    assert mixed.batch(range(7)).lengths is not None
    gradients, logs = [], []
    for size in (0, 1):
        trainer = make_trainer(batch_size=7, micro_batch=size, dropout=0.1)
        for module in trainer.modules.values():
            module.double()
        trainer.decoder.model.double()  # type: ignore[attr-defined]
        logs.append(trainer.step(mixed, 0, make_schedule(trainer.cfg, len(mixed))))
        gradients.append({n: p.grad.clone() for n, p in trainer.trainable().items() if p.grad is not None})
        trainer.decoder.model.float()  # type: ignore[attr-defined]
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12 * largest)
    assert logs[0]["loss_kd"] == pytest.approx(logs[1]["loss_kd"], rel=1e-6)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_samples_of_different_length_are_trained_and_probed(
    make_trainer: MakeTrainer, cached: CachedSamples, micro_batch: int
) -> None:
    """The probe looks at samples of one length, and gives the numbers that it gives where no others are."""
    samples = [replace(s, draws=s.draws[:, :2]) if i % 3 else s for i, s in enumerate(cached.samples)]
    mixed = CachedSamples(samples, cached.tokens, cached.pooled)
    trainer = make_trainer(batch_size=7, micro_batch=micro_batch, epochs=1)
    records, _ = run(trainer, mixed)
    alone = trainer.probe(CachedSamples(samples[::3], cached.tokens, cached.pooled))
    assert {key: records[-1][key] for key in alone} == pytest.approx(alone)


def test_training_lowers_both_losses(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    records, _ = run(make_trainer(epochs=40, batch_size=7), cached)
    assert records[-1]["loss_ce"] < 0.7 * records[0]["loss_ce"]
    assert records[-1]["loss_kd"] < records[0]["loss_kd"] - 0.1


def test_without_lambda_there_is_no_teacher_in_the_gradient(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    """lambda = 0 with an alignment gives the student the gradients of no alignment at all."""
    grads = []
    for trainer in (make_trainer(lambda_kd=0.0), make_trainer(align=None, lambda_kd=0.0)):
        trainer.step(cached, 0, make_schedule(trainer.cfg, len(cached)))
        grads.append({n: p.grad.clone() for n, p in trainer.student.named_parameters() if p.grad is not None})
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-5, atol=1e-7)


def test_lambda_scales_the_alignment_only(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    """The gradient of the whole is gradient(CE) + lambda · gradient(KD), by name, Eq. 9."""
    grads = {}
    for lambda_kd in (0.0, 1.0, 2.5):
        trainer = make_trainer(lambda_kd=lambda_kd)
        trainer.step(cached, 0, make_schedule(trainer.cfg, len(cached)))
        grads[lambda_kd] = {n: p.grad.clone() for n, p in trainer.student.named_parameters() if p.grad is not None}
    for name, base in grads[0.0].items():
        kd = grads[1.0][name] - base
        torch.testing.assert_close(grads[2.5][name], base + 2.5 * kd, rtol=1e-3, atol=1e-6)


def test_the_frozen_language_model_is_not_touched(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    trainer = make_trainer()
    before = {n: p.clone() for n, p in trainer.decoder.model.named_parameters()}  # type: ignore[attr-defined]
    run(trainer, cached)
    after = dict(trainer.decoder.model.named_parameters())  # type: ignore[attr-defined]
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    trainer = make_trainer()
    trainer.student.llm_proj.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="lower train"):
        run(trainer, cached)


def test_the_best_epoch_is_marked_by_validation(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    accuracy = iter([0.25, 0.5, 0.5, 0.4])
    states: list[tuple[int, bool]] = []
    train(
        make_trainer(epochs=4, batch_size=7),
        cached,
        log=lambda _: None,
        save=lambda step, _, state: states.append((step, state["is_best"])),
        validate=lambda: next(accuracy),
    )
    assert states == [(1, True), (2, True), (3, False), (4, False)]


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    cfg = TrainConfig(batch_size=3, drop_last=False, epochs=2)
    schedule = make_schedule(cfg, 8)
    epochs = [[i for s in range(3) for i in batch_positions(cfg, schedule, 8, 3 * e + s)[0]] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
    assert epochs[0] != epochs[1]
    assert batch_positions(cfg, schedule, 8, 4) == batch_positions(cfg, schedule, 8, 4)


def test_grouped_questions_of_a_window_stay_together_and_share_a_draw() -> None:
    cfg = TrainConfig(batch_size=4, drop_last=False, epochs=2, group_windows=True)
    window_of = [0, 1, 2, 0, 1, 2, 0, 1]
    schedule = make_schedule(cfg, 8)
    orders = []
    for epoch in range(2):
        steps = [batch_positions(cfg, schedule, 8, 2 * epoch + s, window_of) for s in range(2)]
        positions, draws = ([x for step in steps for x in step[k]] for k in range(2))
        assert sorted(positions) == list(range(8))
        windows = [window_of[i] for i in positions]
        assert len([w for w, before in zip(windows, [None, *windows], strict=False) if w != before]) == 3
        assert len(set(zip(windows, draws, strict=True))) == 3
        orders.append(positions)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("size", "windows", "lengths"),
    [
        (4, None, [4, 3]),
        (4, [0, 0, 0, 1, 1, 2, 2], [3, 4]),
        (3, [0, 0, 1, 1, 1, 1, 2], [2, 3, 2]),  # a window of four does not fit: three, and the fourth with the next
        (9, [0, 1, 1, 1, 1, 2, 2], [7]),
        (1, [0, 0, 1, 1, 2, 2, 2], [1] * 7),
    ],
)
def test_a_micro_batch_does_not_cut_a_window(size: int, windows: list[int] | None, lengths: list[int]) -> None:
    parts = micro_batches(windows or range(7), lambda questions, _: questions <= size)
    assert [part.stop - part.start for part in parts] == lengths
    assert [i for part in parts for i in range(7)[part]] == list(range(7))


def test_questions_that_share_a_window_make_room_for_more() -> None:
    parts = micro_batches([0, 0, 0, 1, 1, 2, 3], lambda questions, windows: questions + 4 * windows <= 13)
    assert parts == [slice(0, 5), slice(5, 7)]


def test_a_budget_makes_micro_batches_and_the_same_gradients(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    whole = make_trainer(batch_size=6)
    need = [
        fixed_bytes(whole.student) + peak_bytes(whole.student, whole.shape(cached), questions=n, windows=n)
        for n in (1, 2, 3)
    ]
    tight = make_trainer(batch_size=6, memory=f"{need[1]}B")
    schedule = make_schedule(tight.cfg, len(cached))
    assert [len(positions) for positions, _ in tight.cuts(cached, 0, schedule)] == [2, 2, 2]
    logs = [trainer.step(cached, 0, schedule) for trainer in (whole, tight)]
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


def test_the_evaluations_give_one_training_curve(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    """Dropout included: the masks do not depend on the order in which layers and steps are visited."""
    curves = []
    for evaluation in ("parallel", "reference"):
        trainer = make_trainer(dropout=0.1)
        trainer.student.cfg = trainer.student.cfg.model_copy(update={"evaluation": evaluation})
        curves.append([record["loss_ce"] for record in run(trainer, cached)[0]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_malmm_schedule_warms_up_inside_the_first_epoch_and_steps_down_per_epoch() -> None:
    """LVU relationship: 4 steps an epoch, so the first epoch ends at 3e-7 and the second starts near 1e-4."""
    schedule = make_schedule(TrainConfig(), 298)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (4, 80)
    assert schedule.lr(0) == pytest.approx(1e-8)
    assert schedule.lr(3) == pytest.approx(1e-8 + (1e-4 - 1e-8) * 3 / 1000)
    assert schedule.lr(4) == schedule.lr(7) == pytest.approx(9.938e-5, rel=1e-3)
    assert schedule.lr(79) == pytest.approx(6.16e-7, rel=1e-2)


def test_cosine_schedule_changes_at_every_step() -> None:
    schedule = Schedule(TrainConfig(schedule="cosine_steps", lr=1.0, warmup_steps=2, warmup_lr=0.0), 5, 12)
    assert [schedule.lr(s) for s in (0, 1, 2, 7)] == pytest.approx([0.0, 0.5, 1.0, 0.5])


def test_reading_ahead_changes_no_bit_of_a_training(make_trainer: MakeTrainer, cached: CachedSamples) -> None:
    """The trainer reads through the ring; step by step through ``CachedSamples.batch`` the numbers are the same."""
    ahead, _ = run(make_trainer(dropout=0.1, micro_batch=3), cached)
    trainer = make_trainer(dropout=0.1, micro_batch=3)
    trainer.student.train()
    schedule = make_schedule(trainer.cfg, len(cached))
    simple = [trainer.step(cached, step, schedule) for step in range(schedule.total_steps)]
    assert [{key: record[key] for key in simple[0]} for record in ahead] == simple


def test_merges_of_frozen_frames_are_decided_once_per_window_and_change_no_number(
    make_trainer: MakeTrainer, cached: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = {"pe": "frozen_zero", "train_ln_vision": False, "memory_len": 2}
    decided = 0

    def counted(x: torch.Tensor, max_len: int) -> MergePlan:
        nonlocal decided
        decided += x.shape[1]
        return merge_plan(x, max_len)

    monkeypatch.setattr(plan, "merge_plan", counted)
    trainer = make_trainer(student=frozen)
    records, saved = run(trainer, cached)
    assert trainer.student.visual_plans is not None
    assert decided == len(trainer.student.visual_plans) < 2 * len(cached)  # two epochs

    without = make_trainer(student=frozen)
    without.student.visual_plans = None
    expected, weights = run(without, cached)
    assert [r["loss_ce"] for r in records] == [r["loss_ce"] for r in expected]
    assert equal(saved[-1][1], weights[-1][1])


@pytest.mark.parametrize("settings", [{}, {"pe": "frozen_zero"}, {"train_ln_vision": False}])
def test_merges_are_decided_anew_where_the_frames_are_trained(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    assert make_trainer(student=settings).student.visual_plans is None


def test_a_signal_waits_until_the_step_is_saved(
    make_trainer: MakeTrainer, cached: CachedSamples, monkeypatch: pytest.MonkeyPatch, stopped: type[Exception]
) -> None:
    whole, _ = run(make_trainer(epochs=3), cached)
    saved: list[tuple[int, dict[str, torch.Tensor]]] = []
    records: list[dict[str, Any]] = []
    trainer = make_trainer(epochs=3)
    learn = trainer.step

    def interrupted(data: CachedSamples, step: int, *rest: Any) -> dict[str, float]:
        if step == 2:  # the first of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(data, step, *rest)

    monkeypatch.setattr(trainer, "step", interrupted)
    keep = lambda step, tensors, _: saved.append((step, tensors))  # noqa: E731
    with pytest.raises(stopped):
        train(trainer, cached, log=records.append, save=keep)
    assert [step for step, _ in saved] == [2, 3]  # the end of the epoch, and where it was stopped
    assert [r["loss_ce"] for r in records] == [r["loss_ce"] for r in whole[:3]]


def test_a_second_signal_is_not_held_back(stopped: type[Exception]) -> None:
    def twice() -> None:
        with whole_steps() as asked_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked_to_stop()
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher passed it on: the same request
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal was held back")

    with pytest.raises(stopped):
        twice()
    with pytest.raises(stopped):  # and the handlers are those of before
        os.kill(os.getpid(), signal.SIGTERM)
