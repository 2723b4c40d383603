"""How sure an accuracy is, and whether two variants differ: videos are the units, not the windows or questions in them.

Windows of one video share their label and most of their frames, so an interval that counts them as independent is too
short. Here whole videos are drawn (bootstrap) or flipped (test). Everything is a function of its arguments: the
bootstrap's generator is seeded, and the test is exact, without any draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

DRAWS = 10_000
SEED = 0
LEVEL = 0.95
FEW = 20  # videos; below this a bootstrap interval is too short more often than it says
AT_ONCE = 1 << 22  # drawn indices in memory
NORMAL = NormalDist()


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
    """Wilson's score interval of a share (1927): good for small n and for shares near 0 and 1. None where n is 0."""
    if n == 0:
        return None
    z = NORMAL.inv_cdf((1 + LEVEL) / 2)
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
    distribution = bootstrap_shares(sums, counts, np.random.default_rng(SEED))
    estimate = float(sums.sum() / counts.sum())
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    low, high = bca(distribution, estimate, left_out)
    return Interval(low, high, len(sums), "bca")


def bootstrap_shares(
    sums: Float[np.ndarray, " V"], counts: Float[np.ndarray, " V"], rng: np.random.Generator, draws: int = DRAWS
) -> Float[np.ndarray, " R"]:
    """The ratio sum / count of ``draws`` resamples of videos."""
    size = max(1, AT_ONCE // len(sums))
    parts = []
    for first in range(0, draws, size):
        index = rng.integers(0, len(sums), (min(size, draws - first), len(sums)))
        parts.append(sums[index].sum(axis=1) / counts[index].sum(axis=1))
    return np.concatenate(parts)


def bca(
    distribution: Float[np.ndarray, " R"], estimate: float, left_out: Float[np.ndarray, " V"]
) -> tuple[float, float]:
    """Efron's bias-corrected and accelerated interval (1987) from a bootstrap distribution and a jackknife."""
    below = ((distribution < estimate).mean() + (distribution <= estimate).mean()) / 2
    if below in (0.0, 1.0):  # the estimate lies outside of all draws: no bias correction exists
        low, high = np.quantile(distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        return low, high
    bias = NORMAL.inv_cdf(float(below))
    deviation = left_out.mean() - left_out
    spread = (deviation**2).sum()
    acceleration = float((deviation**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + NORMAL.inv_cdf(tail)
        ends.append(NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(distribution, ends).tolist()
    return low, high


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
    scale = math.lcm(len(a), len(b))
    scaled = b.sum(axis=0) * (scale // len(b)) - a.sum(axis=0) * (scale // len(a))  # integers: the test stays exact
    mean = scaled / scale
    sums, counts = cluster_sums(scaled.astype(float), videos)
    result = Paired(
        n=a.shape[1],
        videos=len(sums),
        difference=float(mean.mean()) if mean.size else 0.0,
        interval=difference_interval(mean, videos),
        p=sign_flip(np.rint(sums).astype(np.int64)),
    )
    if not same_seeds or len(a) < 2 or not mean.size:
        return result
    per_seed = b.astype(np.int64) - a
    return Paired(
        **{name: getattr(result, name) for name in ("n", "videos", "difference", "interval", "p")},
        seed_differences=tuple(per_seed.mean(axis=1).tolist()),
        seed_p=sign_flip(per_seed.sum(axis=1)),
        both=_over_videos_and_seeds(per_seed, videos, counts),
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
