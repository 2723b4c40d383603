"""Every picture of the page, as SVG text that stands inside the HTML.

Text stays text: it takes the page's font, can be selected, and cannot break out. Nothing is read as a formula, so a
label with dollar signs is a label. Same input, same bytes: ids come from a fixed salt, and there is no date.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.progress import printable

INK, MUTED, FAINT, PAPER = "#22262b", "#6b7280", "#e3e5e8", "#ffffff"
TEAL, ORANGE, ALARM = "#1b6b78", "#c2622d", "#b3261e"
SERIES = (TEAL, ORANGE, "#5a5fa8", "#7a8c2e", "#9a4a78", "#4a6fa5", "#8a6d3b", "#3f7d58")
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f9f9", "#cfe1e2", "#86b5ba", "#3d8792", "#0f4852"])
WIDE, NARROW = 6.0, 3.9  # inches: a whole row, and half of one; on a phone each panel takes a row
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}


styled = mpl.rc_context(STYLE)  # around every picture: matplotlib asks for a style whenever it makes a text
DASHED = (0, (4, 3))


@dataclass(frozen=True)
class Picture:
    """Panels that stand side by side where there is room, and what their colours mean (label, colour)."""

    panels: tuple[Markup, ...]
    legend: tuple[tuple[str, str], ...] = ()


def svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an ``<svg>`` element. ``name`` salts its ids, so that two on one page do not share any."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", text)  # numbered per figure, so doubled on a page
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", text, count=1)
    text = re.sub(r'height="[\d.]+pt"|width="[\d.]+pt"', "", text, count=2)
    title = str(Markup.escape(printable(description)))
    head, _, rest = text.partition(">")
    widest = figure.get_figwidth() * 72 * (1.25 if figure.get_figwidth() >= WIDE else 1.05)
    # matplotlib has escaped every text in it
    return Markup(f'{head} role="img" aria-label="{title}" style="max-width:{widest:.0f}pt">{rest}')


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def clean(text: str, longest: int = 48) -> str:
    """A label from a file of a stranger: no control characters, and not longer than the picture."""
    text = " ".join(printable(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """A few words beside a point, in points from it."""
    ax.annotate(text, at, offset, textcoords="offset points", fontsize=8.5, **options)


def over_steps(ax: Axes, title: str) -> None:
    """What all pictures over training have in common."""
    ax.set_title(title)
    ax.set_xlabel("optimiser step")
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


Row = tuple[str, float, tuple[float, float] | None, Sequence[float], bool]


@styled
def dots(rows: Sequence[Row], *, majority: float | None, name: str) -> Picture:
    """Top-1 of every variant: dot, interval, a ring per seed. Rows: label, top-1, interval, seeds, is a student."""
    figure, ax = canvas(WIDE, 0.75 + 0.34 * len(rows))
    for y, (_, value, interval, seeds, student) in enumerate(rows):
        color = TEAL if student else MUTED
        if interval is not None:
            ax.plot([100 * end for end in interval], [y, y], color=color, linewidth=1.8, solid_capstyle="round")
        if len(seeds) > 1:
            ring = {"s": 9, "facecolor": "none", "edgecolor": color, "linewidth": 0.8}
            ax.scatter([100 * seed for seed in seeds], [y + 0.26] * len(seeds), **ring)  # type: ignore[arg-type]
        ax.scatter([100 * value], [y], s=44, color=color, zorder=3, edgecolor=PAPER, linewidth=1)
    if majority is not None:
        ax.axvline(100 * majority, color=ORANGE, linewidth=1, linestyle=DASHED)
        note(ax, "most frequent answer", (100 * majority, -0.62), (4, 0), color=ORANGE, va="center")
    ax.set_yticks(range(len(rows)), [clean(row[0], 40) for row in rows])
    ax.set_ylim(len(rows) - 0.45, -0.95)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    ax.set_xlabel("top-1 (% of the test questions)")
    ax.grid(axis="x", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
    return Picture((svg(figure, name, "Top-1 of every variant with its interval"),))


@styled
def sweep(
    points: Sequence[tuple[float, float, tuple[float, float] | None]], paper: Mapping[float, float], *, name: str
) -> Picture:
    """Figure 3: top-1 against λ; beside it the points that the paper states, where they are of the same kind."""
    measured, ax = canvas(NARROW if paper else WIDE, 2.6)
    ax.plot(range(len(points)), [100 * p[1] for p in points], color=TEAL, marker="o", markersize=5)
    for i, (_, _, interval) in enumerate(points):
        if interval is not None:
            ax.plot([i, i], [100 * end for end in interval], color=TEAL, linewidth=1.2, alpha=0.7)
    _over_lambda(ax, [p[0] for p in points])
    ax.set_title("Here" if paper else "")
    panels = [svg(measured, f"{name}-here", "Top-1 against λ here")]
    if paper:
        published, other = canvas(NARROW, 2.6)
        values = sorted(paper)
        other.plot(
            range(len(values)), [paper[v] for v in values], "D", color=ORANGE, markersize=5, markerfacecolor=PAPER
        )
        other.set_xlim(-0.6, len(values) - 0.4)
        other.set_title("Paper, LVU relationship (stated points)")
        _over_lambda(other, values)
        panels.append(svg(published, f"{name}-paper", "In the paper"))
    return Picture(tuple(panels))


def _over_lambda(ax: Axes, values: Sequence[float]) -> None:
    ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    ax.set_xlabel("λ, weight of the alignment")
    ax.set_ylabel("top-1 (%)")
    ax.grid(axis="y", color=FAINT, linewidth=0.7)


Colors = Mapping[str, str]  # variant -> colour, the same all over a study


def palette(labels: Sequence[str]) -> dict[str, str]:
    """A colour for every variant of a study; they repeat after eight."""
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}


def _legend(colors: Colors, shown: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Only what is shown, and nothing where that is one alone."""
    names = [label for label in colors if label in shown]
    return tuple((label, colors[label]) for label in names) if len(names) > 1 else ()


Curve = tuple[str, Sequence[Sequence[tuple[int, float]]]]  # label, one list of (step, value) per seed


@styled
def curves(parts: Sequence[tuple[str, Sequence[Curve]]], colors: Colors, *, name: str) -> Picture:
    """Learning curves: mean over the seeds, each seed thin behind it; smoothed over a twentieth."""
    panels = []
    for number, (title, lines) in enumerate(parts):
        figure, ax = canvas(NARROW if len(parts) > 1 else WIDE, 2.6)
        for label, seeds in lines:
            for seed in seeds if len(seeds) > 1 else ():
                steps, values = zip(*seed, strict=True)
                ax.plot(steps, smooth(values), color=colors[label], linewidth=0.6, alpha=0.35)
            ax.plot(*_smooth_mean(seeds), color=colors[label])
        over_steps(ax, title)
        panels.append(svg(figure, f"{name}-{number}", title))
    return Picture(tuple(panels), _legend(colors, [label for _, lines in parts for label, _ in lines]))


def smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a twentieth of the run, so that the eye sees the course."""
    width = max(1, len(values) // 20)
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]


def _smooth_mean(seeds: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    at: dict[int, list[float]] = {}
    for seed in seeds:
        for step, value in seed:
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    return steps, smooth([sum(at[s]) / len(at[s]) for s in steps])


Levels = Mapping[int, Sequence[tuple[int, float]]]  # level -> (step, value)


@styled
def levels_over_time(
    cosine: Levels, weight: Levels, constant: float | None, alarm: int | None, *, name: str
) -> Picture:
    """Raw cosine and weight of every level over training, with what a constant gets, and where the alarm rings."""
    colors = {u: to_hex(HEAT(0.3 + 0.7 * i / max(1, len(cosine) - 1))) for i, u in enumerate(cosine)}
    (left, ax), (right, other) = canvas(NARROW, 2.6), canvas(NARROW, 2.6)
    for axes, series in ((ax, cosine), (other, weight)):
        for level, points in series.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, smooth(values), color=colors.get(level, MUTED))
    over_steps(ax, "Raw cosine (−L_kd)")
    over_steps(other, "Weight w")
    other.set_ylim(-0.03, 1.06)
    if constant is not None:
        ax.axhline(constant, color=ORANGE, linewidth=1.2, linestyle=DASHED)
        ax.set_ylim(top=max(constant, ax.dataLim.y1) + 0.14)
        note(ax, "best constant", (ax.get_xlim()[1], constant), (-2, 3), color=ORANGE, ha="right", va="bottom")
    if alarm is not None:
        other.axvspan(alarm, other.get_xlim()[1], color=ALARM, alpha=0.07, linewidth=0)
        note(other, "all saturated", (alarm, 0.0), (4, 2), color=ALARM, va="bottom")
    panels = (
        svg(left, f"{name}-cosine", "Cosine of every level"),
        svg(right, f"{name}-weight", "Weight of every level"),
    )
    return Picture(panels, tuple((f"level {u}", color) for u, color in colors.items()))


@styled
def similarity(matrices: Sequence[tuple[str, Sequence[Sequence[float | None]]]], *, name: str) -> Picture:
    """Linear CKA of all levels with all, one square per variant. Undefined pairs are left white."""
    panels = []
    for number, (label, rows) in enumerate(matrices[:SQUARES]):
        figure, ax = canvas(3.1, 2.6)
        mesh = ax.pcolormesh(_masked(rows), cmap=HEAT, vmin=0, vmax=1, edgecolor=PAPER, linewidth=0.6)
        ticks = [i for i in range(len(rows)) if i % 3 == 0]
        ax.set_xticks([i + 0.5 for i in ticks], [str(i + 1) for i in ticks])
        ax.set_yticks([i + 0.5 for i in ticks], [str(i + 1) for i in ticks])
        ax.set_title(clean(label, 26))
        ax.set_xlabel("level")
        ax.set_ylabel("level")
        ax.set_aspect("equal")
        _bar(figure, ax, mesh, "linear CKA")
        panels.append(svg(figure, f"{name}-{number}", "Similarity of the levels' hidden states"))
    return Picture(tuple(panels))


SQUARES = 6  # variants whose levels are compared in a picture


@styled
def heat(
    rows: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    *,
    name: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    height: float | None = None,
) -> Picture:
    """A matrix over frames: one row per label."""
    figure, ax = canvas(WIDE, height or 0.85 + 0.27 * len(rows))
    values = _masked(rows)
    low, high = limits or (float(values.min()), float(values.max()))
    few = values.size <= 400
    lines = {"edgecolor": PAPER, "linewidth": 0.6} if few else {"rasterized": True}
    mesh = ax.pcolormesh(values, cmap=HEAT, vmin=low, vmax=max(high, low + 1e-6), **lines)
    every = math.ceil(len(labels) / 14)
    ax.set_yticks([i + 0.5 for i in range(0, len(labels), every)], list(labels[::every]))
    ax.invert_yaxis()
    frames = values.shape[1]
    step = max(1, math.ceil(frames / 12))
    ax.set_xticks([i + 0.5 for i in range(0, frames, step)], [str(i + 1) for i in range(0, frames, step)])
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    _bar(figure, ax, mesh, unit)
    return Picture((svg(figure, name, f"{unit} by {ylabel} and {xlabel}"),))


def _bar(figure: Figure, ax: Axes, mesh: Any, unit: str) -> None:
    """A colour scale beside a matrix without a frame."""
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=18)
    bar.set_label(unit)
    bar.outline.set_visible(False)


def _masked(rows: Sequence[Sequence[float | None]]) -> Any:
    return np.ma.masked_invalid(np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float))


Line = tuple[str, Sequence[float]]  # label, one value per frame


@styled
def shares(lines: Sequence[Line], colors: Colors, *, name: str) -> Picture:
    """Share of the last cross-attention per frame, one line per variant, with the even share."""
    figure, ax = canvas(WIDE, 2.5)
    _over_frames(ax, lines, colors, scale=100)
    frames = len(lines[0][1])
    ax.axhline(100 / frames, color=MUTED, linewidth=1, linestyle=DASHED)
    note(ax, "even", (ax.get_xlim()[1], 100 / frames), (3, 0), color=MUTED, va="center", annotation_clip=False)
    ax.set_xlabel("frame of the window")
    ax.set_ylabel("cross-attention (%)")
    ax.set_ylim(bottom=0)
    shown = [label for label, _ in lines]
    return Picture((svg(figure, name, "Share of the last cross-attention per frame"),), _legend(colors, shown))


@styled
def under_strip(cosine: Sequence[Line], attention: Sequence[Line], colors: Colors, *, name: str) -> Picture:
    """One column per frame: cosine with the teacher, and the share of the last attention."""
    panels: list[Markup] = []
    for title, lines, scale in (("Cosine with the teacher", cosine, 1), ("Share of the attention (%)", attention, 100)):
        if lines:
            figure, ax = canvas(NARROW, 1.75)
            _over_frames(ax, lines, colors, scale=scale)
            ax.set_title(title)
            ax.margins(y=0.2)
            ax.yaxis.set_major_locator(MaxNLocator(3))
            ax.set_xlabel("frame of the window")
            panels.append(svg(figure, f"{name}-{len(panels)}", title))
    return Picture(tuple(panels), _legend(colors, [label for label, _ in (*cosine, *attention)]))


def _over_frames(ax: Axes, lines: Sequence[Line], colors: Colors, *, scale: float) -> None:
    for label, values in lines:
        mark = "o" if len(values) <= 40 else ""
        heights = [scale * value for value in values]
        ax.plot(range(1, len(values) + 1), heights, color=colors[label], marker=mark, markersize=3)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
