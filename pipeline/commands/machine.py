"""``synth``, ``doctor``: what a first start needs. The work: stages/miniature/world.py and pipeline/doctor.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import results
from pipeline.commands import options
from pipeline.errors import ENVIRONMENT, guard, naming
from pipeline.printing import tell
from pipeline.progress import Progress

app = typer.Typer()


@app.command("synth", epilog="Example:  pipeline synth --videos 60 --seed 1 --out cache/another-world")
def synth(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where videos and annotations go.")] = Path(
        "cache/miniature/world"  # where preset miniature looks
    ),
    videos: Annotated[int, typer.Option("--videos", min=6, metavar="N", help="How many, all splits together.")] = 48,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes that draw.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Another seed draws other videos.")] = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw the small labelled videos that the miniature preset runs on."""
    with guard(debug=debug, as_json=as_json):
        from stages.miniature.world import write_world

        with Progress() as progress, naming(out):
            world = write_world(out, videos=videos, seed=seed, workers=workers, progress=progress)
        result = {"folder": str(world.root), "videos": world.videos, "frames": world.frames, "written": world.written}
        tell(result, results.show_synth, as_json=as_json)


@app.command("doctor", epilog="Example:  pipeline doctor --store s3://bucket/features")
def doctor(
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="PATH", help="Also try what a cache needs of this folder or object store."),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check this machine, and a folder or an object store that is to hold a cache."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import doctor as room

        result = room.examine(store)
        tell(result, results.show_doctor, as_json=as_json)
        if complaint := room.complaint(result):
            print(f"error: {complaint}", file=sys.stderr)
            raise typer.Exit(ENVIRONMENT)
