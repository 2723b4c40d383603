"""``pipeline ablate`` against the commands that it stands for: real caches, real runs, real kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache_schema.errors import CacheMismatch
from cache_schema.store import FeatureStore
from pipeline import compose, presets, training
from pipeline.ablate import ablate, free_memory
from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger
from pipeline.overrides import apply
from pipeline.progress import clock
from pipeline.report.answer import result_of
from pipeline.report.cost import cost_of
from pipeline.report.read import read_studies
from pipeline.runs import RunFolder
from pipeline.scoring import compare
from pipeline.variants import make_variants, parse_seeds, parse_vary
from stages.config import PipelineConfig
from stages.train import diagnostics, grid
from tests.pipeline.conftest import QUIET, options_of

Configure = Callable[..., PipelineConfig]
MINIATURE = presets.miniature()


@pytest.fixture(scope="module")
def settings(seeded: list[str]) -> list[str]:
    """Four steps in two epochs; validation after each."""
    more = ("data.task=scene", "student.dropout=0.1", "train.select=best_val", "train.epochs=2", "train.micro_batch=3")
    return [*seeded, *more]


@pytest.fixture(scope="module")
def configure(settings: list[str]) -> Configure:
    return lambda *sets: apply(presets.miniature(), [*settings, *sets])


@pytest.fixture
def cache(seeded_cache: Path) -> Path:
    return seeded_cache


def run(config: PipelineConfig, cache: Path, out: Path, *, memory: int | None = None, **what: Any) -> dict[str, Any]:
    variants, _ = make_variants(config, **what)
    return ablate(variants, cache=cache, out=out, memory=memory, **QUIET)


def alone(config: PipelineConfig, cache: Path, out: Path) -> dict[str, Any]:
    """What two commands leave and say."""
    compose.train(config, cache=cache, out=out, **QUIET)
    return compose.evaluate(out, cache=cache, split="test", checkpoint=None, **QUIET)


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit, but for times and versions."""
    assert RunFolder.open(folder).config == RunFolder.open(other).config
    assert RunFolder.open(folder).metrics() == RunFolder.open(other).metrics()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir())
    for name in ("best", "final"):
        one, two = (RunFolder.open(path).load_checkpoint(name) for path in (folder, other))
        assert (one.step, one.state) == (two.step, two.state)
        assert one.tensors.keys() == two.tensors.keys()
        assert [key for key in one.tensors if not torch.equal(one.tensors[key], two.tensors[key])] == []
    assert (folder / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()


# ---------------------------------------------------------------- against the runs alone


@pytest.fixture(scope="module")
def grid_of_nine(
    configure: Configure, seeded_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Three λ with two ways to weigh and two seeds; for λ = 0 the ways are one: 5 arms, 10 runs."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    vary = ["train.lambda_kd=0,1,5", "align.weights=adaptive,uniform"]
    return out, run(configure(), seeded_cache, out, vary=vary, seeds="0,3")


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("lambda_kd=0_weights=adaptive_seed=0", ["train.lambda_kd=0", "train.seed=0"]),
        ("lambda_kd=5_weights=adaptive_seed=0", ["train.lambda_kd=5", "train.seed=0"]),
        ("lambda_kd=1_weights=uniform_seed=3", ["align.weights=uniform", "train.seed=3"]),
    ],
)
def test_a_variant_leaves_the_run_folder_that_two_commands_would_have_left(
    grid_of_nine: tuple[Path, Any], configure: Configure, cache: Path, tmp_path: Path, name: str, sets: list[str]
) -> None:
    out, result = grid_of_nine
    scored = alone(configure(*sets), cache, tmp_path / "solo")
    assert_same_run(out / name, tmp_path / "solo")
    provenances = [RunFolder.open(folder).provenance for folder in (out / name, tmp_path / "solo")]
    assert provenances[0] is not None
    assert provenances[0].digest == getattr(provenances[1], "digest", None)
    (row,) = [row for row in result["variants"] if row["variant"] == name]
    told = (row["k"], row["n"], row["accuracy"], row["interval"], row["by_video"])
    assert told == (scored["correct"], scored["n"], scored["top1"], scored["interval"], scored["by_video"])
    assert (row["status"], row["step"], row["steps"]) == ("done", 4, 4)


def test_the_table_holds_every_variant_and_every_arm_over_its_seeds(grid_of_nine: tuple[Path, Any]) -> None:
    out, result = grid_of_nine
    assert result["done"] == len(result["variants"]) == 10
    assert len(result["arms"]) == 5
    assert (result["rounds"], result["llm_loads"]) == (2, 1)  # one pass a seed
    kept = json.loads((out / "ablation.json").read_text())
    assert kept["variants"] == result["variants"]
    for arm, part in kept["arms"].items():
        rows = [row for row in kept["variants"] if row["arm"] == arm]
        assert part["seeds"] == [0, 3]
        assert part["per_seed"] == [row["accuracy"] for row in rows]
        assert part["accuracy"] == pytest.approx(np.mean(part["per_seed"]))
        assert (part["k"], part["n"]) == (sum(row["k"] for row in rows), sum(row["n"] for row in rows))
        assert part["interval"][0] <= part["accuracy"] <= part["interval"][1]
        assert part["seed_sd"] == pytest.approx(np.std(part["per_seed"], ddof=1))


def test_the_other_commands_read_what_it_leaves(grid_of_nine: tuple[Path, Any]) -> None:
    out, result = grid_of_nine
    told = compare(sorted(path for path in out.iterdir() if path.is_dir()), split="test")
    assert len(told["variants"]) == 5
    assert all(sorted(variant["seeds"]) == [0, 3] for variant in told["variants"])
    assert sorted(v["top1"] for v in told["variants"]) == pytest.approx(
        sorted(part["accuracy"] for part in result["arms"].values())
    )


def test_students_of_a_pass_share_its_cost(grid_of_nine: tuple[Path, Any], configure: Configure, cache: Path) -> None:
    out, result = grid_of_nine
    spent = [s for row in result["variants"] for s in RunFolder.open(out / row["variant"]).sessions()]
    trained = [session for session in spent if session["command"] == "ablate"]
    assert [(s["first_step"], s["steps"], s["students"]) for s in trained] == [(0, 4, 5)] * 10
    frame = sum(FeatureStore.open(cache, name).spec.frame_bytes for name in ("tokens", "pooled/layer8"))
    samples = 2 * 4 * 4  # two passes of four steps of four samples, each read once for five students
    assert sum(s["bytes_read"] for s in trained) == pytest.approx(samples * configure().data.num_frames * frame)
    assert 0 < sum(s["seconds"] for s in trained) < result["seconds"]
    assert [session["command"] for session in spent if session not in trained] == ["evaluate"] * 10


def test_the_report_shows_every_arm_with_its_seeds_and_what_they_cost(
    grid_of_nine: tuple[Path, Any], tmp_path: Path
) -> None:
    out, result = grid_of_nine
    done = CliRunner().invoke(app, ["report", str(out), "--videos", "0", "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "10 runs on one page" in done.stdout
    (study,) = read_studies([out])
    scores = {
        (v.lambda_kd, v.config.align.weights if v.lambda_kd else "adaptive"): result_of(study).of(v)
        for v in study.variants
        if v.config is not None
    }
    for arm, part in result["arms"].items():
        value, weights = re.fullmatch(r"lambda_kd=(\d)_weights=(\w+)", arm).groups()  # type: ignore[union-attr]
        score = scores.pop((float(value), weights))
        assert score is not None
        assert (score.per_seed, score.top1) == (tuple(part["per_seed"]), pytest.approx(part["accuracy"]))
    assert scores == {}
    page = (tmp_path / "page.html").read_text()
    assert all(variant.label in page for variant in study.variants)
    seconds = cost_of(study, None).seconds
    assert seconds is not None
    assert f"<td>{clock(seconds)}</td>" in page


def test_a_second_start_does_nothing_and_says_so(
    grid_of_nine: tuple[Path, Any], settings: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = grid_of_nine
    before = (out / "ablation.json").read_text()
    monkeypatch.setattr(training, "build_decoder", lambda *_: pytest.fail("loads the language model"))
    words = [
        "ablate",
        *options_of(settings),
        "--cache",
        str(cache),
        "--out",
        str(out),
        "--seeds",
        "0,3",
        "--device",
        "cpu",
    ]
    vary = ["--vary", "train.lambda_kd=0,1,5", "--vary", "align.weights=adaptive,uniform"]
    done = CliRunner().invoke(app, [*words, *vary], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "10 of 10 variants were done before; nothing to do" in done.stdout
    assert "left out: lambda_kd=0_weights=uniform_seed=0" in done.stderr
    assert (out / "ablation.json").read_text() == before
    shown = CliRunner().invoke(app, ["ablate-status", str(out)], env={"COLUMNS": "120"})
    assert len(re.findall(r"^ +lambda_kd=", shown.stdout, re.MULTILINE)) == 5


def test_more_seeds_are_added_to_what_is_there(configure: Configure, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(configure(), cache, out, vary=["train.lambda_kd=0,1"], seeds="0")
    first = Ledger.open(out).rows
    result = run(configure(), cache, out, vary=["train.lambda_kd=1"], seeds="0-1")
    assert result["done_before"] == 1
    assert [row["variant"] for row in result["variants"]] == [*first, "lambda_kd=1_seed=1"]
    assert result["arms"]["lambda_kd=1"]["seeds"] == [0, 1]
    with pytest.raises(ConfigError, match=r"train.lr: \S+ there, 0.1 now"):
        run(configure("train.lr=0.1"), cache, out, vary=["train.lambda_kd=1"], seeds="2,0")
    assert not (out / "lambda_kd=1_seed=2" / "checkpoints" / "latest.json").exists()


def test_val_and_test_are_read_once_for_all_students_and_training_batches_too(
    configure: Configure, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = FeatureStore.read

    def counted(self: FeatureStore, video: str, *args: Any, **options: Any) -> Any:
        reads.append(f"{self.modality} {video}")
        return original(self, video, *args, **options)

    monkeypatch.setattr(FeatureStore, "read", counted)
    monkeypatch.setattr(diagnostics, "probe_due", lambda *_, **__: False)  # each looks at its own probe samples
    counts = []
    for lambdas in ("1", "1,2,3"):
        reads.clear()
        run(configure(), cache, tmp_path / lambdas, vary=[f"train.lambda_kd={lambdas}"], seeds="0")
        counts.append(len(reads))
    # Sizing a student before the start takes one micro-batch, whatever their number.
    assert counts[0] == counts[1]


def test_memory_cuts_a_pass_into_rounds_and_changes_no_number(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    whole = run(configure(), cache, tmp_path / "whole", vary=["train.lambda_kd=1,2,3"], seeds="0")
    memory = whole["memory"]
    room = (memory["per_step"] + int(2.5 * memory["per_student"])) * 4 // 3 + 4
    cut = run(configure(), cache, tmp_path / "cut", vary=["train.lambda_kd=1,2,3"], seeds="0", memory=room)
    assert (whole["rounds"], cut["rounds"], cut["llm_loads"]) == (1, 2, 1)
    tight = run(configure(), cache, tmp_path / "tight", vary=["train.lambda_kd=1,2"], seeds="0", memory=1000)
    assert tight["rounds"] == 2
    for name in ("lambda_kd=1_seed=0", "lambda_kd=2_seed=0"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "cut" / name)
        assert_same_run(tmp_path / "whole" / name, tmp_path / "tight" / name)


def test_the_plan_knows_what_a_student_holds(configure: Configure, cache: Path, tmp_path: Path) -> None:
    """Weights and two moments, as a finished run has them on disk."""
    result = run(configure(), cache, tmp_path / "out", vary=["train.lambda_kd=1"])
    saved = RunFolder.open(tmp_path / "out" / "lambda_kd=1_seed=42").load_checkpoint("final").tensors
    steps = sum(tensor.nbytes for name, tensor in saved.items() if name.startswith("optimizer.step."))
    # A parameter that the loss does not reach (the last block's feed-forward of the text) gets no moments.
    assert 0 <= result["memory"]["per_student"] - (sum(t.nbytes for t in saved.values()) - steps) < 0.1 * steps * 1e4


# ---------------------------------------------------------------- what goes wrong


def test_a_variant_that_diverges_is_dropped_with_its_reason_and_stays_dropped(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    vary = {"vary": ["train.lr=1e-3,1e30"], "seeds": "0"}
    config = configure("train.warmup_steps=0")
    result = run(config, cache, tmp_path / "out", **vary)
    good, bad = result["variants"]
    assert (good["status"], bad["status"], bad["kind"], bad["step"]) == ("done", "dropped", "diverged", 1)
    assert "lower train.lr" in bad["reason"]
    assert list(result["arms"]) == ["lr=1e-3"]
    alone(apply(config, ["train.lr=1e-3", "train.seed=0"]), cache, tmp_path / "solo")
    assert_same_run(tmp_path / "out" / "lr=1e-3_seed=0", tmp_path / "solo")
    again = run(config, cache, tmp_path / "out", **vary)
    assert (again["done_before"], again["dropped"], again["llm_loads"]) == (2, 1, 0)


def test_a_variant_that_is_too_large_is_dropped_and_tried_again_by_the_next_start(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    """A real failed allocation: a feed-forward layer of 2^46 weights."""
    vary = {"vary": ["student.intermediate_size=128,1099511627776"], "seeds": "0"}
    result = run(configure(), cache, tmp_path / "out", **vary)
    good, bad = result["variants"]
    assert (good["status"], bad["status"], bad["kind"]) == ("done", "dropped", "memory")
    assert "out of memory" in bad["reason"]
    again = run(configure(), cache, tmp_path / "out", **vary)
    assert (again["done_before"], again["dropped"]) == (1, 1)


def test_dropped_variants_exit_with_3_and_are_named(settings: list[str], cache: Path, tmp_path: Path) -> None:
    words = ["ablate", *options_of([*settings, "train.warmup_steps=0"]), "--cache", str(cache), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--vary", "train.lr=1e30"])
    assert done.exit_code == 3, done.output
    assert "dropped: lr=1e30_seed=42: loss became" in done.stdout


def test_a_wrong_cache_or_a_folder_of_somebody_else_is_refused_before_anything_is_trained(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\)"):
        run(configure(), cache, tmp_path / "mine", vary=["train.lambda_kd=0,1"])
    with pytest.raises(CacheMismatch, match="was made with other settings"):
        run(configure(), cache, tmp_path / "out", vary=["clip.layer=5,4"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="holds no ablation"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_ablation_goes_on_and_ends_bit_for_bit_the_same(
    settings: list[str], configure: Configure, cache: Path, tmp_path: Path, signal_number: int
) -> None:
    out, sets = tmp_path / "out", [*settings, "train.max_steps=16", "train.epochs=100", "train.save_every=1"]
    words = [*options_of(sets), "--cache", str(cache), "--out", str(out), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "pipeline.cli", "ablate", *words, "--vary", "train.lambda_kd=0,1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    marker = out / "lambda_kd=1_seed=42" / "checkpoints" / "latest.json"
    wait_for(lambda: marker.exists() and step_of(marker) >= 3, child)
    status = CliRunner().invoke(app, ["ablate-status", str(out), "--json"])
    child.send_signal(signal_number)
    child.communicate()
    assert child.returncode == (75 if signal_number == signal.SIGTERM else -signal.SIGKILL)
    rows = json.loads(status.stdout)["variants"]
    assert [(row["status"], row["steps"]) for row in rows] == [("waiting", 16)] * 2
    assert all(3 - 1 <= row["step"] < 16 for row in rows)
    config = apply(configure(), sets)
    result = run(config, cache, out, vary=["train.lambda_kd=0,1"])
    assert result["done"] == 2
    alone(apply(config, ["train.lambda_kd=1"]), cache, tmp_path / "solo")
    assert_same_run(out / "lambda_kd=1_seed=42", tmp_path / "solo")


def step_of(marker: Path) -> int:
    return int(json.loads(marker.read_text())["step"])


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "the child ended"
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- the paper's studies


def test_the_matched_arm_weighs_as_much_as_the_adaptive_one_did(
    configure: Configure, cache: Path, tmp_path: Path
) -> None:
    result = run(configure(), cache, tmp_path, study="weights", seeds="0,1")
    assert [part["seeds"] for part in result["arms"].values()] == [[0, 1]] * 3
    for seed in (0, 1):
        metrics = RunFolder.open(tmp_path / f"weights=adaptive_seed={seed}").metrics()
        total = np.mean([sum(value for key, value in r.items() if key.startswith("w/")) for r in metrics])
        matched = RunFolder.open(tmp_path / f"weights=matched_seed={seed}").config.align
        assert matched.weights == "uniform"
        assert matched.uniform_weight * len(matched.levels) == pytest.approx(total, abs=1e-5)
    (study,) = read_studies([tmp_path])
    labels = {(v.label, tuple(run.seed for run in v.runs)) for v in study.variants}
    assert len(labels) == 3
    assert ("weights uniform, weight by seed", (0, 1)) in labels
    average = RunFolder.open(tmp_path / "weights=average_seed=0").config.align
    assert average.uniform_weight == pytest.approx(1 / 3, rel=1e-5)
    assert run(configure(), cache, tmp_path, study="weights", seeds="0,1")["done_before"] == 6


def test_studies_vary_what_the_paper_varies() -> None:
    lambdas = make_variants(MINIATURE, study="lambda", seeds="0-4")[0]
    assert [v.config.train.lambda_kd for v in lambdas if v.seed == 0] == [0, 0.1, 0.5, 1, 2, 5, 10]
    levels = make_variants(MINIATURE, study="levels")[0]
    expected = [tuple(range(1, 14)), (13,), tuple(range(1, 8)), tuple(range(8, 14))]
    assert [v.config.align.levels for v in levels] == expected
    assert len(lambdas) == 35
    weights = make_variants(presets.get("lvu-relationship"), study="weights")[0]
    assert [(v.config.align.weights, v.needs) for v in weights] == [
        ("adaptive", None),
        ("uniform", "weights=adaptive_seed=42"),
        ("uniform", None),
    ]


# ---------------------------------------------------------------- what is typed


def test_a_grid_is_all_with_all_and_zip_pairs_one_by_one() -> None:
    vary = ["train.lambda_kd=1,2", "align.levels=all,[1,5]"]
    names = [v.name for v in make_variants(MINIATURE, vary=vary, seeds="0,7")[0]]
    assert names == [f"lambda_kd={x}_levels={y}_seed={s}" for x in "12" for y in ("all", "1,5") for s in (0, 7)]
    zipped = make_variants(MINIATURE, vary=vary, zipped=True)[0]
    assert [(v.config.train.lambda_kd, v.config.align.levels) for v in zipped] == [
        (1, tuple(range(1, 14))),
        (2, (1, 5)),
    ]


def test_a_name_is_a_folder_whatever_the_value() -> None:
    vary = ["student.init=seed:0,../../etc/passwd,../..-etc/passwd", "clip.weights=a b", "teacher.weights=x"]
    variants, _ = make_variants(MINIATURE, vary=vary)
    names = [v.name for v in variants]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_.,=+-]+", name) and ".." not in name for name in names)
    assert "clip.weights=a-b" in names[0]


def test_what_lambda_zero_cannot_feel_is_trained_once() -> None:
    variants, notes = make_variants(MINIATURE, vary=["train.lambda_kd=0,1", "align.levels=13,8-13,all"])
    assert [v.arm for v in variants if v.config.train.lambda_kd == 0] == ["lambda_kd=0_levels=13"]
    assert len(variants) == 4
    assert "lambda_kd=0_levels=8-13_seed=42" in notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say what varies"),
        ({"vary": ["train.lr=1"], "study": "lambda"}, "one of the two"),
        ({"study": "lamda"}, "known: lambda, levels, weights"),
        ({"vary": ["train.lr"]}, "expected key=value,value"),
        ({"vary": ["train.lr="]}, "expected key=value,value"),
        ({"vary": ["train.lrr=1"]}, "did you mean train.lr"),
        ({"vary": ["train.lr=1,fast"]}, "lr=fast: train.lr: expected a number > 0, got 'fast'"),
        ({"vary": ["align.levels=14"]}, "align.levels: 14 is above 13"),
        ({"vary": ["train.seed=1,2"]}, "--seeds 0-4"),
        ({"vary": ["train.lr=1,1"]}, "twice"),
        ({"vary": ["align.levels=13,13-13"]}, "are the same run"),
        ({"vary": ["train.lr=1", "train.lr=2"]}, "names train.lr twice"),
        ({"vary": ["train.lr=1,2", "train.lambda_kd=1"], "zipped": True}, "train.lr has 2, train.lambda_kd has 1"),
        ({"vary": ["train.lr=1"], "seeds": "4-0"}, "expected numbers and ranges"),
        ({"vary": ["train.lr=1"], "seeds": "1,0-2"}, "names a seed twice"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_variants(MINIATURE, **options)


def test_values_and_seeds_as_they_are_typed() -> None:
    assert parse_vary('a.b=1, [1,2],"x,y",') == ("a.b", ("1", "[1,2]", '"x,y"'))
    assert parse_seeds("0-2,7") == (0, 1, 2, 7)


def test_what_is_free_is_part_of_what_there_is() -> None:
    assert 1 << 20 < free_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_rounds_are_as_full_as_memory_allows() -> None:
    assert grid.plan_rounds([3, 3, 3, 3, 3], step=4, limit=10) == [[0, 1], [2, 3], [4]]
    assert grid.plan_rounds([3, 9, 1, 1], step=4, limit=10) == [[0], [1], [2, 3]]
    assert grid.plan_rounds([], step=4, limit=10) == []


def test_a_dry_run_counts_without_a_cache_and_makes_nothing(settings: list[str], tmp_path: Path) -> None:
    words = ["ablate", *options_of(settings), "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    vary = ["--vary", "train.lambda_kd=0,1,2,3", "--seeds", "0-1", "--dry-run"]
    result = json.loads(CliRunner().invoke(app, [*words, *vary, "--json"]).stdout)
    assert (result["variants"], result["passes"], result["students_in_a_pass"]) == (8, 2, 4)
    assert result["steps"] == 8 * 4
    alone = result["bytes_read_one_by_one"] / result["bytes_read_in_training"]
    assert 3.9 < alone <= 4  # the run without a teacher reads a little less
    assert result["bytes_of_students_in_a_pass"] > 4 * 100_000
    assert "Variants: lambda_kd=0_seed=0, " in CliRunner().invoke(app, [*words, *vary]).stdout
    assert not list(tmp_path.iterdir())
