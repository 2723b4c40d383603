"""What the diagnostics say about a study: numbers, pictures, and sentences about the paper's claims."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report import figures
from pipeline.report.answer import PAPERS_LEVELS
from pipeline.report.figures import Picture
from pipeline.report.read import Study, Variant
from stages.train.diagnostics import level_values, saturation

SHOWN = 4  # aligned variants whose levels are drawn over time


@dataclass(frozen=True)
class LevelRow:
    """One level of one variant: what Eq. 5 and 6 are at, and what that is worth."""

    level: int
    cosine: float
    above_constant: float | None
    centred: float | None
    weight: float | None
    saturated: float | None


@dataclass(frozen=True)
class VariantInsight:
    """The alignment of one variant."""

    label: str
    alarm: str
    picture: Picture | None  # cosine and weight over training
    constant: float | None
    rows: tuple[LevelRow, ...]  # from diagnostics.json, mean over seeds
    per_frame: Picture | None


@dataclass(frozen=True)
class Insight:
    """Everything of a study."""

    findings: tuple[str, ...]
    alarms: tuple[str, ...]
    curves: Picture | None
    variants: tuple[VariantInsight, ...]
    more: int  # aligned variants that are not drawn
    similarity: Picture | None
    similarity_rows: tuple[tuple[str, float | None, float | None], ...]  # label, between levels, with the teacher
    timeline: Picture | None
    slots: Picture | None
    attention: Picture | None


def insight_of(study: Study, prefix: str) -> Insight:
    """Draw and describe. ``prefix`` keeps the ids of two studies apart."""
    aligned = [v for v in study.variants if (v.lambda_kd or 0) > 0]
    drawn = [_variant(v, f"{prefix}-{i}") for i, v in enumerate(aligned[:SHOWN])]
    alarms = tuple(f"{v.label}: {told}" for v in aligned if (told := _alarm(v)))
    return Insight(
        findings=tuple(_findings(study, aligned)),
        alarms=alarms,
        curves=_curves(study, prefix),
        variants=tuple(drawn),
        more=max(0, len(aligned) - SHOWN),
        similarity=_similarity(study, prefix),
        similarity_rows=tuple(
            (v.label, _mean_of(v, lambda d: d["levels"]["similarity"]), _mean_of(v, _teacher_similarity))
            for v in study.variants
            if v.diagnosed
        ),
        timeline=_timeline(study, prefix),
        slots=_slots(study, prefix),
        attention=_attention(study, prefix),
    )


def _alarm(variant: Variant) -> str:
    """The alarm of the first seed that rings, with how many ring."""
    if variant.config is None or variant.config.align.weights != "adaptive":
        return ""
    ringing = [found for run in variant.runs if (found := saturation(run.records)) is not None]
    if not ringing:
        return ""
    seeds = f" ({len(ringing)} of {len(variant.runs)} seeds)" if len(variant.runs) > 1 else ""
    return f"{ringing[0]}{seeds}"


def _variant(variant: Variant, prefix: str) -> VariantInsight:
    records = next((run.records for run in variant.runs if run.records), ())
    adaptive = variant.config is not None and variant.config.align.weights == "adaptive"
    alarm = saturation(records) if adaptive else None
    constants = [r["probe/constant"] for r in records if r.get("probe/constant") is not None]
    cosine = {u: [(s, -v) for s, v in points] for u, points in _series(records, "kd/").items()}
    weight = _series(records, "w/")
    constant = _mean_of(variant, lambda d: d["levels"]["constant"])
    if constant is None and constants:
        constant = constants[-1]
    picture = None
    if cosine:
        at = None if alarm is None else alarm.step
        picture = figures.levels_over_time(cosine, weight, constant, at, name=f"{prefix}-levels")
    return VariantInsight(
        label=variant.label,
        alarm=_alarm(variant),
        picture=picture,
        constant=constant,
        rows=tuple(_rows(variant)),
        per_frame=_per_frame(variant, prefix),
    )


def _series(records: Sequence[Mapping[str, Any]], prefix: str) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    for record in records:
        for level, value in level_values(record, prefix).items():
            found.setdefault(level, []).append((int(record["step"]), float(value)))
    return dict(sorted(found.items()))


def _rows(variant: Variant) -> list[LevelRow]:
    if not variant.diagnosed:
        return []
    found = []
    for key in sorted(variant.diagnosed[0]["levels"]["cosine"], key=int):
        cosine = _level(variant, "cosine", key)
        if cosine is None:
            continue
        constant = _mean_of(variant, lambda d: d["levels"]["constant"])
        above = None if constant is None else cosine - constant
        rest = (_level(variant, what, key) for what in ("centred", "weight", "saturated"))
        found.append(LevelRow(int(key), cosine, above, *rest))
    return found


def _level(variant: Variant, what: str, key: str) -> float | None:
    return _mean_of(variant, lambda d: d["levels"][what].get(key))


def _mean_of(variant: Variant, pick: Callable[[Mapping[str, Any]], Any]) -> float | None:
    """Mean over the seeds that have the number."""
    values = [value for found in variant.diagnosed if (value := pick(found)) is not None]
    return sum(values) / len(values) if values else None


def _teacher_similarity(found: Mapping[str, Any]) -> float | None:
    """CKA of the last level with the teacher: no projection head is in it, so it exists without an alignment too."""
    values = found["levels"]["cka_teacher"]
    return values[-1] if values else None


def _per_frame(variant: Variant, prefix: str) -> Picture | None:
    if not variant.diagnosed or not variant.diagnosed[0]["per_frame"]:
        return None
    keys = sorted(variant.diagnosed[0]["per_frame"], key=int)
    tables = _like_the_first([[found["per_frame"].get(key, ()) for key in keys] for found in variant.diagnosed])
    rows = _averaged(tables)
    return figures.heat(
        rows, keys, name=f"{prefix}-frames", xlabel="frame of the window", ylabel="level", unit="cosine"
    )


def _colors(study: Study) -> dict[str, str]:
    return figures.palette([variant.label for variant in study.variants])


def _curves(study: Study, prefix: str) -> Picture | None:
    parts = []
    for title, key in (("Answer loss (L_ce)", "loss_ce"), ("Top-1 on val", "val_top1")):
        lines = []
        for variant in study.variants:
            seeds = [
                points
                for run in variant.runs
                if (points := [(r["step"], r[key]) for r in run.records if r.get(key) is not None])
            ]
            if seeds:
                lines.append((variant.label, seeds))
        if lines:
            parts.append((title, lines))
    return figures.curves(parts, _colors(study), name=f"{prefix}-curves") if parts else None


def _similarity(study: Study, prefix: str) -> Picture | None:
    matrices = []
    for variant in study.variants:
        tables = [found["levels"]["cka"] for found in variant.diagnosed]
        if tables and tables[0]:
            matrices.append((variant.label, _averaged(_like_the_first(tables))))
    return figures.similarity(matrices, name=f"{prefix}-cka") if matrices else None


def _averaged(tables: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Entry by entry; None where any is undefined."""
    return [[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _like_the_first(tables: Sequence[Any]) -> list[Any]:
    """Those of the first one's shape: a seed that was looked at otherwise does not enter a mean."""
    return [table for table in tables if list(map(len, table)) == list(map(len, tables[0]))]


def _first_diagnosed(study: Study) -> Mapping[str, Any] | None:
    """Of the last variant that has them: the one with the most alignment."""
    return next((v.diagnosed[0] for v in reversed(study.variants) if v.diagnosed), None)


def _timeline(study: Study, prefix: str) -> Picture | None:
    found = _first_diagnosed(study)
    if found is None or len(found["starts"] or ()) < 2:
        return None
    rows = [[v if frame < step else None for frame, v in enumerate(row)] for step, row in enumerate(found["starts"])][
        1:
    ]
    return figures.heat(
        rows,
        [str(step + 2) for step in range(len(rows))],
        name=f"{prefix}-timeline",
        xlabel="frame at which an entry begins",
        ylabel="frame being read",
        unit="share of tokens",
        limits=(0, 1),
        height=3.6,
    )


def _slots(study: Study, prefix: str) -> Picture | None:
    found = _first_diagnosed(study)
    tables = [] if found is None else [s["slots"] for s in found["per_sample"].values() if s["slots"]]
    if not tables:
        return None
    rows = [[sum(cell) / len(tables) for cell in zip(*row, strict=True)] for row in zip(*tables, strict=True)]
    names = [f"entry {i + 1}" for i in range(len(rows) - 1)] + ["current"]
    return figures.heat(
        rows,
        names,
        name=f"{prefix}-slots",
        xlabel="frame of the window",
        ylabel="",
        unit="share of tokens",
        limits=(0, 1),
    )


def _attention(study: Study, prefix: str) -> Picture | None:
    lines = []
    for variant in study.variants:
        tables = [s["attention"] for d in variant.diagnosed for s in d["per_sample"].values() if s["attention"]]
        tables = [table for table in tables if len(table) == len(tables[0])]
        if tables:
            lines.append((variant.label, [sum(frame) / len(tables) for frame in zip(*tables, strict=True)]))
    return figures.shares(lines, _colors(study), name=f"{prefix}-attention") if lines else None


# ---------------------------------------------------------------- in words


def _findings(study: Study, aligned: Sequence[Variant]) -> list[str]:
    sentences = []
    for variant in aligned[:SHOWN]:
        rows = _rows(variant)
        if not rows or rows[0].above_constant is None:
            continue
        best = max(rows, key=lambda row: row.cosine)
        above = best.above_constant or 0
        more = f"{above:.3f} more than" if above > 0 else f"{-above:.3f} less than"
        centred = [row.centred for row in rows if row.centred is not None]
        sentences.append(
            f"{variant.label}: the cosine with the teacher reaches {best.cosine:.3f} on test questions, at level "
            f"{best.level}. That is {more} one constant vector gets ({best.cosine - above:.3f}), which knows nothing "
            f"about any frame. Without the common part the best level has {max(centred, default=0):.3f}."
        )
    alike = [
        (v, value) for v in study.variants if (value := _mean_of(v, lambda d: d["levels"]["similarity"])) is not None
    ]
    if len(alike) > 1:
        most, least = max(alike, key=lambda pair: pair[1]), min(alike, key=lambda pair: pair[1])
        sentences.append(
            f"Levels are most alike in {most[0].label} (mean CKA {most[1]:.2f}) and least in {least[0].label} "
            f"({least[1]:.2f}). The paper says that aligning all levels makes them alike{_claim(alike)}."
        )
    return sentences


def _claim(alike: Sequence[tuple[Variant, float]]) -> str:
    """Whether all levels aligned are more alike than the higher ones, in two variants that differ in that alone."""
    pairs: dict[str, dict[str, float]] = {}
    for variant, value in alike:
        if variant.config is not None and variant.config.train.lambda_kd > 0:
            aligned = variant.config.align.levels
            every = len(aligned) > 7 and aligned == tuple(range(1, len(aligned) + 1))
            name = "all" if every else "higher" if aligned == PAPERS_LEVELS else "other"
            rest = {key: setting for key, setting in variant.runs[0].settings.items() if key != "align.levels"}
            pairs.setdefault(json.dumps(rest, sort_keys=True), {})[name] = value
    pair = next((pair for pair in pairs.values() if {"all", "higher"} <= set(pair)), None)
    if pair is None:
        return "; this study has no pair that could show it"
    verb = "agrees" if pair["all"] > pair["higher"] else "disagrees"
    return f"; this study {verb}: {pair['all']:.2f} with all levels, {pair['higher']:.2f} with levels 8–13"
