"""Scores from text alone."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from stages.decode.metrics import Prediction, is_correct, most_frequent, one_per_video, score, tally
from stages.decode.statistics import wilson


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
    assert {name: (part.tally.correct, part.tally.n) for name, part in report.per_class.items()} == {
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


def test_precision_f1_and_confusion_follow_from_the_same_counts() -> None:
    report = score(SIX, "exact")
    assert report.to_json()["confusion"] == {
        "labels": ["friend", "wife", "year", "(other)"],
        "counts": [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]],  # "Friend" is no label; no beam at all is none either
        "other": {"friend": [["Friend", 1]]},
    }
    assert (report.per_class["friend"].said, report.per_class["friend"].precision) == (2, 1 / 2)
    assert (report.per_class["year"].said, report.per_class["year"].precision) == (0, None)
    f1 = [2 * 1 / (2 + 3), 2 * 1 / (2 + 2), 0.0]
    assert report.macro_f1 == pytest.approx(sum(f1) / 3)


def test_a_confusion_matrix_accounts_for_every_prediction() -> None:
    rng = random.Random(1)
    words = ["a", "b", "c", "d e"]
    records = [said(rng.choice(words[:3]), rng.choice(words), video=str(i % 7)) for i in range(200)]
    report = score(records, "exact")
    counts = report.confusion or ()
    assert [sum(row) for row in counts] == [part.tally.n for part in report.per_class.values()]
    assert [row[i] for i, row in enumerate(counts)] == [part.tally.correct for part in report.per_class.values()]
    columns = [sum(row[i] for row in counts) for i in range(3)]
    assert columns == [part.said for part in report.per_class.values()]


def test_thousands_of_answers_make_no_matrix() -> None:
    records = [said(f"w{i}", f"w{i}", video=str(i)) for i in range(65)]
    assert score(records, "exact").confusion is None
    assert score(records[:64], "exact").confusion is not None


def test_one_answer_per_video_by_vote() -> None:
    windows = [
        said("x", "y", "x", video="a"),
        said("x", "x", video="a"),
        said("x", "x", "y", video="a"),
        said("y", "x", "y", video="b"),  # a tie of one to one: y has the larger sum of 1 / rank
        said("y", "y", "z", video="b"),
        said("y", "q", "p", video="c"),  # a full tie: the alphabet
        said("y", "p", "q", video="c"),
        said("y", video="d"),
    ]
    votes = one_per_video(windows, "exact", "vote")
    assert [(p.video_id, p.beams[:1]) for p in votes] == [("a", ("x",)), ("b", ("y",)), ("c", ("p",)), ("d", ())]
    level = score(windows, "exact").video_level
    assert (level["vote"].n, level["vote"].correct, level["vote"].correct5) == (4, 2, 2)
    assert list(level) == ["vote"]


def test_one_answer_per_video_by_mean_score() -> None:
    windows = [
        dataclasses.replace(said("x", "y", video="a"), ranked=("y", "x"), scores=(-1.0, -1.5)),
        dataclasses.replace(said("x", "y", video="a"), ranked=("y", "x"), scores=(-1.0, -1.5)),
        dataclasses.replace(said("x", "x", video="a"), ranked=("x", "y"), scores=(-0.1, -9.0)),
    ]
    level = score(windows, "exact").video_level
    assert (level["vote"].correct, level["mean"].correct) == (0, 1)


def test_questions_asked_once_have_no_video_level() -> None:
    assert score([said("a", "a", video="v"), said("b", "b", video="v")], "exact").video_level == {}


def test_closed_label_sets_stand_beside_the_exact_match_and_never_replace_it() -> None:
    first = dataclasses.replace(said("wife", "a wife"), ranked=("wife", "friend"), scores=(-1.0, -2.0))
    second = dataclasses.replace(said("wife", "wife"), ranked=("friend", "wife"), scores=(-1.0, -2.0))
    report = score([first, second], "exact")
    assert report.overall.correct == 1
    assert (report.closed["ranked"].correct, report.closed["ranked"].correct5) == (1, 2)
    assert "constrained" not in report.closed
    both = [dataclasses.replace(p, constrained=("wife",)) for p in (first, second)]
    assert score(both, "exact").closed["constrained"].correct == 2
    assert "ranked" not in score([first, said("wife", "wife")], "exact").closed  # not of every sample


def test_the_interval_over_videos_is_wider_where_windows_repeat_each_other() -> None:
    rng = random.Random(2)
    right = [rng.random() < 0.6 for _ in range(40)]
    alike = [said("x", "x" if r else "y", video=str(v)) for v, r in enumerate(right) for _ in range(5)]
    apart = [dataclasses.replace(p, video_id=str(i)) for i, p in enumerate(alike)]
    together, single = tally(alike, "exact").by_video, tally(apart, "exact").by_video
    assert together is not None
    assert single is not None
    assert together.high - together.low > 2 * (single.high - single.low)  # five windows count as one: sqrt(5)
    assert (together.videos, single.videos) == (40, 200)


def test_a_prediction_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIX[0].answer = "other"  # type: ignore[misc]


# ---------------------------------------------------------------- what exact match leaves out


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Black.", "black"),
        ("the dog", "dog"),
        ("two", "2"),
        ("A  Man", "man"),
        ("ice-cream", "ice cream"),
        ("ﬁre", "fire"),
    ],
)
def test_answers_that_are_right_but_for_their_form_are_counted_beside_the_headline(said: str, answer: str) -> None:
    report = score([said_for(0, said, answer), said_for(1, answer, answer), said_for(2, "cat", answer)], "exact")
    assert (report.overall.correct, report.normalised.correct, report.normalised.more) == (1, 2, 1)
    assert (
        f"1 more of 3 would be right after normalisation (case, punctuation, articles, two = 2), such as {said!r}"
        in (report.warnings[0])
    )


def test_by_the_first_word_an_article_hides_the_answer() -> None:
    report = score([said_for(0, "a dog runs", "dog"), said_for(1, "cat, of course", "cat")], "first_word")
    assert (report.overall.correct, report.normalised.more) == (0, 2)


def test_up_to_one_in_a_hundred_is_no_warning() -> None:
    answers = [said_for(n, f"word{n}", f"word{n}") for n in range(99)]
    assert score([*answers, said_for(99, "Word99.", "word99")], "exact").warnings == ()
    assert score([*answers[1:], said_for(99, "Word99.", "word99")], "exact").warnings != ()


@pytest.mark.parametrize(("same", "true_answers", "warned"), [(95, 50, True), (94, 50, False), (95, 1, False)])
def test_one_answer_to_nearly_everything_is_a_warning_unless_it_is_the_truth(
    same: int, true_answers: int, warned: bool
) -> None:
    given = [said_for(n, "x" if n < same else f"word{n}", f"answer{n % true_answers}") for n in range(100)]
    assert ("95 of 100 samples are given one answer, 'x'" in " ".join(score(given, "exact").warnings)) == warned


def test_what_was_said_instead_of_a_label_is_listed_with_counts() -> None:
    given = [said_for(0, "Black.", "black"), said_for(1, "Black.", "black"), said_for(2, "grey", "black")]
    report = score([*given, said_for(3, "black", "white")], "exact")
    assert report.other == {"black": (("Black.", 2), ("grey", 1))}
    document = report.to_json()
    assert document["confusion"]["other"] == {"black": [["Black.", 2], ["grey", 1]]}  # type: ignore[index]
    assert document["answers"] == [["Black.", 2], ["black", 1], ["grey", 1]]
    assert document["normalised"] == {"correct": 2, "more": 2, "example": ["Black.", "black"]}


def said_for(number: int, said: str, answer: str) -> Prediction:
    return Prediction(str(number), f"v{number}", "what", "what is it?", answer, (said,))
