"""The page: everything that the other modules found, through one template."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import registry
from pipeline.errors import ConfigError
from pipeline.locks import replace_text
from pipeline.overrides import flatten
from pipeline.printing import size
from pipeline.progress import OnProgress, clock, printable
from pipeline.report import answer, figures, paper, videos
from pipeline.report.answer import Headline, Result
from pipeline.report.cost import Cost, cost_of
from pipeline.report.figures import Picture
from pipeline.report.files import DAMAGED
from pipeline.report.insight import Insight, insight_of
from pipeline.report.paper import Table
from pipeline.report.read import Missing, Study, Variant, read_studies
from pipeline.report.videos import VideoView
from stages.decode.statistics import WANTED

TEMPLATES = Path(__file__).parent / "templates"
ROWS = 40  # true answers listed one by one at most


@dataclass(frozen=True)
class Chapter:
    """One study on the page."""

    anchor: str
    study: Study
    result: Result
    headline: Headline
    dots: Picture | None
    sweep: Picture | None
    insight: Insight
    videos: list[VideoView]
    cost: Cost
    missing: list[tuple[Missing, list[str]]]  # what, and the runs that lack it

    @property
    def new(self) -> bool:
        """Whether the questions are held out, as far as is known: only then is anything tested."""
        return self.result.held_out.held_out is not False


def report(paths: Sequence[Path], *, out: Path | None, shown: int, progress: OnProgress) -> dict[str, Any]:
    """Write the page of the runs at or below ``paths``.

    Args:
        paths: run folders, or folders of run folders such as the OUT of an ablation.
        out: the HTML file; default: report.html in the first folder.
        shown: questions shown one by one, per study.
        progress: told about every study.

    Raises:
        ConfigError: no run can be read, or ``out`` is a folder.
    """
    target = out or paths[0] / "report.html"
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name the page itself:  --out {quote(str(target / 'report.html'))}")
    left_out: dict[str, str] = {}
    studies = read_studies(paths, lambda path, reason: left_out.update({str(path): reason}))
    results = [answer.result_of(study) for study in studies]
    chapters = []
    for number, result in enumerate(results):
        progress(number, len(results), result.study.title)
        chapters.append(_chapter(result, number, shown))
    progress(len(results), len(results), "page")
    page = render(chapters, _paper_tables(studies, results), left_out)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, page)
    return {
        "page": str(target),
        "bytes": len(page.encode()),
        "studies": len(studies),
        "runs": sum(len(study.runs) for study in studies),
        "held_out": [result.held_out.to_json() for result in results],
        "power": [_power(result) for result in results],
        "answers_used": {str(run.path): run.made_from for study in studies for run in study.runs if run.made_from},
        "left_out": [{"path": path, "reason": reason} for path, reason in left_out.items()],
        "warnings": [f"left out: {path}: {reason}" for path, reason in left_out.items()],
        "answers": [f"{chapter.study.title}: {chapter.headline.verdict}" for chapter in chapters],
        "missing": [
            {"what": lack.what, "runs": names, "command": lack.command}
            for chapter in chapters
            for lack, names in chapter.missing
        ],
    }


def _power(result: Result) -> list[dict[str, Any]]:
    return [
        {"variant": c.variant.label, "reference": c.reference.label, **(c.test.power.to_json() if c.test.power else {})}
        for c in result.contrasts
    ]


def render(chapters: Sequence[Chapter], tables: Sequence[Table], left_out: Mapping[str, str]) -> str:
    """The HTML text. Every text from a file is escaped, and loses its control characters first."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "percent": answer.percent,
        "signed": answer.signed,
        "span": answer.span,
        "p_value": answer.p_value,
        "size": size,
        "clock": clock,
        "operations": operations,
        "points": lambda share: "none" if share is None else f"{100 * share:.1f}",
        "count": lambda number: "–" if number is None else f"{number:,}",
        "setting": lambda value: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value),
    }
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        chapters=chapters,
        tables=tables,
        left_out=left_out,
        style=Markup(style),
        version=importlib.metadata.version("diff-lmm"),
        rows=ROWS,
        wanted=[f"{100 * value:g}" for value in WANTED],
        flatten=flatten,
    )


def _finalize(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def operations(count: float | None) -> str:
    """``1.9 T``: floating-point operations with a unit prefix."""
    if count is None:
        return "–"
    units = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}FLOP"


def _chapter(result: Result, number: int, shown: int) -> Chapter:
    study, prefix = result.study, f"study-{number + 1}"
    return Chapter(
        anchor=prefix,
        study=study,
        result=result,
        headline=answer.headline(result),
        dots=_dots(result, f"{prefix}-dots"),
        sweep=_sweep(result, f"{prefix}-sweep"),
        insight=insight_of(study, prefix),
        videos=videos.views_of(result, shown, prefix),
        cost=cost_of(study, _distinct_frames(study)),
        missing=_missing(study),
    )


def _dots(result: Result, name: str) -> Picture | None:
    rows = []
    for variant in (*result.study.variants, *result.study.baselines):
        score = result.of(variant)
        if score is not None:
            interval = None if score.interval is None else (score.interval.low, score.interval.high)
            rows.append((variant.label, score.top1, interval, score.per_seed, variant.config is not None))
    return figures.dots(rows, majority=result.majority, name=name) if rows else None


def _sweep(result: Result, name: str) -> Picture | None:
    """Only where λ alone was varied, over three values or more."""
    if result.study.differing != ["train.lambda_kd"]:
        return None
    points = []
    for variant in result.study.variants:
        score = result.of(variant)
        if score is not None and variant.lambda_kd is not None:
            interval = None if score.interval is None else (score.interval.low, score.interval.high)
            points.append((variant.lambda_kd, score.top1, interval))
    published = paper.FIGURE_3 | {0.0: 58.2} if paper.tables([result.study], result.of) else {}
    return figures.sweep(points, published, name=name) if len(points) > 2 else None


def _paper_tables(studies: Sequence[Study], results: Sequence[Result]) -> list[Table]:
    def scores(variant: Variant) -> answer.Score | None:
        for study, result in zip(studies, results, strict=True):
            if any(variant is other for other in study.variants):
                return result.of(variant)
        return None

    return paper.tables(studies, scores)


def _missing(study: Study) -> list[tuple[Missing, list[str]]]:
    """What some run lacks; one command stands for all that lack the same."""
    found: dict[str, tuple[Missing, list[str]]] = {}
    for run in (run for v in (*study.variants, *study.baselines) for run in v.runs):
        for lack in run.missing:
            found.setdefault(lack.what, (lack, []))[1].append(run.name)
    return list(found.values())


def _distinct_frames(study: Study) -> int | None:
    """Frames that extraction encodes for training, once each; None where the annotations are not at hand."""
    try:
        dataset = registry.load("dataset", study.config.data.name)(study.config.data)
        return sum(len(frames) for frames in dataset.wanted(["train"]).values())
    except DAMAGED:
        return None
