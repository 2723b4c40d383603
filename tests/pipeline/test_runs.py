"""The run folder: complete, never half-written, and refused to a run of another kind."""

from __future__ import annotations

import getpass
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import presets, runs
from pipeline.errors import ConfigError
from pipeline.overrides import apply, flatten
from pipeline.runs import RunFolder

CONFIG = presets.get("miniature")


def tensors_of(step: int) -> dict[str, Tensor]:
    """Tensors of several kinds that only this step has."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 5, generator=generator)
    return {
        "student.weight": weight,
        "student.half": weight.half(),
        "optimizer.step": torch.tensor(float(step)),
        "rng": generator.get_state(),
        "transposed": weight.T,
        "empty": torch.zeros(0, 4),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "one", CONFIG)


def save(run: RunFolder, *steps: int, **options: Any) -> None:
    for step in steps:
        run.save_checkpoint(step, tensors_of(step), {"step": step, "best": step / 7}, **options)


def folders(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())


# ---------------------------------------------------------------- configuration


def test_the_configuration_is_kept_whole(run: RunFolder) -> None:
    assert RunFolder.open(run.path).config == CONFIG
    kept = json.loads((run.path / "config.json").read_text())
    assert sum(len(section) for section in kept.values() if isinstance(section, dict)) == len(flatten(CONFIG)) - 1


def test_the_same_configuration_opens_the_same_run(run: RunFolder) -> None:
    save(run, 4)
    again = RunFolder.create(run.path, presets.get("miniature"))
    loaded = again.load_latest()
    assert loaded is not None
    assert loaded.step == 4


def test_another_configuration_is_refused_with_the_keys_that_differ(run: RunFolder) -> None:
    other = apply(CONFIG, ["train.lr=0.5", "data.task=scene"])
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(run.path, other)
    text = str(caught.value)
    assert "train.lr: 0.002 there, 0.5 now" in text
    assert "data.task: 'spot' there, 'scene' now" in text
    assert "train.epochs" not in text
    assert "--out" in text
    assert RunFolder.open(run.path).config == CONFIG


def test_a_run_goes_on_though_the_cache_is_read_in_another_way(run: RunFolder) -> None:
    other = apply(CONFIG, ["data.io=pread", "data.reader_threads=5"])
    assert RunFolder.create(run.path, other).config == CONFIG


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"letter\.txt"):
        RunFolder.create(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "file", CONFIG)


def test_results_of_an_extraction_may_lie_in_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "extract-clip.json").write_text("{}")
    assert RunFolder.create(tmp_path, CONFIG).config == CONFIG


def test_a_run_that_is_not_there_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pipeline train-student --out"):
        RunFolder.open(tmp_path / "none")


@pytest.mark.parametrize("text", ["{", "[]", '{"preset": "x", "train": {"unheard_of": 1}}'])
def test_a_damaged_configuration_is_named(run: RunFolder, text: str) -> None:
    (run.path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be used"):
        RunFolder.open(run.path)


def test_the_environment_names_versions_and_nobody(run: RunFolder) -> None:
    text = (run.path / "environment.json").read_text()
    facts = json.loads(text)
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "platform", "cpus", "commit"} <= facts.keys()
    for secret in (str(Path.home()), os.getcwd(), socket.gethostname(), f"/{getpass.getuser()}/"):
        assert secret not in text


def test_resuming_with_other_versions_is_said(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = run.path / "environment.json"
    facts = json.loads(path.read_text())
    facts["packages"]["numpy"] = "0.0.1"
    path.write_text(json.dumps(facts))
    RunFolder.create(run.path, CONFIG)
    assert "numpy (0.0.1 then" in caplog.text


# ---------------------------------------------------------------- metrics


def test_metrics_come_back_as_they_were_logged(run: RunFolder) -> None:
    run.log({"step": 1, "loss": 0.1 + 0.2})
    run.log({"step": 2, "loss": float("nan")})
    assert run.metrics() == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": None}]


def test_a_half_written_line_is_dropped_and_the_next_one_is_whole(run: RunFolder) -> None:
    run.log({"step": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.log({"step": 2})
    assert run.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_resumed_run_forgets_what_it_will_do_again(run: RunFolder) -> None:
    for step in range(1, 6):
        run.log({"step": step})
    run.rewind(3)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_a_run_without_metrics_has_none(run: RunFolder) -> None:
    run.rewind(0)
    assert run.metrics() == []


def test_event_files_can_be_read_by_tensorboard(run: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = run.board(first_step=first)
        for step in steps:
            board.add_scalar("loss", step + 10 * first, step)
        board.close()
        time.sleep(1.1)  # files are named by the second, and read in that order
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(run: RunFolder) -> None:
    state = {"step": 3, "best": 0.1 + 0.2, "nested": {"list": [1, "a", None, True]}}
    run.save_checkpoint(3, tensors_of(3), state)
    loaded = RunFolder.open(run.path).load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.state, loaded.skipped) == (3, state, ())
    assert same(loaded.tensors, tensors_of(3))


def test_tensors_may_share_memory(run: RunFolder) -> None:
    base = torch.arange(6.0)
    run.save_checkpoint(1, {"a": base, "b": base, "c": base[2:4]}, {})
    loaded = run.load_checkpoint("latest").tensors
    assert torch.equal(loaded["a"], base)
    assert torch.equal(loaded["b"], base)
    assert torch.equal(loaded["c"], base[2:4])


def test_a_new_run_has_no_checkpoint(run: RunFolder) -> None:
    assert run.load_latest() is None
    with pytest.raises(ConfigError, match="train first"):
        run.load_checkpoint()


def test_the_newest_two_stay_and_best_and_final(run: RunFolder) -> None:
    save(run, 1)
    save(run, 2, mark=("best",))
    save(run, 3, 4, 5)
    assert folders(run) == ["step-000002", "step-000004", "step-000005"]
    save(run, 6, mark=("best", "final"))
    assert folders(run) == ["step-000005", "step-000006"]


def test_a_checkpoint_is_found_by_name(run: RunFolder) -> None:
    save(run, 1, mark=("best",))
    save(run, 2, 3)
    assert [run.load_checkpoint(name).step for name in ("", "best", "latest", "step-000002")] == [1, 1, 3, 2]
    save(run, 4, mark=("final",))
    assert run.load_checkpoint("final").step == 4


@pytest.mark.parametrize("name", ["step-9", "../checkpoints/step-000001", "/etc", "final", "."])
def test_a_name_that_is_no_checkpoint_is_refused_with_those_there_are(run: RunFolder, name: str) -> None:
    save(run, 1, mark=("best",))
    with pytest.raises(ConfigError, match="there are: latest, best, step-000001"):
        run.load_checkpoint(name)


@pytest.mark.parametrize("harm", ["truncate", "flip", "no state", "half state", "empty", "no tensors"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    run: RunFolder, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1, 2)
    newest = run.checkpoints / "step-000002"
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    raw = tensors.read_bytes()
    if harm == "truncate":
        tensors.write_bytes(raw[:-7])
    elif harm == "flip":
        tensors.write_bytes(raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:])
    elif harm == "no state":
        state.unlink()
    elif harm == "half state":
        state.write_text(state.read_text()[:20])
    elif harm == "empty":
        tensors.write_bytes(b"")
    else:
        tensors.unlink()
    loaded = run.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    assert same(loaded.tensors, tensors_of(1))
    assert "step-000002 is damaged" in loaded.skipped[0]
    assert "step-000002 is damaged" in caplog.text


def test_when_every_checkpoint_is_damaged_the_run_starts_over_and_says_so(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    (run.checkpoints / "step-000001" / "state.json").unlink()
    assert run.load_latest() is None
    assert "starting from the beginning" in caplog.text


def test_a_checkpoint_without_its_marker_does_not_count(run: RunFolder) -> None:
    save(run, 1)
    marker = (run.checkpoints / "latest.json").read_bytes()
    save(run, 2)
    (run.checkpoints / "latest.json").write_bytes(marker)  # killed between rename and marker
    loaded = run.load_latest()
    assert loaded is not None
    assert loaded.step == 1
    save(run, 2)
    assert same(run.load_checkpoint("latest").tensors, tensors_of(2))


def test_a_lost_marker_is_no_lost_run(run: RunFolder) -> None:
    save(run, 1, 2)
    (run.checkpoints / "latest.json").write_text("{")
    loaded = run.load_latest()
    assert loaded is not None
    assert loaded.step == 2


def test_what_lies_beyond_an_older_start_goes_away(run: RunFolder) -> None:
    save(run, 1, 2, 3)
    (run.checkpoints / "step-000003" / "state.json").unlink()
    assert run.load_latest() is not None
    run.save_checkpoint(3, tensors_of(30), {})
    assert torch.equal(run.load_checkpoint("latest").tensors["student.weight"], tensors_of(30)["student.weight"])
    assert folders(run) == ["step-000002", "step-000003"]


def test_nothing_in_a_checkpoint_is_a_pickle(run: RunFolder) -> None:
    save(run, 1)
    assert {path.suffix for path in run.checkpoints.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_a_full_disk_leaves_the_older_checkpoint_and_no_litter(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        save(run, 2)
    monkeypatch.undo()
    assert folders(run) == ["step-000001"]
    assert run.load_checkpoint("latest").step == 1


SAVER = """
import sys, torch
from pathlib import Path
from pipeline.runs import RunFolder
run = RunFolder.open(Path(sys.argv[1]))
latest = run.load_latest()
step = latest.step if latest else 0
print("ready", step, flush=True)
while True:
    step += 1
    run.log({"step": step})
    tensors = {"a": torch.full((200_000,), float(step)), "b": torch.full((7,), step, dtype=torch.int64)}
    run.save_checkpoint(step, tensors, {"step": step}, mark=("best",) if step % 3 == 0 else ())
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_loses_no_saved_checkpoint(run: RunFolder) -> None:
    moments = random.Random(0)
    saved = 0
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        word, step = child.stdout.readline().split()
        assert (word, int(step) >= saved) == ("ready", True)
        time.sleep(moments.uniform(0.02, 0.5))
        child.send_signal(signal.SIGKILL)
        printed = child.communicate()[0].splitlines()
        saved = max([saved, int(step), *map(int, printed)])
        loaded = run.load_latest()
        assert loaded is None if saved == 0 else loaded is not None
        if loaded is not None:
            assert loaded.skipped == ()
            assert loaded.step in (saved, saved + 1)
            assert loaded.state == {"step": loaded.step}
            assert torch.equal(loaded.tensors["a"], torch.full((200_000,), float(loaded.step)))
            assert torch.equal(loaded.tensors["b"], torch.full((7,), loaded.step))
            assert {record["step"] for record in run.metrics()} >= set(range(1, loaded.step + 1))
    assert saved > 8
