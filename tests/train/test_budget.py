"""Memory planned before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stages.config import StudentConfig
from stages.train.budget import Room, Shape, fixed_bytes, parse_bytes, peak_bytes
from stages.train.student import Student

SHAPE = Shape(num_frames=9, wanted=9, tokens=60, width=10, text=4)


@pytest.mark.parametrize(("text", "size"), [("20GB", 20 * 10**9), ("1.5 gib", 3 * 2**29), ("7B", 7)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "20", "much", "-3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 20GB"):
        parse_bytes(text)


def test_a_budget_holds_as_many_samples_as_fit(make_student: Callable[..., Student]) -> None:
    student = make_student()
    needs = [fixed_bytes(student) + peak_bytes(student, SHAPE, questions=n, windows=n) for n in range(1, 6)]
    for budget, most in ((needs[0], 1), (needs[2], 3), (needs[3] - 1, 3)):
        room = Room(student, SHAPE, budget)
        assert [room.fits(n, n) for n in range(1, 6)] == [n <= most for n in range(1, 6)]
    assert Room(student, SHAPE, needs[2]).fits(4, 1)  # questions about one window share what it takes
    with pytest.raises(ValueError, match="one sample takes"):
        Room(student, SHAPE, needs[0] - 1)


@pytest.mark.parametrize(
    ("frames", "questions", "recompute", "dropout"),
    [
        *[("all", [0], False, dropout) for dropout in (0.0, 0.1)],
        *[("last", [0], False, dropout) for dropout in (0.0, 0.1)],
        *[("all", [0], True, dropout) for dropout in (0.0, 0.1)],
        *[("all", [0] * 8, False, dropout) for dropout in (0.0, 0.1)],
    ],
)
def test_the_formula_is_near_what_is_alive_at_once_and_not_below_it(
    make_wide: Callable[..., Student], frames: str, questions: list[int], recompute: bool, dropout: float
) -> None:
    """Of a step whose widths stand to each other as in the paper's; counted by the profiler, weights apart."""
    student, prompts = make_wide(recompute_layers=recompute, dropout=dropout), ["what is the color?"] * len(questions)
    num_frames, tokens, width = 24, 40, 220
    f = torch.randn(1, num_frames, tokens, width)
    text = student.tokenize(prompts)[0].shape[1]
    shape = Shape(num_frames, num_frames if frames == "all" else 1, tokens, width, text)

    def step() -> None:
        out = student(f, prompts, levels=(3, 5), frames=frames, windows=questions)
        (out.prefix.square().sum() + sum(hidden.square().sum() for hidden in out.hidden.values())).backward()

    student.zero_grad(set_to_none=False)
    step()  # gradients are there now: fixed_bytes counts them
    ratio = most_alive(step) / peak_bytes(student, shape, questions=len(questions), windows=1)
    assert 0.6 <= ratio <= 1


def most_alive(step: Callable[[], None]) -> int:
    """Bytes of tensors alive at once during ``step``, beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()

    def sizes() -> Iterator[int]:
        alive = 0
        events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            yield alive

    return max(sizes())


@pytest.fixture
def make_wide(make_student: Callable[..., Student]) -> Callable[..., Student]:
    """A student of four layers, 128 wide."""

    def make(**settings: bool | float) -> Student:
        small = make_student()
        cfg = StudentConfig(
            init="seed:0", num_layers=4, hidden_size=128, num_heads=4, intermediate_size=512, num_queries=8,
            memory_len=5, **settings,
        )  # fmt: skip
        return Student(cfg, small.tokenizer, clip_width=220, llm_width=32)

    return make
