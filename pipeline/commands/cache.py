"""``pipeline cache``: what is in a feature store, whether it is sound, and how to mend it.

The work: pipeline/cache_tools.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import cache_results
from pipeline.commands import options
from pipeline.commands.options import config_of, device_of, load_compose, place_of
from pipeline.errors import CACHE, FAILURES, guard, naming
from pipeline.printing import tell
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.cache_tools import Options

app = typer.Typer(
    name="cache",
    help="Look into feature stores, check them, and mend them.",
    epilog="Example:  pipeline cache verify --full",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

PresetOption = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Whose default store and encoders are meant.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting that the store was extracted with.")
]
HashOption = Annotated[bool, typer.Option("--hash", help="With --sources: read every video, whatever its time says.")]


@app.command("ls", epilog="Example:  pipeline cache ls cache")
def ls(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where stores are looked for: a folder or s3://….")
    ] = "cache",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the stores below a folder: modalities, videos, frames, size, digest of the settings."""
    with guard(debug=debug, as_json=as_json):
        from cache_schema.objects import locate
        from pipeline import cache_tools

        result = cache_tools.list_stores(locate(folder))
        tell(result, cache_results.show_ls, as_json=as_json)
        if any(part.get("error") for store in result["stores"] for part in (store, *store["modalities"])):
            raise typer.Exit(CACHE)


@app.command("verify", epilog="Example:  pipeline cache verify --full --semantic 8 --sources")
def verify(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: options.Cache = None,
    full: Annotated[bool, typer.Option("--full", help="Read every frame and check its checksum.")] = False,
    semantic: Annotated[
        int, typer.Option("--semantic", min=0, metavar="N", help="Make N frames again and compare.")
    ] = 0,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, metavar="X", help="Largest relative error of such a frame.")
    ] = 0.01,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Another seed takes other frames.")] = 0,
    sources: Annotated[
        bool, typer.Option("--sources", help="Compare the videos with those that were extracted (size, time).")
    ] = False,
    hashed: HashOption = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check a store: quickly by its index and footers, or deeper. Exit code 4 where something is wrong."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import cache_tools

        options = _options(preset, sets, cache)
        with Progress() as progress:
            result = cache_tools.check(
                options,
                full=full,
                semantic=semantic,
                tolerance=tolerance,
                seed=seed,
                sources=sources,
                hashed=hashed,
                device=_device(device),
                progress=progress,
            )
        tell(result, cache_results.show_verify, as_json=as_json)
        if result["problems"]:
            raise typer.Exit(CACHE)


@app.command("repair", epilog="Example:  pipeline cache repair --preset miniature --dry-run")
def repair(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: options.Cache = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the frames to find damage.")] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Make the features of videos again whose file was replaced.")
    ] = False,
    hashed: HashOption = False,
    device: options.Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which shards are damaged; do nothing.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Extract the damaged shards again, and nothing else. What cannot be mended stays as it is, with exit code 4."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import cache_tools

        options = _options(preset, sets, cache)
        with Progress() as progress, naming(options.cache):
            result = cache_tools.repair(
                options,
                quick=quick,
                sources=sources,
                hashed=hashed,
                dry_run=dry_run,
                device=_device(device),
                progress=progress,
            )
        tell(result, cache_results.show_repair, as_json=as_json)
        if result["left"] or (dry_run and result["damaged"]):
            raise typer.Exit(CACHE)


@app.command("gc", epilog="Example:  pipeline cache gc --dry-run")
def gc(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: options.Cache = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="NAME", help="A machine that is gone for good; repeatable.")
    ] = None,
    unplanned: Annotated[
        bool, typer.Option("--unplanned", help="Also remove files that are no part of the store.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; do nothing.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove the partial files that dead processes left."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import cache_tools

        result = cache_tools.collect_garbage(
            _options(preset, sets, cache), dead_hosts=set(host or ()), unplanned=unplanned, dry_run=dry_run
        )
        tell(result, cache_results.show_gc, as_json=as_json)


@app.command("inspect", epilog="Example:  pipeline cache inspect v000")
def inspect(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="The video's id.")],
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: options.Cache = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show one video in every modality: rows, status, source file, and what its features look like."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import cache_tools

        tell(cache_tools.inspect(_options(preset, sets, cache), video), cache_results.show_inspect, as_json=as_json)


@app.command("copy", epilog="Example:  pipeline cache copy s3://bucket/lvu cache/lvu")
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A feature store: a folder or s3://….")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A new place, or a copy that is not complete.")],
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Copy a store between folders and object stores. Every shard is verified; the same command resumes."""
    with guard(debug=debug, as_json=as_json):
        from cache_schema.objects import locate
        from pipeline import cache_tools

        with Progress() as progress:
            result = cache_tools.copy(locate(source), locate(target), dry_run=dry_run, progress=progress)
        tell(result, cache_results.show_copy, as_json=as_json)
        if result["damaged"]:
            raise typer.Exit(CACHE)


@app.command("export", epilog="Example:  pipeline cache export --out tars --modality pooled/layer8")
def export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: options.Cache = None,
    form: Annotated[
        str, typer.Option("--format", metavar="NAME", help="webdataset: tars of npz and json; or plain.")
    ] = "webdataset",
    plain: Annotated[
        bool, typer.Option("--plain", help="--format plain: a Zarr that needs no codec of ours, int8 as float16.")
    ] = False,
    modality: Annotated[
        list[str] | None, typer.Option("--modality", metavar="NAME", help="Only this one; repeatable. [default: all]")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the features in the format of another tool. Nothing is pickled."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import cache_tools

        form = "plain" if plain else form
        with naming(out):
            result = cache_tools.export(_options(preset, sets, cache), out, form=form, modalities=modality or [])
        tell(result, cache_results.show_export, as_json=as_json)
        if result["skipped"]:
            raise typer.Exit(FAILURES)


def _options(preset: str, sets: list[str] | None, cache: str | None) -> Options:
    from pipeline import cache_tools

    config = config_of(preset, sets)
    return cache_tools.Options(config, sets or [], place_of(cache, config))


def _device(name: str) -> Callable[[], str]:
    """Resolved only where an encoder is built: that loads torch."""

    def resolve() -> str:
        load_compose()
        return device_of(name)

    return resolve
