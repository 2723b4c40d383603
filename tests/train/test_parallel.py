"""The two evaluations of the student are equal: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.train.student import Student

PROMPTS = ["what is the relationship of the movie ?", "who runs ?", "scene"]
LEVELS = (1, 3, 5)
REACH = 1e-12


def run(student: Student, evaluation: str, f: torch.Tensor, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one evaluation, by name."""
    student.cfg = student.cfg.model_copy(update={"evaluation": evaluation})
    student.zero_grad()
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


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_frames=st.integers(1, 12),
    memory_len=st.integers(1, 5),
    batch=st.integers(1, 3),
    frames=st.sampled_from(["all", "last", 2]),
    seed=st.integers(0, 99),
)
def test_parallel_equals_reference(
    make_student: Callable[..., Student],
    features: Callable[..., torch.Tensor],
    num_frames: int,
    memory_len: int,
    batch: int,
    frames: Any,
    seed: int,
) -> None:
    student = make_student(memory_len=memory_len)
    f = features(batch, num_frames, seed=seed)
    want = run(student, "reference", f, PROMPTS[:batch], frames=frames)
    assert_equal(run(student, "parallel", f, PROMPTS[:batch], frames=frames), want)


@pytest.mark.parametrize("part", ["image_pe.weight", "ln_vision.weight"])
def test_gradient_of_the_frames_path_reaches_its_parameters(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor], part: str
) -> None:
    got = run(make_student(), "parallel", features(2, 9), PROMPTS[:2], frames="all")[f"grad {part}"]
    assert float(got.abs().max()) > 1e-3
