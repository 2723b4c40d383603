"""Every picture of the page, as SVG text that stands inside the HTML.

Text stays text: it takes the page's font, can be selected, and cannot break out. Nothing is read as a formula, so a
label with dollar signs is a label. Same input, same bytes: ids come from a fixed salt, and there is no date.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.progress import printable

INK, MUTED, FAINT, PAPER = "#22262b", "#6b7280", "#e3e5e8", "#ffffff"
TEAL, ORANGE, ALARM = "#1b6b78", "#c2622d", "#b3261e"
SERIES = (TEAL, ORANGE, "#5a5fa8", "#7a8c2e", "#9a4a78", "#4a6fa5", "#8a6d3b", "#3f7d58")
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f9f9", "#cfe1e2", "#86b5ba", "#3d8792", "#0f4852"])
WIDE, NARROW = 7.2, 3.5  # inches: the text column, and half of it
STYLE = {
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
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}


styled = mpl.rc_context(STYLE)  # around every picture: matplotlib asks for a style whenever it makes a text


def svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an ``<svg>`` element. ``name`` salts its ids, so that two on one page do not share any."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", text)  # numbered per figure, so doubled on a page
    text = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", text, count=1, flags=re.DOTALL)
    width = f"{figure.get_figwidth() * 72:.0f}"
    title = str(Markup.escape(printable(description)))
    head, _, rest = text.partition(">")
    return Markup(f'{head} role="img" aria-label="{title}" style="max-width:{width}pt">{rest}')


def canvas(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure in our style with ``columns`` axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    return figure, list(axes)


def clean(text: str, longest: int = 48) -> str:
    """A label from a file of a stranger: no control characters, and not longer than the picture."""
    text = " ".join(printable(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


@styled
def dots(
    rows: Sequence[tuple[str, float, tuple[float, float] | None, Sequence[float], bool]], *, majority: float | None
) -> Markup:
    """Top-1 of every variant: dot, interval, a small ring per seed. Rows: label, top-1, interval, seeds, is a student."""
    figure, (axes,) = canvas(WIDE, 0.75 + 0.34 * len(rows))
    for y, (_, value, interval, seeds, student) in enumerate(rows):
        color = TEAL if student else MUTED
        if interval is not None:
            axes.plot([100 * end for end in interval], [y, y], color=color, linewidth=1.8, solid_capstyle="round")
        if len(seeds) > 1:
            axes.scatter(
                [100 * s for s in seeds], [y + 0.26] * len(seeds), s=9, facecolor="none", edgecolor=color, linewidth=0.8
            )
        axes.scatter([100 * value], [y], s=44, color=color, zorder=3, edgecolor=PAPER, linewidth=1)
    if majority is not None:
        axes.axvline(100 * majority, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "most frequent answer",
            (100 * majority, -0.62),
            (4, 0),
            textcoords="offset points",
            color=ORANGE,
            fontsize=8.5,
            va="center",
        )
    axes.set_yticks(range(len(rows)), [clean(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.95)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("top-1 (% of the test questions)")
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    return svg(figure, "dots", "Top-1 of every variant with its interval")


@styled
def sweep(points: Sequence[tuple[float, float, tuple[float, float] | None]], paper: Mapping[float, float]) -> Markup:
    """Figure 3: top-1 against λ, ours beside the points that the paper states."""
    figure, (left, right) = canvas(WIDE, 2.5, 2, width_ratios=[3, 1])
    x = np.arange(len(points))
    left.plot(x, [100 * p[1] for p in points], color=TEAL, marker="o", markersize=5)
    for i, (_, _, interval) in enumerate(points):
        if interval is not None:
            left.plot([i, i], [100 * end for end in interval], color=TEAL, linewidth=1.2, alpha=0.7)
    left.set_xticks(x, [f"{p[0]:g}" for p in points])
    left.set_title("here")
    right.plot(range(len(paper)), list(paper.values()), "D", color=ORANGE, markersize=5, markerfacecolor=PAPER)
    right.set_xticks(range(len(paper)), [f"{value:g}" for value in paper])
    right.set_xlim(-0.6, len(paper) - 0.4)
    right.set_title("paper (LVU relationship)")
    for axes in (left, right):
        axes.set_xlabel("λ, weight of the alignment")
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
    left.set_ylabel("top-1 (%)")
    return svg(figure, "sweep", "Top-1 against the weight of the alignment")


Curve = tuple[str, Sequence[Sequence[tuple[int, float]]]]  # label, one list of (step, value) per seed


@styled
def curves(parts: Sequence[tuple[str, Sequence[Curve]]], *, name: str = "curves") -> Markup:
    """Learning curves side by side: mean over the seeds, each seed thin behind it; smoothed over a twentieth."""
    figure, axes = canvas(WIDE, 2.75, len(parts))
    for ax, (title, lines) in zip(axes, parts, strict=True):
        for i, (label, seeds) in enumerate(lines):
            color = SERIES[i % len(SERIES)]
            for seed in seeds if len(seeds) > 1 else ():
                steps, values = zip(*seed, strict=True)
                ax.plot(steps, smooth(values), color=color, linewidth=0.6, alpha=0.35)
            steps, values = _mean(seeds)
            ax.plot(steps, smooth(values), color=color, label=clean(label, 30))
        ax.set_title(title)
        ax.set_xlabel("optimiser step")
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)))
    return svg(figure, name, "Learning curves")


def smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a twentieth of the run, so that the eye sees the course."""
    width = max(1, len(values) // 20)
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width)) for i in range(len(values))]


def _mean(seeds: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    at: dict[int, list[float]] = {}
    for seed in seeds:
        for step, value in seed:
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    return steps, [sum(at[s]) / len(at[s]) for s in steps]


@styled
def levels_over_time(
    cosine: Mapping[int, Sequence[tuple[int, float]]],
    weight: Mapping[int, Sequence[tuple[int, float]]],
    constant: float | None,
    alarm: int | None,
    *,
    name: str,
) -> Markup:
    """Raw cosine and weight of every level over training, with what a constant gets, and where the alarm rings."""
    figure, (left, right) = canvas(WIDE, 2.75, 2)
    shades = _shades(max(len(cosine), len(weight)))
    for ax, series in ((left, cosine), (right, weight)):
        for shade, (level, points) in zip(shades, series.items(), strict=False):
            steps, values = zip(*points, strict=True)
            ax.plot(steps, smooth(values), color=shade, label=f"level {level}")
        ax.set_xlabel("optimiser step")
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.set_title("Raw cosine (−L_kd)")
    right.set_title("Weight w")
    right.set_ylim(-0.03, 1.06)
    if constant is not None:
        left.axhline(constant, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
        x = left.get_xlim()[1]
        left.annotate(
            "best constant",
            (x, constant),
            (-2, -4),
            textcoords="offset points",
            color=ORANGE,
            fontsize=8.5,
            ha="right",
            va="top",
        )
    if alarm is not None:
        right.axvspan(alarm, right.get_xlim()[1], color=ALARM, alpha=0.07, linewidth=0)
        right.annotate(
            "all saturated", (alarm, 0.03), (4, 0), textcoords="offset points", color=ALARM, fontsize=8.5, va="bottom"
        )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(7, len(labels)), handlelength=1.2, columnspacing=1.2
    )
    return svg(figure, name, "Cosine and weight of every level over training")


def _shades(count: int) -> list[Any]:
    return [HEAT(0.35 + 0.65 * i / max(1, count - 1)) for i in range(count)]


@styled
def similarity(matrices: Sequence[tuple[str, Sequence[Sequence[float | None]]]], *, name: str) -> Markup:
    """Linear CKA of all levels with all, one square per variant. Undefined pairs are left white."""
    shown = matrices[:3]
    figure, axes = canvas(WIDE, 0.9 + WIDE / max(2, len(shown)) * 0.82, max(2, len(shown)))
    mesh = None
    for ax, (label, rows) in zip(axes, shown, strict=False):
        values = _masked(rows)
        mesh = ax.pcolormesh(values, cmap=HEAT, vmin=0, vmax=1, edgecolor=PAPER, linewidth=0.6)
        ticks = [i for i in range(len(rows)) if i % 3 == 0]
        ax.set_xticks([i + 0.5 for i in ticks], [str(i + 1) for i in ticks])
        ax.set_yticks([i + 0.5 for i in ticks], [str(i + 1) for i in ticks])
        ax.set_title(clean(label, 26))
        ax.set_xlabel("level")
        _frameless(ax)
    axes[0].set_ylabel("level")
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=axes[: len(shown)], shrink=0.8, pad=0.02, aspect=22)
        bar.set_label("linear CKA")
        bar.outline.set_visible(False)  # type: ignore[operator]
    return svg(figure, name, "Similarity of the levels' hidden states")


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
    width: float = WIDE,
    height: float | None = None,
) -> Markup:
    """A matrix over frames: one row per label."""
    figure, (ax,) = canvas(width, height or 0.85 + 0.27 * len(rows))
    values = _masked(rows)
    low, high = limits or (float(values.min()), float(values.max()))
    few = values.size <= 400
    mesh = ax.pcolormesh(
        values,
        cmap=HEAT,
        vmin=low,
        vmax=max(high, low + 1e-6),
        edgecolor=PAPER if few else "none",
        linewidth=0.6 if few else 0,
        rasterized=not few,
    )
    every = math.ceil(len(labels) / 14)
    ax.set_yticks([i + 0.5 for i in range(0, len(labels), every)], list(labels[::every]))
    ax.invert_yaxis()
    frames = values.shape[1]
    step = max(1, math.ceil(frames / 12))
    ax.set_xticks([i + 0.5 for i in range(0, frames, step)], [str(i + 1) for i in range(0, frames, step)])
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    _frameless(ax)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=16)
    bar.set_label(unit)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return svg(figure, name, f"{unit} by {ylabel} and {xlabel}")


def _masked(rows: Sequence[Sequence[float | None]]) -> Any:
    return np.ma.masked_invalid(np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float))


def _frameless(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)


@styled
def shares(lines: Sequence[tuple[str, Sequence[float]]], *, name: str) -> Markup:
    """Share of the last cross-attention per frame, one line per variant, with the even share."""
    figure, (ax,) = canvas(WIDE, 2.5)
    frames = max(len(values) for _, values in lines)
    for i, (label, values) in enumerate(lines):
        ax.plot(
            range(1, len(values) + 1),
            [100 * v for v in values],
            color=SERIES[i % len(SERIES)],
            marker="o",
            markersize=3.5,
            label=clean(label, 30),
        )
    ax.axhline(100 / frames, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate("even", (1, 100 / frames), (0, 3), textcoords="offset points", color=MUTED, fontsize=8.5, va="bottom")
    ax.set_xlabel("frame of the window")
    ax.set_ylabel("cross-attention (%)")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    if len(lines) > 1:
        figure.legend(loc="outside upper left", ncols=3)
    return svg(figure, name, "Share of the last cross-attention per frame")


@styled
def under_strip(
    cosine: Sequence[tuple[str, Sequence[float]]], attention: Sequence[tuple[str, Sequence[float]]], *, name: str
) -> Markup:
    """Below a frame strip, one column per frame: cosine with the teacher, and the share of the last attention."""
    parts = [
        (title, lines)
        for title, lines in (("Cosine with the teacher", cosine), ("Share of the last attention (%)", attention))
        if lines
    ]
    figure = Figure(figsize=(WIDE, 0.5 + 1.05 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (title, lines) in zip(axes, parts, strict=True):
        scale = 100 if "%" in title else 1
        for i, (label, values) in enumerate(lines):
            ax.plot(
                range(1, len(values) + 1),
                [scale * v for v in values],
                color=SERIES[i % len(SERIES)],
                marker="o",
                markersize=3,
                label=clean(label, 30),
            )
        ax.set_title(title, fontsize=9)
        ax.margins(y=0.2)
        ax.set_xlim(0.5, len(lines[0][1]) + 0.5)
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes[-1].set_xlabel("frame of the window")
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=3)
    return svg(figure, name, "Alignment and attention over the frames of this window")
