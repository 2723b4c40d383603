"""Coverage, estimate and the majority baseline."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.data.manifest import coverage, estimate, fitting, majority_answer, why_absent, why_length_differs
from stages.types import Extent, Sample


def wanted(*videos: str) -> dict[str, np.ndarray]:
    return {video: np.arange(3 + number) for number, video in enumerate(videos)}


def sample(answer: str) -> Sample:
    return Sample("0", "v", np.zeros((1, 2), dtype=np.int64), "who?", answer, "who")


def test_every_video_of_a_split_is_in_its_place() -> None:
    report = coverage(
        {"train": wanted("a", "b", "c", "d"), "test": wanted("e", "a")},
        has={"a", "b", "d"}.__contains__,
        status={"a": None, "b": "the file ends early", "e": None, "unrelated": "x"},
    )
    train, test = report["train"], report["test"]
    assert train.found == ("a", "b", "d")
    assert (train.decoded, train.failed) == (("a",), {"b": "the file ends early"})
    assert (train.missing, train.pending) == (("c",), ("d",))
    assert train.summary() == "4 videos wanted, 3 found, 1 decoded, 1 failed, 1 missing, 1 not tried yet"
    assert test.decoded == ("a", "e")  # e was decoded before its file went away
    assert test.summary() == "2 videos wanted, 1 found, 2 decoded"


IDS = st.sets(st.sampled_from("abcdefgh"))


@given(IDS, IDS, st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.just("reason")))
def test_wanted_is_decoded_plus_failed_plus_missing_plus_pending(
    videos: set[str], there: set[str], status: dict[str, str | None]
) -> None:
    report = coverage({"train": wanted(*videos)}, has=there.__contains__, status=status)["train"]
    parts = [*report.decoded, *report.failed, *report.missing, *report.pending]
    assert sorted(parts) == sorted(videos) == list(report.wanted)


def test_the_source_is_asked_once_per_video() -> None:
    asked: list[str] = []

    def has(video: str) -> bool:
        asked.append(video)
        return False

    coverage({"train": wanted("a", "b"), "test": wanted("b")}, has=has, status={})
    assert asked == ["a", "b"]


def test_coverage_goes_into_json() -> None:
    report = coverage({"val": wanted("a", "b")}, has=lambda _: False, status={"b": "broken"})["val"]
    assert json.loads(json.dumps(report.to_json())) == {
        "wanted": 2,
        "found": 0,
        "decoded": 0,
        "failed": {"b": "broken"},
        "missing": ["a"],
        "pending": [],
    }


def test_the_estimate_is_frames_times_bytes_of_each_modality() -> None:
    size = estimate(wanted("a", "b"), {"tokens": 100, "pooled/layer8": 4})
    assert size.to_json() == {
        "videos": 2,
        "frames": 7,
        "bytes": 728,
        "bytes_per_modality": {"tokens": 700, "pooled/layer8": 28},
    }


def test_the_majority_answer_is_the_most_frequent_and_the_first_among_equals() -> None:
    assert majority_answer([sample(a) for a in ("dog", "cat", "dog", "cat", "ant")]) == "cat"


def test_frames_fit_up_to_two_past_the_end_and_outside_damage() -> None:
    assert fitting(np.arange(0, 20, 3), Extent(11, ((4, 6),))).tolist() == [0, 3, 9, 12]
    assert fitting(np.array([13, 15]), Extent(11)).tolist() == [13, 15]  # none fits: extraction says why


def test_why_frames_are_absent_is_said_only_as_far_as_the_facts_know() -> None:
    facts = {"count": 62, "damaged": [[4, 6]]}
    assert why_absent([70], facts) == "the file has 62 frames"
    assert why_absent([5, 70], facts).endswith("; the file does not decode at frames 4 to 6")
    assert why_absent([3], facts) == why_absent([70], {}) == ""


def test_only_a_large_difference_of_length_is_said() -> None:
    said = "its annotation speaks of 100 frames (10.0 s), the file has 125 (12.5 s)"
    assert why_length_differs(np.arange(100), 125, 10.0, unseen_s=2.0) == said
    for count in (20, 100, 120):
        assert why_length_differs(np.arange(100), count, 10.0, unseen_s=2.0) == ""
    assert why_length_differs(np.arange(1000), 1109, 10.0, unseen_s=2.0) == ""  # 11 s of 111 s
    assert why_length_differs(np.arange(1000), 1490, 10.0, unseen_s=50.0) == ""  # LVU's outro
