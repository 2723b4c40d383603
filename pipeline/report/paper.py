"""The paper's numbers, and its tables with ours beside them. Every figure here stands in its Tables 1 to 4 or §4.4.

Figures 3 and 4 are pictures; of their points only those are here that the text states. k of n is not printed in the
paper; with MA-LMM's annotation files the numbers of test windows are 91 … 337, and every figure is a whole k of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline import presets
from pipeline.overrides import flatten
from pipeline.report.answer import PAPERS_LEVELS, Score, papers_lambda, percent, span
from pipeline.report.read import Study, Subject, Variant, levels
from stages.config import PipelineConfig
from stages.decode.metrics import Prediction, is_correct

TASKS = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")
TASK_NAMES = ("Relationship", "Speaking style", "Scene", "Director", "Genre", "Writer", "Release year")
WINDOWS = (91, 473, 218, 268, 1291, 432, 337)
TABLE_1_MALMM = (58.2, 44.8, 80.3, 74.6, 61.0, 70.4, 51.9)
TABLE_1_DIFFLMM = (69.2, 45.2, 80.3, 71.6, 63.2, 75.0, 48.96)
TABLE_2 = {"husband wife": ("Husband & wife", 27.8, 66.7), "friend": ("Friend", 76.7, 90.7)}
TABLE_3 = (60.6, 60.8)
TABLE_4 = {"adaptive": 69.2, "uniform": 58.2}
FIGURE_3 = {1.0: 69.2}  # §4.4: best at λ = 1; the other points of the figure have no number in the text
FIGURE_4 = {"8–13": 69.2, "1–13": 53.9}  # §4.4: all levels are "nearly 15.3 %" lower
FIGURE_4_WORDS = {"1–7": "“only slightly less effective” than 8–13", "13": "no number in the text"}
REFERENCE = {"lvu": "lvu-relationship", "msvd_qa": "msvd-qa-malmm", "world": "miniature"}  # subject -> preset
FROZEN = (  # settings that name the frozen models and what they see: another one is another experiment
    *("clip.model", "clip.weights", "clip.layer", "teacher.name", "teacher.model", "teacher.weights"),
    *("student.init", "student.memory_len", "decode.llm", "data.num_frames"),
)
SAME_ENCODER = ("Salesforce/instructblip-vicuna-7b", "EVA01-g-14")  # the vision tower of the one is the other
NOT_RUN = "not run"
PAPERS_LAYER = 8  # of the DiT, §4.2


@dataclass(frozen=True)
class Cell:
    """One number of a table. ``kind``: paper, ours, or missing."""

    text: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page. ``source`` says what the paper's columns are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    source: str = ""


Scores = Callable[[Variant], Score | None]


def theirs(value: float) -> Cell:
    """A number that the paper prints."""
    return Cell(f"{value:.2f}".rstrip("0") if value != round(value, 1) else f"{value:.1f}", "paper")


def ours(score: Score | None) -> Cell:
    """A number of a run, with its n and interval."""
    if score is None:
        return Cell(NOT_RUN, "missing")
    seeds = f", {score.seeds} seeds" if score.seeds > 1 else ""
    return Cell(percent(score.top1), "ours", f"{score.correct:.6g} of {score.n}{seeds} · {span(score.interval)}")


def tables(studies: Sequence[Study], scores: Scores) -> list[Table]:
    """Of Tables 1 to 4 and the stated points of Figures 3 and 4 those in which some study on the page has a place.

    That is a study of the paper's datasets, or of the small world, whose tasks have the names of LVU's. Nothing has
    been published about other videos, so nothing stands beside them.
    """
    subjects = {study.subject for study in studies}
    found = []
    if subjects & {"lvu", "world"}:
        found.append(_table_1(studies, scores))
    if any(study.subject == "lvu" and study.task == "relationship" for study in studies):
        found.append(_table_2(studies))
    if "msvd_qa" in subjects:
        found.append(_table_3(studies, scores))
    if _kinds(studies):
        found += [_table_4(studies, scores), _figure_3(studies, scores), _figure_4(studies, scores)]
    return found


def student_of(studies: Sequence[Study], subject: Subject, task: str | None, *, aligned: bool) -> Variant | None:
    """The variant that stands for Diff-LMM, or with λ = 0 for MA-LMM: the one that is nearest to the paper's."""
    fitting = [
        variant
        for study in studies
        if study.subject == subject and task in (None, study.task)
        for variant in study.variants
        if variant.config is not None and (variant.config.train.lambda_kd > 0) == aligned
    ]
    return min(fitting, key=lambda variant: tuple(_off(variant, subject).values()), default=None)


def other_models(config: PipelineConfig, subject: Subject) -> list[str]:
    """Settings of the frozen models that are not the reference's; a folder named like a hub id counts for it."""
    reference, values = flatten(presets.get(REFERENCE[subject])), flatten(config)

    def name(value: object) -> object:
        value = "EVA01-g-14" if value in SAME_ENCODER else value
        return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value

    keys = [key for key in FROZEN if config.train.lambda_kd > 0 or not key.startswith("teacher.")]
    return [
        f"{key}={name(values[key])}"
        for key in keys
        if name(values[key]) != name(reference[key])
        and (not key.endswith(".weights") or f"{values[key]}".startswith("seed:"))
    ]


def _off(variant: Variant, subject: Subject) -> dict[str, float]:
    """How far the settings that tables vary are from the paper's (§4.2); 0 where equal. Without λ, few have a meaning.

    The first is what makes a student least comparable.
    """
    config = variant.config
    assert config is not None
    off = {"models": float(len(other_models(config, subject))), "student": float(config.student.name != "malmm")}
    if config.train.lambda_kd > 0:
        align = config.align
        teacher = (config.teacher.layer, config.teacher.grid, config.teacher.timestep)
        off["targets"] = float(align.target_norm != "none" or teacher != (PAPERS_LAYER, 1, 0))
        off["levels"] = float(align.levels != PAPERS_LEVELS)
        off["weights"] = float(align.weights != "adaptive")
        off["lambda"] = abs(config.train.lambda_kd - papers_lambda(subject))
    return off


def _point(study: Study, varied: str, fits: Callable[[PipelineConfig], bool]) -> Variant | None:
    """The first variant that fits and is the paper's in everything but what the table varies."""
    for variant in study.variants:
        if variant.config is not None and fits(variant.config):
            off = _off(variant, study.subject)
            if not any(distance for axis, distance in off.items() if axis != varied):
                return variant
    return None


def _score(variant: Variant | None, scores: Scores) -> Cell:
    return ours(None if variant is None else scores(variant))


def _named(cell: Cell, variant: Variant | None, subject: Subject) -> Cell:
    """The cell; where the settings of its run are not the paper's, the note names the run, and its other models."""
    if variant is None or variant.config is None or cell.kind != "ours" or not any(_off(variant, subject).values()):
        return cell
    models = other_models(variant.config, subject)
    which = variant.label or variant.runs[0].name
    if models:
        which += f" with {', '.join(models[:3])}{' …' if len(models) > 3 else ''}"
    return replace(cell, note=f"{which}: {cell.note}")


def _table_1(studies: Sequence[Study], scores: Scores) -> Table:
    subjects: list[Subject] = [s for s in ("lvu", "world") if any(study.subject == s for study in studies)]
    columns: tuple[str, ...] = ("MA-LMM, paper", "Diff-LMM, paper")
    columns += ("MA-LMM, ours", "Diff-LMM, ours") if "lvu" in subjects else ()
    columns += ("small world: MA-LMM", "small world: Diff-LMM") if "world" in subjects else ()
    rows = []
    for task, name, n, base, diff in zip(TASKS, TASK_NAMES, WINDOWS, TABLE_1_MALMM, TABLE_1_DIFFLMM, strict=True):
        cells = [theirs(base), theirs(diff)]
        for subject in subjects:
            students = [student_of(studies, subject, task, aligned=aligned) for aligned in (False, True)]
            cells += [_named(_score(variant, scores), variant, subject) for variant in students]
        rows.append((f"{name} (n\u00a0=\u00a0{n})", tuple(cells)))
    note = (
        " The small world has tasks of the same names on other videos: those columns are no reproduction."
        if "world" in subjects
        else ""
    )
    return Table("Table 1. LVU, top-1 in %", columns, tuple(rows), f"n: test windows of the paper’s protocol.{note}")


def _table_2(studies: Sequence[Study]) -> Table:
    rows = []
    for label, (name, base, diff) in TABLE_2.items():
        cells = [theirs(base), theirs(diff)]
        for aligned in (False, True):
            variant = student_of(studies, "lvu", "relationship", aligned=aligned)
            cells.append(_named(_recall(variant, label), variant, "lvu"))
        rows.append((name, tuple(cells)))
    columns = ("MA-LMM, paper", "Diff-LMM, paper", "MA-LMM, ours", "Diff-LMM, ours")
    return Table("Table 2. Two labels of LVU relationship, recall in %", columns, tuple(rows))


def _recall(variant: Variant | None, label: str) -> Cell:
    asked: list[Prediction] = []
    if variant is not None:
        asked = [p for run in variant.runs for p in run.predictions if p.answer.strip() == label]
    if not asked:
        return Cell(NOT_RUN, "missing")
    right = sum(bool(p.beams) and is_correct(p.beams[0], p.answer, "exact") for p in asked)
    return Cell(percent(right / len(asked)), "ours", f"{right} of {len(asked)}")


def _table_3(studies: Sequence[Study], scores: Scores) -> Table:
    cells = [Cell(NOT_RUN, "missing")] * 2
    for i, aligned in enumerate((False, True)):
        variant = student_of(studies, "msvd_qa", None, aligned=aligned)
        cells[i] = _named(_score(variant, scores), variant, "msvd_qa")
    columns = ("MA-LMM, paper", "Diff-LMM, paper", "MA-LMM, ours", "Diff-LMM, ours")
    return Table("Table 3. MSVD-QA, accuracy in %", columns, (("MSVD-QA", (*map(theirs, TABLE_3), *cells)),))


def _kinds(studies: Sequence[Study]) -> list[tuple[str, Study]]:
    """LVU relationship, then every task of the small world: (heading, study)."""
    lvu = [study for study in studies if study.subject == "lvu" and study.task == "relationship"]
    world = [study for study in studies if study.subject == "world" and study.task]
    return [("ours, LVU relationship", study) for study in lvu] + [(f"small world, {s.task}", s) for s in world]


def _table_4(studies: Sequence[Study], scores: Scores) -> Table:
    kinds = _kinds(studies)

    def weighed(config: PipelineConfig) -> str:
        align = config.align
        if align.weights == "adaptive":
            return "Adaptive"
        return "Average, 1/M each" if abs(align.uniform_weight * len(align.levels) - 1) < 0.01 else "Equal, not 1/M"

    arms = {
        "Adaptive": theirs(TABLE_4["adaptive"]),
        "Average, 1/M each": theirs(TABLE_4["uniform"]),
        "Equal, not 1/M": Cell("–", "missing", "not in the paper"),
    }
    rows = []
    for name, paper in arms.items():

        def fits(config: PipelineConfig, name: str = name) -> bool:
            return config.train.lambda_kd > 0 and weighed(config) == name

        found = [_point(study, "weights", fits) for _, study in kinds]
        rows.append((name, (paper, *(_score(variant, scores) for variant in found))))
    source = (
        "λ = 1, levels 8–13. The paper’s “average” equals MA-LMM’s own figure. A fair average keeps the sum of the "
        "adaptive weights, which is not 1 (D7)."
    )
    return Table("Table 4. Weights of the levels, top-1 in %", ("paper", *(k for k, _ in kinds)), tuple(rows), source)


def _figure_3(studies: Sequence[Study], scores: Scores) -> Table:
    kinds = _kinds(studies)
    values = {v.lambda_kd for _, study in kinds for v in study.variants if v.lambda_kd is not None} | {0.0, *FIGURE_3}
    rows = []
    for value in sorted(values):
        stated = {0.0: Cell("58.2", "paper", "MA-LMM in Table 1")}.get(value)
        paper = stated or (theirs(FIGURE_3[value]) if value in FIGURE_3 else Cell("–", "missing", "only drawn"))

        def fits(config: PipelineConfig, value: float = value) -> bool:
            return config.train.lambda_kd == value

        found = [_point(study, "lambda", fits) for _, study in kinds]
        rows.append((f"λ = {value:g}", (paper, *(_score(variant, scores) for variant in found))))
    source = (
        "Levels 8–13, adaptive weights. §4.4 says in words that larger and smaller λ are worse; it prints no other "
        "number."
    )
    return Table(
        "Figure 3. Weight λ of the alignment, top-1 in %", ("paper", *(k for k, _ in kinds)), tuple(rows), source
    )


def _figure_4(studies: Sequence[Study], scores: Scores) -> Table:
    kinds = _kinds(studies)
    rows = []
    for name in ("8–13", "1–7", "13", "1–13"):
        paper = theirs(FIGURE_4[name]) if name in FIGURE_4 else Cell("–", "missing", FIGURE_4_WORDS[name])

        def fits(config: PipelineConfig, name: str = name) -> bool:
            return config.train.lambda_kd > 0 and levels(config.align.levels) == name

        found = [_point(study, "levels", fits) for _, study in kinds]
        shown = f"levels {name}" + (" (all)" if name == "1–13" else "")
        rows.append((shown, (paper, *(_score(variant, scores) for variant in found))))
    source = (
        "λ = 1, adaptive weights. 53.9 follows from the text: all levels are “nearly 15.3 %” below 69.2 (49 of 91 "
        "windows)."
    )
    return Table("Figure 4. Aligned levels, top-1 in %", ("paper", *(k for k, _ in kinds)), tuple(rows), source)
