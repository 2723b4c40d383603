"""``ablate``, ``ablate-status``, ``tour``: many runs at once.

The work: pipeline/variants.py and pipeline/ablate.py, pipeline/ledger.py, pipeline/tour.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import results
from pipeline.commands import options
from pipeline.commands.options import config_of, device_of, load_compose, place_of
from pipeline.errors import FAILURES, guard
from pipeline.printing import parse_size, tell
from pipeline.progress import Progress

app = typer.Typer()


@app.command("ablate", epilog="Example:  pipeline ablate --study levels --seeds 0-4")
def ablate(
    preset: options.Preset = "miniature",
    sets: options.Set = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary", metavar="KEY=V,V,…", help="A setting and its values, such as train.lambda_kd=0,1,10; repeatable."
        ),
    ] = None,
    zipped: Annotated[bool, typer.Option("--zip", help="Pair the values one by one instead of all with all.")] = False,
    study: Annotated[
        str | None,
        typer.Option(
            "--study", metavar="NAME", help="The paper's: lambda (Fig. 3), levels (Fig. 4), weights (Table 4)."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0-4", help="Train every arm with each. [default: train.seed]")
    ] = None,
    cache: options.Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="One run folder a variant. [default: runs/PRESET-STUDY]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="For students and features. [default: what is free]")
    ] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train and score many variants on one pass over the cache; each is an ordinary run folder."""
    with guard(debug=debug, as_json=as_json):
        from pipeline.variants import make_variants

        config = config_of(preset, sets)
        variants, notes = make_variants(config, vary=vary or (), zipped=zipped, study=study, seeds=seeds)
        room = parse_size(memory) if memory else None
        place = place_of(cache, config)
        load_compose(dry_run=dry_run)
        from pipeline.ablate import ablate as run_ablation

        with Progress() as progress:
            result = run_ablation(
                variants,
                cache=place,
                out=out or Path("runs") / f"{config.preset}-{study or 'ablation'}",
                device=device_of(device, dry_run=dry_run),
                memory=room,
                dry_run=dry_run,
                progress=progress,
            )
        show = results.show_ablation_plan if dry_run else results.show_ablation
        tell(result | {"warnings": notes}, show, as_json=as_json)
        if not dry_run and result["dropped"]:
            raise typer.Exit(FAILURES)


@app.command("ablate-status", epilog="Example:  pipeline ablate-status runs/miniature-lambda")
def ablate_status(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="What ablate was given as --out.")],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The table of an ablation so far, while it runs or after."""
    with guard(debug=debug, as_json=as_json):
        from pipeline.ledger import Ledger

        tell(Ledger.open(out).result(), results.show_ablation, as_json=as_json)


@app.command("tour", epilog="Example:  pipeline tour --out runs/tour")
def tour(
    sets: options.Set = None,
    cache: options.Cache = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="One folder per task and arm.")] = Path("runs/tour"),
    processes: Annotated[
        int, typer.Option("--processes", min=0, metavar="N", help="Runs at a time, one thread each; 0 = one a core.")
    ] = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The miniature's study: a coarse and a fine task, with and without the diffusion teacher, beside the baselines."""
    with guard(debug=debug, as_json=as_json):
        place = place_of(cache, config_of("miniature", sets))
        load_compose()
        from pipeline.tour import processes_here
        from pipeline.tour import tour as run_tour

        with Progress() as progress:
            result = run_tour(
                sets or [], cache=place, out=out, processes=processes or processes_here(), progress=progress
            )
        tell(result, results.show_tour, as_json=as_json)
