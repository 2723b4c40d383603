"""Which samples ``diagnose`` looks at. What it finds is tested on the page that shows it (test_report.py)."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.diagnose import alike, evenly
from stages.types import Sample


def test_only_samples_with_the_most_frequent_number_of_frames_are_looked_at() -> None:
    samples = [Sample(f"s{i}", "v", np.zeros((1, 3 if i in (0, 4) else 5), int), "what?", "bar", "") for i in range(7)]
    chosen, said = alike(samples)
    assert [sample.sample_id for sample in chosen] == ["s1", "s2", "s3", "s5", "s6"]
    assert said == "2 samples with another number of frames than 5 are not looked at"
    assert alike(chosen) == (chosen, "")


@pytest.mark.parametrize(("count", "wanted", "positions"), [(10, 4, [0, 2, 5, 7]), (3, 8, [0, 1, 2]), (5, 1, [0])])
def test_samples_are_taken_evenly_from_the_first_on(count: int, wanted: int, positions: list[int]) -> None:
    assert evenly(count, wanted) == positions
