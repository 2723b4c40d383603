"""Runs against each other, from their predictions files alone; and what is said of missing samples."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import presets, results
from pipeline.errors import ConfigError
from pipeline.inputs import refuse_leaks
from pipeline.overrides import apply
from pipeline.runs import RunFolder
from pipeline.scoring import compare, held_out_of, report, worst
from stages.config import DataConfig
from stages.data.samples import Availability
from stages.decode.evaluate import line_of
from stages.decode.metrics import Prediction
from stages.decode.statistics import paired
from stages.types import Sample

PREDICTIONS = [Prediction(f"s{i}", f"v{i // 3}", "scene", "what?", "bar", ("bar",)) for i in range(60)]


def answered(folder: Path, share: float, *, seed: int, sets: tuple[str, ...] = (), number: int = 60) -> Path:
    """A run folder whose answers are right with chance ``share``."""
    RunFolder.create(folder, apply(presets.miniature(), [f"train.seed={seed}", *sets]))
    rng = random.Random(f"{share}{seed}")
    said = [replace(p, beams=("bar",) if rng.random() < share else ("road",)) for p in PREDICTIONS[:number]]
    rng.shuffle(said)
    (folder / "predictions.jsonl").write_bytes(b"".join(map(line_of, said)))
    return folder


def right(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    by_id = {line["sample_id"]: int(line["beams"] == ["bar"]) for line in lines}
    return np.array([by_id[key] for key in sorted(by_id)])


def test_seeds_of_one_setting_are_one_variant_and_the_test_is_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = [answered(tmp_path / f"low{s}", 0.3, seed=s, sets=("train.lambda_kd=0",)) for s in (0, 1, 2)]
    high = [answered(tmp_path / f"high{s}", 0.8, seed=s) for s in (2, 0, 1)]
    result = compare([*low, *high], split="test")
    assert [(v["name"], v["seeds"]) for v in result["variants"]] == [
        ("low0 (3 seeds)", [0, 1, 2]),
        ("high2 (3 seeds)", [2, 0, 1]),
    ]
    a, b = np.array([right(f) for f in low]), np.array([right(f) for f in (high[1], high[2], high[0])])
    videos = [p.video_id for p in sorted(PREDICTIONS, key=lambda p: p.sample_id)]
    expected = paired(a, b, videos, same_seeds=True).to_json()
    (pair,) = result["pairs"]
    assert {key: pair[key] for key in expected} == expected
    assert pair["p_holm"] == pair["p"] < 0.01
    assert result["differing"] == {"train.lambda_kd": [0.0, 1.0]}
    results.show_comparison(result)
    shown = capsys.readouterr().out
    assert "high2 (3 seeds)" in shown
    assert "train.lambda_kd: 0.0 | 1.0" in shown
    assert "60 samples of 20 videos" in shown


def test_without_alignment_the_teachers_settings_make_no_variant(tmp_path: Path) -> None:
    low = [
        answered(tmp_path / f"low{s}", 0.3, seed=s, sets=("train.lambda_kd=0", *sets))
        for s, sets in enumerate([(), ("align.levels=all",), ("teacher.grid=2",)])
    ]
    result = compare([*low, answered(tmp_path / "high", 0.8, seed=0, sets=("align.levels=13",))], split="test")
    assert [v["seeds"] for v in result["variants"]] == [[0, 1, 2], [0]]
    assert result["differing"] == {"train.lambda_kd": [0.0, 1.0]}


def test_only_samples_that_all_have_answered_count(tmp_path: Path) -> None:
    whole = answered(tmp_path / "whole", 0.5, seed=0)
    part = answered(tmp_path / "part", 0.5, seed=0, sets=("train.lr=0.5",), number=42)
    result = compare([whole, part], split="test")
    assert (result["n"], result["videos"], result["left_out"]) == (42, 14, 18)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = answered(tmp_path / "one", 0.5, seed=0)
    with pytest.raises(ConfigError, match="two runs that differ in more than their seed"):
        compare([one, answered(tmp_path / "seed", 0.5, seed=1)], split="test")
    with pytest.raises(ConfigError, match="give it once"):
        compare([one, one], split="test")
    other = answered(tmp_path / "other", 0.5, seed=0, sets=("train.lr=0.5",))
    with pytest.raises(ConfigError, match=r"predictions-val\.jsonl is not there"):
        compare([one, other], split="val")
    text = (other / "predictions.jsonl").read_text()
    (other / "predictions.jsonl").write_text(text.replace('"answer": "bar"', '"answer": "inn"'))
    with pytest.raises(ConfigError, match="60 of 60 samples, such as 's0', are another question"):
        compare([one, other], split="test")
    (other / "predictions.jsonl").write_text(text.replace('"sample_id": "s', '"sample_id": "t'))
    with pytest.raises(ConfigError, match="no sample in common"):
        compare([one, other], split="test")


class Scenes:
    """What ``report`` asks a dataset."""

    answer_rule, splits, warnings = "exact", ("test",), ()

    def samples(self, _split: str) -> list[Sample]:
        return [
            Sample(p.sample_id, p.video_id, np.zeros((1, 2), int), p.prompt, p.answer, p.group) for p in PREDICTIONS
        ]

    def published_n(self, split: str) -> int | None:
        return 218 if split == "test" else None


def test_missing_samples_are_named_and_the_worst_case_counts_them_as_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = answered(tmp_path / "run", 0.5, seed=0, number=48)
    samples = Scenes().samples("test")
    reasons = {f"v{i}": "tokens: refused when it was read" for i in range(16, 20)}
    found = Availability(tuple(samples[:48]), reasons, 12)
    result = report(Scenes(), samples, found, "test", folder / "predictions.jsonl")
    correct = int(right(folder).sum())
    assert (result["n"], result["correct"], result["matches_published_n"]) == (48, correct, False)
    assert result["worst_case"] == {"n": 218, "correct": correct, "top1": correct / 218}
    assert result["missing_samples"] == 218 - 48  # 12 of the annotations, the rest is not even annotated
    assert result["missing_ids"] == [f"s{i}" for i in range(48, 60)]
    results.show_evaluation(result)
    shown = capsys.readouterr().out
    assert f"{correct} of 218" in shown
    assert "missing: v17: tokens: refused" in shown
    assert "not the published 218" in shown


def test_training_on_tasks_that_leak_is_refused_unless_asked_for() -> None:
    config = apply(presets.get("lvu-scene"), ["data.task=scene,genre"])
    refuse_leaks(config, ())
    with pytest.raises(ConfigError, match="204 test videos of one task are training videos of another, such as v0"):
        refuse_leaks(config, [f"v{i}" for i in range(204)])
    refuse_leaks(apply(config, ["data.allow_leak=true"]), ["v0"])


# ---------------------------------------------------------------- held out or not


def entries(path: Path, *groups: tuple[str, str, range]) -> Path:
    """Questions in the QA layout: (subset or nothing, video prefix, numbers)."""
    rows = {
        f"{subset}{prefix}{n}": {"video": f"{prefix}{n // 2}", "question": f"what is {n}?", "answer": "bar"}
        | {"frame_length": 60}
        | ({"subset": subset} if subset else {})
        for subset, prefix, numbers in groups
        for n in numbers
    }
    path.write_text(json.dumps(rows))
    return path


def clips(annotations: Path) -> DataConfig:
    return DataConfig(name="clips", annotations=str(annotations), num_frames=3)


def test_what_a_split_shares_with_training_is_counted_by_questions_and_videos(tmp_path: Path) -> None:
    same = held_out_of(clips(entries(tmp_path / "all.json", ("", "v", range(6)))), "test")
    assert (same.held_out, same.shared) == (False, {"train": (6, 3), "val": (6, 3)})
    assert "all 6 test questions are in train too" in str(same)
    videos = entries(
        tmp_path / "some.json", ("train", "v", range(4)), ("val", "w", range(4)), ("test", "v", range(2, 8))
    )
    part = held_out_of(clips(videos), "test")
    assert part.shared == {"train": (2, 1)}
    assert "1 of the 3 test videos are in train too, and 2 of its 6 questions" in str(part)
    apart = entries(tmp_path / "apart.json", ("train", "u", range(4)), ("val", "w", range(4)), ("test", "v", range(6)))
    good = held_out_of(clips(apart), "test")
    assert (good.held_out, str(good)) == (True, "")
    gone = held_out_of(clips(tmp_path / "gone.json"), "test")
    assert gone.held_out is None
    assert "could not be checked" in str(gone)
    assert [worst(parts, "test") for parts in ([good, part, gone], [good, gone], [good])] == [part, gone, good]
    assert worst([], "test").held_out is None


def test_comparing_runs_that_were_tested_on_their_training_questions_says_so_first_and_tests_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = entries(tmp_path / "all.json", ("", "v", range(6)))
    for name, share, weight in (("low", 0.1, 0), ("high", 0.9, 1)):
        sets = ("data.num_frames=3", f"data.annotations={annotations}", f"train.lambda_kd={weight}")
        answered(tmp_path / name, share, seed=0, sets=sets)
    result = compare([tmp_path / "low", tmp_path / "high"], split="test")
    assert next(iter(result)) == "held_out"
    assert result["held_out"]["held_out"] is False
    results.show_comparison(result)
    shown = capsys.readouterr().out
    assert shown.startswith("Not held out: all 6 test questions are in train too")
    assert "p (Holm)" not in shown
    assert "Differences on questions that are not held out" in shown


def test_a_comparison_says_what_it_can_show_and_what_other_differences_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = entries(
        tmp_path / "a.json", ("train", "u", range(2)), ("val", "w", range(2)), ("test", "v", range(6))
    )
    for seed in range(5):
        for name, share, weight in (("low", 0.5, 0), ("high", 0.6, 1)):
            sets = (f"data.annotations={annotations}", f"train.lambda_kd={weight}")
            answered(tmp_path / f"{name}{seed}", share, seed=seed, sets=sets)
    result = compare(sorted(tmp_path.glob("*[0-4]")), split="test")
    (pair,) = result["pairs"]
    assert pair["power"]["detectable_over_seeds"] is None
    assert pair["power"]["wanted"]["5"]["videos"] > 20
    assert pair["seed_p"] >= 0.0625
    results.show_comparison(result)
    shown = capsys.readouterr().out
    assert not shown.startswith("Not held out")
    assert "p over seeds cannot fall below 0.0625 with so few seeds; it takes 6 to fall below 0.05." in shown
    assert f"{100 * pair['power']['detectable_over_videos']:.1f} points" in shown
