"""What an error tells to type next is typed, and works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger
from pipeline.runs import free_folder
from tests.pipeline.conftest import options_of


@pytest.fixture
def words(seeded: list[str], seeded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One variant of one step, in a folder without runs."""
    monkeypatch.chdir(tmp_path)
    sets = [*seeded, "data.task=scene", "train.max_steps=1", "train.warmup_steps=0"]
    return ["ablate", *options_of(sets), "--cache", str(seeded_cache), "--device", "cpu", "--vary", "train.lambda_kd=0"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def hint(done: Result) -> list[str]:
    """The option that the error names, as the shell would pass it on."""
    assert done.exit_code == 2, done.output
    return shlex.split(re.findall(r"  (--out .+)", done.stderr)[0])


@pytest.mark.parametrize("out", [[], ["--out", "my runs/first"]])
def test_an_ablation_of_other_settings_goes_to_the_folder_that_the_error_names(
    words: list[str], out: list[str]
) -> None:
    folder = Path(out[-1]) if out else Path("runs/miniature-ablation")
    assert run(*words, *out).exit_code == 0
    before = (folder / "ablation.json").read_bytes()
    others = [*words, *out, "--set", "train.lr=0.5"]
    refused = run(*others)
    assert "lambda_kd=0_seed=42 holds a run with another configuration" in refused.stderr
    assert "train.lr" in refused.stderr
    typed = hint(refused)
    assert typed == ["--out", f"{folder}-2"]
    done = run(*others, *typed)
    assert done.exit_code == 0, done.output
    assert (folder / "ablation.json").read_bytes() == before
    assert Ledger.open(Path(f"{folder}-2")).is_settled("lambda_kd=0_seed=42")
    assert hint(run(*words, *out, "--set", "train.lr=0.25")) == ["--out", f"{folder}-3"]


def test_an_ablation_beside_files_of_somebody_else_goes_to_the_folder_that_the_error_names(words: list[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    Path("mine-ablation").mkdir()
    Path("mine-ablation/notes").touch()
    assert hint(run(*words, "--out", "mine")) == ["--out", "mine-ablation-2"]
    assert run(*words, "--out", "mine", "--out", "mine-ablation-2").exit_code == 0
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    status = run("ablate-status", "mine")
    (command,) = re.findall(r"pipeline (ablate .+)", status.stderr)
    assert command == "ablate --study lambda --out mine-ablation-3"
    assert run(*shlex.split(command), *words[1:-2], "--dry-run").exit_code == 0


def test_a_run_of_other_settings_goes_to_the_folder_that_the_error_names(words: list[str]) -> None:
    train = ["train-student", *words[1:-2]]
    assert run(*train, "--dry-run").exit_code == 0
    assert run(*train, "--set", "train.lambda_kd=0").exit_code == 0
    others = [*train, "--set", "train.lambda_kd=0", "--set", "train.lr=0.5"]
    assert run(*others, *hint(run(*others))).exit_code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["miniature", "miniature-2"]


def test_a_folder_that_is_free_is_named_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert [free_folder(Path(name)) for name in ("new", "a b/new", "empty")] == ["new", "'a b/new'", "empty"]
    assert free_folder(Path("full")) == "full-2"
    assert free_folder(Path("full"), "-ablation") == "full-ablation"
    assert free_folder(Path("full/file")) == "full/file-2"
    assert free_folder(Path()) == f"{tmp_path}-2"
    with pytest.raises(ConfigError, match=r"ablate --study lambda --out full-ablation$"):
        Ledger.open(Path("full"))
