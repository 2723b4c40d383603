"""The frozen diffusion teacher: uint8 frames -> pooled hidden states of a DiT (§3.2, §4.2).

frame -> ``sample_size * 8`` px -> VAE encoder -> latents × scaling factor -> DiT blocks 1..max(layers) -> token means.
No noise is added: the paper feeds clean latents at timestep 0 with the null class.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cache_schema.spec import FeatureSpec
from stages.config import PipelineConfig, TeacherConfig
from stages.extract.resize import Resize
from stages.types import FrozenEncoder
from stages.weights import (
    WeightsMissing,
    combine_digests,
    load_strict,
    parse_seed,
    read_json,
    read_tensors,
    resolve,
    resolve_weights,
    seeded_init,
    short_digest,
    tensor_digests,
    weights_digest,
    without_weights,
)

CONFIGS = ("transformer/config.json", "vae/config.json")
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Published configs of the paper's teacher, for --dry-run where nothing is downloaded yet.
XL_2 = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_layers": 28, "patch_size": 2}
XL_2 |= {"num_attention_heads": 16, "attention_head_dim": 72}
KNOWN = {
    "facebook/DiT-XL-2-256": {**XL_2, "sample_size": 32},
    "facebook/DiT-XL-2-512": {**XL_2, "sample_size": 64},
}
# Settings that change the numbers and leave no trace in weights or shapes; the spec carries a digest of them.
DIT_SETTINGS = ("num_attention_heads", "patch_size", "sample_size", "activation_fn", "norm_eps", "upcast_attention")
VAE_SETTINGS = ("act_fn", "norm_num_groups", "layers_per_block", "down_block_types")
BLOCK = re.compile(r"dit\.transformer_blocks\.(\d+)\.")
# VAE files of 2022 name the projections of the attention in the middle block so.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Teacher(nn.Module):
    """VAE encoder and the first blocks of a DiT; what the features do not depend on is cut off."""

    def __init__(self, vae: Any, dit: Any) -> None:
        super().__init__()
        self.vae, self.dit = vae, dit
        before = set(self.state_dict())
        del vae.decoder, vae.post_quant_conv  # 60 % of the VAE
        del dit.norm_out, dit.proj_out_1, dit.proj_out_2
        self.dropped = frozenset(before - set(self.state_dict()))
        for block in dit.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            # DiT was trained with frequencies exp(-ln(10000) i / 128); diffusers divides by 127, which is another
            # function at timesteps above 0 (2 % off at 261, 6 % at 999) and the same one at 0.
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        self._modulations: dict[tuple[int, int, int], list[Tensor]] = {}

    def latents(self, pictures: UInt8[Tensor, "b 3 h w"], *, sample: bool = False) -> Float[Tensor, "b c s s"]:
        """VAE latents × scaling factor, float32, of the size that the DiT was made for (it would take any)."""
        device = next(self.vae.parameters()).device
        posterior = self.vae.encode(pictures.to(device).float().div(127.5).sub(1)).latent_dist
        latents: Tensor = posterior.mode()
        if sample:
            latents = latents + posterior.std * _noise_of(pictures, latents.shape[1:]).to(device)
        size = self.dit.config.sample_size
        assert latents.shape[2:] == (size, size), f"latents {tuple(latents.shape)}, but the teacher takes {size}×{size}"
        return latents * float(self.vae.config.scaling_factor)

    def hidden(self, latents: Float[Tensor, "b c s s"], timestep: int, label: int) -> Iterator[Float[Tensor, "b n D"]]:
        """Token states after block 1, block 2, …"""
        tokens = self.dit.pos_embed(latents.to(self.dit.dtype))
        modulations = self.modulations(len(latents), timestep, label)
        for block, modulation in zip(self.dit.transformer_blocks, modulations, strict=True):
            tokens = _run_block(block, tokens, modulation)
            yield tokens

    def modulations(self, batch: int, timestep: int, label: int) -> list[Float[Tensor, "b sixD"]]:
        """What timestep and class add to each block: constants, computed once per batch size.

        Per batch size, because a matrix product's last bits depend on its number of rows, and the features are to be
        bit for bit those of the library's own forward. Where all rows are the same (always but in the smallest
        batches), one is kept.
        """
        key = (batch, timestep, label)
        if key not in self._modulations:
            device = next(self.dit.parameters()).device
            tau, labels = (torch.full((batch,), value, device=device) for value in (timestep, label))
            tables = []
            for block in self.dit.transformer_blocks:
                norm = block.norm1
                table = norm.linear(norm.silu(norm.emb(tau, labels, hidden_dtype=self.dit.dtype)))
                same = bool((table == table[:1]).all())
                tables.append(table[:1].clone().expand(batch, -1) if same else table)
            self._modulations[key] = tables
        return self._modulations[key]


def _run_block(block: Any, tokens: Float[Tensor, "b n D"], modulation: Float[Tensor, "b sixD"]) -> Tensor:
    """diffusers' ``BasicTransformerBlock`` with ada_norm_zero, bit for bit, given its modulation."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    normed = block.norm1.norm(tokens) * (1 + scale[:, None]) + shift[:, None]
    tokens = gate.unsqueeze(1) * block.attn1(normed) + tokens
    normed = block.norm3(tokens) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    out: Tensor = gate_mlp.unsqueeze(1) * block.ff(normed) + tokens
    return out


def _noise_of(pictures: UInt8[Tensor, "b 3 h w"], shape: torch.Size) -> Float[Tensor, "b c s s"]:
    """Standard normal noise, seeded by each picture's own pixels: the same in any batch, order or process."""
    noise = []
    for picture in pictures:
        pixels = picture.permute(1, 2, 0).contiguous().numpy().data
        seed = int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little") >> 1
        noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(noise)


def pool_tokens(tokens: Float[Tensor, "b n D"], grid: int) -> Float[Tensor, "b ..."]:
    """Mean over tokens in float32: [b, D] for grid 1 (Eq. 4), else [b, g, g, D] over the cells of a g × g grid."""
    batch, count, width = tokens.shape
    if grid == 1:
        return tokens.float().mean(dim=1)
    side = math.isqrt(count)
    assert side * side == count, f"{count} tokens are not a square"
    assert side % grid == 0, f"{grid} does not divide {side}"
    cells = tokens.float().reshape(batch, grid, side // grid, grid, side // grid, width)
    return cells.mean(dim=(2, 4))


class FrozenDiT:
    """The teacher as ``FrozenEncoder``: uint8 frames -> ``{"pooled/layer8": [b, D], …}``, all layers in one pass."""

    def __init__(self, teacher: Teacher, resize: Resize, specs: Mapping[str, FeatureSpec], teacher_cfg: TeacherConfig):
        self._teacher = teacher.requires_grad_(False).eval()
        self._device = next(teacher.parameters()).device
        self._resize, self._specs, self._cfg = resize, dict(specs), teacher_cfg
        self._label = int(teacher.dit.config.num_embeds_ada_norm)

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """One modality per layer."""
        return dict(self._specs)

    def view(self, frames: UInt8[np.ndarray, "b h w 3"]) -> UInt8[Tensor, "b 3 size size"]:
        """The frames as the teacher sees them; on the CPU, in any thread."""
        return self._resize(frames)

    def __call__(self, frames: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Float[np.ndarray, "b ..."]]:
        """``encode(view(frames))``."""
        return self.encode(self.view(frames))

    def encode(self, pictures: UInt8[Tensor, "b 3 size size"]) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Pooled states in the spec's dtype; a value beyond float16 becomes inf, which the store refuses by frame."""
        self._teacher.eval()  # whoever called train() on it must not change the features
        pooled: dict[str, np.ndarray] = {}
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            latents = self._teacher.latents(pictures, sample=self._cfg.posterior == "sample")
            states = self._teacher.hidden(latents, self._cfg.timestep, self._label)
            for layer, tokens in enumerate(states, start=1):
                name = modality(layer, self._cfg.grid)
                if name in self._specs:
                    features = pool_tokens(tokens, self._cfg.grid)
                    assert tuple(features.shape[1:]) == self._specs[name].frame_shape, features.shape
                    pooled[name] = features.to(getattr(torch, self._specs[name].dtype)).cpu().numpy()
        return pooled

    def weights_digest(self) -> str:
        """sha256 over all kept weights as they are in memory now (a spec's ``weights`` covers its own layers only)."""
        return weights_digest(self._teacher)


def modality(layer: int, grid: int) -> str:
    """``pooled/layer8``, or ``pooled/layer8_grid4``."""
    return f"pooled/layer{layer}" + (f"_grid{grid}" if grid > 1 else "")


def build(cfg: PipelineConfig, *, device: str | torch.device = "cpu", frame_rule: str, decoder: str) -> FrozenEncoder:
    """The encoder of ``cfg.teacher`` on a device, with its weights loaded and hashed.

    ``frame_rule`` and ``decoder`` are those of the frame source; they go into the specs.
    Raises WeightsMissing and WeightsRefused (stages.weights), and ValueError for settings that do not fit together.
    """
    own = cfg.teacher
    if own.geometry != cfg.clip.geometry:
        raise ValueError(
            f"teacher.geometry={own.geometry} but clip.geometry={cfg.clip.geometry}: target and student would see "
            "different pictures. Set both to the same"
        )
    teacher = _load(own)
    dit, vae = teacher.dit.config, teacher.vae.config
    resize = Resize(dit["sample_size"] * _vae_stride(vae), own.geometry)
    settings = {key: dit[key] for key in DIT_SETTINGS} | {f"vae.{key}": vae[key] for key in VAE_SETTINGS}
    digests = tensor_digests(teacher)
    specs = {
        modality(layer, own.grid): FeatureSpec(
            encoder=f"diffusers:DiT#{short_digest(settings)}",
            weights=combine_digests({name: sha for name, sha in digests.items() if _block_of(name) <= layer}),
            layer=layer,
            pool="mean" if own.grid == 1 else f"grid{own.grid}",
            resize=str(resize),
            normalize="x/127.5-1",
            latent=f"{own.posterior}*{vae['scaling_factor']:.8g}",
            timestep=own.timestep,
            label=int(dit["num_embeds_ada_norm"]),
            dtype=own.dtype,
            compute_dtype=own.compute_dtype,
            frame_shape=_frame_shape(dit, own.grid),
            frame_rule=frame_rule,
            decoder=decoder,
        )
        for layer in sorted(set(own.layers))
    }
    return FrozenDiT(teacher.to(device), resize, specs, own)


def describe(cfg: PipelineConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Modality -> (frame shape, stored dtype), from the model's config alone: for ``--dry-run``. No network.

    Raises ValueError (WeightsMissing) where neither the config is here nor the model one of the paper's.
    """
    own = cfg.teacher
    try:
        folder = resolve(own.model, own.revision, patterns=CONFIGS[:1], advise=CONFIGS, local_only=True)
        config = _dit_config(folder / CONFIGS[0])
    except WeightsMissing:
        if own.model not in KNOWN:
            raise
        config = KNOWN[own.model]
    _check(own, config)
    return {modality(layer, own.grid): (_frame_shape(config, own.grid), own.dtype) for layer in sorted(set(own.layers))}


def _frame_shape(dit: Mapping[str, Any], grid: int) -> tuple[int, ...]:
    width = int(dit["num_attention_heads"]) * int(dit["attention_head_dim"])
    return (width,) if grid == 1 else (grid, grid, width)


def _check(own: TeacherConfig, dit: Mapping[str, Any]) -> None:
    """Layers and grid against the DiT's config. Raises ValueError."""
    depth, side = int(dit["num_layers"]), int(dit["sample_size"]) // int(dit["patch_size"])
    if max(own.layers) > depth:
        raise ValueError(f"teacher.layers={own.layers} but {own.model} has {depth} blocks; layers count from 1")
    if side % own.grid:
        divisors = [g for g in range(1, side + 1) if side % g == 0]
        raise ValueError(f"teacher.grid={own.grid} does not divide the {side}×{side} tokens; possible: {divisors}")


# ---------------------------------------------------------------- loading


def _load(own: TeacherConfig) -> Teacher:
    """The cut teacher with its weights: DiT in ``compute_dtype``, VAE in float32 (bfloat16 latents are too coarse)."""
    seed = parse_seed(own.weights)
    if seed is None and own.weights:
        raise ValueError(f"teacher.weights={own.weights}: it is '' for the weights of teacher.model, or seed:<n>")
    compute = getattr(torch, own.compute_dtype)
    folders = {part: _part(own, part, with_weights=seed is None) for part in ("transformer", "vae")}
    dit, vae = _dit_config(folders["transformer"] / CONFIGS[0]), _vae_config(folders["vae"] / CONFIGS[1])
    _check(own, dit)
    if vae["latent_channels"] != dit["in_channels"]:
        raise ValueError(
            f"{own.model}: the VAE gives {vae['latent_channels']} channels, the DiT takes {dit['in_channels']}"
        )

    def make() -> Teacher:
        # The VAE first, so that with a seed a layer does not depend on which deeper layers are asked for.
        encoder = AutoencoderKL(**vae)
        return Teacher(encoder, DiTTransformer2DModel(**{**dit, "num_layers": max(own.layers)}))

    if seed is not None:
        teacher = seeded_init(make, seed)
        nn.Module.to(teacher.dit, compute)  # diffusers' own to() logs a warning about nothing
    else:
        teacher = without_weights(make)
        _fill(teacher, "vae", folders["vae"] / "vae", torch.float32, dit["num_layers"])
        _fill(teacher, "dit", folders["transformer"] / "transformer", compute, dit["num_layers"])
    rows = teacher.dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings
    assert rows == dit["num_embeds_ada_norm"] + 1, f"{rows} classes: the last one must be the null class"
    teacher.vae.to(memory_format=torch.channels_last)  # 12 % faster on a CPU
    return teacher


def _part(own: TeacherConfig, part: str, *, with_weights: bool) -> Path:
    """The model folder with a part's config, and its weights if wanted."""
    configs, advise = (f"{part}/config.json",), ("transformer/*", "vae/*")
    if not with_weights:
        return resolve(own.model, own.revision, patterns=configs, advise=CONFIGS)
    return resolve_weights(
        own.model, own.revision, prefixes=("",), configs=configs, subfolder=part, files=FILES, advise=advise
    )


def _fill(teacher: Teacher, part: str, folder: Path, dtype: torch.dtype, depth: int) -> None:
    """Load one part. What was cut off is known and not read; any other surplus or lack is an error."""
    kept = len(teacher.dit.transformer_blocks)

    def wanted(key: str) -> bool:
        name = _new_name(f"{part}.{key}")
        return name not in teacher.dropped and not kept < _block_of(name) <= depth

    tensors = read_tensors(folder, keep=wanted, dtype=dtype)
    renamed = {_new_name(f"{part}.{key}").removeprefix(f"{part}."): tensor for key, tensor in tensors.items()}
    load_strict(teacher.get_submodule(part), renamed, source=folder)


def _new_name(name: str) -> str:
    if name.startswith("vae."):
        for old, new in OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def _block_of(name: str) -> int:
    """The 1-based DiT block that a weight belongs to; 0 for weights that every layer needs."""
    match = BLOCK.match(name)
    return int(match[1]) + 1 if match else 0


def _dit_config(path: Path) -> dict[str, Any]:
    """Constructor arguments of the DiT. Raises ValueError for another kind of transformer."""
    document = read_json(path)
    kind = document.get("_class_name", "DiTTransformer2DModel")
    # The released file says Transformer2DModel, diffusers' older class for DiT, PixArt and others.
    norm = document.get("norm_type", "ada_norm_zero" if kind == "DiTTransformer2DModel" else "layer_norm")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or norm != "ada_norm_zero":
        raise ValueError(f"{path} describes a {kind} with norm_type {norm}; the teacher must be a DiT (ada_norm_zero)")
    return _arguments(DiTTransformer2DModel, document)


def _vae_config(path: Path) -> dict[str, Any]:
    """Constructor arguments of the VAE. Raises ValueError for one whose latents are scaled in another way."""
    config = _arguments(AutoencoderKL, read_json(path))
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config[key] is not None:
            raise ValueError(f"{path} sets {key}; only latents × scaling_factor is supported, as DiT was trained")
    return config


def _arguments(model: type[nn.Module], document: Mapping[str, Any]) -> dict[str, Any]:
    """A config's constructor arguments with the library's defaults filled in; other keys of the file are dropped."""
    parameters = [p for name, p in inspect.signature(model.__init__).parameters.items() if name != "self"]
    return {p.name: document.get(p.name, p.default) for p in parameters}


def _vae_stride(vae: Mapping[str, Any]) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))
