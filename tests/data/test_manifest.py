"""Coverage, estimate and the majority baseline."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.data.manifest import coverage, estimate, majority_answer
from stages.types import Sample


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
