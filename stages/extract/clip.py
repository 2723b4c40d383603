"""The frozen image encoder: uint8 frames -> raw patch tokens of one block, class token first (§3.1).

Two sources give the same tensor: any open_clip model, and the vision tower inside an InstructBLIP checkpoint.
Tokens are taken after block ``layer`` (1-based) and before every final norm, because ``ln_vision`` is trained.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import open_clip
import torch
from jaxtyping import Float, UInt8
from open_clip.model import CLIPVisionCfg, _build_vision_tower  # the image tower alone: no text tower to build or load
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from cache_schema.spec import FeatureSpec
from stages.config import ClipConfig, PipelineConfig
from stages.extract.resize import Resize
from stages.types import FrozenEncoder
from stages.weights import (
    HUB_ID,
    WeightsMissing,
    WeightsRefused,
    load_strict,
    local_path,
    parse_seed,
    read_json,
    read_tensors,
    resolve,
    resolve_any,
    resolve_weights,
    seeded_init,
    short_digest,
    weights_digest,
    without_weights,
)

MODALITY = "tokens"
MINIATURE_MODELS = Path(__file__).parent.parent / "miniature" / "clip"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
OPEN_CLIP_CONFIG = "open_clip_config.json"
BUILT_IN_MODELS = frozenset(open_clip.list_models())
INSTRUCTBLIP_CONFIGS = ("config.json", "preprocessor_config.json")
# Checkpoints whose vision tower has transformers' default sizes: 39 blocks, 257 tokens of 1408.
KNOWN_INSTRUCTBLIP = tuple(f"Salesforce/instructblip-{llm}" for llm in ("vicuna-7b", "vicuna-13b", "flan-t5-xl"))
RESAMPLE: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# What InstructBLIP's vision config adds beyond weights and shapes.
VISION_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class Preprocess:
    """What a checkpoint says about its input. The geometry is ours (``clip.geometry``): one for CLIP and teacher."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"]

    @classmethod
    def of(cls, cfg: Mapping[str, Any], *, source: object) -> Preprocess:
        """From the fields ``mean``, ``std``, ``interpolation`` of an open_clip preprocess config."""
        mean, std, interpolation = (cfg.get(key) for key in ("mean", "std", "interpolation"))
        if not mean or not std or interpolation not in RESAMPLE.values():
            raise ValueError(f"{source} must give mean, std, and interpolation bicubic or bilinear; got {dict(cfg)}")
        return cls(tuple(map(float, mean)), tuple(map(float, std)), cast(Literal["bicubic", "bilinear"], interpolation))

    def __str__(self) -> str:
        return " ".join(f"{name}={','.join(f'{v:.8g}' for v in getattr(self, name))}" for name in ("mean", "std"))


class Tower(nn.Module):
    """An image tower cut after a block: pixels [b, 3, h, w] -> raw tokens [b, P, C]."""

    image_size: tuple[int, int]
    dropped: frozenset[str]  # names of the weights that the cut removed: known, and not read


class OpenClipTower(Tower):
    """The first ``layer`` blocks of an open_clip image tower, native or from timm."""

    def __init__(self, visual: Any, layer: int, name: str) -> None:
        super().__init__()
        self.visual = visual
        trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
        blocks = getattr(trunk, "blocks", None) or getattr(getattr(trunk, "transformer", None), "resblocks", None)
        if blocks is None or not hasattr(trunk, "prune_intermediate_layers"):
            raise ValueError(f"clip.model={name} has no transformer blocks with patch tokens; take a ViT or EVA model")
        _check_layer(layer, len(blocks), name)
        before = set(self.state_dict())
        trunk.prune_intermediate_layers([layer - 1], prune_norm=True, prune_head=True)
        if isinstance(visual, TimmModel):
            visual.head = nn.Identity()
        else:
            visual.attn_pool = visual.attn_pool_contrastive = None  # CoCa's
        self.dropped = frozenset(before - set(self.state_dict()))
        self.image_size = tuple(visual.image_size)
        self.prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 1))  # 0 in SigLIP: it has no class token

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b P C"]:
        """Tokens after the last kept block, class token first, no norm applied."""
        taken = self.visual.forward_intermediates(  # its defaults are all blocks, NCHW, and no class token
            pixels,
            indices=1,
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=self.prefix_tokens > 0,
        )
        names = ("image_intermediates_prefix", "image_intermediates")
        return torch.cat([taken[name][0] for name in names if name in taken], dim=1)


class InstructBlipTower(Tower):
    """The first ``layer`` blocks of InstructBLIP's vision tower, without ``post_layernorm`` (that is ``ln_vision``)."""

    def __init__(self, config: InstructBlipVisionConfig, layer: int, name: str) -> None:
        super().__init__()
        model: Any = InstructBlipVisionModel(config)
        self.vision_model = model
        _check_layer(layer, config.num_hidden_layers, name)
        before = set(self.state_dict())
        model.encoder.layers = model.encoder.layers[:layer]
        model.post_layernorm = nn.Identity()
        self.dropped = frozenset(before - set(self.state_dict()))
        self.image_size = (model.embeddings.image_size, model.embeddings.image_size)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b P C"]:
        """Tokens after the last kept block, class token first, no norm applied."""
        model: Any = self.vision_model
        tokens: Tensor = model.encoder(inputs_embeds=model.embeddings(pixels)).last_hidden_state
        return tokens


def _check_layer(layer: int, depth: int, name: str) -> None:
    if layer > depth:
        raise ValueError(f"clip.layer={layer} but {name} has {depth} blocks; layers count from 1 to {depth}")


class FrozenClip:
    """A tower with its preprocessing, as ``FrozenEncoder``: uint8 frames -> ``{"tokens": [b, P, C]}``."""

    def __init__(self, tower: Tower, preprocess: Preprocess, resize: Resize, spec: FeatureSpec) -> None:
        self._tower = tower.requires_grad_(False).eval()
        weight = next(tower.parameters())
        self._device, self._compute = weight.device, weight.dtype
        self._mean = torch.tensor(preprocess.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.std, device=self._device).view(1, 3, 1, 1)
        self._resize, self._spec = resize, spec

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """One modality: ``tokens``."""
        return {MODALITY: self._spec}

    def view(self, frames: UInt8[np.ndarray, "b h w 3"]) -> UInt8[Tensor, "b 3 size size"]:
        """The frames as the encoder sees them; on the CPU, in any thread."""
        return self._resize(frames)

    def __call__(self, frames: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Float[np.ndarray, "b P C"]]:
        """``encode(view(frames))``."""
        return self.encode(self.view(frames))

    def encode(self, pictures: UInt8[Tensor, "b 3 size size"]) -> dict[str, Float[np.ndarray, "b P C"]]:
        """Tokens in the spec's feature_dtype; a value beyond float16 becomes inf, which the store refuses by frame."""
        self._tower.eval()  # whoever called train() on it must not change the features
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            pixels = pictures.to(self._device).float().div(255)
            pixels = ((pixels - self._mean) / self._std).to(self._compute)
            tokens = self._tower(pixels)  # [b, P, C]
            assert tuple(tokens.shape[1:]) == self._spec.frame_shape, (tokens.shape, self._spec.frame_shape)
            stored: np.ndarray = tokens.to(getattr(torch, self._spec.feature_dtype)).cpu().numpy()
        return {MODALITY: stored}

    def weights_digest(self) -> str:
        """sha256 over the kept weights as they are in memory now."""
        return weights_digest(self._tower)


def build(cfg: PipelineConfig, *, device: str | torch.device = "cpu", frame_rule: str, decoder: str) -> FrozenEncoder:
    """The encoder of ``cfg.clip`` on a device, with its weights loaded and hashed.

    ``frame_rule`` and ``decoder`` are those of the frame source; they go into the spec.
    Raises WeightsMissing and WeightsRefused (stages.weights), and ValueError for settings that do not fit together.
    """
    clip = cfg.clip
    name, tower, preprocess = _load_instructblip(clip) if clip.source == "instructblip" else _load_open_clip(clip)
    resize = Resize(_side(tower, clip.model), clip.geometry, preprocess.interpolation)
    spec = FeatureSpec(
        encoder=name,
        weights=weights_digest(tower),
        layer=clip.layer,
        pool="none",
        resize=str(resize),
        normalize=str(preprocess),
        latent="",
        timestep=None,
        label=None,
        dtype=clip.dtype,
        compute_dtype=clip.compute_dtype,
        frame_shape=_frame_shape(clip),
        frame_rule=frame_rule,
        decoder=decoder,
    )
    return FrozenClip(tower.to(device), preprocess, resize, spec)


def describe(cfg: PipelineConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Modality -> (frame shape, stored dtype), without weights, memory or network: for ``--dry-run``.

    Raises ValueError (WeightsMissing) for an architecture that only a checkpoint knows which is not here.
    """
    return {MODALITY: (_frame_shape(cfg.clip), cfg.clip.dtype)}


def _frame_shape(clip: ClipConfig) -> tuple[int, ...]:
    """(P, C) by running the architecture on the meta device, which computes shapes and nothing else."""
    with torch.device("meta"), torch.inference_mode():
        if clip.source == "instructblip":
            tower: Tower = InstructBlipTower(_instructblip_config(clip, local_only=True), clip.layer, clip.model)
        else:
            tower = _Architecture.of(clip, _described(clip, local_only=True)).build(clip.layer)
        side = _side(tower, clip.model)
        return tuple(tower.eval()(torch.empty(1, 3, side, side)).shape[1:])


def _side(tower: Tower, name: str) -> int:
    height, width = tower.image_size
    if height != width:
        raise ValueError(f"clip.model={name} wants {height}×{width} pictures; only square ones are supported")
    return height


# ---------------------------------------------------------------- open_clip


@dataclass(frozen=True)
class _Architecture:
    """An open_clip image tower by name: from open_clip's own list, our miniature, or a checkpoint's config file."""

    name: str
    config: Mapping[str, Any]  # embed_dim, vision_cfg, maybe quick_gelu

    @classmethod
    def of(cls, clip: ClipConfig, described: Mapping[str, Any]) -> _Architecture:
        """The architecture of ``clip.model``. A checkpoint that describes itself must agree with the name."""
        known = clip.model in open_clip.list_models()
        if not known and MINIATURE_MODELS.is_dir():
            open_clip.add_model_config(MINIATURE_MODELS)
        named, own = open_clip.get_model_config(clip.model), described.get("model_cfg")
        if named is None and own is None:
            near = difflib.get_close_matches(clip.model, open_clip.list_models(), n=4, cutoff=0.4)
            raise ValueError(f"clip.model={clip.model} is not an open_clip model; nearest: {', '.join(near) or 'none'}")
        if named is not None and own is not None and _numerics(named) != _numerics(own):
            differ = sorted(key for key in _numerics(named) if _numerics(named)[key] != _numerics(own)[key])
            alike = _models_like(_numerics(own), clip.model)
            raise ValueError(
                f"clip.model={clip.model} and the {OPEN_CLIP_CONFIG} of clip.weights={clip.weights} differ in "
                f"{', '.join(differ)}.\nName the model that the weights were made for:  --set clip.model="
                f"{alike[0] if alike else 'NAME'}"
            )
        return cls(clip.model, named if named is not None else cast("Mapping[str, Any]", own))

    @property
    def quick_gelu(self) -> bool:
        """OpenAI's activation: it changes the numbers and leaves no trace in the weights."""
        return bool(self.config.get("quick_gelu", False))

    @property
    def encoder(self) -> str:
        """The spec field. A name that open_clip does not define is followed by a digest of what it stands for."""
        own = "" if self.name in BUILT_IN_MODELS else f"#{short_digest(_numerics(self.config))}"
        return f"open_clip:{self.name}{own}"

    def build(self, layer: int) -> OpenClipTower:
        """The cut tower with its library's initial weights."""
        vision = {**self.config["vision_cfg"], "timm_model_pretrained": False}
        visual = _build_vision_tower(self.config["embed_dim"], vision, self.quick_gelu)
        return OpenClipTower(visual, layer, self.name)


def _numerics(config: Mapping[str, Any]) -> dict[str, Any]:
    """The image tower's settings with open_clip's defaults filled in."""
    settings = asdict(CLIPVisionCfg(**{**config["vision_cfg"], "timm_model_pretrained": False}))
    return {**settings, "quick_gelu": bool(config.get("quick_gelu", False))}


def _load_open_clip(clip: ClipConfig) -> tuple[str, Tower, Preprocess]:
    """Encoder name, tower with weights, preprocessing."""
    described = _described(clip)
    architecture = _Architecture.of(clip, described)
    tag = _tag(clip)
    if not described.get("model_cfg"):
        _check_activation(clip, architecture, tag)
    seed, compute = parse_seed(clip.weights), getattr(torch, clip.compute_dtype)
    if seed is not None:
        tower = seeded_init(lambda: architecture.build(clip.layer), seed).to(compute)
    else:
        source = _open_clip_file(clip, tag)
        tower = without_weights(lambda: architecture.build(clip.layer))
        try:
            _fill(tower, source, "visual.", compute)
        except WeightsRefused as error:
            raise WeightsRefused(f"{error}\n{_other_model(source)}") from error
    preprocess = _open_clip_preprocess(clip, architecture, tag, described)
    return architecture.encoder, tower, preprocess


def _models_like(numerics: Mapping[str, Any], model: str) -> list[str]:
    """Names of open_clip's models whose image tower has these settings, those that begin like ``model`` first."""
    names = sorted(BUILT_IN_MODELS, key=lambda name: (not name.startswith(model.removesuffix("-quickgelu")), name))
    return [name for name in names if _numerics(open_clip.get_model_config(name)) == dict(numerics)]


def _check_activation(clip: ClipConfig, architecture: _Architecture, tag: Mapping[str, Any]) -> None:
    """QuickGELU or GELU leaves no trace in the weights, so that the wrong one makes wrong features without an error.

    Raises ValueError where the tag, the hub repository or the name of the file tells that it is the other one; warns
    where nothing tells.
    """
    quick = architecture.quick_gelu
    other = clip.model.removesuffix("-quickgelu") if quick else f"{clip.model}-quickgelu"
    if parse_seed(clip.weights) is not None or other not in open_clip.list_models():
        return
    plain = clip.model.removesuffix("-quickgelu")
    published = {name: open_clip.get_pretrained_cfg(plain, name) for name in _tags_of(plain)}
    names = [name for name, cfg in published.items() if _is_named(clip.weights, name, cfg)]
    longest = max(names, key=len, default="")
    trained = tag or published.get(longest, {})
    if trained and bool(trained.get("quick_gelu", False)) != quick:
        raise ValueError(
            f"clip.weights={clip.weights} {'was' if tag else 'looks like open_clip tag ' + longest + ', which was'} "
            f"trained {'without' if quick else 'with'} QuickGELU, and clip.model={clip.model} "
            f"{'has' if quick else 'does not have'} it: the features would be off without an error.\n"
            f"Name the model it was trained as:  --set clip.model={other}"
        )
    if not trained:
        makers = sorted(name for name, cfg in published.items() if bool(cfg.get("quick_gelu", False)) != quick)
        warnings.warn(
            f"clip.weights={clip.weights} does not say whether it was trained with QuickGELU; clip.model={clip.model} "
            f"takes {'it' if quick else 'GELU'}. If it is one of {', '.join(makers[:4])}:  --set clip.model={other}",
            stacklevel=2,
        )


def _tags_of(model: str) -> list[str]:
    tags: list[str] = open_clip.list_pretrained_tags_by_model(model)
    return tags


def _is_named(weights: str, tag: str, published: Mapping[str, Any]) -> bool:
    """Whether weights come, by their name, from a published tag: its hub repository, or its name in a file's name."""
    repository = str(published.get("hf_hub", "")).rpartition("/")[0]
    if weights == repository:
        return True
    words = re.split(r"[^a-z0-9]+", Path(weights).expanduser().absolute().as_posix().lower())
    parts = re.split(r"[^a-z0-9]+", tag.lower())
    last = words[-8:]  # the file and the folders next to it
    return any(last[at : at + len(parts)] == parts for at in range(len(last)))


def _described(clip: ClipConfig, *, local_only: bool = False) -> dict[str, Any]:
    """The ``open_clip_config.json`` beside local weights or in a hub repository; {} where there is none."""
    path = local_path(clip.weights)
    if not clip.weights or parse_seed(clip.weights) is not None or _tag(clip):
        return {}
    if not path.exists() and _is_hub_repository(clip.weights):
        try:
            path = resolve(
                clip.weights,
                clip.revision,
                patterns=(OPEN_CLIP_CONFIG,),
                advise=("open_clip_*",),
                local_only=local_only,
            )
        except WeightsMissing:
            if not local_only:
                raise
    file = (path if path.is_dir() else path.parent) / OPEN_CLIP_CONFIG
    return dict(read_json(file)) if path.exists() and file.is_file() else {}


def _tag(clip: ClipConfig) -> dict[str, Any]:
    """What open_clip publishes about ``clip.weights`` as a tag of ``clip.model``; {} if it is no tag."""
    return dict(open_clip.get_pretrained_cfg(clip.model, clip.weights))


def _other_model(source: Path) -> str:
    """Which of open_clip's models have a tower of the sizes that a file holds, as a setting to type."""
    shapes = {key: tuple(tensor.shape) for key, tensor in read_tensors(source, ("visual.",)).items()}
    conv = shapes.get("visual.conv1.weight")
    if conv is None or len(conv) != 4:
        return "Name the model that the weights were made for:  --set clip.model=NAME"
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", key))}
    tokens = shapes.get("visual.positional_embedding", (0,))[0]
    alike = []
    for name in sorted(BUILT_IN_MODELS, key=lambda name: (len(name), name)):
        sizes = _numerics(open_clip.get_model_config(name))
        patch, side = sizes["patch_size"], sizes["image_size"]
        if not isinstance(side, int) or not isinstance(patch, int):
            continue
        if (sizes["width"], patch, sizes["layers"], (side // patch) ** 2 + 1) == (
            conv[0],
            conv[2],
            len(blocks),
            tokens,
        ):
            alike.append(name)
    told = f"a ViT of width {conv[0]}, {len(blocks)} blocks, patches of {conv[2]}, {tokens} tokens"
    return f"It holds {told}.\nName that model:  --set clip.model={alike[0] if alike else 'NAME'}"


def _is_hub_repository(weights: str) -> bool:
    return "/" in weights and HUB_ID.fullmatch(weights) is not None


def _open_clip_file(clip: ClipConfig, tag: Mapping[str, Any]) -> Path:
    """The weights file of a tag, of a local path, or of a hub repository. Raises WeightsMissing."""
    path = local_path(clip.weights)
    if not tag and path.is_file():
        return path
    names: tuple[str, ...] = OPEN_CLIP_FILES
    repository = clip.weights
    if tag:  # "owner/name/" or "owner/name/file"
        repository, _, file = str(tag["hf_hub"]).rpartition("/")
        names = (Path(file).with_suffix(".safetensors").name, file) if file else OPEN_CLIP_FILES[:2]
    elif not (clip.weights and path.is_dir()) and not _is_hub_repository(clip.weights):
        tags = ", ".join(_tags_of(clip.model)) or "none"
        raise WeightsMissing(
            f"clip.weights={clip.weights!r} is not here: no such file or folder, and no tag of {clip.model}.\n"
            f"Tags of {clip.model}: {tags}. For random weights: --set clip.weights=seed:0"
        )
    folder = resolve_any(repository, clip.revision, choices=names)
    return next(folder / name for name in names if (folder / name).is_file())


def _open_clip_preprocess(
    clip: ClipConfig, architecture: _Architecture, tag: Mapping[str, Any], described: Mapping[str, Any]
) -> Preprocess:
    """Mean, std and interpolation: of the tag, of the checkpoint's own config, or of all published tags alike.

    A weights file alone does not know them, and open_clip then assumes OpenAI's, which is wrong for many models.
    So they are taken from the model's published tags where all of these agree, and asked for otherwise.
    """
    if tag:
        return Preprocess.of(tag, source=f"{clip.model} {clip.weights}")
    if described.get("preprocess_cfg"):
        return Preprocess.of(described["preprocess_cfg"], source=f"{OPEN_CLIP_CONFIG} of {clip.weights}")
    tags = [open_clip.get_pretrained_cfg(clip.model, name) for name in _tags_of(clip.model)]
    alike = [cfg for cfg in tags if bool(cfg.get("quick_gelu", False)) == architecture.quick_gelu]
    published = {Preprocess.of(cfg, source=clip.model) for cfg in alike}
    if len(published) == 1:
        return published.pop()
    if parse_seed(clip.weights) is not None:  # random weights have no right answer; the spec records this one
        return Preprocess.of(asdict(PreprocessCfg()), source="open_clip")
    raise ValueError(
        f"clip.weights={clip.weights} does not say how its input is normalised, and the published versions of "
        f"{clip.model} {'differ' if published else 'do not exist'}. Write beside the weights a file "
        f'{OPEN_CLIP_CONFIG} such as {{"preprocess_cfg": {json.dumps(asdict(PreprocessCfg()))}}}'
    )


# ---------------------------------------------------------------- InstructBLIP


def _load_instructblip(clip: ClipConfig) -> tuple[str, Tower, Preprocess]:
    """Encoder name, tower with weights, preprocessing, of the checkpoint ``clip.model``."""
    seed = parse_seed(clip.weights)
    if seed is None and clip.weights not in ("", ClipConfig().weights):
        raise ValueError(
            f"clip.weights={clip.weights}: with clip.source=instructblip the weights are those of clip.model"
        )
    config = _instructblip_config(clip)
    compute = getattr(torch, clip.compute_dtype)
    configs = INSTRUCTBLIP_CONFIGS
    if seed is not None:
        folder = resolve(clip.model, clip.revision, patterns=configs)
        config.initializer_range = 0.02  # the released config says 1e-10, which gives the same tokens for every picture
        tower = seeded_init(lambda: InstructBlipTower(config, clip.layer, clip.model), seed).to(compute)
    else:
        folder = resolve_weights(clip.model, clip.revision, prefixes=("vision_model.",), configs=configs)
        tower = without_weights(lambda: InstructBlipTower(config, clip.layer, clip.model))
        _fill(tower, folder, "vision_model.", compute)
    facts = {key: getattr(config, key) for key in VISION_SETTINGS}
    preprocess = _instructblip_preprocess(folder / "preprocessor_config.json", config)
    return f"transformers:InstructBlipVisionModel#{short_digest(facts)}", tower, preprocess


def _instructblip_config(clip: ClipConfig, *, local_only: bool = False) -> InstructBlipVisionConfig:
    try:
        folder = resolve(
            clip.model,
            clip.revision,
            patterns=("config.json",),
            advise=(*INSTRUCTBLIP_CONFIGS, "model.safetensors.index.json"),  # which then tells the shards
            local_only=local_only,
        )
    except WeightsMissing:
        if local_only and clip.model in KNOWN_INSTRUCTBLIP:
            return InstructBlipVisionConfig()
        raise
    document = read_json(folder / "config.json")
    if "vision_config" not in document:
        raise ValueError(f"{folder / 'config.json'} is not that of an InstructBLIP checkpoint: it has no vision_config")
    return InstructBlipVisionConfig.from_dict(document["vision_config"])


def _instructblip_preprocess(path: Path, config: InstructBlipVisionConfig) -> Preprocess:
    document = read_json(path)
    size, resample = document.get("size"), document.get("resample")
    side = size.get("height") if isinstance(size, dict) else size
    if side != config.image_size or resample not in RESAMPLE:
        raise ValueError(
            f"{path} asks for size {size} and resample {resample}; the vision tower takes {config.image_size}×"
            f"{config.image_size}, and resample must be one of {RESAMPLE}"
        )
    fields = {"mean": document.get("image_mean"), "std": document.get("image_std"), "interpolation": RESAMPLE[resample]}
    return Preprocess.of(fields, source=path)


# ---------------------------------------------------------------- shared


def _fill(tower: Tower, source: Path, prefix: str, dtype: torch.dtype) -> None:
    """Load a tower's own weights; those of dropped blocks and of other modules are not read."""
    tensors = read_tensors(source, (prefix,), keep=lambda key: key not in tower.dropped, dtype=dtype)
    load_strict(tower, tensors, source=source)
