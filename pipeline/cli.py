"""The commands: parse, call, print. Nothing heavy is imported before a command runs.

Every command resumes: what an earlier start finished is not done again. Exit codes are those of ``pipeline.errors``.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline import cache_commands
from pipeline.errors import ENVIRONMENT, FAILURES, ConfigError, NotAvailable, guard

if TYPE_CHECKING:
    from cache_schema.objects import StorePath
    from stages.config import PipelineConfig

app = typer.Typer(
    name="pipeline",
    help=(
        "Diff-LMM as a feature-caching pipeline: extract frozen features once, train the student against them, "
        "evaluate it through a frozen language model.\n\n"
        "Every command resumes, and says so. Exit codes: 0 done, 2 usage or config, 3 finished with failures, 4 cache "
        "missing or stale, 5 environment, 75 interrupted (the same command resumes), 130 Ctrl-C."
    ),
    epilog="Example:  pipeline extract --preset miniature",
    rich_markup_mode=None,  # plain text: quicker, and the same on every terminal
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.add_typer(cache_commands.app)

PresetOption = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="miniature, lvu-TASK, msvd-qa-malmm or msvd-qa-literal.")
]
RunPresetOption = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Instead of the configuration that the run was trained with.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be given many times.")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", metavar="PATH", help="The feature store: a folder or s3://… [default: cache/…, by preset]"),
]
LocalOption = Annotated[
    Path | None, typer.Option("--cache-local", metavar="DIR", help="Keep shards of an s3:// store here as well.")
]
BudgetOption = Annotated[
    str, typer.Option("--cache-local-budget", metavar="SIZE", help="At most so much of them, such as 800MB or 2TB.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Memory to stay within, such as 20GB; chooses the micro-batch."),
]
RunOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder. [default: runs/PRESET]")]
EvaluatedRunOption = Annotated[
    Path | None, typer.Option("--run", "--out", metavar="DIR", help="The run folder. [default: runs/PRESET]")
]
ReportOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Also keep the result as DIR/COMMAND.json.")
]
BaselinesOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where they are kept. [default: runs/PRESET-baselines]")
]
ProbeOption = Annotated[
    list[str] | None, typer.Option("--probe", metavar="NAME", help="Only this one; repeatable. [default: all]")
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")
]
SplitsOption = Annotated[
    list[str] | None, typer.Option("--split", metavar="NAME", help="Only this split; repeatable. [default: all]")
]
SplitOption = Annotated[str, typer.Option("--split", metavar="NAME", help="The split to answer.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="NAME", help="best, final, latest or step-N. [default: best, else final]"),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, metavar="N", help="Dask worker processes; 0 works in this process.")
]
StoredOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="Store tokens as float16, float32 or int8 (half of it): clip.dtype."),
]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Try videos again that failed before.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, the last line of stdout.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and its size; do nothing.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(value: bool) -> None:
    if value:
        print(importlib.metadata.version("diff-lmm"))
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    assert not version


@app.command(
    epilog="Example:  pipeline extract --preset lvu-relationship --workers 2",
)
def extract(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    out: ReportOption = None,
    split: SplitsOption = None,
    dtype: StoredOption = None,
    workers: WorkersOption = 0,
    retry_failed: RetryOption = False,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put the features of both frozen networks into the cache; every frame is decoded once."""
    with guard(debug=debug, as_json=as_json):
        config = _config(preset, _stored_as(sets, dtype))
        place = place_of(cache, config, cache_local, cache_local_budget)
        _extract("both", config, place, out, split or [], workers, retry_failed, device, dry_run, as_json)


@app.command(
    "extract-clip",
    epilog="Example:  pipeline extract-clip --preset lvu-relationship --workers 2",
)
def extract_clip(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    out: ReportOption = None,
    split: SplitsOption = None,
    dtype: StoredOption = None,
    workers: WorkersOption = 0,
    retry_failed: RetryOption = False,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put the patch tokens of the frozen image encoder into the cache."""
    with guard(debug=debug, as_json=as_json):
        config = _config(preset, _stored_as(sets, dtype))
        place = place_of(cache, config, cache_local, cache_local_budget)
        _extract("clip", config, place, out, split or [], workers, retry_failed, device, dry_run, as_json)


@app.command(
    "extract-teacher",
    epilog="Example:  pipeline extract-teacher --preset miniature --set teacher.layer=4",
)
def extract_teacher(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    out: ReportOption = None,
    split: SplitsOption = None,
    workers: WorkersOption = 0,
    retry_failed: RetryOption = False,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put the pooled targets of the diffusion teacher into the cache."""
    with guard(debug=debug, as_json=as_json):
        config = _config(preset, sets)
        place = place_of(cache, config, cache_local, cache_local_budget)
        _extract("teacher", config, place, out, split or [], workers, retry_failed, device, dry_run, as_json)


@app.command(
    "train-student",
    epilog="Example:  pipeline train-student --set train.lr=3e-4 --out runs/slower",
)
def train_student(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    out: RunOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the memory-bank student against the cache."""
    with guard(debug=debug, as_json=as_json):
        room = [] if memory is None else [f"train.memory={memory}", "train.micro_batch=0"]
        config = _config(preset, [*(sets or []), *room])
        place = place_of(cache, config, cache_local, cache_local_budget)
        compose = _compose(dry_run)
        from pipeline.progress import Progress

        with Progress() as progress:
            result = compose.train(
                config,
                cache=place,
                out=out or Path("runs") / config.preset,
                device=_device(device, dry_run),
                dry_run=dry_run,
                progress=progress,
            )
        _show("train-student", result, dry_run, as_json)


@app.command(
    epilog="Example:  pipeline evaluate --run runs/slower --split val --checkpoint best",
)
def evaluate(
    preset: RunPresetOption = "",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    run: EvaluatedRunOption = None,
    split: SplitOption = "test",
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer the questions of a split and score the answers."""
    with guard(debug=debug, as_json=as_json):
        run = run or Path("runs") / (preset or "miniature")
        config, changed = _run_config(run, preset, sets)
        place = place_of(cache, config, cache_local, cache_local_budget)
        compose = _compose(dry_run)
        from pipeline.progress import Progress

        with Progress() as progress:
            result = compose.evaluate(
                config if changed else None,
                cache=place,
                out=run,
                split=split,
                checkpoint=checkpoint,
                device=_device(device, dry_run),
                dry_run=dry_run,
                progress=progress,
            )
        _show("evaluate", result, dry_run, as_json)


@app.command(epilog="Example:  pipeline baselines --probe clip_mean --probe teacher_mean")
def baselines(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
    cache: CacheOption = None,
    cache_local: LocalOption = None,
    cache_local_budget: BudgetOption = "50GB",
    out: BaselinesOption = None,
    split: SplitOption = "test",
    probe: ProbeOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Majority class and probes on the cached features: what a student has to beat. Runs on the CPU."""
    with guard(debug=debug, as_json=as_json):
        config = _config(preset, sets)
        place = place_of(cache, config, cache_local, cache_local_budget)
        _compose(dry_run)
        from pipeline.baselines import baselines as run_baselines
        from pipeline.progress import Progress

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
        _show("baselines", result, dry_run, as_json)


@app.command(epilog="Example:  pipeline ablate --study levels --seeds 0-4")
def ablate(
    preset: PresetOption = "miniature",
    sets: SetOption = None,
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
    cache: CacheOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="One run folder a variant. [default: runs/PRESET-STUDY]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="For students and features. [default: what is free]")
    ] = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train and score many variants on one pass over the cache; each is an ordinary run folder."""
    with guard(debug=debug, as_json=as_json):
        from pipeline.variants import make_variants, parse_memory

        config = _config(preset, sets)
        variants, notes = make_variants(config, vary=vary or (), zipped=zipped, study=study, seeds=seeds)
        room = parse_memory(memory) if memory else None
        place = place_of(cache, config)
        _compose(dry_run)
        from pipeline.ablate import ablate as run_ablation
        from pipeline.progress import Progress

        with Progress() as progress:
            result = run_ablation(
                variants,
                cache=place,
                out=out or Path("runs") / f"{config.preset}-{study or 'ablation'}",
                device=_device(device, dry_run),
                memory=room,
                dry_run=dry_run,
                progress=progress,
            )
        _show("ablate", result | {"warnings": notes}, dry_run, as_json)
        if not dry_run and result["dropped"]:
            raise typer.Exit(FAILURES)


@app.command("ablate-status", epilog="Example:  pipeline ablate-status runs/miniature-lambda")
def ablate_status(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="What ablate was given as --out.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The table of an ablation so far, while it runs or after."""
    with guard(debug=debug, as_json=as_json):
        from pipeline.ledger import Ledger

        _show("ablate-status", Ledger.open(out).result(), False, as_json)


@app.command(epilog="Example:  pipeline tour --out runs/tour")
def tour(
    sets: SetOption = None,
    cache: CacheOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="One folder per task and arm.")] = Path("runs/tour"),
    processes: Annotated[
        int, typer.Option("--processes", min=0, metavar="N", help="Runs at a time, one thread each; 0 = one a core.")
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The miniature's study: a coarse and a fine task, with and without the diffusion teacher, beside the baselines."""
    with guard(debug=debug, as_json=as_json):
        config = _config("miniature", sets)
        place = place_of(cache, config)
        _compose(dry_run=False)
        from pipeline.progress import Progress
        from pipeline.tour import processes_here
        from pipeline.tour import tour as run_tour

        with Progress() as progress:
            result = run_tour(config, cache=place, out=out, processes=processes or processes_here(), progress=progress)
        _show("tour", result, False, as_json)


@app.command(epilog="Example:  pipeline diagnose --run runs/slower --samples 128")
def diagnose(
    cache: CacheOption = None,
    run: EvaluatedRunOption = None,
    split: SplitOption = "test",
    samples: Annotated[
        int, typer.Option("--samples", min=4, metavar="N", help="Evenly spaced samples that are looked at.")
    ] = 64,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Look into a finished student: alignment per level and frame, memory banks, attention, operations."""
    with guard(debug=debug, as_json=as_json):
        run = run or Path("runs") / "miniature"
        config, _ = _run_config(run, "", None)
        place = place_of(cache, config)
        _compose(dry_run=False)
        from pipeline.diagnose import diagnose as look
        from pipeline.progress import Progress

        with Progress() as progress:
            result = look(
                run,
                cache=place,
                split=split,
                samples=samples,
                checkpoint=checkpoint or "",
                device=_device(device, False),
                progress=progress,
            )
        _show("diagnose", result, False, as_json)


@app.command(epilog="Example:  pipeline report runs/ablation --out ablation.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of run folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page. [default: report.html in the first RUN]")
    ] = None,
    videos: Annotated[
        int, typer.Option("--videos", min=0, metavar="N", help="Questions shown one by one, with their frames.")
    ] = 6,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put runs on one page: the answer, the paper's tables beside ours, the diagnostics, single questions, the cost."""
    with guard(debug=debug, as_json=as_json):
        _compose(dry_run=False)
        from pipeline.progress import Progress
        from pipeline.report.build import report as build

        with Progress() as progress:
            result = build(runs, out=out, shown=videos, progress=progress)
        _show("report", result, False, as_json)


@app.command(epilog="Example:  pipeline compare runs/lambda-0 runs/lambda-1")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of baselines.")],
    split: SplitOption = "test",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Test any two runs against each other, paired by sample and clustered by video.

    Runs that differ in their seed only are one variant: their answers are averaged per sample first.
    """
    with guard(debug=debug, as_json=as_json):
        from pipeline.scoring import compare as compare_runs

        _show("compare", compare_runs(runs, split=split), False, as_json)


@app.command(epilog="Example:  pipeline synth --videos 60 --seed 1 --out cache/another-world")
def synth(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where videos and annotations go.")] = Path(
        "cache/miniature/world"  # where preset miniature looks
    ),
    videos: Annotated[int, typer.Option("--videos", min=6, metavar="N", help="How many, all splits together.")] = 48,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes that draw.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Another seed draws other videos.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw the small labelled videos that the miniature preset runs on."""
    with guard(debug=debug, as_json=as_json):
        from stages.miniature.world import write_world

        world = write_world(out, videos=videos, seed=seed, workers=workers)
        result = {"folder": str(world.root), "videos": world.videos, "frames": world.frames, "written": world.written}
        _show("synth", result, False, as_json)


@app.command(epilog="Example:  pipeline doctor --store s3://bucket/features")
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Also try what a cache needs of this object store.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what this machine, and an object store, have and lack."""
    with guard(debug=debug, as_json=as_json):
        from pipeline import doctor as room

        result = room.examine(store)
        _show("doctor", result, False, as_json)
        if complaint := room.complaint(result):
            print(f"error: {complaint}", file=sys.stderr)
            raise typer.Exit(ENVIRONMENT)


def _config(preset: str, sets: Sequence[str] | None) -> PipelineConfig:
    from pipeline import overrides, presets

    return overrides.apply(presets.get(preset), sets or [])


def _stored_as(sets: Sequence[str] | None, dtype: str | None) -> list[str]:
    return [*(sets or []), *([] if dtype is None else [f"clip.dtype={dtype}"])]


def _run_config(run: Path, preset: str, sets: Sequence[str] | None) -> tuple[PipelineConfig, bool]:
    """The configuration of an evaluation, and whether it is another than the run's own."""
    from pipeline import overrides, presets
    from pipeline.runs import RunFolder

    base = presets.get(preset) if preset else RunFolder.open(run).config
    return overrides.apply(base, sets or []), bool(preset or sets)


def place_of(cache: str | None, config: PipelineConfig, local: Path | None = None, budget: str = "50GB") -> StorePath:
    """The store that ``--cache`` names, with its copies on a local disk."""
    from cache_schema.objects import LocalCopies, ObjectPath, locate
    from pipeline import presets
    from pipeline.results import parse_size

    copies = LocalCopies(local, parse_size(budget)) if local is not None else None
    store = presets.default_cache(config) if cache is None else locate(cache, copies)
    if copies and not isinstance(store, ObjectPath):
        raise ConfigError(f"--cache-local keeps copies of a store that is elsewhere, but {store} is a folder here")
    return store


def _compose(dry_run: bool) -> Any:
    """The stages, put together; loading them takes seconds."""
    # torch's idle threads otherwise spin: on a machine that also does other work, small models run 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers of ours would make it warn
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if sys.stderr.isatty() and not dry_run:
        print("loading …", file=sys.stderr)
    from pipeline import compose

    return compose


def _device(name: str, dry_run: bool) -> str:
    """``auto`` resolved, and CUDA checked before anything is loaded onto it."""
    if dry_run or name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise NotAvailable(
            f"--device {name}: torch {torch.__version__} finds no CUDA device here.\nRun on:  --device cpu"
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise NotAvailable(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return name


def _extract(
    which: Literal["clip", "teacher", "both"],
    config: PipelineConfig,
    cache: StorePath,
    out: Path | None,
    splits: list[str],
    workers: int,
    retry_failed: bool,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    command = "extract" if which == "both" else f"extract-{which}"
    compose = _compose(dry_run)
    from pipeline.progress import Progress

    with Progress() as progress:
        result = compose.extract(
            config,
            which=which,
            cache=cache,
            workers=workers,
            retry_failed=retry_failed,
            splits=splits,
            device=_device(device, dry_run),
            dry_run=dry_run,
            progress=progress,
        )
    if out is not None and not dry_run:
        from pipeline.results import as_json as to_json

        out.mkdir(parents=True, exist_ok=True)
        (out / f"{command}.json").write_text(to_json(result) + "\n")
    _show(command, result, dry_run, as_json)
    if not dry_run and result["failed"]:
        raise typer.Exit(FAILURES)


def _show(command: str, result: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    from pipeline import results
    from pipeline.progress import printable

    for warning in result.get("warnings", ()):
        print(f"note: {printable(str(warning))}", file=sys.stderr)
    if as_json:
        print(results.as_json(result))
    elif dry_run and command == "ablate":
        results.show_ablation_plan(result)
    elif dry_run:
        results.show_estimate(command, result)
    elif command.startswith("extract"):
        results.show_extraction(result)
    else:
        {
            "train-student": results.show_training,
            "evaluate": results.show_evaluation,
            "baselines": results.show_baselines,
            "ablate": results.show_ablation,
            "ablate-status": results.show_ablation,
            "tour": results.show_tour,
            "diagnose": results.show_diagnosis,
            "report": results.show_report,
            "compare": results.show_comparison,
            "synth": results.show_synth,
            "doctor": results.show_doctor,
        }[command](result)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    app(arguments)


if __name__ == "__main__":
    main()
