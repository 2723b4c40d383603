"""The two evaluations of the student are equal: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.train import parallel
from stages.train.memory import MemoryBank
from stages.train.plan import MergePlan, PlanCache, merge_plan
from stages.train.student import Student, num_aligned_frames

PROMPTS = ["what is the relationship of the movie ?", "who runs ?", "scene"]
LEVELS = (1, 3, 5)
REACH = 1e-12


def run(
    student: Student, evaluation: str, f: torch.Tensor, prompts: list[str], **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one evaluation, by name."""
    student.cfg = student.cfg.model_copy(update={"evaluation": evaluation})
    student.zero_grad()
    torch.manual_seed(3)  # seeds of the dropout masks
    out = student(f, prompts, levels=LEVELS, **options)
    parts = {"prefix": out.prefix, **{f"level {u}": h for u, h in out.hidden.items()}}
    generator = torch.Generator().manual_seed(1)
    sum((p * torch.randn(p.shape, dtype=p.dtype, generator=generator)).sum() for p in parts.values()).backward()  # type: ignore[union-attr]
    zero = {n: torch.zeros_like(p) for n, p in student.named_parameters()}
    return {n: p.detach() for n, p in parts.items()} | {
        f"grad {n}": (zero[n] if p.grad is None else p.grad.clone()) for n, p in student.named_parameters()
    }


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Relative to each tensor's size; a gradient that is truly 0 (key biases) against 1e-3 of the largest one."""
    assert got.keys() == want.keys()
    largest = max(float(w.abs().max()) for n, w in want.items() if n.startswith("grad"))
    for name, wanted in want.items():
        size = max(float(wanted.abs().max()), 1e-3 * largest if name.startswith("grad") else 0.0)
        assert float((got[name] - wanted).abs().max()) <= REACH * size, name


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_evaluations_are_equal(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor], data: st.DataObject
) -> None:
    num_frames, batch = data.draw(st.integers(1, 9), "T"), data.draw(st.integers(1, 3), "B")
    windows = data.draw(st.sampled_from([None, [0] * batch, [0, 1, 0][:batch]]), "windows")
    detach = data.draw(st.booleans(), "detach")
    student = make_student(
        memory_len=data.draw(st.integers(1, 4), "K"),
        dropout=data.draw(st.sampled_from([0.0, 0.3]), "dropout"),
        bank_detach=detach,
        recompute_layers=data.draw(st.booleans(), "recompute"),
        spatial_std=data.draw(st.sampled_from([0.0, 0.7]), "spatial_std"),
    ).train()
    f = features(batch if windows is None else max(windows) + 1, num_frames, seed=data.draw(st.integers(0, 99), "seed"))
    lengths = data.draw(st.none() | st.lists(st.integers(1, num_frames), min_size=len(f), max_size=len(f)), "lengths")
    frames = data.draw(st.sampled_from(["all", "last", 2, 4]), "frames")
    options = {"frames": frames, "windows": windows, "lengths": lengths}
    prompts = data.draw(st.permutations(PROMPTS), "prompts")[:batch]
    want = run(student, "reference", f, prompts, **options)
    assert_equal(run(student, "parallel", f, prompts, **options), want)
    assert_equal(run(student, "lean", f, prompts, **options), want)


def test_questions_together_give_the_sum_of_separate_runs(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor]
) -> None:
    student, f, windows = make_student(), features(2, 7), [1, 0, 1]
    together = run(student, "parallel", f, PROMPTS, frames="all", windows=windows)
    total: dict[str, torch.Tensor] = {}
    for prompt, window in zip(PROMPTS, windows, strict=True):
        student.zero_grad()
        out = student(f[[window]], [prompt], levels=LEVELS, frames="all")
        loss = out.prefix.square().sum() + sum(h.square().sum() for h in out.hidden.values())
        loss.backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0.0) + parameter.grad
    student.zero_grad()
    out = student(f, PROMPTS, levels=LEVELS, frames="all", windows=windows)
    (out.prefix.square().sum() + sum(h.square().sum() for h in out.hidden.values())).backward()
    largest = max(float(g.abs().max()) for g in total.values())
    for name, gradient in total.items():
        got = dict(student.named_parameters())[name].grad
        assert float((got - gradient).abs().max()) <= 1e-12 * max(float(gradient.abs().max()), 1e-3 * largest), name
    assert together["prefix"].shape[0] == 3


@pytest.mark.parametrize("frames", ["all", "last", 2])
def test_samples_of_different_lengths_are_as_if_alone(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor], frames: Any
) -> None:
    """Values and gradients, whatever stands in the padding. K = 3; the last window has two questions."""
    student, f, lengths, windows = make_student(), features(3, 7), [7, 2, 5], [0, 1, 2, 2]
    f[1, 2:], f[2, 5:] = 1e3, -7.0
    prompts = [*PROMPTS, "what"]
    out = student(f, prompts, levels=LEVELS, frames=frames, windows=windows, lengths=lengths)
    counts = [num_aligned_frames(frames, lengths[w]) for w in windows]
    gradients = []
    for alone in (False, True):
        student.zero_grad()
        for b, (window, count) in enumerate(zip(windows, counts, strict=True)):
            one = student(f[[window], : lengths[window]], [prompts[b]], levels=LEVELS, frames=frames)
            prefix, hidden = (one.prefix[0], {u: h[0] for u, h in one.hidden.items()})
            if not alone:
                want, want_hidden = prefix.detach(), hidden
                prefix, hidden = out.prefix[b], {u: h[b, -count:] for u, h in out.hidden.items()}
                torch.testing.assert_close(prefix, want, rtol=1e-11, atol=1e-12)
                for u in LEVELS:
                    torch.testing.assert_close(hidden[u], want_hidden[u].detach(), rtol=1e-11, atol=1e-12)
            loss = (prefix.sin() * (b + 1)).sum() + sum(h.sin().sum() for h in hidden.values())
            loss.backward(retain_graph=True)
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    largest = max(float(g.abs().max()) for g in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-10, atol=1e-13 * largest)


def test_gradient_through_the_banks_is_the_slope_of_the_loss(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor]
) -> None:
    """Against central differences: PE of the first frame reaches the last prefix through banks only."""
    for detach in (False, True):
        student, f = make_student(bank_detach=detach), features(1, 6)
        rows = student.image_pe.weight
        student(f, PROMPTS[:1]).prefix.square().sum().backward()
        gradient = rows.grad[0].clone()  # type: ignore[index]
        if detach:
            assert torch.count_nonzero(gradient) == 0
            continue
        slopes = []
        for c in range(3):
            ends = []
            for side in (1e-5, -1e-5):
                with torch.no_grad():
                    rows[0, c] += side
                    ends.append(float(student(f, PROMPTS[:1]).prefix.square().sum()))
                    rows[0, c] -= side
            slopes.append((ends[0] - ends[1]) / 2e-5)
        torch.testing.assert_close(gradient[:3], torch.tensor(slopes, dtype=gradient.dtype), rtol=1e-5, atol=1e-9)
        assert float(gradient.abs().max()) > 1e-6


def starts(plan: MergePlan, t: int) -> torch.Tensor:
    """First frame of every bank entry that step t reads, in order of time [k, B, N], from the positions alone."""
    order = torch.arange(min(t, plan.max_len))[:, None, None]
    first = order.expand(-1, *plan.position.shape[1:])
    for j in range(max(0, t - plan.max_len)):
        longer = torch.cat([first, torch.full_like(first[:1], plan.max_len + j)])  # K + 1 at the time of merge j
        first = longer.gather(0, order + (order > plan.position[j]).long())
    return first


def test_the_plan_tells_the_entries_of_every_bank(features: Callable[..., torch.Tensor]) -> None:
    f = features(2, 9)
    plan, bank = merge_plan(f.transpose(0, 1), 3), MemoryBank.empty(3)
    for t in range(9):
        if t:
            assert bank.values is not None
            assert bank.sizes is not None
            first = starts(plan, t).transpose(0, 1)  # [B, k, N]
            ends = torch.cat([first[:, 1:], torch.full_like(first[:, :1], t)], 1)
            assert torch.equal((ends - first).double(), bank.sizes)
            assert torch.equal(
                bank.slots_followed_by(f[:, t]).flatten(1).sort(1).values[:, -1], torch.tensor([min(t, 3)] * 2)
            )
        bank = bank.append(f[:, t])


def test_in_float32_query_states_merge_as_their_cosines_in_float64_say(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def noted(x: torch.Tensor, max_len: int) -> MergePlan:
        plans.append((x, merge_plan(x, max_len)))
        return plans[-1][1]

    monkeypatch.setattr(parallel, "merge_plan", noted)
    student = make_student(dtype=torch.float32, num_layers=6, max_frames=60, memory_len=20)
    torch.nn.init.zeros_(student.image_pe.weight)
    student((features(1, 1) + 1e-2 * features(1, 60, seed=1)).float(), PROMPTS[:1], frames="all")
    assert len(plans) == 6
    for states, plan in plans:
        queries = states[:, :, :5].double()  # the text of layer 2 repeats itself but for rounding
        assert torch.equal(plan.position[:, :, :5], merge_plan(queries, 20).position)


def test_repeated_frames_tie_alike_in_both_forms(make_student: Callable[..., Student]) -> None:
    student = make_student()
    torch.nn.init.zeros_(student.image_pe.weight)
    f = torch.randn(2, 3, 6, 10, dtype=torch.float64)[:, [0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert_equal(*(run(student, evaluation, f, PROMPTS[:2], frames="all") for evaluation in ("parallel", "reference")))


def test_plans_that_were_kept_are_those_that_would_be_made(features: Callable[..., torch.Tensor]) -> None:
    x = features(4, 9).transpose(0, 1)  # [T, B, N, C]
    plans = PlanCache()
    for names in (["a", "b"], ["c", "b", "a"], ["d", "d"]):
        rows = x[:, ["abcd".index(name) for name in names]]
        kept, made = plans.plan(names, rows, 3), merge_plan(rows, 3)
        for field in ("position", "kept_slot", "freed_slot", "kept_row", "freed_row", "last_row", "weight"):
            ours, theirs = getattr(kept, field), getattr(made, field)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    assert len(plans) == 4
    longer = plans.plan(["a"], torch.cat([x[:, :1], torch.zeros_like(x[:2, :1])]), 3)  # padded to eleven frames
    assert longer.num_merges == 7
    assert len(plans) == 5


def test_no_more_plans_are_kept_than_there_is_room_for(features: Callable[..., torch.Tensor]) -> None:
    x = features(3, 9).transpose(0, 1)
    size = merge_plan(x[:, :1], 3).packed(0).nbytes
    plans = PlanCache(limit=2 * size + size // 2)
    for _ in range(2):
        assert torch.equal(plans.plan("abc", x, 3).position, merge_plan(x, 3).position)
        assert (len(plans), plans.nbytes) == (2, 2 * size)
