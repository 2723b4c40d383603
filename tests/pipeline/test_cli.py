"""The command line: quick to answer, exact in what it passes on, and the same in every terminal."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline import commands, presets
from pipeline.cli import app
from pipeline.overrides import apply
from pipeline.runs import RunFolder
from tests.pipeline.conftest import EXTRACTED, Composed

STAGE_COMMANDS = ("extract", "extract-clip", "extract-teacher", "train-student", "evaluate")
COMMANDS = (
    *STAGE_COMMANDS,
    *("baselines", "compare", "diagnose", "report", "tour", "ablate", "ablate-status", "doctor"),
)
GOLDEN = Path(__file__).parent.parent / "golden"
HEAVY = ("torch", "transformers", "diffusers", "open_clip", "zarr", "numpy", "rich", "av")


def run(*arguments: str) -> Result:
    """One command in this process, on a terminal of 100 columns without colours."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"}, prog_name="pipeline")


def run_cpu(*arguments: str) -> Result:
    return run(*arguments, "--device", "cpu")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run folder as train-student leaves it, without checkpoints."""
    RunFolder.create(tmp_path / "run", apply(presets.get("miniature"), ["train.lr=0.5"]))
    return tmp_path / "run"


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("evaluate", "--help")])
def test_help_and_version_answer_in_under_0_6_seconds(arguments: tuple[str, ...]) -> None:
    def cpu_seconds() -> float:  # equals the time on the clock where the machine does nothing else
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(4)) < 0.6


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\ntry: app(['extract-clip', '--help'])\n"
        f"except SystemExit: pass\nprint('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "Example:" in output
    assert output.endswith("LOADED []\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_text_is_the_one_on_record(command: str) -> None:
    path = GOLDEN / f"help_{command or 'main'}.txt"
    text = run(*filter(None, [command]), "--help").stdout
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_with_an_example_that_parses(command: str) -> None:
    text = run(*filter(None, [command]), "--help").stdout.rstrip()
    example = text.rpartition("Example:  pipeline ")[2]
    assert example
    assert "\n" not in example
    words = example.split()
    assert words[0] == command or not command
    if words[0] in ("extract", "extract-clip", "extract-teacher", "train-student"):
        done = run(*words, "--dry-run", "--json")
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", STAGE_COMMANDS)
@pytest.mark.parametrize("option", ["--preset", "--set", "--cache", "--out", "--device", "--json", "--dry-run"])
def test_every_command_has_the_common_options(command: str, option: str) -> None:
    if command == "evaluate" and option in ("--preset", "--out"):  # the run knows its settings
        option = "--run"
    assert re.search(rf"{option}\b", run(command, "--help").stdout)


def test_version_is_the_one_of_the_distribution() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == version("diff-lmm") + "\n"


def test_every_command_is_in_the_module_that_the_map_of_commands_names() -> None:
    told = {}
    for module, names in re.findall(r"^    (\w+)\.py +(.*)$", str(commands.__doc__), re.MULTILINE):
        told |= dict.fromkeys(names.split(" · "), f"pipeline.commands.{module}")
    del told["the options that commands share, and what their values mean"]
    found: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    found |= {f"cache {name}": command for name, command in found.pop("cache").commands.items()}
    assert {name: command.callback.__module__ for name, command in found.items()} == told


# ---------------------------------------------------------------- what is passed on


def test_extraction_passes_its_options_on(composed: Composed, tmp_path: Path) -> None:
    options = ["--preset", "lvu-scene", "--set", "data.fps=5", "--workers", "3", "--retry-failed"]
    assert (
        run_cpu("extract-teacher", *options, "--split", "test", "--split", "val", "--cache", str(tmp_path)).exit_code
        == 0
    )
    ((name, (config,), options_seen),) = composed.calls
    assert name == "extract"
    assert (config.preset, config.data.task, config.data.fps) == ("lvu-scene", "scene", 5.0)
    assert callable(options_seen.pop("progress"))
    assert options_seen == {
        "which": "teacher",
        "cache": tmp_path,
        "workers": 3,
        "retry_failed": True,
        "part": (1, 1),
        "splits": ["test", "val"],
        "device": "cpu",
        "dry_run": False,
    }


def test_extraction_without_options_is_the_miniature_inline_on_all_splits(composed: Composed) -> None:
    run_cpu("extract-clip")
    ((_, (config,), seen),) = composed.calls
    assert config == presets.get("miniature")
    assert (seen["which"], seen["workers"], seen["splits"]) == ("clip", 0, [])
    assert seen["cache"] == Path("cache/miniature/features")


def test_one_command_extracts_both(composed: Composed, tmp_path: Path) -> None:
    assert run_cpu("extract", "--out", str(tmp_path)).exit_code == 0
    ((_, (config,), seen),) = composed.calls
    assert (config, seen["which"]) == (presets.get("miniature"), "both")
    assert (tmp_path / "extract.json").is_file()


def test_training_goes_to_a_run_folder_named_after_the_preset(composed: Composed) -> None:
    run_cpu("train-student", "--preset", "lvu-year")
    assert composed.calls[0][2]["out"] == Path("runs/lvu-year")


def test_evaluation_asks_the_run_for_its_settings_and_its_cache(composed: Composed, trained: Path) -> None:
    assert run_cpu("evaluate", "--run", str(trained)).exit_code == 0
    ((name, (folder,), seen),) = composed.calls
    assert (name, folder) == ("evaluate", trained)
    assert (seen["cache"], seen["sets"], seen["split"], seen["checkpoint"]) == (None, [], "test", None)


def test_what_an_evaluation_changes_is_passed_on(composed: Composed, trained: Path) -> None:
    run_cpu("evaluate", "--run", str(trained), "--set", "decode.num_beams=7", "--split", "val", "--checkpoint", "final")
    ((_, _, seen),) = composed.calls
    assert (seen["sets"], seen["split"], seen["checkpoint"]) == (["decode.num_beams=7"], "val", "final")


def test_other_videos_get_a_cache_of_their_own(composed: Composed, tmp_path: Path) -> None:
    for folder in ("one/clips", "two/clips"):
        run_cpu("extract-clip", "--set", "data.name=clips", "--set", f"data.videos={tmp_path / folder}")
    first, second = (seen["cache"] for _, _, seen in composed.calls)
    assert first != second
    assert first.parent.name.startswith("clips-")


def test_a_dry_run_does_not_load_torch() -> None:
    code = (
        "import sys, types\nmodule = types.ModuleType('pipeline.compose')\n"
        "module.extract = lambda *a, **k: {'videos': 228, 'frames': 28080, 'bytes': 20_323_123_200}\n"
        "sys.modules['pipeline.compose'] = module\nfrom pipeline.cli import app\n"
        "try: app(['extract-clip', '--dry-run'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "20.3 GB" in output
    assert "28,080" in output
    assert output.endswith("False\n")


def test_synth_draws_videos_once(tmp_path: Path) -> None:
    world = str(tmp_path / "world")
    first = run("synth", "--out", world, "--videos", "6")
    assert first.exit_code == 0, first.output
    assert "6 drawn now" in first.stdout
    assert "nothing to do" in run("synth", "--out", world, "--videos", "6").stdout
    assert json.loads(run("synth", "--out", world, "--videos", "6", "--json").stdout)["written"] == 0


# ---------------------------------------------------------------- what is printed


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_json_is_the_only_line_on_stdout(command: str, composed: Composed, trained: Path) -> None:
    extra = ["--run", str(trained)] if command == "evaluate" else []
    result = run_cpu(command, "--json", *extra)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    name = command.partition("-")[0]
    assert json.loads(result.stdout) == json.loads(json.dumps(composed.returns[name]))


def test_json_has_no_numbers_that_json_does_not_know(composed: Composed) -> None:
    composed.returns["train"] = {"steps": 3, "loss_ce": float("nan"), "parts": [float("inf"), 1.5]}
    line = run_cpu("train-student", "--json").stdout
    assert json.loads(line, parse_constant=pytest.fail) == {"steps": 3, "loss_ce": None, "parts": [None, 1.5]}


@pytest.mark.usefixtures("composed")
def test_an_error_with_json_is_one_object_too() -> None:
    result = run_cpu("extract-clip", "--json", "--set", "train.lr=fast")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": "train.lr: expected a number > 0, got 'fast'", "exit_code": 2}


@pytest.mark.usefixtures("composed")
def test_the_result_table_shows_accuracy_beside_the_majority(trained: Path) -> None:
    table = run_cpu("evaluate", "--run", str(trained)).stdout
    (line,) = [line for line in table.splitlines() if line.strip().startswith("all ")]
    assert line.split() == ["all", "91", "63", "69.2", "59.1", "to", "77.8", "87.9", "46.2"]
    assert "friend" in table
    assert "One seed (42), 41 videos" in table
    assert "n = 91 is that of the published figures." in table


def test_a_finished_extraction_says_that_there_is_nothing_to_do(composed: Composed) -> None:
    composed.returns["extract"] = EXTRACTED | {"skipped": 7}
    assert "7 of 7 videos cached; nothing to do" in run_cpu("extract-clip").stdout
    composed.returns["extract"] = EXTRACTED | {"skipped": 6}
    assert "nothing to do" not in run_cpu("extract-clip").stdout


def test_names_from_files_cannot_steer_the_terminal(composed: Composed) -> None:
    failure = {"video": "\x1b[31mred\x1b]0;title\x07.mp4", "reason": "bad\r\x9b2J\u202e name"}
    composed.returns["extract"] = EXTRACTED | {"failed": 1, "failures": [failure], "warnings": ["\x1b[2Jnote"]}
    result = run_cpu("extract-clip")
    assert "failed: red.mp4: bad2J name" in result.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output)


@pytest.mark.usefixtures("composed")
def test_the_result_is_kept_in_out(tmp_path: Path) -> None:
    run_cpu("extract-clip", "--out", str(tmp_path / "new" / "folder"))
    assert json.loads((tmp_path / "new" / "folder" / "extract-clip.json").read_text()) == EXTRACTED


# ---------------------------------------------------------------- exit codes


def test_videos_without_some_frames_exit_with_3_and_replaced_ones_with_4(composed: Composed) -> None:
    composed.returns["extract"] = EXTRACTED | {"left_out": [{"video": "short", "reason": "the file has 12 frames"}]}
    result = run_cpu("extract")
    assert result.exit_code == 3
    assert "left out: short: the file has 12 frames" in result.output
    replaced = {"changed": [{"video": "v", "reason": "has other bytes now"}], "repair": "pipeline cache repair"}
    composed.returns["extract"] = EXTRACTED | replaced
    result = run_cpu("extract")
    assert result.exit_code == 4
    assert "Make them anew: pipeline cache repair" in result.output


def test_failures_exit_with_3_and_are_listed(composed: Composed) -> None:
    failures = [{"video": f"v{n}", "reason": "no video stream"} for n in range(25)]
    composed.returns["extract"] = EXTRACTED | {"failed": 25, "failures": failures}
    result = run_cpu("extract-clip")
    assert result.exit_code == 3
    assert "failed: v0: no video stream" in result.stdout
    assert "and 5 more" in result.stdout
    assert "--retry-failed" in result.stdout
    assert run_cpu("extract-clip", "--json").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract-clip", "--set", "lr=3"], ["lr: no such setting", "train.lr"]),
        (["extract-clip", "--set", "train.epochs=2.5"], ["train.epochs: expected a whole number >= 1, got 2.5"]),
        (["extract-clip", "--set", "train.lr"], ["expected key=value"]),
        (["extract-clip", "--preset", "lvu_scene"], ["no preset", "lvu-scene"]),
        (["train-student", "--device", "tpu"], ["--device tpu", "cuda:N"]),
        (["evaluate", "--run", "nowhere"], ["nowhere holds no run", "pipeline train-student --out nowhere"]),
        (["extract-clip", "--wrokers", "2"], ["No such option"]),
        (["extract-clip", "--workers", "-1"], ["--workers"]),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_type(
    composed: Composed, arguments: list[str], words: list[str]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert not composed.calls
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.mark.usefixtures("composed")
def test_a_missing_gpu_exits_with_5() -> None:
    import torch

    name = f"cuda:{torch.cuda.device_count()}"
    result = run("train-student", "--device", name)
    assert result.exit_code == 5
    assert f"--device {name}" in result.stderr


def test_a_full_disk_exits_with_75_and_says_how_to_go_on(composed: Composed) -> None:
    def write_to_a_full_disk(*_: object, **__: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    composed.returns["extract"] = write_to_a_full_disk
    result = run_cpu("extract-clip")
    assert result.exit_code == 75
    assert "no space left" in result.stderr
    assert "The same command" in result.stderr


def test_debug_adds_the_traceback(composed: Composed) -> None:
    composed.returns["extract"] = ValueError("a broken thing")
    assert "Traceback" not in run_cpu("extract-clip").output
    result = run_cpu("extract-clip", "--debug")
    assert "Traceback" in result.stderr
    assert "error: a broken thing" in result.stderr.splitlines()
