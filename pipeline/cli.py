"""The console script: every command, in the order of ``--help``.

A command is in the module of its group below (pipeline/commands/__init__.py lists them by name). Every command resumes:
what an earlier start finished is not done again. Exit codes are those of ``pipeline.errors``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline.commands import cache, features, findings, machine, students, studies
from pipeline.errors import outliving_readers

app = typer.Typer(
    name="pipeline",
    help=(
        "Diff-LMM as a feature-caching pipeline: extract frozen features once, train the student against them, "
        "evaluate it through a frozen language model.\n\n"
        "Every command resumes, and says so. Exit codes: 0 done, 1 a defect of this program, 2 usage or config, "
        "3 finished with failures, 4 cache missing or stale, 5 environment, 75 interrupted, disk full or folder in use "
        "(the same command resumes), 130 Ctrl-C."
    ),
    epilog="Example:  pipeline synth && pipeline extract --preset miniature",
    rich_markup_mode=None,  # plain text: quicker, and the same on every terminal
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for group in (features, students, studies, findings, machine):
    app.add_typer(group.app)
app.add_typer(cache.app, name="cache")


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    with outliving_readers():
        app(arguments)


if __name__ == "__main__":
    main()
