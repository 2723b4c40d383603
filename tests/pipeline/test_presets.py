"""The paper's hyper-parameters, one by one, against §4.2 and the table of MA-LMM's scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import presets
from pipeline.errors import ConfigError
from pipeline.overrides import apply, flatten
from stages.config import PipelineConfig
from stages.weights import local_path

LVU = [name for name in presets.PRESETS if name.startswith("lvu-")]
PAPER = [name for name in presets.PRESETS if name != "miniature"]

# §4.2 of the paper, and where it is silent MA-LMM (algorithm notes 1 to 4).
COMMON: dict[str, Any] = {
    "decode.llm": "lmsys/vicuna-7b-v1.1",  # "Vicuna-7B"; InstructBLIP's weights need v1.1
    "train.lr": 1e-4,
    "train.betas": [0.9, 0.999],
    "train.weight_decay": 0.05,
    "clip.geometry": "squash",  # "resized to 224×224"
    "clip.model": "EVA01-g-14",
    "clip.weights": "laion400m_s11b_b41k",
    "clip.layer": 39,
    "clip.source": "open_clip",
    "teacher.model": "facebook/DiT-XL-2-256",
    "teacher.layer": 8,  # "the eighth layer output"
    "teacher.layers": [8],
    "teacher.timestep": 0,  # "no noise"
    "teacher.posterior": "mode",
    "teacher.grid": 1,
    "decode.num_beams": 5,
    "decode.num_return": 5,
    "decode.repetition_penalty": 1.5,
    "align.levels": [8, 9, 10, 11, 12, 13],  # §4.4
    "align.weights": "adaptive",
    "align.target_norm": "none",
    "align.frames": "all",
    "student.init": "Salesforce/instructblip-vicuna-7b",
    "student.num_queries": 32,
    "student.hidden_size": 768,
    "student.num_layers": 12,
    "student.num_heads": 12,
    "student.intermediate_size": 3072,
    "student.dropout": 0.1,
    "student.max_frames": 120,
    "train.warmup_steps": 1000,
    "train.warmup_lr": 1e-8,
    "train.min_lr": 0.0,
    "train.schedule": "malmm",
    "train.seed": 42,
    "train.drop_last": True,
    "data.fps": 10.0,
}
OF_LVU: dict[str, Any] = {
    "train.lambda_kd": 1.0,
    "train.epochs": 20,
    "train.batch_size": 64,
    "data.num_frames": 100,
    "data.history_s": 100,
    "data.stride_s": 20,
    "student.memory_len": 20,
    "decode.max_new_tokens": 4,
    "decode.length_penalty": 1.0,
    "data.name": "lvu",
}
OF_MSVD: dict[str, Any] = {
    "train.lambda_kd": 0.0005,
    "decode.max_new_tokens": 9,
    "decode.length_penalty": 0.0,
    "data.name": "msvd_qa",
}
READINGS: dict[str, dict[str, Any]] = {
    "msvd-qa-malmm": {"data.num_frames": 20, "student.memory_len": 10, "train.epochs": 5, "train.batch_size": 128},
    "msvd-qa-literal": {"data.num_frames": 100, "student.memory_len": 20, "train.epochs": 20, "train.batch_size": 64},
}


def settings(name: str, keys: dict[str, Any]) -> dict[str, Any]:
    flat = flatten(presets.get(name))
    return {key: flat[key] for key in keys}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_has_the_hyper_parameters_of_the_paper(name: str) -> None:
    assert settings(name, COMMON) == COMMON


@pytest.mark.parametrize("name", LVU)
def test_lvu_has_the_numbers_of_lvu(name: str) -> None:
    assert settings(name, OF_LVU) == OF_LVU


@pytest.mark.parametrize("name", list(READINGS))
def test_both_readings_of_msvd_qa(name: str) -> None:
    expected = OF_MSVD | READINGS[name]
    assert settings(name, expected) == expected


def test_there_is_a_preset_for_every_lvu_task() -> None:
    tasks = {presets.get(name).data.task for name in LVU}
    assert tasks == {"relationship", "way_speaking", "scene", "director", "genre", "writer", "year"}


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_a_preset_knows_its_name_and_is_consistent(name: str) -> None:
    config = presets.get(name)
    assert config.preset == name
    assert apply(config, []) == config
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_the_other_source_of_the_image_encoder_is_two_settings() -> None:
    other = apply(
        presets.get("lvu-genre"), ["clip.source=instructblip", "clip.model=Salesforce/instructblip-vicuna-7b"]
    )
    assert (other.clip.source, other.clip.layer) == ("instructblip", 39)


@pytest.mark.parametrize(
    ("typed", "near"), [("lvu_scene", "lvu-scene"), ("msvd_qa", "msvd-qa-malmm"), ("mini", "mini")]
)
def test_an_unknown_preset_names_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{typed}.*{near}"):
        presets.get(typed)


def test_presets_with_the_same_encoders_and_videos_share_a_cache() -> None:
    assert {presets.default_cache(presets.get(name)) for name in LVU} == {Path("cache/lvu/features")}
    assert {presets.default_cache(presets.get(name)) for name in READINGS} == {Path("cache/msvd-qa/features")}


def test_other_videos_have_another_cache_and_the_same_videos_the_same() -> None:
    base = presets.get("miniature")
    one, again, two = (
        presets.default_cache(apply(base, [f"data.videos={videos}"])) for videos in ("/a/x", "/a/../a/x", "/b/x")
    )
    assert one == again
    assert len({one, two, presets.default_cache(base)}) == 3


def test_a_cache_name_holds_no_path_of_the_videos() -> None:
    cache = presets.default_cache(apply(presets.get("miniature"), ["data.videos=https://host/a b/../x?y=1&z.tar"]))
    assert cache.parts[0] == "cache"
    assert len(cache.parts) == 3
    assert ".." not in cache.parts


def test_the_parts_of_the_miniature_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = presets.get("miniature")
    for folder in (config.teacher.model, config.student.tokenizer, config.decode.llm, config.clip.weights):
        assert local_path(folder).is_dir(), folder
