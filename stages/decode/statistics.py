"""How sure an accuracy is, and whether two variants differ: videos are the units, not the windows or questions in them.

Windows of one video share their label and most of their frames, so an interval that counts them as independent is too
short. Here whole videos are drawn (bootstrap) or flipped (test). Everything is a function of its arguments: the
bootstrap's generator is seeded, and the test is exact, without any draws.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

DRAWS = 10_000
SEED = 0
LEVEL = 0.95
FEW = 20  # videos; below this a bootstrap interval is too short more often than it says
AT_ONCE = 1 << 22  # drawn indices in memory
ALPHA = 0.05  # of every test
POWER = 0.8  # how often a difference that counts as detectable is found
WANTED = (0.01, 0.02, 0.05)  # differences for which the number of videos and seeds is worked out
MOST = 10_000_000  # videos or seeds; nobody plans for more
Z_LEVEL, Z_POWER = float(stats.norm.ppf(1 - ALPHA / 2)), float(stats.norm.ppf(POWER))


@dataclass(frozen=True)
class Interval:
    """95 % interval of a share or of a difference of shares, from ``videos`` independent units."""

    low: float
    high: float
    videos: int
    method: str  # "bca", "percentile"; or "wilson" over videos, where all videos are alike and a bootstrap says nothing

    def to_json(self) -> dict[str, object]:
        """Plain values; ``few`` warns that the interval is optimistic."""
        return {
            "interval": [self.low, self.high],
            "videos": self.videos,
            "method": self.method,
            "few": self.videos < FEW,
        }


def wilson(correct: float | int, n: int) -> tuple[float, float] | None:
    """Wilson's score interval of a share (1927): good for small n and for shares near 0 and 1. None where n is 0.

    Equal to ``scipy.stats.binomtest(…).proportion_ci("wilson")``, which takes whole counts only: a mean over seeds is
    no whole number of videos.
    """
    if n == 0:
        return None
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share, z2 = correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_sums(
    values: Float[np.ndarray, " N"], videos: Sequence[str]
) -> tuple[Float[np.ndarray, " V"], Float[np.ndarray, " V"]]:
    """Sum of the values, and their number, per video."""
    _, index = np.unique(np.asarray(videos, dtype=object).astype(str), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def share_interval(values: Float[np.ndarray, " N"], videos: Sequence[str]) -> Interval | None:
    """BCa bootstrap interval of a mean over samples, drawing whole videos. None where there is no sample.

    The mean is a ratio of two sums over videos, since a video may have many samples or few. Values are hits (0 or 1),
    or means of hits over seeds. Where every video has the same mean, no draw can differ: then Wilson over videos.
    """
    if not len(values):
        return None
    sums, counts = cluster_sums(values, videos)
    if len(sums) == 1 or np.ptp(sums / counts) == 0:
        low, high = wilson(float(sums.sum() / counts.sum()) * len(sums), len(sums)) or (0.0, 1.0)
        return Interval(low, high, len(sums), "wilson")
    return _bootstrapped(sums, counts)


def difference_interval(differences: Float[np.ndarray, " N"], videos: Sequence[str]) -> Interval | None:
    """The same for a mean difference; where all videos agree it has no width. None where there is but one video."""
    if not len(differences):
        return None
    sums, counts = cluster_sums(differences, videos)
    if len(sums) == 1:
        return None
    if np.ptp(sums / counts) == 0:
        value = float(sums.sum() / counts.sum())
        return Interval(value, value, len(sums), "percentile")
    return _bootstrapped(sums, counts)


def _bootstrapped(sums: Float[np.ndarray, " V"], counts: Float[np.ndarray, " V"]) -> Interval:
    """scipy's BCa over videos; its percentile interval where the estimate lies outside of all draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (sums, counts),
            lambda k, n, axis: k.sum(axis=axis) / n.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=DRAWS,
            batch=max(1, AT_ONCE // len(sums)),
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(SEED),
        )
    low, high = map(float, result.confidence_interval)
    if math.isfinite(low) and math.isfinite(high):
        return Interval(low, high, len(sums), "bca")
    low, high = np.quantile(result.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Interval(low, high, len(sums), "percentile")


# ---------------------------------------------------------------- two variants


@dataclass(frozen=True)
class Paired:
    """Variant b minus variant a on the same samples. Hits are averaged over the seeds of a variant first.

    ``p``: exact sign-flip test over videos, two-sided: could the difference come from exchanging a and b per video?
    It speaks of new videos for these trained students. ``seed_*`` speaks of new training seeds on these videos, and
    exists where both variants were trained with the same two or more seeds. ``both`` draws videos and seeds.
    """

    n: int
    videos: int
    difference: float
    interval: Interval | None
    p: float
    seed_differences: tuple[float, ...] = ()
    seed_p: float | None = None
    both: tuple[float, float] | None = None
    power: Power | None = None  # None where there is no sample

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation of the difference over seeds."""
        return float(np.std(self.seed_differences, ddof=1)) if len(self.seed_differences) > 1 else None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "n": self.n,
            "videos": self.videos,
            "difference": self.difference,
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "p": self.p,
            "seed_differences": list(self.seed_differences),
            "seed_sd": self.seed_sd,
            "seed_p": self.seed_p,
            "interval_videos_and_seeds": None if self.both is None else list(self.both),
            "power": None if self.power is None else self.power.to_json(),
        }


def paired(
    a: Int[np.ndarray, "S N"], b: Int[np.ndarray, "U N"], videos: Sequence[str], *, same_seeds: bool = False
) -> Paired:
    """Compare two variants.

    Args:
        a, b: hits (0 or 1) per seed and sample; the samples are the same, in the same order.
        videos: the video of each sample.
        same_seeds: row s of both was trained with the same seed.
    """
    if not a.shape[1]:
        return Paired(n=0, videos=0, difference=0.0, interval=None, p=1.0)
    scale = math.lcm(len(a), len(b))
    scaled = b.sum(axis=0) * (scale // len(b)) - a.sum(axis=0) * (scale // len(a))  # integers: the test stays exact
    mean = scaled / scale
    sums, counts = cluster_sums(scaled.astype(float), videos)
    result = Paired(
        n=a.shape[1],
        videos=len(sums),
        difference=float(mean.mean()),
        interval=difference_interval(mean, videos),
        p=sign_flip(np.rint(sums).astype(np.int64)),
        power=Power(sums / scale, counts),
    )
    if not same_seeds or len(a) < 2:
        return result
    per_seed = b.astype(np.int64) - a
    differences = per_seed.mean(axis=1)
    return replace(
        result,
        seed_differences=tuple(differences.tolist()),
        seed_p=sign_flip(per_seed.sum(axis=1)),
        both=_over_videos_and_seeds(per_seed, videos, counts),
        power=Power(sums / scale, counts, seeds=len(a), seed_sd=float(differences.std(ddof=1))),
    )


def _over_videos_and_seeds(
    per_seed: Int[np.ndarray, "S N"], videos: Sequence[str], counts: Float[np.ndarray, " V"]
) -> tuple[float, float]:
    """Percentile interval of the mean difference when videos and seeds are both drawn anew (crossed bootstrap)."""
    table = np.stack([cluster_sums(row.astype(float), videos)[0] for row in per_seed])  # [S, V]
    rng = np.random.default_rng(SEED)
    size = max(1, AT_ONCE // len(counts))
    parts = []
    for first in range(0, DRAWS, size):
        rows = min(size, DRAWS - first)
        seeds = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), rows)  # how often each seed is drawn
        chosen = rng.integers(0, len(counts), (rows, len(counts)))
        sums = np.take_along_axis(seeds @ table, chosen, axis=1).sum(axis=1)
        parts.append(sums / (len(table) * counts[chosen].sum(axis=1)))
    shares = np.concatenate(parts)
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def sign_flip(sums: Int[np.ndarray, " V"]) -> float:
    """Exact two-sided p of |sum| when every entry may have either sign: P(|Σ ±d| ≥ |Σ d|), by convolution.

    With one sample per video this is McNemar's exact test.
    """
    sizes = np.abs(sums[sums != 0])
    if not len(sizes):
        return 1.0
    sizes = sizes // np.gcd.reduce(sizes)
    observed = abs(int(sums.sum())) // int(np.gcd.reduce(np.abs(sums[sums != 0])))
    reach = int(sizes.sum())
    chance = np.zeros(2 * reach + 1)  # of every total from -reach to reach
    chance[reach] = 1.0
    for size in sizes.tolist():
        moved = np.zeros_like(chance)
        moved[size:] += chance[: len(chance) - size] / 2
        moved[: len(chance) - size] += chance[size:] / 2
        chance = moved
    totals = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chance[totals >= observed].sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979) for a family of tests, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, floor = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = floor
    return adjusted


# ---------------------------------------------------------------- what a test can show


@dataclass(frozen=True)
class Power:
    """How large a difference the two sign-flip tests of a pair can show, clustered as they are (D90).

    A difference is detectable where the test finds it (p < 0.05, two-sided, before Holm's correction) in 80 % of
    repetitions. Over videos: as many disagreements per video as in these answers, more of them on one side. This is the
    sample size of McNemar's test (Miettinen 1968, Connor 1987), with sums over a video in place of single answers. Over
    seeds: the differences of new seeds are normal, with the standard deviation of these.

    Args:
        sums, counts: difference of the hits, and number of samples, per video.
        seeds: pairs of runs with the same seed; 0 where there is no test over seeds.
        seed_sd: standard deviation of the difference over them; 0 where none is known.
    """

    sums: Float[np.ndarray, " V"] = field(repr=False, compare=False)
    counts: Float[np.ndarray, " V"] = field(repr=False, compare=False)
    seeds: int = 0
    seed_sd: float = 0.0

    def over_videos(self, videos: int | None = None) -> float | None:
        """The smallest detectable difference with so many videos (default: these); None where none can be."""
        videos = videos or len(self.sums)
        if videos < LEAST:
            return None
        size, square, mean = np.abs(self.sums), float((self.sums**2).mean()), float(self.counts.mean())
        # Solves sqrt(V) m = z_level sqrt(E x^2) + z_power sqrt(E x^2 - m^2) for m, the mean of x over videos.
        reach, most = Z_LEVEL**2 * square, videos + Z_POWER**2
        root = reach * videos - most * (reach - Z_POWER**2 * square)
        per_video = (math.sqrt(reach * videos) + math.sqrt(max(0.0, root))) / most
        if 0 < per_video <= size.mean():
            return per_video / mean
        # Not even with all disagreements on one side: there must be more of them. Of V videos at least LEAST must
        # differ; their number is binomial, and the inverse of its distribution function a quantile of beta.
        differing = float(stats.beta.ppf(POWER, LEAST, videos - LEAST + 1))
        typical = float(size[size > 0].mean()) if size.any() else mean
        return min(1.0, max(float(size.mean()), differing * typical) / mean)

    def videos_for(self, difference: float) -> int | None:
        """How many videos such as these it takes to detect a difference; None where more than MOST."""
        return _fewest(self.over_videos, difference)

    def over_seeds(self, seeds: int | None = None) -> float | None:
        """The smallest detectable difference with so many seeds (default: these); None where none can be."""
        seeds = seeds or self.seeds
        return None if seeds < LEAST or not self.seed_sd else seed_effect(seeds) * self.seed_sd

    def seeds_for(self, difference: float) -> int | None:
        """How many seeds it takes to detect a difference; None where more than MOST, or where no spread is known."""
        return _fewest(self.over_seeds, difference) if self.seed_sd else None

    def to_json(self) -> dict[str, object]:
        """Plain values; ``wanted`` maps a difference in points to what it takes."""
        wanted: Mapping[str, object] = {
            f"{100 * value:g}": {"videos": self.videos_for(value), "seeds": self.seeds_for(value)} for value in WANTED
        }
        return {
            "power": POWER,
            "alpha": ALPHA,
            "fewest_seeds": LEAST,
            "detectable_over_videos": self.over_videos(),
            "detectable_over_seeds": self.over_seeds(),
            "smallest_seed_p": 2.0 ** (1 - self.seeds) if self.seeds else None,
            "wanted": wanted,
        }


LEAST = next(n for n in range(1, 64) if 2.0 ** (1 - n) < ALPHA)  # signs that agree until p < ALPHA: 6
SEED_EFFECTS = {6: 1.78, 7: 1.34, 8: 1.19}  # simulated: the exact test has few values of p


def seed_effect(seeds: int) -> float:
    """The mean, in standard deviations, that the sign-flip test over so many normal numbers detects.

    From simulation (a test repeats it): the usual (z + z) / sqrt(n) is too small, by 36 % at six seeds, 12 % at ten.
    """
    return SEED_EFFECTS.get(seeds, (Z_LEVEL + Z_POWER) / math.sqrt(seeds - 2.3))


def _fewest(detectable: Callable[[int], float | None], difference: float) -> int | None:
    """The smallest number with ``detectable(number) <= difference``, by bisection."""

    def enough(number: int) -> bool:
        value = detectable(number)
        return value is not None and value <= difference

    if not enough(MOST):
        return None
    return bisect_left(range(MOST + 1), True, lo=LEAST, key=enough)
