"""A toy DiT pipeline folder for the tests of the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from stages.config import ClipConfig, PipelineConfig, TeacherConfig
from stages.extract import dit
from stages.types import FrozenEncoder

DIT = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 12, "sample_size": 8, "patch_size": 2}
DIT |= {"num_embeds_ada_norm": 10, "in_channels": 4, "out_channels": 8}
VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.31}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def save_pipeline(folder: Path) -> Path:
    """A folder as diffusers saves it: 12 blocks, 4×4 tokens of 24, null class 10, pictures of 16 px."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DiTTransformer2DModel(**DIT).save_pretrained(folder / "transformer")
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    return folder


def copied(pipeline: Path, target: Path) -> Path:
    """A copy of a pipeline folder, to be changed by a test."""
    shutil.copytree(pipeline, target)
    return target


def config(model: Path | str, **kwargs: Any) -> PipelineConfig:
    geometry = kwargs.pop("clip_geometry", kwargs.get("geometry", "squash"))
    settings = {"model": str(model), "layers": (8,), "dtype": "float32"} | kwargs
    return PipelineConfig(preset="test", clip=ClipConfig(geometry=geometry), teacher=TeacherConfig(**settings))


def build(model: Path | str, **kwargs: Any) -> FrozenEncoder:
    return dit.build(config(model, **kwargs), device="cpu", frame_rule="by hand", decoder="none")


def whole(folder: Path, **kwargs: Any) -> Any:
    model: Any = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", **kwargs)
    return model.eval()


def hooked(model: Any, latents: torch.Tensor, layer: int, *, tau: int = 0, label: int = 10) -> torch.Tensor:
    """Tokens after block ``layer`` of a model that runs from end to end."""
    taken: list[torch.Tensor] = []
    handle = model.transformer_blocks[layer - 1].register_forward_hook(lambda *args: taken.append(args[2]))
    size = len(latents)
    with torch.inference_mode():
        model(latents, timestep=torch.full((size,), tau), class_labels=torch.full((size,), label))
    handle.remove()
    return taken[0]


def latents_of(encoder: Any, pictures: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        latents: torch.Tensor = encoder._teacher.latents(encoder._resize(pictures))
    return latents


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
