"""``pipeline cache``: on a real store of real drawn videos, from the command line to the exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cache_schema.store import FeatureStore
from pipeline.cli import app
from stages.miniature.videos import specs
from stages.miniature.world import write_world
from tests.cache_schema.conftest import moto, s3
from tests.cache_schema.makers import flip_bit, tree

__all__ = ["moto", "s3"]  # fixtures

COMMANDS = ("ls", "verify", "repair", "gc", "inspect", "copy", "export")
GOLDEN = Path(__file__).parent.parent / "golden"


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, env={"COLUMNS": "100", "NO_COLOR": "1"}, prog_name="pipeline")


def ask(*arguments: object) -> tuple[int, Any]:
    """Exit code and the JSON that a command prints."""
    done = run(*arguments, "--json")
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A store with both modalities, and the settings that made it."""
    folder = tmp_path_factory.mktemp("made")
    write_world(folder / "world", videos=6, seed=3)
    settings = [f"data.videos={folder / 'world/videos'}", "data.name=clips", "data.annotations="]
    settings += ["extract.shard_frames=16", "data.num_frames=4"]
    options = [word for setting in settings for word in ("--set", setting)]
    for command in ("extract-clip", "extract-teacher"):
        done = run(command, *options, "--cache", folder / "store", "--device", "cpu")
        assert done.exit_code == 0, done.output
    return folder / "store", options


@pytest.fixture
def copy(made: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[object]]:
    """A store to damage, and the options that name it."""
    shutil.copytree(made[0], tmp_path / "store")
    return tmp_path / "store", ["--cache", tmp_path / "store", *made[1]]


def shard(store: Path, number: int, modality: str = "tokens") -> Path:
    return FeatureStore.open(store, modality).layout.info.shard_file(number)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_text_is_the_one_on_record(command: str) -> None:
    path = GOLDEN / f"help_cache{'-' + command if command else ''}.txt"
    text = run("cache", *filter(None, [command]), "--help").stdout
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_of_the_command(command: str) -> None:
    last = run("cache", command, "--help").stdout.rstrip().splitlines()[-1]
    assert last.startswith(f"  Example:  pipeline cache {command}")


def test_a_quick_check_loads_no_torch(made: tuple[Path, list[str]]) -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        f"try: app(['cache', 'verify', '--cache', {str(made[0])!r}])\nexcept SystemExit as end: print(end.code)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["0", "False"]


# ---------------------------------------------------------------- looking


def test_ls_lists_every_store_below_a_folder(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "deep/er/store")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zarr.json").write_text('{"attributes": {"format": "anndata"}}')
    code, result = ask("cache", "ls", tmp_path)
    (store,) = result["stores"]
    assert (code, store["path"]) == (0, str(tmp_path / "deep/er/store"))
    tokens = next(part for part in store["modalities"] if part["modality"] == "tokens")
    opened = FeatureStore.open(made[0], "tokens")
    assert tokens["digest"] == opened.spec.digest()
    assert (tokens["videos"], tokens["failed"], tokens["planned"]) == (6, 0, 6)
    assert tokens["frames"] == opened.plan.num_frames
    assert tokens["bytes"] == sum(file.stat().st_size for file in (made[0] / "tokens").glob("c.*"))
    assert opened.spec.digest()[:12] in run("cache", "ls", tmp_path).stdout


def test_ls_of_a_damaged_store_says_so_and_of_nothing_too(copy: tuple[Path, list[object]], tmp_path: Path) -> None:
    os.truncate(shard(copy[0], 1), 50)
    text = run("cache", "ls", tmp_path).stdout
    assert "damaged:" in text
    assert "pipeline cache verify" in text
    (tmp_path / "empty").mkdir()
    assert run("cache", "ls", tmp_path / "empty").stdout == "no store there\n"
    assert run("cache", "ls", tmp_path / "absent").exit_code == 2


def test_41_inspect_shows_a_video_and_counts_its_zero_vectors(copy: tuple[Path, list[object]]) -> None:
    store, options = copy
    video = FeatureStore.open(store, "tokens").plan.videos[2]
    code, result = ask("cache", "inspect", video, *options)
    assert code == 0
    pooled, tokens = result["modalities"]
    assert (pooled["status"], tokens["status"], tokens["zero_frames"]) == ("ok", "ok", 0)
    features = FeatureStore.open(store, "tokens").read(video, range(tokens["planned_frames"])).astype("f8")
    assert tokens["std"] == pytest.approx(features.std(), rel=1e-9)
    assert len(tokens["source"]["sha256"]) == 64
    assert "zero frames" in run("cache", "inspect", video, *options).stdout
    flip_bit(shard(store, tokens["shards"][0]), 3)
    assert ask("cache", "inspect", video, *options)[1]["modalities"][1]["status"] == "damaged"


def test_36_a_video_nobody_knows_is_answered_with_the_nearest_and_escapes_do_not_reach_the_terminal(
    copy: tuple[Path, list[object]],
) -> None:
    store, options = copy
    video = FeatureStore.open(store, "tokens").plan.videos[0]
    done = run("cache", "inspect", f"{video}\x1b[2J", *options)
    assert done.exit_code == 4
    assert repr(video) in done.stderr
    (store / "\x1b]0;title\x07notes\x1b[31m").write_text("x")
    text = run("cache", "gc", "--dry-run", *options).output + run("cache", "verify", *options).output
    assert "notes" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


# ---------------------------------------------------------------- checking and mending


def test_a_sound_store_passes_every_check(copy: tuple[Path, list[object]]) -> None:
    done = run("cache", "verify", *copy[1], "--full", "--semantic", "3", "--sources", "--hash", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "no problem found" in done.stdout


def test_08_10_damage_is_listed_with_what_to_run_and_repaired_to_the_same_bytes(
    copy: tuple[Path, list[object]], made: tuple[Path, list[str]]
) -> None:
    store, options = copy
    flip_bit(shard(store, 3), 200)
    os.truncate(shard(store, 1, "pooled/layer8"), 40)
    shard(store, 4).unlink()
    code, quick = ask("cache", "verify", *options)
    assert code == 4
    assert {(p["modality"], p["shard"], p["kind"]) for p in quick["problems"]} == {
        ("pooled/layer8", 1, "truncated"),
        ("tokens", 4, "deleted"),
    }
    code, full = ask("cache", "verify", *options, "--full")
    (flipped,) = [p for p in full["problems"] if p["kind"] == "frame"]
    assert (code, flipped["shard"], flipped["frame"]) == (4, 3, 0)
    (command,) = full["next"]
    assert command.startswith("pipeline cache repair --preset miniature --cache")
    assert " ".join(command.split()) in " ".join(run("cache", "verify", *options).stdout.split())
    assert run("cache", "repair", *options, "--dry-run").exit_code == 4
    assert tree(store) != tree(made[0])
    code, repaired = ask("cache", "repair", *options, "--device", "cpu")
    assert (code, repaired["repaired"], repaired["left"]) == (0, 3, [])
    assert tree(store) == tree(made[0])
    assert run("cache", "repair", *options).stdout == "no damaged shard; nothing to do\n"


@pytest.mark.parametrize("damage", ["deleted", "empty", "half", "swapped"])
def test_08_09_11_12_training_on_a_damaged_store_is_refused_with_4_and_the_command(
    copy: tuple[Path, list[object]], made: tuple[Path, list[str]], tmp_path: Path, damage: str
) -> None:
    store, options = copy
    first, second = shard(store, 0), shard(store, 4)  # of the training split
    if damage == "deleted":
        first.unlink()
    elif damage == "swapped":
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    else:
        os.truncate(first, 0 if damage == "empty" else first.stat().st_size // 2)
    learn = [f"data.annotations={made[0].parent / 'world/lvu'}", "data.name=lvu", "train.epochs=1"]
    learn = [word for setting in learn for word in ("--set", setting)]
    done = run("train-student", *options, *learn, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 4, done.output
    assert "pipeline extract-clip" in done.stderr
    assert damage == "deleted" or str(store / "tokens/c.") in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert ask("cache", "repair", *options, "--device", "cpu")[0] == 0
    assert ask("cache", "verify", *options, "--full")[0] == 0


def test_17_a_replaced_video_is_reported_and_its_features_are_made_again_in_every_modality(
    copy: tuple[Path, list[object]], made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    store, options = copy
    shutil.copytree(made[0].parent / "world/videos", tmp_path / "videos")
    options = [*options, "--set", f"data.videos={tmp_path / 'videos'}", "--device", "cpu"]
    # One that is shorter than what it stands for would lack frames that are asked for.
    seconds = {spec.video_id: spec.seconds for spec in specs(6, 3)}
    first, second = sorted((tmp_path / "videos").iterdir(), key=lambda path: seconds[path.stem])[:2]
    shutil.copy(second, first)
    code, checked = ask("cache", "verify", *options, "--sources")
    assert (code, {p["video"] for p in checked["problems"]}) == (4, {first.stem})
    (command,) = checked["next"]
    assert command.startswith("pipeline cache repair --sources")
    code, result = ask("cache", "repair", *options, "--sources")
    assert (code, result["changed_videos"], result["repaired"]) == (0, [first.stem], 2)
    assert ask("cache", "verify", *options, "--full", "--sources", "--hash", "--semantic", "4")[0] == 0
    pooled = FeatureStore.open(store, "pooled/layer8")
    assert pooled.facts(first.stem)["sha256"] == pooled.facts(second.stem)["sha256"]
    first.unlink()
    code, gone = ask("cache", "verify", *options, "--sources")
    assert (code, {p["kind"] for p in gone["problems"]}) == (4, {"source_gone"})


def test_15_repair_with_other_settings_is_refused_with_the_fields(copy: tuple[Path, list[object]]) -> None:
    store, options = copy
    before = tree(store)
    os.truncate(shard(store, 1), 40)
    damaged = tree(store)
    done = run("cache", "repair", *options, "--set", "clip.layer=2", "--device", "cpu")
    assert done.exit_code == 4
    assert re.search(r"layer +\d+ +2", done.stderr)
    assert tree(store) == damaged != before


def test_a_shard_that_cannot_be_made_again_stays_and_is_said_so(
    copy: tuple[Path, list[object]], made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    store, options = copy
    shutil.copytree(made[0].parent / "world/videos", tmp_path / "videos")
    flip_bit(shard(store, 0), 9)
    damaged = tree(store)
    video = FeatureStore.open(store, "tokens").plan.videos[0]
    next((tmp_path / "videos").glob(f"{video}.*")).unlink()
    done = run("cache", "repair", *options, "--set", f"data.videos={tmp_path / 'videos'}", "--device", "cpu")
    assert done.exit_code == 4
    assert "left as it is: tokens, shard 0" in done.stdout
    assert tree(store) == damaged


@pytest.mark.parametrize("gone", ["tokens/zarr.json", "pooled/layer8/zarr.json", "pooled/zarr.json"])
def test_an_array_without_its_zarr_json_is_a_problem_that_extraction_mends_and_gc_keeps_its_shards(
    copy: tuple[Path, list[object]], gone: str
) -> None:
    """Was: "no problem found", exit 0, and ``gc --unplanned`` offered to remove the whole folder."""
    store, options = copy
    whole = tree(store)
    (store / gone).unlink()
    modality = "tokens" if gone.startswith("tokens") else "pooled/layer8"
    code, result = ask("cache", "verify", *options, "--full")
    assert (code, [(p["modality"], p["kind"]) for p in result["problems"]]) == (4, [(modality, "lost")])
    code, listed = ask("cache", "ls", store.parent)
    assert (code, gone.rpartition("/")[0] in listed["stores"][0]["error"]) == (4, True)
    before = tree(store)
    code, collected = ask("cache", "gc", *options, "--unplanned")
    assert (code, collected["removed"]) == (0, 0)
    assert {o["kind"] for o in collected["orphans"]} == {"shards"}
    assert run("cache", "repair", *options, "--device", "cpu").exit_code == 4
    assert tree(store) == before
    for command in result["next"]:
        assert run(*shlex.split(command)[1:], "--device", "cpu").exit_code == 0
    assert tree(store) == whole
    assert ask("cache", "verify", *options, "--full")[0] == 0


def test_without_its_plan_a_store_is_reported_and_gc_keeps_every_shard(copy: tuple[Path, list[object]]) -> None:
    store, options = copy
    for file in (store / "plan").glob("0*"):
        file.unlink()
    assert run("cache", "verify", *options).exit_code == 4
    before = tree(store)
    assert ask("cache", "gc", *options, "--unplanned")[1]["removed"] == 0
    assert tree(store) == before


def test_ls_exits_with_4_on_damage_and_its_hint_names_it(copy: tuple[Path, list[object]]) -> None:
    store, _ = copy
    assert run("cache", "ls", store).exit_code == 0
    flip_bit(shard(store, 0), -1)
    done = run("cache", "ls", store)
    assert done.exit_code == 4
    (hint,) = re.findall(r"^ *(pipeline cache verify .*)$", done.stdout, re.MULTILINE)
    hinted = run(*shlex.split(hint)[1:])
    assert hinted.exit_code == 4
    assert "tokens" in hinted.stdout
    assert run("cache", "ls", store / "nothing").exit_code == 2


def test_ls_verify_and_repair_with_sources_work_on_an_object_store(
    copy: tuple[Path, list[object]], s3: str, tmp_path: Path
) -> None:
    """Was: "s3:/… is no folder", and a traceback for every object store."""
    store, options = copy
    videos = Path(str(options[options.index("--set") + 1]).partition("=")[2])
    shutil.copytree(videos, tmp_path / "videos")
    url = f"{s3}/deeper/store"
    assert run("cache", "copy", store, url).exit_code == 0
    options = ["--cache", url, *options[2:], "--set", f"data.videos={tmp_path / 'videos'}"]
    code, listed = ask("cache", "ls", s3)
    assert (code, [s["path"] for s in listed["stores"]]) == (0, [url])
    assert [part["videos"] for part in listed["stores"][0]["modalities"]] == [6, 6]
    assert run("cache", "ls", f"{s3}/nothing").exit_code == 2
    code, result = ask("cache", "verify", *options, "--sources", "--hash")
    assert (code, result["problems"]) == (0, [])
    first, _, second = sorted((tmp_path / "videos").iterdir())[:3]  # of one length
    first.write_bytes(second.read_bytes())
    code, result = ask("cache", "verify", *options, "--sources")
    assert (code, {(p["kind"], p["video"]) for p in result["problems"]}) == (4, {("source_changed", first.stem)})
    code, result = ask("cache", "repair", *options, "--sources", "--device", "cpu")
    assert (code, result["changed_videos"], result["left"]) == (0, [first.stem], []), result["left"]
    assert ask("cache", "verify", *options, "--full", "--sources")[0] == 0


# ---------------------------------------------------------------- leftovers, and the way out


def test_gc_shows_first_and_removes_only_what_is_dead(copy: tuple[Path, list[object]]) -> None:
    store, options = copy
    before = tree(store)
    names = [".shard-9.node-7.12.0123abcd.partial", "notes.txt"]
    for name in names:
        (store / "tokens" / name).write_bytes(b'{"host": "node-8"}')
    code, shown = ask("cache", "gc", *options, "--dry-run", "--host", "node-7")
    assert (code, [o["removed"] for o in shown["orphans"]]) == (0, [True, False])
    assert ask("cache", "gc", *options)[1]["removed"] == 0
    assert ask("cache", "gc", *options, "--host", "node-7")[1]["removed"] == 1
    assert "kept: tokens/notes.txt" in run("cache", "gc", *options).stdout
    assert ask("cache", "gc", *options, "--unplanned")[1]["removed"] == 1
    assert tree(store) == before


def test_copy_copies_once_resumes_and_leaves_damaged_shards_with_exit_code_4(
    copy: tuple[Path, list[object]], tmp_path: Path
) -> None:
    store, _ = copy
    shards = sum(FeatureStore.open(store, name).plan.num_shards for name in ("tokens", "pooled/layer8"))
    code, shown = ask("cache", "copy", store, tmp_path / "copy", "--dry-run")
    assert (code, sum(part["copied"] for part in shown["modalities"])) == (0, shards)
    assert not (tmp_path / "copy").exists()
    code, result = ask("cache", "copy", store, tmp_path / "copy")
    assert (code, sum(part["copied"] for part in result["modalities"]), result["bytes"]) == (0, shards, shown["bytes"])
    assert tree(tmp_path / "copy") == tree(store)
    assert "every shard is there; nothing to do" in run("cache", "copy", store, tmp_path / "copy").stdout
    file = FeatureStore.open(store, "tokens").layout.info.shard_file(0)
    flip_bit(file, 9)
    code, result = ask("cache", "copy", store, tmp_path / "other")
    assert (code, len(result["damaged"])) == (4, 1)
    assert str(file) in result["damaged"][0]
    assert run(*result["next"][0].split()[1:]).exit_code == 4  # the hint works, and names the damage
    assert run("cache", "copy", store, store).exit_code == 2


@pytest.mark.parametrize("part", ["", "3", "0/4", "5/4", "-1/2", "1/0", "1/2/3", "one/two", "1.0/2"])
def test_a_part_that_cannot_be_is_wrong_usage(part: str, made: tuple[Path, list[str]], tmp_path: Path) -> None:
    done = run("extract-clip", *made[1], "--cache", tmp_path / "store", f"--part={part}")
    assert done.exit_code == 2
    assert "expected I/N with I from 1 to N, such as 3/8" in done.stderr


def test_parts_say_plainly_what_the_others_lack(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = ["extract-clip", *made[1], "--cache", tmp_path / "store", "--device", "cpu"]
    done = run(*words, "--part", "2/2")
    assert done.exit_code == 0, done.output
    assert "part 2 of 2 is complete; 1 other part still lacks 3 videos" in " ".join(done.stdout.split())
    code, result = ask(*words, "--part", "1/2")
    assert (code, result["part"], result["videos"], result["other_parts_lack"]) == (0, [1, 2], 3, 0)
    assert "part 2 of 2 is complete; so is 1 other part" in " ".join(run(*words, "--part", "2/2").stdout.split())
    assert "6 of 6 videos cached; nothing to do" in run(*words).stdout


def test_export_writes_tars_and_refuses_an_existing_folder(copy: tuple[Path, list[object]], tmp_path: Path) -> None:
    _, options = copy
    code, result = ask("cache", "export", "--out", tmp_path / "tars", "--modality", "pooled/layer8", *options)
    assert (code, result["videos"], result["modalities"]) == (0, 6, ["pooled/layer8"])
    assert run("cache", "export", "--out", tmp_path / "tars", *options).exit_code == 5
    for wrong in (["--format", "pickle"], ["--modality", "nothing"]):
        assert run("cache", "export", "--out", tmp_path / "more", *wrong, *options).exit_code == 2


@pytest.mark.parametrize("command", [["verify"], ["repair"], ["gc"], ["inspect", "v"], ["export", "--out", "x"]])
def test_a_folder_without_a_store_exits_with_4_and_says_what_makes_one(command: list[str], tmp_path: Path) -> None:
    done: Callable[..., Result] = run
    result = done("cache", *command, "--cache", tmp_path)
    assert result.exit_code == 4
    assert "There is no cache at" in result.stderr
