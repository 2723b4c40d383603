"""The options that commands share, and what their values mean. Options of one command stand in its signature."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import ConfigError, NotAvailable

if TYPE_CHECKING:
    from cache_schema.objects import StorePath
    from stages.config import PipelineConfig

Preset = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="miniature, lvu-TASK, msvd-qa-malmm or msvd-qa-literal.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be given many times.")
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", metavar="PATH", help="The feature store: a folder or s3://… [default: cache/…, by preset]"),
]
RunCache = Annotated[
    str | None,
    typer.Option("--cache", metavar="PATH", help="The feature store, where it has moved. [default: the run's]"),
]
Run = Annotated[Path, typer.Option("--run", metavar="DIR", help="The run folder.", show_default=True)]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="NAME", help="best, final, latest or step-N. [default: best, else final]"),
]
Split = Annotated[str, typer.Option("--split", metavar="NAME", help="The split to answer.")]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, the last line of stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and its size; do nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def config_of(preset: str, sets: Sequence[str] | None) -> PipelineConfig:
    """The configuration that ``--preset`` and ``--set`` name."""
    from pipeline import overrides, presets

    return overrides.apply(presets.get(preset), sets or [])


def place_of(cache: str | None, config: PipelineConfig) -> StorePath:
    """The store that ``--cache`` names."""
    from cache_schema.objects import locate
    from pipeline import presets

    return presets.default_cache(config) if cache is None else locate(cache)


def part_of(text: str) -> tuple[int, int]:
    """``--part 3/8`` as (3, 8). Raises ConfigError."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts:
        raise ConfigError(f"--part {text}: expected I/N with I from 1 to N, such as 3/8 for the third of eight jobs")
    return number, parts


def store_at(cache: str | None) -> StorePath | None:
    """The store that ``--cache`` names; None for the one that a run has recorded."""
    from cache_schema.objects import locate

    return None if cache is None else locate(cache)


def load_compose(*, dry_run: bool = False) -> Any:
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


def device_of(name: str, *, dry_run: bool = False) -> str:
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
