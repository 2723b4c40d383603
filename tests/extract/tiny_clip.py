"""Toy models for the tests of the image encoder: every family at a width of 32 and a picture of 28 px."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm.models
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva

from stages.config import ClipConfig, PipelineConfig
from stages.extract import clip
from stages.types import FrozenEncoder

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 5, "head_width": 8}
EVA = {"image_size": 28, "timm_model_name": "tiny_eva", "timm_pool": "token", "timm_proj": None}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-vit-quickgelu": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "tiny-dropout": {"embed_dim": 24, "vision_cfg": {**VIT, "patch_dropout": 0.5}, "text_cfg": TEXT},
    "tiny-coca": {"embed_dim": 24, "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2}}
    | {"text_cfg": TEXT},
    "tiny-eva": {"embed_dim": 24, "vision_cfg": EVA, "text_cfg": TEXT, "custom_text": True},
}
DEPTH = {"tiny-vit": 5, "tiny-vit-quickgelu": 5, "tiny-dropout": 5, "tiny-coca": 5, "tiny-eva": 4}
EVA_SIZES: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 3.0,
}


def tiny_eva(num_classes: int, global_pool: str, **_unused: object) -> Eva:
    """EVA-g's architecture at toy size, under a name that open_clip can ask timm for."""
    model = Eva(**EVA_SIZES, num_classes=num_classes, global_pool=global_pool)
    for name, parameter in model.named_parameters():  # the biases start at zero and would hide a swap of q and v
        if name.endswith(("bias", "_bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def register_models(folder: Path) -> None:
    """Make the toy models known to open_clip and timm by name."""
    if not timm.is_model("tiny_eva"):
        timm.models.register_model(tiny_eva)
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def config(**kwargs: Any) -> PipelineConfig:
    settings = {"model": "tiny-vit", "weights": "seed:0", "layer": 3, "dtype": "float32"} | kwargs
    return PipelineConfig(preset="test", clip=ClipConfig(**settings))


def build(**kwargs: Any) -> FrozenEncoder:
    return clip.build(config(**kwargs), device="cpu", frame_rule="by hand", decoder="none")


def checkpoint(
    folder: Path, model: str, *, file: str = "open_clip_model.safetensors", seed: int = 0
) -> torch.nn.Module:
    """A full open_clip model, both towers, with its weights saved in a folder."""
    torch.manual_seed(seed)
    full: torch.nn.Module = open_clip.create_model(model, pretrained_text=False).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in full.state_dict().items()}, folder / file)
    return full


def described(folder: Path, **preprocess: Any) -> Path:
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", **preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": cfg}))
    return folder


def hooked(full: torch.nn.Module, layer: int, pictures: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """Output of block ``layer`` of the uncut tower, taken by a hook, on pictures of its own size."""
    visual: Any = full.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    taken: list[torch.Tensor] = []
    handle = blocks[layer - 1].register_forward_hook(lambda *args: taken.append(args[2]))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.inference_mode():
        visual(pixels)
    handle.remove()
    return taken[0].numpy()
