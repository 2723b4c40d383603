"""The files around the code: the lock, the run script, the citation."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import PROJECT

PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (PROJECT / "requirements.lock").read_text().splitlines()
    if (text := line.partition("  #")[0].strip()) and not text.startswith("#")
    for requirement in [Requirement(text)]
}
DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def pinned_version(name: str) -> str:
    ((operator, version),) = ((s.operator, s.version) for s in PINS[canonicalize_name(name)].specifier)
    assert operator == "=="
    return version


@pytest.mark.parametrize(
    "requirement", [*DECLARED["dependencies"], *DECLARED["optional-dependencies"]["test"]], ids=str
)
def test_every_declared_dependency_is_pinned_within_its_range(requirement: str) -> None:
    declared = Requirement(requirement)
    assert declared.specifier.contains(pinned_version(declared.name))


def test_every_dependency_of_a_pinned_package_is_pinned_too() -> None:
    unpinned = []
    for name in PINS:
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            extras = [{**default_environment(), "extra": extra} for extra in ("", *PINS[name].extras)]
            applies = requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in extras)
            if applies and canonicalize_name(requirement.name) not in PINS:
                unpinned.append(f"{name} -> {requirement}")
    assert not unpinned


def test_the_pinned_versions_are_the_installed_ones() -> None:
    differing = {
        name: (metadata.version(name), pinned_version(name))
        for name, requirement in PINS.items()
        if (requirement.marker is None or requirement.marker.evaluate())
        and metadata.version(name) != pinned_version(name)
    }
    assert not differing


def test_no_package_index_is_named() -> None:
    for path in ("requirements.lock", "run.sh", ".ci/run", "pyproject.toml", ".pre-commit-config.yaml"):
        text = (PROJECT / path).read_text()
        assert "://" not in text, path
        assert "--index" not in text, path


# ---------------------------------------------------------------- run.sh


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """run.sh of a copy, so that nothing here is touched."""
    return subprocess.run(
        ["/bin/bash", "run.sh", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("run.sh", "requirements.lock"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


def tools(folder: Path, **programs: str) -> Path:
    """A PATH with the usual small programs and the given scripts, and no Python."""
    path = folder / "tools"
    path.mkdir()
    for name in ("bash", "dirname", "basename", "sed", "cat", "mkdir", "touch", "rm", "cp", "chmod"):
        (path / name).symlink_to(str(shutil.which(name)))
    for name, script in programs.items():
        (path / name).write_text(f"#!/bin/bash\n{script}\n")
        (path / name).chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = PROJECT / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_a_wrong_word_shows_the_usage_and_installs_nothing(copy: Path) -> None:
    done = run_script(copy, "tset", PATH=str(tools(copy)))
    assert done.returncode == 2
    assert "./run.sh test" in done.stderr
    assert not (copy / ".venv").exists()


def test_without_a_fitting_python_it_says_which_to_install(copy: Path) -> None:
    done = run_script(copy, PATH=str(tools(copy, python3="exit 1")))
    assert done.returncode == 5
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (copy / ".venv").exists()


# A Python that makes an environment of stubs: `-m venv DIR`, `-m pip` (counted in pip.log), everything else succeeds.
FAKE_PYTHON = r"""
case "$*" in
    *"sys.exit(not"*) exit 0 ;;
    *hashlib*) echo stamp ;;
    --version) echo Python 3.13.0 ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
        for name in ruff mypy lint-imports pipeline; do
            printf '#!/bin/bash\necho "$(basename $0) $*"\n' > "$3/bin/$name"
            chmod +x "$3/bin/$name"
        done ;;
    "-m pip "*) echo "$*" >> pip.log; [ ! -e fail ] ;;
    "-m pytest"*) echo "pytest ${*:3}" ;;
esac
"""


def test_a_second_start_installs_nothing(copy: Path) -> None:
    path = str(tools(copy, **{"python3.12": FAKE_PYTHON}))
    first = run_script(copy, PATH=path)
    assert first.returncode == 0, first.stderr
    log = (copy / "pip.log").read_text()
    assert "-r requirements.lock" in log
    assert "--no-deps" in log
    commands = [line.split()[:2] for line in first.stdout.splitlines()]
    assert [words[1] for words in commands] == ["synth", "extract", "tour"]
    assert run_script(copy, PATH=path).returncode == 0
    assert (copy / "pip.log").read_text() == log


def test_an_interrupted_installation_is_begun_anew(copy: Path) -> None:
    path = str(tools(copy, **{"python3.12": FAKE_PYTHON}))
    (copy / "fail").touch()
    assert run_script(copy, PATH=path).returncode != 0
    (copy / "fail").unlink()
    (copy / ".venv" / "left over").touch()
    again = run_script(copy, "test", "-k", "one", PATH=path)
    assert again.returncode == 0, again.stderr
    assert "interrupted; beginning anew" in again.stderr
    assert not (copy / ".venv" / "left over").exists()
    assert again.stdout.splitlines()[-1] == "pytest -n 2 --dist loadfile -k one"


def test_an_environment_of_somebody_else_is_added_to_not_removed(copy: Path) -> None:
    path = str(tools(copy, **{"python3.12": FAKE_PYTHON}))
    mine = copy / "mine"
    subprocess.run(["python3.12", "-m", "venv", str(mine)], env={"PATH": path}, check=True)
    (mine / "precious").touch()
    (copy / "fail").touch()
    assert run_script(copy, PATH=path, VENV="mine").returncode != 0
    (copy / "fail").unlink()
    assert run_script(copy, PATH=path, VENV="mine").returncode == 0
    assert (mine / "precious").exists()


def test_other_settings_and_presets_reach_the_commands(copy: Path) -> None:
    path = str(tools(copy, **{"python3.12": FAKE_PYTHON}))
    done = run_script(copy, PATH=path, PRESET="lvu-year", SET="--set a.b=c", OUT="runs/mine")
    assert done.stdout.splitlines() == [
        "pipeline extract --preset lvu-year --set a.b=c",
        "pipeline train-student --preset lvu-year --set a.b=c --out runs/mine",
        "pipeline evaluate --run runs/mine",
    ]


def test_failed_videos_do_not_stop_the_job_and_a_stale_cache_does(copy: Path) -> None:
    path = str(tools(copy, **{"python3.12": FAKE_PYTHON}))
    assert run_script(copy, PATH=path).returncode == 0
    for code, expected in ((3, 0), (4, 4)):
        script = f'#!/bin/bash\n[ "$1" != extract ] || exit {code}\n'
        (copy / ".venv" / "bin" / "pipeline").write_text(script)
        assert run_script(copy, PATH=path).returncode == expected


def test_the_citation_names_the_paper_and_its_base() -> None:
    text = (PROJECT / "CITATION.cff").read_text()
    assert "10.24963/ijcai.2025/98" in text
    assert "MA-LMM" in text
