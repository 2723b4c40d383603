"""``diagnose``, ``report``, ``compare``: what finished runs say.

The work: pipeline/diagnose.py, pipeline/report/, pipeline/scoring.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import results
from pipeline.commands import options
from pipeline.commands.options import device_of, load_compose, store_at
from pipeline.errors import FAILURES, guard
from pipeline.printing import tell
from pipeline.progress import Progress

app = typer.Typer()


@app.command("diagnose", epilog="Example:  pipeline diagnose --run runs/slower --samples 128")
def diagnose(
    run: options.Run = Path("runs/miniature"),
    cache: options.RunCache = None,
    split: options.Split = "test",
    samples: Annotated[
        int, typer.Option("--samples", min=4, metavar="N", help="Evenly spaced samples that are looked at.")
    ] = 64,
    checkpoint: options.Checkpoint = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Look into a finished student: alignment per level and frame, memory banks, attention, operations."""
    with guard(debug=debug, as_json=as_json):
        load_compose()
        from pipeline.diagnose import diagnose as look

        with Progress() as progress:
            result = look(
                run,
                cache=store_at(cache),
                split=split,
                samples=samples,
                checkpoint=checkpoint or "",
                device=device_of(device),
                progress=progress,
            )
        tell(result, results.show_diagnosis, as_json=as_json)


@app.command("report", epilog="Example:  pipeline report runs/ablation --out ablation.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of run folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page. [default: report.html in the first RUN]")
    ] = None,
    videos: Annotated[
        int, typer.Option("--videos", min=0, metavar="N", help="Questions shown one by one, with their frames.")
    ] = 6,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Put runs on one page: the answer, published figures of the same kind, the diagnostics, questions, the cost.

    What cannot be read is left out, named on the page and on stderr, and ends the command with exit code 3.
    """
    with guard(debug=debug, as_json=as_json):
        load_compose()
        from pipeline.report.build import report as build

        with Progress() as progress:
            result = build(runs, out=out, shown=videos, progress=progress)
        tell(result, results.show_report, as_json=as_json)
        if result["left_out"]:
            raise typer.Exit(FAILURES)


@app.command("compare", epilog="Example:  pipeline compare runs/lambda-0 runs/lambda-1")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of baselines.")],
    split: options.Split = "test",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Test any two runs against each other, paired by sample and clustered by video.

    Runs that differ in their seed only are one variant: their answers are averaged per sample first.
    """
    with guard(debug=debug, as_json=as_json):
        from pipeline.scoring import compare as compare_runs

        tell(compare_runs(runs, split=split), results.show_comparison, as_json=as_json)
