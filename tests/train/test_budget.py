"""Memory planned before it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stages.train.budget import Shape, fixed_bytes, largest_batch, parse_bytes, sample_bytes
from stages.train.student import Student

SHAPE = Shape(num_frames=9, wanted=9, tokens=6, width=10, text=4)


@pytest.mark.parametrize(("text", "size"), [("20GB", 20 * 10**9), ("1.5 gib", 3 * 2**29), ("7B", 7)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "20", "much", "-3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 20GB"):
        parse_bytes(text)


def test_a_budget_holds_as_many_samples_as_fit(make_student: Callable[..., Student]) -> None:
    student = make_student()
    fixed, each = fixed_bytes(student), sample_bytes(student, SHAPE)
    assert [largest_batch(student, SHAPE, fixed + size) for size in (each, 3 * each, 4 * each - 1)] == [1, 3, 3]
    with pytest.raises(ValueError, match="one sample takes"):
        largest_batch(student, SHAPE, fixed + each - 1)
