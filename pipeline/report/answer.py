"""What was asked, what came out: scores of every variant on the samples that all have answered, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.overrides import TEACHER_ONLY
from pipeline.report.read import Study, Subject, Variant
from pipeline.scoring import Answers, HeldOut, common_questions, held_out_of, question_of, worst
from stages.config import PipelineConfig
from stages.decode.metrics import score
from stages.decode.statistics import ALPHA, LEAST, POWER, Interval, Paired, holm

ENOUGH_SEEDS = 10  # five have shown a difference that ten took back (tests/bench/results/studies_2core-cpu_20261128.md)
PAPERS_LEVELS = (8, 9, 10, 11, 12, 13)  # §4.2


def papers_lambda(subject: Subject) -> float:
    """§4.2: 1 on LVU, which the small world follows, 0.0005 on MSVD-QA."""
    return 0.0005 if subject == "msvd_qa" else 1.0


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
    seed_sd: float | None
    recalls: dict[str, tuple[float, int]]  # true answer -> (recall over the seeds, n per seed)

    @property
    def seeds(self) -> int:
        """How many runs stand behind it."""
        return len(self.per_seed)


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
        return self.p_holm < ALPHA and not inside


@dataclass(frozen=True)
class Result:
    """Everything that the answers of one study say."""

    study: Study
    held_out: HeldOut  # whether the questions are new to the students
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
    runs = {v.key: [(run.seed, run.predictions) for run in v.runs if run.predictions] for v in study.variants}
    everything = [predictions for part in runs.values() for _, predictions in part]
    common = common_questions(everything)
    asked = {question_of(p) for predictions in everything for p in predictions}
    answers = {key: Answers.of(part, study.match, common) for key, part in runs.items() if part and common}
    for variant in study.baselines:
        tables = [{question_of(p) for p in run.predictions} for run in variant.runs]
        if common and all(table >= set(common) for table in tables):
            part = [(run.seed, run.predictions) for run in variant.runs]
            answers[variant.key] = Answers.of(part, study.match, common)
    scored = [v for v in study.variants if v.key in answers]
    reference = reference_of(scored, study.subject)
    contrasts: list[Contrast] = []
    if reference is not None:
        others = [v for v in scored if v is not reference]
        tests = [answers[v.key].against(answers[reference.key]) for v in others]
        adjusted = holm([test.p for test in tests])
        contrasts = [Contrast(v, reference, t, p) for v, t, p in zip(others, tests, adjusted, strict=True)]
    truth = [answer.strip() for *_, answer in common]
    recorded = [run.held_out for run in study.runs if run.held_out is not None]
    return Result(
        study=study,
        held_out=worst(recorded, "test") if recorded else held_out_of(study.config.data, "test"),
        samples=tuple(sample for sample, *_ in common),
        left_out=len(asked) - len(common),
        scores={key: _score(part, study) for key, part in answers.items()},
        majority=max(map(truth.count, set(truth))) / len(truth) if truth else None,
        reference=reference,
        contrasts=tuple(contrasts),
    )


def reference_of(scored: Sequence[Variant], subject: Subject) -> Variant | None:
    """What the others are compared with: MA-LMM, else another student without alignment, else the paper's choice, else
    the first. None for one alone."""
    if len(scored) < 2:
        return None

    def rank(variant: Variant) -> int:
        config = variant.config
        assert config is not None
        if config.train.lambda_kd == 0:
            return 0 if config.student.name == "malmm" else 1
        paper = config.align.levels == PAPERS_LEVELS and config.align.weights == "adaptive"
        return 2 if paper and config.train.lambda_kd == papers_lambda(subject) else 3 if paper else 4

    return min(scored, key=rank)


def _score(answers: Answers, study: Study) -> Score:
    reports = [score(row, study.match) for row in answers.predictions]
    top5 = [share for report in reports if (share := report.overall.top5) is not None]
    f1 = [report.macro_f1 for report in reports if report.macro_f1 is not None]
    recalls = {}
    for name, part in reports[0].per_class.items():
        shares = [r.per_class[name].tally.top1 or 0.0 for r in reports]
        recalls[name] = (sum(shares) / len(shares), part.tally.n)
    return Score(
        n=answers.n,
        videos=len(set(answers.videos)),
        correct=answers.correct,
        top1=answers.top1,
        top5=sum(top5) / len(top5) if top5 else None,
        macro_f1=sum(f1) / len(f1) if f1 else None,
        interval=answers.interval,
        per_seed=answers.per_seed,
        seed_sd=answers.seed_sd,
        recalls=recalls,
    )


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
    doubt = (str(result.held_out),) if result.held_out.unknown else ()
    if result.held_out.held_out is False:
        return _not_held_out(result, scored, basis)
    if result.reference is None:
        alone = result.scores[scored[0].key]
        return Headline(
            "How many of the test questions does this student answer?",
            f"{percent(alone.top1)} % of {alone.n}.",
            (
                *doubt,
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
    sentences = [describe(ups[0] if len(ups) == 1 else best, result)]
    worse = [c for c in sure if c.test.difference < 0]
    if ups:
        verdict = "Yes." if study.differing else "There is a difference."
    elif worse:
        verdict = "No: it costs answers." if _asks_about_teacher(result) else "Yes, for the worse."
        # Not the worst of many, where the paper's choice is there.
        papers = [c for c in worse if c.variant.lambda_kd == papers_lambda(study.subject)]
        sentences = [describe((papers or sorted(worse, key=lambda c: c.test.difference))[0], result)]
    else:
        verdict = "No difference is shown."
    if sure and all(result.scores[v.key].seeds == 1 for v in scored):  # p speaks of new videos, not of new students
        verdict = "One seed cannot tell."
    if len(result.contrasts) > 1:
        sentences.append(
            f"{len(sure)} of {len(result.contrasts)} variants differ from {result.reference.label} "
            f"(p < {ALPHA:g} after Holm’s correction, and an interval without 0): {len(ups)} better, "
            f"{len(worse)} worse."
        )
    return Headline(_question(result), verdict, (*doubt, *sentences, *power_in_words(result), *basis))


def _not_held_out(result: Result, scored: Sequence[Variant], basis: tuple[str, ...]) -> Headline:
    """The scores, and no word about a difference between methods."""
    shares = "; ".join(f"{v.label} {percent(result.scores[v.key].top1)} %" for v in scored[:4])
    more = f", and {len(scored) - 4} more" if len(scored) > 4 else ""
    return Headline(
        "How many of these questions does a student answer that it was trained on?"
        if "train" in result.held_out.shared
        else "How many of these questions does a student answer that it was chosen by?",
        "This is no test.",
        (str(result.held_out), f"Right answers: {shares}{more}.", *basis),
    )


def _asks_about_teacher(result: Result) -> bool:
    """Whether every contrast is one with an aligned student, and nothing but the alignment differs."""
    aligned = all((contrast.variant.lambda_kd or 0) > 0 for contrast in result.contrasts)
    alike = all(key == "train.lambda_kd" or key.startswith(TEACHER_ONLY) for key in result.study.differing)
    return result.reference is not None and result.reference.lambda_kd == 0 and aligned and alike


def _question(result: Result) -> str:
    study = result.study
    if _asks_about_teacher(result):
        return f"Does learning from {_teacher([c.variant for c in result.contrasts])} make more answers right?"
    names = {
        "train.lambda_kd": "the weight λ of the alignment",
        "align.levels": "the choice of aligned levels",
        "align.weights": "weighing the levels adaptively",
        "align.target_norm": "the form of the targets",
        "student.name": "the kind of student",
    }
    if study.differing:
        what = [names.get(key, key) for key in study.differing[:3]]
        return f"{'Do' if len(what) > 1 else 'Does'} {' and '.join(what)} change how many answers are right?"
    return "How many of the test questions does this student answer?"


def _teacher(variants: Sequence[Variant]) -> str:
    teachers = {teacher_in_words(v.config) for v in variants if v.config is not None}
    return teachers.pop() if len(teachers) == 1 else "a teacher"


def teacher_in_words(config: PipelineConfig) -> str:
    """What the student learns from, as a run's configuration names it."""
    name = "diffusion teacher" if config.teacher.name == "dit" else f"teacher “{config.teacher.name}”"
    return f"an untrained {name}" if config.teacher.weights.startswith("seed:") else f"the {name}"


def power_in_words(result: Result) -> tuple[str, ...]:
    """What the comparison could have shown at all; of several, that of the most seeds."""
    powers = [c.test.power for c in result.contrasts if c.test.power is not None]
    if not powers:
        return ()
    power = max(powers, key=lambda power: power.seeds)
    videos, seeds = power.over_videos(), power.over_seeds()
    floor = f"no p over {power.seeds} seeds falls below {2.0 ** (1 - power.seeds):.2g}, so seeds alone can show nothing"
    alone = f"; {floor}" if 0 < power.seeds < LEAST else ""
    number = result.contrasts[0].test.videos
    if videos is None:
        return (f"With {number} videos, no difference can reach p < {ALPHA:g}{alone}.",)
    if seeds is not None:
        alone = f", and new seeds those of about {100 * seeds:.1f} points or more"
    return (
        f"With {number} videos, such a comparison finds differences of about {100 * videos:.1f} points or more "
        f"(in {100 * POWER:.0f} % of repetitions, before Holm’s correction){alone}.",
    )


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
    number = f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    caution = ""
    if len(scored) > 1 and seeds[0] < ENOUGH_SEEDS:
        caution = f" With fewer than {ENOUGH_SEEDS} seeds, intervals that draw seeds tend to be too short."
    if len(scored) > 1 and seeds == [1]:
        caution = " With one seed, a difference may be the seed’s."
    few = f" {first.videos} videos are few: true intervals are wider." if first.videos < 20 else ""
    return (f"{first.n} questions about {first.videos} test videos, {number} per variant.{caution}{few}",)


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
