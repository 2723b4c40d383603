"""What was asked, what came out: scores of every variant on the samples that all have answered, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from pipeline.report.read import Run, Study, Variant
from stages.decode.metrics import Match, Prediction, hits, score
from stages.decode.statistics import Interval, Paired, holm, paired, share_interval

SURE = 0.05  # adjusted p below which a difference may be called one
ENOUGH_SEEDS = 10  # five have shown a difference that ten took back (tests/bench/results/studies_2core-cpu_20261128.md)
PAPERS_LAMBDA = 1.0  # §4.2, on LVU
PAPERS_LEVELS = (8, 9, 10, 11, 12, 13)  # §4.2


@dataclass(frozen=True)
class Score:
    """One variant on the common samples; hits are averaged over its seeds."""

    n: int
    videos: int
    correct: float  # per seed, on average
    top1: float
    top5: float | None
    macro_f1: float | None
    interval: Interval | None  # drawing whole videos
    per_seed: tuple[float, ...]
    recalls: dict[str, tuple[float, int]]  # true answer -> (recall over the seeds, n per seed)

    @property
    def seeds(self) -> int:
        """How many runs stand behind it."""
        return len(self.per_seed)

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation of top-1 over seeds."""
        return float(np.std(self.per_seed, ddof=1)) if self.seeds > 1 else None


@dataclass(frozen=True)
class Contrast:
    """A variant against the reference, paired over the same samples."""

    variant: Variant
    reference: Variant
    test: Paired
    p_holm: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the difference: over videos and seeds where there are several seeds, else over videos."""
        inner = self.test.interval
        return self.test.both or ((inner.low, inner.high) if inner else None)

    @property
    def sure(self) -> bool:
        """Whether new videos would show it, by p, and new training runs too, by the interval."""
        inside = self.interval is not None and self.interval[0] <= 0 <= self.interval[1]
        return self.p_holm < SURE and not inside


@dataclass(frozen=True)
class Result:
    """Everything that the answers of one study say."""

    study: Study
    samples: tuple[str, ...]  # ids that every student's run has answered
    left_out: int
    scores: dict[str, Score]  # by the variant's key; baselines among them
    majority: float | None  # always saying the most frequent answer of the very samples
    reference: Variant | None
    contrasts: tuple[Contrast, ...]

    def of(self, variant: Variant) -> Score | None:
        """The score of a variant, or None where it has no answers."""
        return self.scores.get(variant.key)


def result_of(study: Study) -> Result:
    """Score every variant that has answers."""
    answered = [v for v in study.variants if any(run.predictions for run in v.runs)]
    tables = {id(run): {p.sample_id: p for p in run.predictions} for v in answered for run in _with_answers(v)}
    everything = list(tables.values())
    common = sorted(set.intersection(*(set(table) for table in everything))) if everything else []
    seen = set().union(*everything) if everything else set()
    scores, rows = {}, {}
    for variant in answered:
        answers = [[tables[id(run)][key] for key in common] for run in _with_answers(variant)]
        if common:
            rows[variant.key] = _hits(answers, study.match)
            scores[variant.key] = _score(answers, rows[variant.key], study.match)
    for variant in study.baselines:
        answers = [_of(run, common) for run in variant.runs]
        if common and all(len(part) == len(common) for part in answers):
            scores[variant.key] = _score(answers, _hits(answers, study.match), study.match)
    scored = [v for v in study.variants if v.key in scores]
    reference = reference_of(scored)
    contrasts: list[Contrast] = []
    if reference is not None:
        videos = [everything[0][key].video_id for key in common]
        others = [v for v in scored if v is not reference]
        tests = [_paired(reference, v, rows, videos) for v in others]
        adjusted = holm([test.p for test in tests])
        contrasts = [Contrast(v, reference, t, p) for v, t, p in zip(others, tests, adjusted, strict=True)]
    truth = [everything[0][key].answer.strip() for key in common] if common else []
    majority = max(map(truth.count, set(truth))) / len(truth) if truth else None
    return Result(study, tuple(common), len(seen) - len(common), scores, majority, reference, tuple(contrasts))


def reference_of(scored: Sequence[Variant]) -> Variant | None:
    """What the others are compared with: MA-LMM, else another student without alignment, else the paper's choice, else
    the first. None for one alone."""
    if len(scored) < 2:
        return None

    def rank(variant: Variant) -> int:
        config = variant.config
        assert config is not None
        if config.train.lambda_kd == 0:
            return 0 if config.student.name == "malmm" else 1
        return 2 if config.align.levels == PAPERS_LEVELS and config.align.weights == "adaptive" else 3

    return min(scored, key=rank)


def _with_answers(variant: Variant) -> list[Run]:
    return [run for run in variant.runs if run.predictions]


def _of(run: Run, common: Sequence[str]) -> list[Prediction]:
    table = {p.sample_id: p for p in run.predictions}
    return [table[key] for key in common if key in table]


def _hits(answers: Sequence[Sequence[Prediction]], match: Match) -> Int[np.ndarray, "S N"]:
    return np.array([hits(row, match) for row in answers])


def _score(answers: Sequence[Sequence[Prediction]], rows: Int[np.ndarray, "S N"], match: Match) -> Score:
    videos = [p.video_id for p in answers[0]]
    reports = [score(row, match) for row in answers]
    top5 = [share for report in reports if (share := report.overall.top5) is not None]
    f1 = [report.macro_f1 for report in reports if report.macro_f1 is not None]
    recalls = {}
    for name, part in reports[0].per_class.items():
        shares = [r.per_class[name].tally.top1 or 0.0 for r in reports]
        recalls[name] = (sum(shares) / len(shares), part.tally.n)
    return Score(
        n=rows.shape[1],
        videos=len(set(videos)),
        correct=float(rows.sum() / len(rows)),
        top1=float(rows.mean()),
        top5=sum(top5) / len(top5) if top5 else None,
        macro_f1=sum(f1) / len(f1) if f1 else None,
        interval=share_interval(rows.mean(axis=0), videos),
        per_seed=tuple(rows.mean(axis=1).tolist()),
        recalls=recalls,
    )


def _paired(a: Variant, b: Variant, rows: dict[str, Int[np.ndarray, "S N"]], videos: Sequence[str]) -> Paired:
    seeds_a, seeds_b = ([run.seed for run in _with_answers(v)] for v in (a, b))
    same = set(seeds_a) == set(seeds_b) and len(set(seeds_a)) == len(seeds_a) and len(seeds_b) == len(seeds_a)
    theirs = rows[b.key][[seeds_b.index(seed) for seed in seeds_a]] if same else rows[b.key]
    return paired(rows[a.key], theirs, videos, same_seeds=same)


# ---------------------------------------------------------------- in words


@dataclass(frozen=True)
class Headline:
    """The top of a study's page."""

    question: str
    verdict: str
    sentences: tuple[str, ...]


def headline(result: Result) -> Headline:
    """The question and its answer, as strong as the numbers allow and no stronger."""
    study, scored = result.study, [v for v in result.study.variants if v.key in result.scores]
    if not scored:
        return Headline(_question(result), "Not answered yet.", ("No run of this study has answered its questions.",))
    basis = _basis(result, scored)
    if result.reference is None:
        alone = result.scores[scored[0].key]
        return Headline(
            "How many of the test questions does this student answer?",
            f"{percent(alone.top1)} % of {alone.n}.",
            (
                f"{alone.correct:.6g} of {alone.n} answers are right; 95 % interval {span(alone.interval)} %.",
                *(
                    (f"Always giving the most frequent answer would be right in {percent(result.majority)} %.",)
                    if result.majority is not None
                    else ()
                ),
                *basis,
            ),
        )
    best = max(result.contrasts, key=lambda c: c.test.difference)
    sure = [c for c in result.contrasts if c.sure]
    ups = [c for c in sure if c.test.difference > 0]
    told = [describe(ups[0] if len(ups) == 1 else best, result)]
    worse = [c for c in sure if c.test.difference < 0]
    if ups:
        verdict = "Yes." if study.differing else "There is a difference."
    elif worse:
        verdict = "No: it costs answers." if result.reference.lambda_kd == 0 else "Yes, for the worse."
        papers = [c for c in worse if c.variant.lambda_kd == PAPERS_LAMBDA]  # not the worst of many, where it is there
        told = [describe((papers or sorted(worse, key=lambda c: c.test.difference))[0], result)]
    else:
        verdict = "No difference is shown."
    if sure and all(result.scores[v.key].seeds == 1 for v in scored):  # p speaks of new videos, not of new students
        verdict = "One seed cannot tell."
    if len(result.contrasts) > 1:
        told.append(
            f"{len(sure)} of {len(result.contrasts)} variants differ from {result.reference.label} "
            f"(p < {SURE:g} after Holm’s correction, and an interval without 0): {len(ups)} better, {len(worse)} worse."
        )
    return Headline(_question(result), verdict, (*told, *basis))


def _question(result: Result) -> str:
    study = result.study
    if result.reference is not None and result.reference.lambda_kd == 0:
        return "Does learning from the diffusion teacher make more answers right?"
    names = {
        "train.lambda_kd": "the weight λ of the alignment",
        "align.levels": "the choice of aligned levels",
        "align.weights": "weighing the levels adaptively",
        "align.target_norm": "the form of the targets",
    }
    if study.differing:
        what = " and ".join(names.get(key, key) for key in study.differing[:2])
        return f"Does {what} change how many answers are right?"
    return "How many of the test questions does this student answer?"


def describe(contrast: Contrast, result: Result) -> str:
    """One contrast as a sentence with its numbers."""
    a, b = result.scores[contrast.reference.key], result.scores[contrast.variant.key]
    test, interval, p = contrast.test, contrast.interval, p_value(contrast.p_holm)
    within = "" if interval is None else f", 95 % interval {signed(interval[0])} to {signed(interval[1])}"
    seeds = "" if test.seed_p is None else f", over seeds {test.seed_p:.2g}"
    return (
        f"{contrast.variant.label} has {percent(b.top1)} % right, {contrast.reference.label} {percent(a.top1)} %: "
        f"{signed(test.difference)} points{within}, p over videos {p if p.startswith('<') else f'= {p}'}{seeds}."
    )


def _basis(result: Result, scored: Sequence[Variant]) -> tuple[str, ...]:
    first = result.scores[scored[0].key]
    seeds = sorted({result.scores[v.key].seeds for v in scored})
    told = f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    caution = ""
    if len(scored) > 1 and seeds[0] < ENOUGH_SEEDS:
        caution = f" With fewer than {ENOUGH_SEEDS} seeds, intervals that draw seeds tend to be too short."
    if len(scored) > 1 and seeds == [1]:
        caution = " With one seed, a difference may be the seed’s."
    few = f" {first.videos} videos are few: true intervals are wider." if first.videos < 20 else ""
    return (f"{first.n} questions about {first.videos} test videos, {told} per variant.{caution}{few}",)


def percent(share: float | None) -> str:
    """One decimal, no sign."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def signed(share: float) -> str:
    """Points with a sign, a true minus; nothing before 0.0."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def span(interval: Interval | None) -> str:
    """``59.1 to 77.8``."""
    return "–" if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def p_value(p: float) -> str:
    """Two digits, never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
