"""Intervals and tests over videos, held to scipy, to binomials and to hand arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.decode import statistics
from stages.decode.statistics import (
    LEAST,
    Power,
    cluster_sums,
    difference_interval,
    holm,
    paired,
    seed_effect,
    share_interval,
    sign_flip,
    wilson,
)


def clustered(seed: int, videos: int, most: int, share: float, alike: float) -> tuple[np.ndarray, list[str]]:
    """Hits of up to ``most`` windows per video; with chance ``alike`` a window repeats its video's first hit."""
    rng = np.random.default_rng(seed)
    hits, ids = [], []
    for video in range(videos):
        first = rng.random() < share
        for _ in range(rng.integers(1, most + 1)):
            hits.append(first if rng.random() < alike else rng.random() < share)
            ids.append(f"v{video}")
    return np.array(hits, dtype=float), ids


def peer(sums: np.ndarray, counts: np.ndarray, method: str, seed: int = 5) -> Any:
    """scipy's bootstrap of the same ratio over the same videos."""
    return stats.bootstrap(
        (sums, counts),
        lambda k, n, axis: k.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method=method,
        rng=np.random.default_rng(seed),
    )


@pytest.mark.parametrize(("seed", "share"), [(0, 0.7), (1, 0.5), (2, 0.08)])
def test_the_interval_of_a_share_is_scipys_bca_over_videos(seed: int, share: float) -> None:
    hits, ids = clustered(seed, 41, 5, share, 0.6)
    found = share_interval(hits, ids)
    assert found is not None
    expected = peer(*cluster_sums(hits, ids), "BCa", seed=9).confidence_interval  # other draws
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.012)
    assert (found.videos, found.method) == (41, "bca")
    assert found == share_interval(hits, ids)  # seeded


def test_whole_videos_are_drawn_and_the_cut_into_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, ids = clustered(4, 30, 4, 0.5, 1.0)  # windows of a video are all alike
    together, apart = share_interval(hits, ids), share_interval(hits, [str(i) for i in range(len(hits))])
    assert together is not None
    assert apart is not None
    assert together.high - together.low > 1.3 * (apart.high - apart.low)
    monkeypatch.setattr(statistics, "AT_ONCE", 700)
    assert share_interval(hits, ids) == together


def test_where_no_draw_leaves_the_estimate_the_percentile_interval_is_taken() -> None:
    found = difference_interval(np.array([1.0, 0.0]), ["x", "y"])  # BCa is undefined for two opposite videos, or nearly
    assert found is not None
    assert 0 <= found.low <= found.high <= 1


def test_where_all_videos_are_alike_the_interval_is_wilsons_over_videos() -> None:
    ids = [f"v{i // 3}" for i in range(30)]
    ours = share_interval(np.ones(30), ids)
    assert ours is not None
    expected = stats.binomtest(10, 10).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert (ours.videos, ours.method) == (10, "wilson")
    assert share_interval(np.array([]), []) is None


def test_the_interval_over_videos_covers_what_it_says_and_wilson_does_not() -> None:
    """41 videos as in LVU relationship, windows of a video mostly alike: 300 worlds with a known share."""
    covered = {"videos": 0, "windows": 0}
    for seed in range(300):
        hits, ids = clustered(seed, 41, 4, 0.65, 0.9)
        interval = share_interval(hits, ids)
        assert interval is not None
        covered["videos"] += interval.low <= 0.65 <= interval.high
        low, high = wilson(hits.sum(), len(hits)) or (0, 0)
        covered["windows"] += low <= 0.65 <= high
    assert covered["videos"] / 300 > 0.90
    assert covered["windows"] / 300 < 0.85


# ---------------------------------------------------------------- the paired test


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_are_counted_exactly(sums: list[int]) -> None:
    observed = abs(sum(sums))
    totals = [
        abs(sum(s * d for s, d in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    assert sign_flip(np.array(sums)) == pytest.approx(sum(t >= observed for t in totals) / len(totals))


def test_sign_flips_are_scipys_permutation_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 10), rng.integers(0, 6, 10)
    expected = stats.permutation_test(
        (b, a),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip(b - a) == pytest.approx(expected.pvalue)


@given(better=st.integers(0, 60), worse=st.integers(0, 60))
def test_with_one_sample_per_video_it_is_mcnemars_exact_test(better: int, worse: int) -> None:
    sums = np.array([1] * better + [-1] * worse + [0] * 5)
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_flip(sums) == pytest.approx(expected)


def test_windows_that_move_together_count_as_one_video() -> None:
    a, b = np.zeros((1, 24), dtype=int), np.ones((1, 24), dtype=int)
    together = paired(a, b, [f"v{i // 8}" for i in range(24)])
    apart = paired(a, b, [f"v{i}" for i in range(24)])
    assert (together.p, together.videos, together.difference) == (2 / 2**3, 3, 1.0)
    assert apart.p == 2 / 2**24


def test_the_paired_test_holds_its_level_where_mcnemar_does_not() -> None:
    """Two variants of equal quality whose errors go by video: p < 0.05 in about 5 % of 400 worlds."""
    rejected = {"videos": 0, "windows": 0}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        per_video = rng.integers(0, 2, (2, 40))
        difference = np.repeat(per_video[1] - per_video[0], 4)
        sums, _ = cluster_sums(difference.astype(float), [str(i // 4) for i in range(160)])
        rejected["videos"] += sign_flip(sums.astype(int)) < 0.05
        rejected["windows"] += sign_flip(difference) < 0.05
    assert rejected["videos"] / 400 < 0.075
    assert rejected["windows"] / 400 > 0.2


def test_several_seeds_are_averaged_per_sample_first() -> None:
    a = np.array([[1, 0, 0, 1], [1, 0, 1, 1]])
    b = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    videos = ["x", "x", "y", "z"]
    result = paired(a, b, videos)
    per_sample = b.mean(axis=0) - a.mean(axis=0)  # 0, 1, 1/6, -2/3
    assert result.difference == pytest.approx(per_sample.mean())
    sums = {"x": 1.0, "y": 1 / 6, "z": -2 / 3}  # |0.5|; totals of the 8 flips: 11/6, 3/2, 1/2, 1/6 and their negatives
    totals = [
        abs(sum(s * d for s, d in zip(signs, sums.values(), strict=True)))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert result.p == pytest.approx(sum(t >= 0.5 - 1e-12 for t in totals) / 8)
    assert (result.seed_differences, result.seed_p, result.both) == ((), None, None)


def test_paired_seeds_have_their_own_spread_and_test() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, (5, 60))
    b = np.maximum(a, rng.integers(0, 2, (5, 60)))  # better with every seed
    videos = [str(i // 3) for i in range(60)]
    result = paired(a, b, videos, same_seeds=True)
    expected = (b - a).mean(axis=1)
    assert result.seed_differences == pytest.approx(expected.tolist())
    assert result.seed_sd == pytest.approx(np.std(expected, ddof=1))
    assert result.seed_p == 2 / 2**5
    assert result.both is not None
    assert result.both[0] < result.difference < result.both[1]
    assert paired(a, b, videos).p == result.p


def test_drawing_seeds_too_widens_the_interval_where_seeds_disagree() -> None:
    rng = np.random.default_rng(2)
    lucky = np.array([[0.2], [0.8], [0.3], [0.7], [0.5], [0.5]])
    a = (rng.random((6, 400)) < 0.5).astype(int)
    b = (rng.random((6, 400)) < lucky).astype(int)
    result = paired(a, b, [str(i) for i in range(400)], same_seeds=True)
    assert result.interval is not None
    assert result.both is not None
    assert result.both[1] - result.both[0] > 2 * (result.interval.high - result.interval.low)


def test_equal_variants_differ_by_nothing() -> None:
    a = np.array([[1, 0, 1]])
    same = paired(a, a, ["x", "y", "z"])
    assert (same.difference, same.p) == (0.0, 1.0)
    assert same.interval is not None
    assert (same.interval.low, same.interval.high) == (0.0, 0.0)
    assert difference_interval(np.array([0.5, 1.0]), ["x", "x"]) is None  # one video says nothing about others


def test_a_large_test_set_is_compared_exactly_and_quickly() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (2, 3, 13_157))
    videos = [str(i % 504) for i in range(13_157)]
    result = paired(a, b, videos, same_seeds=True)
    assert result.p > 0.05
    assert result.interval is not None
    assert result.interval.low < 0 < result.interval.high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_procedure(p: list[float]) -> None:
    order = np.argsort(p, kind="stable")
    expected = np.empty(len(p))
    expected[order] = np.maximum.accumulate(np.minimum(1, np.array(p)[order] * np.arange(len(p), 0, -1)))
    assert holm(p) == pytest.approx(expected.tolist())


# ---------------------------------------------------------------- what a test can show


def disagreements(rng: np.random.Generator, videos: int, *, video: float, window: float, most: int, tilt: float) -> Any:
    """Per video the difference of the hits and the number of windows: whole videos flip, or single windows do.

    ``tilt``: 0 = as often for a as for b, 1 = always for b.
    """
    counts = rng.integers(1, most + 1, videos)
    up = (1 + tilt) / 2
    whole = rng.random(videos) < video
    single = np.where(whole, 0, rng.binomial(counts, window))
    sums = np.where(whole, counts * np.where(rng.random(videos) < up, 1, -1), 2 * rng.binomial(single, up) - single)
    return sums, counts.astype(float)


WORLDS = [  # videos, disagreements by video and by window, windows of a video at most
    (20, 0.3, 0.1, 4),
    (41, 0.5, 0.3, 1),
    (41, 0.1, 0.02, 4),  # six disagreements: not even all on one side are enough
    (100, 0.3, 0.1, 4),
    (400, 0.1, 0.02, 4),
]


@pytest.mark.parametrize(("videos", "video", "window", "most"), WORLDS)
def test_a_detectable_difference_is_found_in_four_of_five_simulated_repetitions(
    videos: int, video: float, window: float, most: int
) -> None:
    rng = np.random.default_rng(0)
    kind: dict[str, Any] = {"video": video, "window": window, "most": most}
    sums, counts = disagreements(rng, 50_000, tilt=0, **kind)
    detectable = Power(sums.astype(float), counts).over_videos(videos)
    assert detectable is not None
    most_possible = disagreements(rng, 50_000, tilt=1, **kind)[0].sum() / counts.sum()
    more = max(1.0, detectable / most_possible)  # a larger difference than all disagreements needs more of them
    kind |= {"video": video * more, "window": window * more}
    tilt = min(1.0, detectable / most_possible)
    found = sum(sign_flip(disagreements(rng, videos, tilt=tilt, **kind)[0]) < 0.05 for _ in range(500)) / 500
    assert 0.68 < found < 0.95


def test_windows_taken_for_independent_promise_what_the_test_over_videos_does_not_show() -> None:
    """The usual shortcut counts 1,000 windows of 100 videos as 1,000: its difference is found in under half."""
    rng = np.random.default_rng(1)
    kind: dict[str, Any] = {"video": 0.4, "window": 0.0, "most": 19}
    sums, counts = disagreements(rng, 20_000, tilt=0, **kind)
    windows = int(counts.mean() * 100)
    shortcut = (1.96 + 0.84) * math.sqrt(0.4 / windows)
    detectable = Power(sums.astype(float), counts).over_videos(100)
    assert detectable is not None
    assert detectable > 2 * shortcut
    found = sum(sign_flip(disagreements(rng, 100, tilt=shortcut / 0.4, **kind)[0]) < 0.05 for _ in range(400)) / 400
    assert found < 0.35


@pytest.mark.parametrize("seeds", [6, 7, 8, 10, 12])
def test_over_seeds_the_detectable_difference_is_that_of_a_simulation(seeds: int) -> None:
    rng = np.random.default_rng(2)
    signs = np.array(list(itertools.product((1, -1), repeat=seeds - 1)))
    drawn = rng.normal(seed_effect(seeds), 1, (4000, seeds))
    totals = np.abs(drawn[:, :1] + drawn[:, 1:] @ signs.T)
    p = (totals >= np.abs(drawn.sum(axis=1))[:, None] - 1e-9).mean(axis=1)
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.025)


def test_five_seeds_can_show_nothing_and_say_how_many_could() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (2, 5, 300))
    power = paired(a, b, [str(i) for i in range(300)], same_seeds=True).power
    assert power is not None
    told: Any = power.to_json()
    assert (told["smallest_seed_p"], told["detectable_over_seeds"]) == (0.0625, None)
    for points, needs in told["wanted"].items():
        wanted = float(points) / 100
        assert needs["seeds"] >= LEAST
        assert power.over_seeds(needs["seeds"]) <= wanted < (power.over_seeds(needs["seeds"] - 1) or 1)  # type: ignore[operator]
        assert power.over_videos(needs["videos"]) <= wanted < (power.over_videos(needs["videos"] - 1) or 1)  # type: ignore[operator]
    one = paired(a[:1], b[:1], [str(i) for i in range(300)]).power
    assert one is not None
    assert one.to_json()["wanted"]["1"]["seeds"] is None  # type: ignore[index]


def test_too_few_videos_can_show_nothing_at_all() -> None:
    for videos, shown in ((5, False), (6, True), (40, True)):
        a, b = np.zeros((1, videos), dtype=int), np.ones((1, videos), dtype=int)
        power = paired(a, b, [str(i) for i in range(videos)]).power
        assert power is not None
        assert (power.over_videos() is not None) is shown
    same = paired(a, a, [str(i) for i in range(videos)]).power  # no disagreement: six of 40, nearly surely
    assert same is not None
    assert same.over_videos() == pytest.approx(0.196, abs=0.01)
