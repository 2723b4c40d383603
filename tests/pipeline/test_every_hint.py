"""What a refusal says to type next is typed, and does not end in the same refusal.

One row of REFUSALS is one refusal: what was typed, and a part of what is said. Words that stand for the user's own
(``DIR``, ``FILE``) are replaced by something real. Commands that take long are typed with ``--dry-run``, which refuses
what they refuse. To add a refusal is to add a row.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests.conftest import PROJECT
from tests.pipeline.conftest import options_of

ROOMS = ("pipeline", "cache_schema", "stages")
DRY = ("extract", "extract-clip", "extract-teacher", "train-student", "evaluate", "baselines", "ablate")


@dataclass(frozen=True)
class Refusal:
    """``typed`` may name {cache} and {seeded} (the settings of the small world); ``told`` is in the message."""

    typed: str
    told: str
    exit_code: int = 2


TRAIN = "train-student {seeded} --cache {cache} --device cpu"
EXTRACT = "extract {seeded} --device cpu"
REFUSALS = {
    "other fps": Refusal(f"{TRAIN} --set data.fps=4", "frame_rule", exit_code=4),
    "other fps, dry": Refusal(f"{TRAIN} --set data.fps=4 --dry-run", "frame_rule", exit_code=4),
    "other fps, extract, dry": Refusal(f"{EXTRACT} --cache {{cache}} --set data.fps=4 --dry-run", "frame", exit_code=4),
    "other fps, extract": Refusal("extract-clip {seeded} --cache {cache} --set data.fps=4", "frame", exit_code=4),
    "other teacher": Refusal(f"{TRAIN} --set teacher.timestep=5", "timestep: 0 there, 5 here", exit_code=4),
    "other layer": Refusal(f"{TRAIN} --set teacher.layer=3", "holds no", exit_code=4),
    "other geometry": Refusal(
        f"{TRAIN} --set clip.geometry=shortest_center --set teacher.geometry=shortest_center", "resize", exit_code=4
    ),
    "one geometry": Refusal(f"{TRAIN} --set teacher.geometry=shortest_center", "teacher.geometry: shortest_center"),
    "no cache": Refusal("train-student {seeded} --cache nowhere", "nowhere", exit_code=4),
    "frames": Refusal(f"{TRAIN} --set data.num_frames=5000", "data.num_frames: 5000 is above"),
    "micro-batch": Refusal(f"{TRAIN} --set train.micro_batch=99", "train.micro_batch: 99 is above"),
    "beams": Refusal(f"{TRAIN} --set decode.num_return=99", "decode.num_return: 99 is above"),
    "levels": Refusal(f"{TRAIN} --set align.levels=9", "align.levels: 9 is above"),
    "task": Refusal(f"{TRAIN} --set data.task=spots", "no video has a label for task 'spots'"),
    "annotations": Refusal(f"{TRAIN} --set data.annotations=nowhere.json", "nowhere.json does not exist"),
    "no annotations": Refusal(f"{TRAIN} --set data.annotations=", "nothing to learn or score"),
    "videos": Refusal(f"{EXTRACT} --cache C --set data.annotations= --set data.videos=nowhere", "cannot be listed"),
    "not drawn": Refusal("extract --cache C --dry-run", "not drawn yet"),
    "dataset": Refusal(f"{TRAIN} --set data.name=msvd_qa", "this dataset does not read"),
    "equals": Refusal("train-student --set train.lr", "expected key=value"),
    "preset": Refusal("train-student --preset miniture --dry-run", "no preset is called 'miniture'"),
    "no run": Refusal("evaluate --run nowhere", "holds no run"),
    "nothing to report": Refusal("report nowhere", "is not a directory"),
    "no ablation": Refusal("ablate-status nowhere", "holds no ablation"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command finds nothing that it was not told about."""
    monkeypatch.chdir(tmp_path)


def run(words: list[str]) -> Result:
    return CliRunner().invoke(app, words)


def hints(message: str) -> list[list[str]]:
    """What the lines of a message offer, two spaces before it."""
    offered = []
    for line in message.splitlines():
        match = re.search(r"(?:^  +|:  +)((?:pipeline |--)\S.*)$|with (--set \S+)$", line)
        if match:
            offered.append(shlex.split(match[1] or match[2]))
    return offered


def typed(words: list[str], hint: list[str], seeded: list[str], world: Path) -> list[str]:
    """What somebody types who follows the hint: the command, or the same command with these options."""
    real = {"DIR": f"{world}/videos", "FILE_OR_FOLDER": f"{world}/lvu", "PATH": f"{world}/lvu", "FILE": f"{world}/lvu"}
    hint = [re.sub(r"(?<==)[A-Z_]{3,}$", lambda match: real[match[0]], word) for word in hint]
    if hint[0] != "pipeline":
        bare = hint[1].partition("=")[0]  # an option that was refused for want of a value goes
        at = words.index(bare) if bare in words else len(words)
        return [*words[: at - 1], *words[at + 1 :], *hint] if at < len(words) else words + hint
    command = hint[1:]
    if command[0] == "synth":
        command += ["--videos", "6"]  # quicker
    if command[0] in ("train-student", "ablate") and "--set" not in command:
        command += options_of(seeded)
    return command


def dry(command: list[str]) -> list[str]:
    return [*command, "--dry-run"] if command[0] in DRY and "--dry-run" not in command else command


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_refusal_offers_does_not_end_in_the_same_refusal(
    name: str, seeded: list[str], seeded_cache: Path, world: Path
) -> None:
    row = REFUSALS[name]
    words = shlex.split(row.typed.format(seeded=shlex.join(options_of(seeded)), cache=seeded_cache))
    refused = run(words)
    assert (refused.exit_code, row.told in refused.stderr) == (row.exit_code, True), refused.output
    offered = hints(refused.stderr)
    assert offered, f"nothing to type: {refused.stderr}"
    before = {path: path.read_bytes() for path in seeded_cache.glob("*/zarr.json")}
    for hint in offered:
        command, told = typed(words, hint, seeded, world), [refused.stderr]
        while (done := run(dry(command))).exit_code != 0:
            assert row.told not in done.stderr, f"{shlex.join(command)} loops:\n{done.stderr}"
            assert done.stderr not in told, f"{shlex.join(command)} loops:\n{done.stderr}"
            told.append(done.stderr)
            assert hints(done.stderr), f"{shlex.join(command)}: nothing to type: {done.stderr}"
            command = typed(command, hints(done.stderr)[0], seeded, world)  # another refusal, with its own way out
    assert before == {path: path.read_bytes() for path in seeded_cache.glob("*/zarr.json")}


def test_verify_advises_commands_for_the_store_that_it_looked_at_whatever_its_preset(seeded: list[str]) -> None:
    sets = [*seeded, "clip.dtype=float32", "data.fps=1"]
    words = ["--cache", "C", "--device", "cpu"]
    assert run(["extract-clip", *options_of(sets), *words]).exit_code == 0
    next(path for path in sorted(Path("C/tokens").glob("c.*"))).unlink()
    verify = ["cache", "verify", "--cache", "C", *options_of([item for item in seeded if item[:4] in ("data", "clip")])]
    found = run([*verify, "--json"])
    assert found.exit_code == 4, found.output
    (command,) = json.loads(found.stdout.splitlines()[-1])["next"]
    assert "clip.dtype=float32" in command
    assert "data.fps=1" in command
    done = run([*shlex.split(command)[1:], "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert run(verify).exit_code == 0


# ---------------------------------------------------------------- every command that the sources spell out


def spelled() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every ``pipeline …`` in a text of the program, up to the first word that is not literal."""
    for path in sorted(
        [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("cache_schema/*.py"), *PROJECT.glob("stages/**/*.py")]
    ):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for match in re.finditer(r"""[ "'`]pipeline ((?:[a-z][a-z-]*)(?: [^"'`&)]*)?)""", line):
                if "import" not in line:
                    yield f"{path.relative_to(PROJECT)}:{number}", match[1].split()


def test_every_command_in_the_sources_exists_with_its_options() -> None:
    root = typer.main.get_command(app)
    seen = 0
    for where, words in spelled():
        command: Any = root
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        if hasattr(command, "commands"):
            continue  # prose such as "the pipeline reads"
        seen += 1
        options = {name for parameter in command.params for name in parameter.opts}
        unknown = [word for word in words if re.fullmatch(r"--[a-z-]+", word) and word not in options]
        assert not unknown, f"{where}: {command.name} has no {unknown}"
    assert seen > 20
