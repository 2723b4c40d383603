"""The frozen image encoder: raw tokens of the right block, from either source, with the checkpoint's preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.config import PipelineConfig
from stages.extract import clip
from stages.types import FrozenEncoder
from stages.weights import WeightsMissing, WeightsRefused
from tests.extract.tiny import frames
from tests.extract.tiny_clip import DEPTH, MODELS, VIT, build, checkpoint, config, described, hooked, register_models


@pytest.fixture(scope="module", autouse=True)
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    register_models(tmp_path_factory.mktemp("open_clip"))


# ---------------------------------------------------------------- the right tokens


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-vit-quickgelu", "tiny-coca", "tiny-eva"])
@pytest.mark.parametrize("layer", [1, 3, -1])
def test_tokens_are_bitwise_those_of_a_hook_on_the_uncut_model(tmp_path: Path, model: str, layer: int) -> None:
    layer = DEPTH[model] if layer == -1 else layer
    full = checkpoint(tmp_path / "w", model)
    described(tmp_path / "w")
    pictures = frames(2, 28, 28)
    tokens = build(model=model, weights=str(tmp_path / "w"), layer=layer)(pictures)["tokens"]
    assert tokens.shape == (2, 17, 32)
    assert (tokens == hooked(full, layer, pictures, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])).all()


def test_the_class_token_comes_first_and_no_norm_is_applied(tmp_path: Path) -> None:
    full: Any = checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    pictures = frames(2, 28, 28)
    tokens = torch.from_numpy(build(weights=str(tmp_path), layer=5)(pictures)["tokens"])
    scaled = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / (
        torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    )
    with torch.inference_mode():
        pooled = full.visual(scaled)
        assert torch.allclose(full.visual.ln_post(tokens)[:, 0] @ full.visual.proj, pooled, atol=1e-5)
        assert not torch.allclose(full.visual.ln_post(tokens), tokens, atol=0.1)


def test_neighbouring_layers_differ() -> None:
    pictures = frames()
    layers = [build(layer=layer)(pictures)["tokens"] for layer in (1, 2, 3)]
    assert np.abs(layers[1] - layers[0]).max() > 0.01
    assert np.abs(layers[2] - layers[1]).max() > 0.01


def test_text_tower_later_blocks_and_head_do_not_enter_features_or_digest(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    encoder = build(weights=str(tmp_path))
    file = tmp_path / "open_clip_model.safetensors"
    tensors = load_file(file)
    unused = [key for key in tensors if not key.startswith("visual.")]
    unused += [key for key in tensors if key.startswith(("visual.transformer.resblocks.3", "visual.ln_post"))]
    assert len(unused) > 20
    for key in unused:
        tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, file)
    poisoned = build(weights=str(tmp_path))
    assert poisoned.specs == encoder.specs
    assert (poisoned(frames())["tokens"] == encoder(frames())["tokens"]).all()


@pytest.mark.parametrize("key", ["visual.class_embedding", "visual.transformer.resblocks.2.ln_1.weight"])
def test_a_weights_file_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, key: str) -> None:
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsRefused, match=key):
        build(weights=str(tmp_path))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-eva")
    described(tmp_path)
    with pytest.raises(WeightsRefused, match="unexpected"):
        build(weights=str(tmp_path))


# ---------------------------------------------------------------- frozen


@pytest.fixture(params=["tiny-vit", "tiny-eva"])
def encoder(request: pytest.FixtureRequest) -> FrozenEncoder:
    return build(model=request.param)


def test_the_encoder_keeps_its_protocol(encoder: FrozenEncoder) -> None:
    assert isinstance(encoder, FrozenEncoder)
    spec = encoder.specs["tokens"]
    features = encoder(frames())["tokens"]
    assert features.shape == (3, *spec.frame_shape)
    assert features.dtype == np.dtype(spec.dtype)
    assert (spec.layer, spec.pool, spec.latent, spec.timestep, spec.label) == (3, "none", "", None, None)
    assert (spec.frame_rule, spec.decoder) == ("by hand", "none")


def test_features_do_not_depend_on_the_batch(encoder: FrozenEncoder) -> None:
    pictures = frames(7)
    together = encoder(pictures)["tokens"]
    alone = np.concatenate([encoder(pictures[i : i + 1])["tokens"] for i in range(7)])
    assert np.abs(together - alone).max() < 1e-5


def test_the_same_frames_give_the_same_bits_twice(encoder: FrozenEncoder) -> None:
    assert (encoder(frames())["tokens"] == encoder(frames())["tokens"]).all()


def test_the_weights_are_the_same_before_and_after(encoder: FrozenEncoder) -> None:
    before = encoder.weights_digest()
    encoder(frames())
    assert encoder.weights_digest() == before == encoder.specs["tokens"].weights
    tower: Any = encoder._tower  # type: ignore[attr-defined]
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.no_grad():
        next(iter(tower.parameters())).view(-1)[0] += 1e-3
    assert encoder.weights_digest() != before


def test_training_mode_cannot_leak_into_the_features() -> None:
    encoder: Any = build(model="tiny-dropout")
    before = encoder(frames())["tokens"]
    encoder._tower.train()
    assert (encoder(frames())["tokens"] == before).all()


def test_seeded_weights_are_reproducible_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = build(weights="seed:1"), build(weights="seed:1"), build(weights="seed:2")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.specs == again.specs
    assert first.specs["tokens"].differences(other.specs["tokens"]).keys() == {"weights"}


def test_values_beyond_float16_become_inf_for_the_store_to_refuse(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    tensors["visual.transformer.resblocks.2.mlp.c_proj.bias"] += 1e6
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    features = build(weights=str(tmp_path), dtype="float16")(frames())["tokens"]
    assert features.dtype == np.float16
    assert np.isinf(features).any()


def test_half_precision_compute_is_recorded_and_close() -> None:
    exact, half = build(), build(compute_dtype="bfloat16")
    assert half.specs["tokens"].compute_dtype == "bfloat16"
    difference = np.abs(exact(frames())["tokens"] - half(frames())["tokens"])
    assert 0 < difference.mean() < 0.03


def test_ambient_autocast_does_not_change_the_features() -> None:
    encoder = build()
    before = encoder(frames())["tokens"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (encoder(frames())["tokens"] == before).all()


# ---------------------------------------------------------------- describe, and what is not here


def test_describe_knows_the_papers_encoder_without_its_weights() -> None:
    assert clip.describe(PipelineConfig(preset="test")) == {"tokens": ((257, 1408), "float16")}


@pytest.mark.usefixtures("hub")
def test_describe_knows_the_papers_instructblip_without_its_files() -> None:
    cfg = config(source="instructblip", model="Salesforce/instructblip-vicuna-7b", weights="", layer=39)
    assert clip.describe(cfg) == {"tokens": ((257, 1408), "float32")}


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-coca", "tiny-eva"])
def test_describe_gives_the_shape_that_is_built(model: str) -> None:
    assert clip.describe(config(model=model))["tokens"][0] == build(model=model).specs["tokens"].frame_shape


def test_models_without_a_class_token_have_patch_tokens_only() -> None:
    cfg = config(model="ViT-B-16-SigLIP2", layer=2, weights="webli")
    assert clip.describe(cfg)["tokens"][0] == (196, 768)


def test_the_miniature_is_found_by_name() -> None:
    if not clip.MINIATURE_MODELS.is_dir():
        pytest.skip("the miniature is not there yet")
    assert clip.describe(config(model="miniature-vit", layer=5))["tokens"][0] == (37, 96)
    assert build(model="miniature-vit", layer=5)(frames())["tokens"].shape == (3, 17, 64)


def test_a_layer_that_does_not_exist_is_refused_with_the_range() -> None:
    for make in (build, lambda **kwargs: clip.describe(config(**kwargs))):
        with pytest.raises(ValueError, match="from 1 to 5"):
            make(layer=6)


def test_an_unknown_model_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="EVA01-g-14"):
        clip.describe(config(model="EVA1-g-14"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer blocks"):
        clip.describe(config(model="RN50", layer=1))


@pytest.mark.usefixtures("hub")
def test_missing_weights_are_named_with_the_command_that_fetches_them() -> None:
    with pytest.raises(
        WeightsMissing, match=r"hf download timm/eva_giant_patch14_clip_224\S+ --include open_clip_model"
    ):
        build(model="EVA01-g-14", weights="laion400m_s11b_b41k", layer=39)
    with pytest.raises(WeightsMissing, match=r"hf download Salesforce/instructblip-vicuna-7b --revision abc --include"):
        build(source="instructblip", model="Salesforce/instructblip-vicuna-7b", weights="", revision="abc")
    with pytest.raises(WeightsMissing, match="hf download owner/repository --include 'open_clip_"):
        build(weights="owner/repository")
    for weights in ("nonsense", ""):
        with pytest.raises(WeightsMissing, match="no tag of tiny-vit"):
            build(weights=weights)


def test_a_config_that_open_clip_does_not_ship_is_part_of_the_encoder_name(tmp_path: Path) -> None:
    other = {**MODELS["tiny-vit"], "vision_cfg": {**VIT, "head_width": 16}}
    (tmp_path / "tiny-heads.json").write_text(json.dumps(other))
    open_clip.add_model_config(tmp_path)
    ours, heads = build().specs["tokens"], build(model="tiny-heads").specs["tokens"]
    assert ours.weights == heads.weights
    assert ours.encoder.partition("#")[2] != heads.encoder.partition("#")[2]
