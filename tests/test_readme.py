"""The README is held to the code: its tree, its commands, its presets, its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from pipeline import presets
from pipeline.cli import app
from pipeline.overrides import apply

PROJECT = Path(__file__).resolve().parent.parent
TEXT = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition("#")[0].strip() for b in BLOCKS for line in b.splitlines() if line.startswith("pipeline ")]


def tree_paths() -> list[str]:
    block = next(b for b in BLOCKS if b.startswith("pyproject.toml"))
    paths, room = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            room = name
        paths.append(room + name if line.startswith(" ") else name)
    return paths


@pytest.mark.parametrize("path", tree_paths())
def test_what_the_tree_shows_is_there(path: str) -> None:
    assert (PROJECT / path).exists()
    assert (PROJECT / path).is_dir() == path.endswith("/")


def test_the_tree_shows_every_room() -> None:
    rooms = {p.name + "/" for p in (PROJECT / "stages").iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert {f"stages/{room}" for room in rooms} <= set(tree_paths())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_names_real_settings(command: str) -> None:
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with group.make_context("pipeline", list(words)) as context:
        name, subcommand, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        with subcommand.make_context(name, rest, parent=context) as parsed:
            preset = parsed.params.get("preset") or "miniature"
            assert apply(presets.get(preset), parsed.params.get("sets") or []).preset == preset


def test_every_preset_named_exists_and_every_preset_is_named() -> None:
    named = set(re.findall(r"`((?:lvu|msvd-qa)-[a-z-]+)`", TEXT))
    assert named == set(presets.PRESETS) - {"miniature"}


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_links_lead_somewhere(target: str) -> None:
    assert (PROJECT / target).exists()
