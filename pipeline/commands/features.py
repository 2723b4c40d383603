"""``extract``, ``extract-clip``, ``extract-teacher``: frozen features into the cache. The work: pipeline/compose.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline import results
from pipeline.commands import options
from pipeline.commands.options import config_of, device_of, load_compose, part_of, place_of
from pipeline.errors import CACHE, FAILURES, guard, naming
from pipeline.locks import replace_text
from pipeline.printing import tell, to_json
from pipeline.progress import Progress

app = typer.Typer()

WHICH: dict[str, Literal["both", "clip", "teacher"]] = {
    "extract": "both",
    "extract-clip": "clip",
    "extract-teacher": "teacher",
}
DTYPE = {"extract": "clip.dtype", "extract-clip": "clip.dtype", "extract-teacher": "teacher.dtype"}  # --dtype


def extract(
    context: typer.Context,
    preset: options.Preset = "miniature",
    sets: options.Set = None,
    cache: options.Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also keep the result as DIR/COMMAND.json.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", metavar="NAME", help="Only this split; repeatable. [default: all]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="Store float16, float32 or (tokens) int8. [default: by preset]"),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, metavar="N", help="Dask worker processes; 0 works in this process.")
    ] = 0,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Only the I-th of N equal parts, for the jobs of an array.")
    ] = "1/1",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try videos again that failed before.")] = False,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """All three commands; their names say which features."""
    with guard(debug=debug, as_json=as_json):
        command = context.info_name or ""
        share = part_of(part)
        stored = [] if dtype is None else [f"{DTYPE[command]}={dtype}"]
        config = config_of(preset, [*(sets or []), *stored])
        place = place_of(cache, config)
        compose = load_compose(dry_run=dry_run)
        with Progress() as progress, naming(place):
            result = compose.extract(
                config,
                which=WHICH[command],
                cache=place,
                workers=workers,
                retry_failed=retry_failed,
                part=share,
                splits=split or [],
                device=device_of(device, dry_run=dry_run),
                dry_run=dry_run,
                progress=progress,
            )
        if out is not None and not dry_run:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / f"{command}.json", to_json(result) + "\n")
        show = partial(results.show_estimate, command) if dry_run else results.show_extraction
        tell(result, show, as_json=as_json)
        if not dry_run and result["changed"]:
            raise typer.Exit(CACHE)
        if not dry_run and (result["failed"] or result["left_out"]):
            raise typer.Exit(FAILURES)


app.command(
    "extract",
    help="Put the features of both frozen networks into the cache; every frame is decoded once.",
    epilog="Example:  pipeline extract --preset lvu-relationship --workers 2",
)(extract)
app.command(
    "extract-clip",
    help="Put the patch tokens of the frozen image encoder into the cache.",
    epilog="Example:  pipeline extract-clip --preset lvu-relationship --workers 2",
)(extract)
app.command(
    "extract-teacher",
    help="Put the pooled targets of the diffusion teacher into the cache.",
    epilog="Example:  pipeline extract-teacher --preset miniature --set teacher.layer=4",
)(extract)
