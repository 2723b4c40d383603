"""Scores from text alone."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from stages.decode.metrics import Prediction, is_correct, most_frequent, score, tally, wilson


def said(answer: str, *beams: str, video: str = "v", group: str = "relationship", sample: str = "s") -> Prediction:
    return Prediction(sample, video, group, "what?", answer, beams)


SIX = [
    said("friend", "friend", "wife", video="a"),
    said("friend", "wife", "friend", video="a"),
    said("friend", "Friend", "friends", video="b"),
    said("wife", "wife", video="c", group="who"),
    said("wife", "friend", "x", "y", "z", "u", "wife", video="c", group="who"),
    said("year", video="d", group="who"),
]


def test_top1_is_the_best_beam_and_top5_any_of_the_first_five() -> None:
    overall = score(SIX, "exact").overall
    assert (overall.n, overall.correct, overall.correct5) == (6, 2, 3)
    assert (overall.top1, overall.top5) == (2 / 6, 3 / 6)


@pytest.mark.parametrize(
    ("beam", "answer", "exact", "first_word"),
    [
        ("dog", "dog", True, True),
        (" dog\n", "dog ", True, True),
        ("dog runs", "dog", False, True),
        ("Dog", "dog", False, False),
        ("dogs", "dog", False, False),
        ("dog\truns", "dog", False, False),  # MA-LMM splits at a space, not at any white space
        ("ice cream", "ice cream", True, False),  # as there: an answer of two words can never match
        ("", "", True, True),
    ],
)
def test_a_match_follows_malmms_rule(beam: str, answer: str, exact: bool, first_word: bool) -> None:
    assert is_correct(beam, answer, "exact") is exact
    assert is_correct(beam, answer, "first_word") is first_word


def test_recall_is_given_per_class_and_averaged_without_weights() -> None:
    report = score(SIX, "exact")
    assert {name: (t.correct, t.n) for name, t in report.per_class.items()} == {
        "friend": (1, 3),
        "wife": (1, 2),
        "year": (0, 1),
    }
    assert report.macro == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)


def test_groups_have_their_own_score_and_their_own_majority() -> None:
    groups = score(SIX, "exact").per_group
    assert list(groups) == ["relationship", "who"]
    assert (groups["who"].correct, groups["who"].n, groups["who"].majority) == (1, 3, 2 / 3)
    assert groups["relationship"].majority == 1.0


def test_the_majority_baseline_stands_beside_the_score() -> None:
    report = score(SIX, "exact", train_majority="wife")
    assert (report.majority_answer, report.overall.majority) == ("friend", 3 / 6)
    assert report.train_majority == 2 / 6
    assert score(SIX, "exact", train_majority="unseen").train_majority == 0.0
    assert score(SIX, "exact").train_majority is None


def test_equal_majorities_are_settled_by_the_alphabet() -> None:
    assert most_frequent(["b", "a", "b ", " a", "c"]) == "a"
    assert most_frequent([]) is None


def test_videos_are_counted_once() -> None:
    assert score(SIX, "exact").videos == 4


def test_the_order_of_the_records_does_not_matter() -> None:
    shuffled = SIX.copy()
    random.Random(0).shuffle(shuffled)
    assert shuffled != SIX
    assert json.dumps(score(shuffled, "exact").to_json()) == json.dumps(score(SIX, "exact").to_json())


def test_nothing_to_score_gives_no_shares() -> None:
    report = score([], "exact", train_majority="a").to_json()
    assert report["n"] == report["correct"] == report["videos"] == 0
    assert [report[k] for k in ("top1", "top5", "majority", "interval", "macro", "train_majority")] == [None] * 6
    assert (report["per_class"], report["per_group"]) == ({}, {})


def test_the_json_has_the_promised_keys_and_plain_values() -> None:
    report = score(SIX, "exact").to_json()
    assert {"n", "correct", "top1", "top5", "majority", "interval"} <= report.keys()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_prediction_without_beams_is_wrong() -> None:
    assert tally([said("a")], "exact").correct5 == 0


@given(n=st.integers(1, 20_000), data=st.data())
def test_the_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_papers_headline_has_the_interval_of_91_windows() -> None:
    low, high = wilson(63, 91) or (0.0, 0.0)
    assert (round(low, 3), round(high, 3)) == (0.591, 0.778)


def test_a_prediction_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIX[0].answer = "other"  # type: ignore[misc]
