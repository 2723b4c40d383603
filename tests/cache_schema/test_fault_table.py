"""The table of fault cases names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tests.cache_schema

TESTS = Path(tests.cache_schema.__file__).parents[1]
NAMED = re.findall(r"(\w+/\w+\.py)::(test_\w+)", tests.cache_schema.__doc__ or "")
NUMBERS = [int(number) for number in re.findall(r"^ ?(\d+)  ", tests.cache_schema.__doc__ or "", re.MULTILINE)]


def test_every_case_of_the_cache_has_a_line():
    assert [*range(1, 7), *range(8, 19), 28, 31, 32, 36, 40, 41, 42, 47, 48, 51] == NUMBERS


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_is_there(file, name):
    assert f"\ndef {name}(" in (TESTS / file).read_text()


def test_every_test_with_a_number_is_in_the_table():
    for path in TESTS.rglob("test_*.py"):
        for name in re.findall(r"\ndef test_((?:\d\d_)+)\w+\(", path.read_text()):
            assert {int(number) for number in name.split("_")[:-1]} <= set(NUMBERS), f"{path.name}: {name}"
