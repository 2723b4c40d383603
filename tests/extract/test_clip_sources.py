"""The image encoder takes its weights and its preprocessing from where the checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.pretrained
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from stages.config import ClipConfig
from stages.extract import clip
from stages.types import FrozenEncoder
from stages.weights import WeightsRefused
from tests.extract.tiny import cached, frames
from tests.extract.tiny_clip import MODELS, VIT, build, checkpoint, config, described, hooked, register_models


@pytest.fixture(scope="module", autouse=True)
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    register_models(tmp_path_factory.mktemp("open_clip"))


# ---------------------------------------------------------------- InstructBLIP


def instructblip_folder(folder: Path, eva: dict[str, torch.Tensor]) -> Path:
    """A small clone of an InstructBLIP checkpoint: two shards with the vision tower, one with everything else."""
    folder.mkdir()
    ours = InstructBlipVisionConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "instructblip", "vision_config": ours.to_dict()}))
    preprocessor = {"size": {"height": 28, "width": 28}, "resample": 3, "do_rescale": True}
    preprocessor |= {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    preprocessor |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vision = as_instructblip(eva, depth=3)
    assert vision.keys() == InstructBlipVisionModel(ours).state_dict().keys()
    keys = sorted(vision)
    parts = [{f"vision_model.{key}": vision[key] for key in half} for half in (keys[::2], keys[1::2])]
    parts.append({"qformer.layernorm.weight": torch.ones(3), "language_model.lm_head.weight": torch.ones(3)})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_instructblip(eva: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """timm's EVA weights under InstructBLIP's names: qkv.bias = [q, 0, v], the last block left out."""
    out = {
        "embeddings.class_embedding": eva["cls_token"],
        "embeddings.position_embedding": eva["pos_embed"],
        "embeddings.patch_embedding.weight": eva["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": eva["patch_embed.proj.bias"],
        "post_layernorm.weight": torch.full((32,), float("nan")),  # ln_vision belongs to the student
        "post_layernorm.bias": torch.full((32,), float("nan")),
    }
    for number in range(depth):
        old, new = f"blocks.{number}.", f"encoder.layers.{number}."
        q_bias, v_bias = eva[f"{old}attn.q_bias"], eva[f"{old}attn.v_bias"]
        out[f"{new}self_attn.qkv.weight"] = eva[f"{old}attn.qkv.weight"]
        out[f"{new}self_attn.qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        pairs = {"attn.proj": "self_attn.projection", "norm1": "layer_norm1", "norm2": "layer_norm2"}
        for theirs, ours in (pairs | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            for kind in ("weight", "bias"):
                out[f"{new}{ours}.{kind}"] = eva[f"{old}{theirs}.{kind}"]
    return {key: value.contiguous() for key, value in out.items()}


@pytest.fixture
def both_sources(tmp_path: Path) -> tuple[FrozenEncoder, FrozenEncoder, Path]:
    """The same EVA weights as an open_clip checkpoint cut after block 3 of 4, and inside an InstructBLIP folder."""
    full: Any = checkpoint(tmp_path / "eva", "tiny-eva")
    described(tmp_path / "eva", mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711])
    folder = instructblip_folder(tmp_path / "blip", full.visual.trunk.state_dict())
    eva = build(model="tiny-eva", weights=str(tmp_path / "eva"), layer=3)
    blip = build(source="instructblip", model=str(folder), weights="", layer=3)
    return eva, blip, folder


def test_open_clip_eva_and_instructblip_give_the_same_tokens_from_the_same_weights(
    both_sources: tuple[FrozenEncoder, FrozenEncoder, Path],
) -> None:
    eva, blip, _ = both_sources
    ours, theirs = eva(frames())["tokens"], blip(frames())["tokens"]
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() <= 1e-6
    assert blip.specs["tokens"].normalize == eva.specs["tokens"].normalize


def test_instructblip_opens_only_the_shards_of_its_vision_tower(
    both_sources: tuple[FrozenEncoder, FrozenEncoder, Path],
) -> None:
    _, blip, folder = both_sources
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"poison")
    again = build(source="instructblip", model=str(folder), weights="", layer=3)
    assert again.specs == blip.specs


def test_the_trainable_ln_vision_is_neither_applied_nor_hashed(
    both_sources: tuple[FrozenEncoder, FrozenEncoder, Path],
) -> None:
    blip: Any = both_sources[1]
    assert np.isfinite(blip(frames())["tokens"]).all()  # the folder's post_layernorm is NaN
    assert not [name for name in blip._tower.state_dict() if "post_layernorm" in name]


def test_instructblip_can_be_cut_earlier_too(both_sources: tuple[FrozenEncoder, FrozenEncoder, Path]) -> None:
    _, _, folder = both_sources
    eva = build(model="tiny-eva", weights=str(folder.parent / "eva"), layer=2)
    blip = build(source="instructblip", model=str(folder), weights="", layer=2)
    assert np.abs(eva(frames())["tokens"] - blip(frames())["tokens"]).max() <= 1e-6
    with pytest.raises(ValueError, match="3 blocks"):
        build(source="instructblip", model=str(folder), weights="", layer=4)


def test_instructblip_preprocessing_must_fit_its_tower(
    both_sources: tuple[FrozenEncoder, FrozenEncoder, Path],
) -> None:
    folder = both_sources[2]
    document = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(document | {"size": {"height": 224, "width": 224}}))
    with pytest.raises(ValueError, match="28×28"):
        build(source="instructblip", model=str(folder), weights="", layer=3)


def test_seeded_instructblip_weights_tell_pictures_apart(
    both_sources: tuple[FrozenEncoder, FrozenEncoder, Path],
) -> None:
    tokens = build(source="instructblip", model=str(both_sources[2]), weights="seed:1", layer=3)(frames())["tokens"]
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1


# ---------------------------------------------------------------- preprocessing


@pytest.fixture
def tag(hub: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A published tag of tiny-vit with mean = std = 0.5, its weights in the local hub cache."""
    published = {"hf_hub": "tests/tiny/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    published["resize_mode"] = "shortest"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"halves": published})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit-quickgelu", {"halves": published})
    return checkpoint(cached(hub, "tests/tiny"), "tiny-vit")


def test_a_tag_brings_its_own_mean_std_and_interpolation(tag: torch.nn.Module) -> None:
    loaded = open_clip.create_model("tiny-vit", pretrained="halves")
    theirs = open_clip.get_model_preprocess_cfg(loaded)
    spec = build(weights="halves").specs["tokens"]
    assert spec.normalize == "mean=0.5,0.5,0.5 std=0.5,0.5,0.5"
    assert spec.resize == f"squash 28 {theirs['interpolation']} antialias uint8"
    assert (theirs["mean"], theirs["std"]) == ((0.5,) * 3, (0.5,) * 3)
    pictures = frames(2, 28, 28)
    tokens = build(weights="halves")(pictures)["tokens"]
    assert (tokens == hooked(tag, 3, pictures, [0.5] * 3, [0.5] * 3)).all()


def test_shortest_center_is_close_to_what_open_clip_would_feed(tag: torch.nn.Module) -> None:
    cfg = PreprocessCfg(size=28, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize_mode="shortest")
    transform = image_transform_v2(cfg, is_train=False)
    pictures = frames(2, 60, 90)
    pixels = torch.stack([transform(Image.fromarray(frame)) for frame in pictures])
    visual: Any = tag.visual
    with torch.inference_mode():
        taken = visual.forward_intermediates(
            pixels, indices=[2], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
    theirs = torch.cat([taken["image_intermediates_prefix"][0], taken["image_intermediates"][0]], dim=1).numpy()
    ours = build(weights="halves", geometry="shortest_center")(pictures)["tokens"]
    squashed = build(weights="halves", geometry="squash")(pictures)["tokens"]
    error, other = np.abs(ours - theirs).mean(), np.abs(squashed - theirs).mean()
    assert error < 0.03 * np.abs(theirs).std()
    assert other > 5 * error


def test_quickgelu_must_match_between_tag_and_model(tag: torch.nn.Module) -> None:
    assert tag is not None
    with pytest.raises(ValueError, match=r"clip\.model=tiny-vit\b"):
        build(model="tiny-vit-quickgelu", weights="halves")
    with pytest.raises(ValueError, match=r"clip\.model=ViT-B-32-quickgelu"):
        build(model="ViT-B-32", weights="openai")


def test_quickgelu_changes_features_and_encoder_name_but_not_weights() -> None:
    plain, quick = build(), build(model="tiny-vit-quickgelu")
    assert plain.specs["tokens"].weights == quick.specs["tokens"].weights
    assert plain.specs["tokens"].encoder != quick.specs["tokens"].encoder
    assert np.abs(plain(frames())["tokens"] - quick(frames())["tokens"]).max() > 1e-3


def test_a_file_without_preprocessing_of_an_unpublished_model_is_refused_with_what_to_write(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-vit")
    with pytest.raises(ValueError, match=r"open_clip_config\.json.*preprocess_cfg.*mean"):
        build(weights=str(tmp_path / "open_clip_model.safetensors"))
    described(tmp_path)
    spec = build(weights=str(tmp_path / "open_clip_model.safetensors")).specs["tokens"]
    assert spec.normalize == "mean=0.5,0.4,0.3 std=0.2,0.3,0.4"


@pytest.mark.parametrize(
    ("model", "mean"), [("EVA01-g-14", 0.48145466), ("ViT-B-16-SigLIP2", 0.5), ("ViT-H-14-CLIPA", 0.485)]
)
def test_a_local_file_gets_the_preprocessing_that_all_published_versions_share(model: str, mean: float) -> None:
    cfg = ClipConfig(model=model, weights="/a/file.safetensors")
    assert clip._open_clip_preprocess(cfg, clip._Architecture.of(cfg, {}), {}, {}).mean[0] == mean


def test_a_local_file_of_a_model_whose_published_versions_differ_is_refused() -> None:
    cfg = ClipConfig(model="ViT-L-14", weights="/a/file.safetensors")
    with pytest.raises(ValueError, match="published versions of ViT-L-14 differ"):
        clip._open_clip_preprocess(cfg, clip._Architecture.of(cfg, {}), {}, {})


def test_the_published_half_half_model_gets_half_half() -> None:
    cfg = ClipConfig(model="ViT-L-14", weights="laion2b_s32b_b82k")
    tag = open_clip.get_pretrained_cfg(cfg.model, cfg.weights)
    assert str(clip._open_clip_preprocess(cfg, clip._Architecture.of(cfg, {}), tag, {})) == (
        "mean=0.5,0.5,0.5 std=0.5,0.5,0.5"
    )


def test_a_checkpoint_that_describes_another_architecture_is_refused_by_field(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    own = json.loads((tmp_path / "open_clip_config.json").read_text())
    own["model_cfg"] = {**MODELS["tiny-vit"], "vision_cfg": {**VIT, "head_width": 16}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="head_width"):
        build(weights=str(tmp_path))


def test_a_checkpoint_that_describes_itself_needs_no_known_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    own = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(own | {"model_cfg": MODELS["tiny-vit"]}))
    unnamed, named = build(model="mine", weights=str(tmp_path)), build(weights=str(tmp_path))
    assert (unnamed(frames())["tokens"] == named(frames())["tokens"]).all()
    assert clip.describe(config(model="mine", weights=str(tmp_path))) == {"tokens": ((17, 32), "float32")}


def test_swapped_colour_channels_give_other_features() -> None:
    encoder, pictures = build(), frames()
    assert np.abs(encoder(pictures)["tokens"] - encoder(pictures[..., ::-1].copy())["tokens"]).max() > 0.05


def test_floats_are_refused() -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)uint8"):
        build()(frames().astype(np.float32))


@pytest.mark.parametrize(
    ("model", "weights", "told"),
    [
        ("ViT-B-32", "timm/vit_base_patch32_clip_224.openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "{}/ViT-B-32-openai.safetensors", "ViT-B-32-quickgelu"),
        ("ViT-L-14", "{}/metaclip_400m/open_clip_model.safetensors", "ViT-L-14-quickgelu"),
        ("ViT-B-16", "{}/vit_b16.DFN2B.pt", "ViT-B-16-quickgelu"),
        ("ViT-B-32-quickgelu", "{}/ViT-B-32-laion2b_s34b_b79k.bin", "ViT-B-32"),
    ],
)
def test_weights_whose_name_tells_the_other_activation_are_refused_with_the_model_to_type(
    tmp_path: Path, model: str, weights: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "_described", lambda *_, **__: {})  # of a hub repository that is not here
    with pytest.raises(ValueError, match=rf"QuickGELU(?s:.*)--set clip\.model={told}$"):
        build(model=model, weights=weights.format(tmp_path))


def test_weights_that_do_not_tell_their_activation_are_taken_with_a_warning_that_names_the_other_model(
    tmp_path: Path, tag: torch.nn.Module
) -> None:
    assert tag is not None  # tiny-vit has a published version
    checkpoint(tmp_path, "tiny-vit")
    described(tmp_path)
    with pytest.warns(UserWarning, match=r"does not say(?s:.*)--set clip\.model=tiny-vit-quickgelu"):
        build(weights=str(tmp_path))


def test_a_checkpoint_that_describes_another_activation_names_the_model_that_has_it(tmp_path: Path) -> None:
    own = open_clip.get_model_config("ViT-B-32-quickgelu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": own}))
    with pytest.raises(ValueError, match=r"differ in quick_gelu(?s:.*)--set clip\.model=ViT-B-32-quickgelu$"):
        build(model="ViT-B-32", weights=str(tmp_path))


def test_weights_of_another_size_name_the_model_of_that_size(tmp_path: Path) -> None:
    tensors = {"conv1.weight": torch.zeros(768, 3, 32, 32), "positional_embedding": torch.zeros(50, 768)}
    tensors |= {f"transformer.resblocks.{n}.ln_1.weight": torch.zeros(768) for n in range(12)}
    path = tmp_path / "mine.safetensors"
    save_file({f"visual.{key}": value for key, value in tensors.items()}, path)
    with (
        pytest.warns(UserWarning, match="QuickGELU"),
        pytest.raises(WeightsRefused, match=r"patches of 32, 50 tokens(?s:.*)--set clip\.model=ViT-B-32$"),
    ):
        build(model="ViT-L-14", weights=str(path))
