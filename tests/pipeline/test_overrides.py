"""``--set``: what is given is what is set, and what cannot be set is explained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import presets
from pipeline.errors import ConfigError
from pipeline.overrides import apply, flatten, nearest, validate
from stages.config import PipelineConfig

BASE = PipelineConfig(preset="test")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data.videos": TEXT,
    "decode.prompt_template": TEXT,
    "data.source": st.sampled_from(["files", "frame_folders", "webdataset"]),
    "data.allow_missing": st.booleans(),
    "data.draw_seed": st.integers(-(2**31), 2**31),
    "train.lr": st.floats(1e-9, 10),
    "decode.length_penalty": st.floats(allow_nan=False, allow_infinity=False),
    "train.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list),
    "teacher.layers": st.lists(st.integers(1, 28), min_size=1, max_size=5).map(lambda layers: [8, *layers]),
    "align.frames": st.one_of(st.sampled_from(["all", "last"]), st.integers(1, 50)),
}


def refusal(*sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply(BASE, sets)
    return str(caught.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_values_written_as_json_come_back(values: dict[str, Any]) -> None:
    config = apply(BASE, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert flatten(config) == flatten(BASE) | values


@settings(deadline=None)
@given(TEXT)
def test_text_without_quotes_is_taken_as_it_is(text: str) -> None:
    try:
        if isinstance(json.loads(text), str):
            return  # a quoted JSON string is unquoted
    except ValueError:
        pass
    assert apply(BASE, [f"data.videos={text}"]).data.videos == text


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_setting_of_every_preset_can_be_typed(name: str) -> None:
    config = presets.get(name)
    sets = [f"{key}={json.dumps(value)}" for key, value in flatten(config).items() if key != "preset"]
    assert apply(config, sets) == config
    assert apply(BASE.model_copy(update={"preset": name}), sets) == config


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("decode.revision=12e4567", "12e4567"),
        ("decode.revision=0123456", "0123456"),
        ("data.videos=/a path/with=equals", "/a path/with=equals"),
        ("data.task=null", "null"),
        ("align.levels=all", list(range(1, 14))),
        ("align.levels=1-3,9", [1, 2, 3, 9]),
        ("align.frames=5", 5),
        ("train.epochs=3.0", 3),
        ("data.allow_missing=yes", True),
    ],
)
def test_values_as_people_type_them(typed: str, value: object) -> None:
    assert flatten(apply(BASE, [typed]))[typed.partition("=")[0]] == value


def test_the_last_of_two_values_wins() -> None:
    assert apply(BASE, ["train.lr=1", "train.lr=2"]).train.lr == 2


def test_nothing_else_changes() -> None:
    before, after = flatten(BASE), flatten(apply(BASE, ["train.lr=0.5"]))
    assert {key for key in before if before[key] != after[key]} == {"train.lr"}


def test_choosing_a_teacher_layer_extracts_it() -> None:
    assert apply(BASE, ["teacher.layer=12"]).teacher.layers == (12,)
    assert apply(BASE, ["teacher.layers=8,12", "teacher.layer=12"]).teacher.layers == (8, 12)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train.lr=fast", "train.lr: expected a number > 0, got 'fast'"),
        ("train.lr=0", "train.lr: expected a number > 0, got 0"),
        ("train.epochs=2.5", "train.epochs: expected a whole number >= 1, got 2.5"),
        ("student.dropout=1", "student.dropout: expected a number >= 0 and < 1, got 1"),
        ("data.allow_missing=maybe", "data.allow_missing: expected true or false, got 'maybe'"),
        ("data.source=zip", "data.source: expected one of files, frame_folders, webdataset, got 'zip'"),
        ("train.betas=0.9", "train.betas: expected a list of 2 numbers such as [0.9, 0.999], got 0.9"),
        ("align.frames=some", "align.frames: expected one of all, last or a whole number >= 1, got 'some'"),
        ("align.levels=8-x", "align.levels: levels are numbers, ranges such as 8-13, or 'all'; got '8-x'"),
        ("decode.length_penalty=NaN", "decode.length_penalty: expected a finite number, got nan"),
        ("data.decode_timeout_s=1e999", "data.decode_timeout_s: expected a finite number, got inf"),
    ],
)
def test_a_wrong_value_is_told_what_was_expected(typed: str, expected: str) -> None:
    assert refusal(typed) == expected


def test_all_wrong_values_are_told_at_once() -> None:
    assert [line.partition(":")[0] for line in refusal("train.lr=x", "data.fps=-1").splitlines()] == [
        "data.fps",
        "train.lr",
    ]


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("lr", "train.lr"),
        ("train.lambda", "train.lambda_kd"),
        ("Train.LR", "train.lr"),
        ("train.num_frames", "data.num_frames"),
        ("dta.fps", "data.fps"),
        ("align.layers", "teacher.layers"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, near: str) -> None:
    text = refusal(f"{typed}=1")
    assert text.startswith(f"{typed}: no such setting; did you mean ")
    assert near in text


def test_a_key_like_no_other_names_the_sections() -> None:
    assert "keys start with align, clip, data" in refusal("qqqqq=1")


def test_a_section_names_its_keys() -> None:
    assert "clip.model" in refusal("clip={}")


def test_the_preset_is_not_a_setting() -> None:
    assert "--preset" in refusal("preset=other")


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["teacher.layers=4", "teacher.layer=8"], "teacher.layer"),
        (["clip.geometry=shortest_center"], "teacher.geometry"),
        (["student.num_layers=6"], "align.levels"),
        (["student.num_heads=5"], "student.num_heads"),
        (["data.num_frames=121"], "data.num_frames"),
        (["train.micro_batch=65"], "train.micro_batch"),
        (["decode.num_beams=2"], "decode.num_return"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sets: list[str], key: str) -> None:
    assert refusal(*sets).startswith(f"{key}: ")


def test_settings_of_another_version_are_named() -> None:
    values = BASE.model_dump(mode="json")
    values["train"]["learning_rate"] = 1
    with pytest.raises(ConfigError, match=r"train\.learning_rate: no such setting"):
        validate(values)


def test_nearest_prefers_the_same_name_in_another_section() -> None:
    assert nearest("clip.layer", ["align.levels", "teacher.layer", "clip.model"])[0] == "teacher.layer"
