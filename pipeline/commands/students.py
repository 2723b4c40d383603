"""``train-student``, ``evaluate``, ``baselines``. The work: pipeline/compose.py and pipeline/baselines.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline import results
from pipeline.commands import options
from pipeline.commands.options import config_of, device_of, load_compose, place_of, store_at
from pipeline.errors import FAILURES, guard
from pipeline.printing import tell
from pipeline.progress import Progress

app = typer.Typer()


@app.command("train-student", epilog="Example:  pipeline train-student --set train.lr=3e-4 --out runs/slower")
def train_student(
    preset: options.Preset = "miniature",
    sets: options.Set = None,
    cache: options.Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder. [default: runs/PRESET]")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory to stay within, such as 20GB; chooses the micro-batch."),
    ] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train the memory-bank student against the cache."""
    with guard(debug=debug, as_json=as_json):
        room = [] if memory is None else [f"train.memory={memory}", "train.micro_batch=0"]
        config = config_of(preset, [*(sets or []), *room])
        place = place_of(cache, config)
        compose = load_compose(dry_run=dry_run)
        with Progress() as progress:
            result = compose.train(
                config,
                cache=place,
                out=out or Path("runs") / config.preset,
                device=device_of(device, dry_run=dry_run),
                dry_run=dry_run,
                progress=progress,
            )
        show = partial(results.show_estimate, "train-student") if dry_run else results.show_training
        tell(result, show, as_json=as_json)


@app.command("evaluate", epilog="Example:  pipeline evaluate --run runs/slower --split val --checkpoint best")
def evaluate(
    run: options.Run = Path("runs/miniature"),
    sets: options.Set = None,
    cache: options.RunCache = None,
    split: options.Split = "test",
    checkpoint: options.Checkpoint = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer the questions of a split and score the answers.

    Answers given with other settings or another checkpoint are kept in a file of their own.
    """
    with guard(debug=debug, as_json=as_json):
        from pipeline.runs import RunFolder

        RunFolder.open(run)  # a wrong folder is said before anything is loaded
        compose = load_compose(dry_run=dry_run)
        with Progress() as progress:
            result = compose.evaluate(
                run,
                cache=store_at(cache),
                sets=sets or [],
                split=split,
                checkpoint=checkpoint,
                device=device_of(device, dry_run=dry_run),
                dry_run=dry_run,
                progress=progress,
            )
        show = partial(results.show_estimate, "evaluate") if dry_run else results.show_evaluation
        tell(result, show, as_json=as_json)


@app.command("baselines", epilog="Example:  pipeline baselines --probe clip_mean --probe teacher_mean")
def baselines(
    preset: options.Preset = "miniature",
    sets: options.Set = None,
    cache: options.Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where they are kept. [default: runs/PRESET-baselines]")
    ] = None,
    split: options.Split = "test",
    probe: Annotated[
        list[str] | None, typer.Option("--probe", metavar="NAME", help="Only this one; repeatable. [default: all]")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Majority class and probes on the cached features: what a student has to beat. Runs on the CPU."""
    with guard(debug=debug, as_json=as_json):
        config = config_of(preset, sets)
        place = place_of(cache, config)
        load_compose(dry_run=dry_run)
        from pipeline.baselines import baselines as run_baselines

        with Progress() as progress:
            result = run_baselines(
                config,
                cache=place,
                out=out or Path("runs") / f"{config.preset}-baselines",
                split=split,
                names=probe or [],
                dry_run=dry_run,
                progress=progress,
            )
        show = partial(results.show_estimate, "baselines") if dry_run else results.show_baselines
        tell(result, show, as_json=as_json)
        if not result["baselines"]:
            raise typer.Exit(FAILURES)
