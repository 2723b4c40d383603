"""The teacher is loaded from every layout of the hubs, strictly, safely, and only as far as it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.config import PipelineConfig
from stages.extract import dit
from stages.weights import WeightsMissing, WeightsRefused
from tests.extract.tiny import Touch, cached, frames
from tests.extract.tiny_dit import build, config, copied, rewrite, save_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    return copied(pipeline, tmp_path / "copy")


# ---------------------------------------------------------------- layouts of the hubs


def as_bin(folder: Path) -> None:
    for file in folder.glob("*/diffusion_pytorch_model.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def as_shards(folder: Path) -> None:
    """The transformer in three shards, the last of which holds blocks 9 to 12 only."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    late = [key for key in tensors if key.startswith(tuple(f"transformer_blocks.{i}." for i in (8, 9, 10, 11)))]
    early = sorted(tensors.keys() - set(late))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((early[::2], early[1::2], late), start=1):
        shard = f"diffusion_pytorch_model-{number:05}-of-00003.safetensors"
        save_file({key: tensors[key] for key in keys}, file.with_name(shard))
        weight_map |= dict.fromkeys(keys, shard)
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()


@pytest.mark.parametrize("layout", [as_bin, as_shards])
def test_every_layout_of_the_hubs_gives_the_same_encoder(
    pipeline: Path, copy: Path, layout: Callable[[Path], None]
) -> None:
    layout(copy)
    ours, theirs = build(copy), build(pipeline)
    assert ours.specs == theirs.specs
    assert (ours(frames())["pooled/layer8"] == theirs(frames())["pooled/layer8"]).all()


def test_a_shard_with_dropped_blocks_only_is_never_opened(copy: Path) -> None:
    as_shards(copy)
    before = build(copy).specs
    (copy / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors").write_bytes(b"poison")
    assert build(copy).specs == before
    with pytest.raises(WeightsRefused, match="00003-of-00003"):
        build(copy, layers=(9,))


def test_decoder_and_output_layers_are_not_read(copy: Path) -> None:
    before = build(copy).specs

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        unused = ("decoder.", "post_quant_conv.", "proj_out_", "transformer_blocks.8.", "transformer_blocks.11.")
        for key in [key for key in tensors if key.startswith(unused)]:
            tensors[key] = torch.full_like(tensors[key], float("nan"))

    for file in copy.glob("*/*.safetensors"):
        rewrite(file, poison)
    assert build(copy).specs == before


def test_the_attention_names_of_old_vae_files_are_understood(pipeline: Path, copy: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            for new, old in names.items():
                if new in key:
                    tensors[key.replace(new, old)] = tensors.pop(key)

    rewrite(copy / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert any(".proj_attn." in key for key in load_file(copy / "vae" / "diffusion_pytorch_model.safetensors"))
    assert build(copy).specs == build(pipeline).specs


def test_the_class_name_of_the_released_config_is_understood(pipeline: Path, copy: Path) -> None:
    path = copy / "transformer" / "config.json"
    released = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    path.write_text(json.dumps(released))
    assert build(copy).specs == build(pipeline).specs
    path.write_text(json.dumps(released | {"norm_type": "ada_norm_single"}))
    with pytest.raises(ValueError, match="ada_norm_single"):
        build(copy)


@pytest.mark.parametrize("key", ["transformer_blocks.7.ff.net.2.bias", "pos_embed.proj.weight"])
def test_a_tensor_that_is_missing_is_named(copy: Path, key: str) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    rewrite(copy / "transformer" / "diffusion_pytorch_model.safetensors", remove)
    with pytest.raises(WeightsRefused, match=key):
        build(copy)


def test_a_tensor_that_belongs_to_no_known_block_is_named(copy: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer_blocks.12.ff.net.2.bias"] = torch.ones(24)

    rewrite(copy / "transformer" / "diffusion_pytorch_model.safetensors", add)
    with pytest.raises(WeightsRefused, match=r"1 unexpected: transformer_blocks\.12"):
        build(copy)


def test_a_hostile_bin_file_is_refused_without_running_it(copy: Path, tmp_path: Path) -> None:
    as_bin(copy)
    file = copy / "transformer" / "diffusion_pytorch_model.bin"
    torch.save({**torch.load(file, weights_only=True), "payload": Touch(tmp_path / "executed")}, file)
    with pytest.raises(WeightsRefused, match="convert it to safetensors with"):
        build(copy)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- describe, and what is not here


@pytest.mark.usefixtures("hub")
def test_describe_knows_the_papers_teacher_without_its_files() -> None:
    assert dit.describe(PipelineConfig(preset="test")) == {"pooled/layer8": ((1152,), "float32")}
    cfg = config("facebook/DiT-XL-2-256", layers=(8, 14), grid=4, dtype="float16")
    shape = ((4, 4, 1152), "float16")
    assert dit.describe(cfg) == {"pooled/layer8_grid4": shape, "pooled/layer14_grid4": shape}


def test_describe_needs_the_config_only_and_gives_what_is_built(copy: Path, pipeline: Path) -> None:
    for file in copy.glob("*/*.safetensors"):
        file.unlink()
    for kwargs in ({"layers": (2, 8)}, {"grid": 2, "dtype": "float16"}):
        specs = build(pipeline, **kwargs).specs
        shapes = {name: (spec.frame_shape, spec.dtype) for name, spec in specs.items()}
        assert dit.describe(config(copy, **kwargs)) == shapes


@pytest.mark.parametrize("make", [build, lambda *args, **kwargs: dit.describe(config(*args, **kwargs))])
def test_a_layer_that_does_not_exist_is_refused_with_the_depth(pipeline: Path, make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="12 blocks"):
        make(pipeline, layers=(8, 13))


@pytest.mark.usefixtures("hub")
def test_missing_weights_are_named_with_the_command_that_fetches_them() -> None:
    command = r"hf download facebook/DiT-XL-2-256 --revision abc --include 'transformer/\*' --include 'vae/\*'"
    with pytest.raises(WeightsMissing, match=command):
        build("facebook/DiT-XL-2-256", revision="abc")
    with pytest.raises(WeightsMissing, match=r"hf download owner/model --include transformer/config\.json"):
        dit.describe(config("owner/model"))


def test_a_hub_copy_is_loaded_from_the_local_cache(pipeline: Path, copy: Path, hub: Path) -> None:
    as_bin(copy)
    copy.rename(cached(hub, "owner/model"))
    assert build("owner/model").specs == build(pipeline).specs


def test_weights_of_a_teacher_are_its_own_or_seeded(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="seed:<n>"):
        build(pipeline, weights="somewhere-else")


def test_the_miniature_runs_with_seeded_weights() -> None:
    folder = Path(dit.__file__).parent.parent / "miniature" / "dit"
    if not (folder / "transformer").is_dir():
        pytest.skip("the miniature is not there yet")
    encoder = build(folder, weights="seed:0", layers=(4, 8), grid=2)
    assert {name: features.shape for name, features in encoder(frames()).items()} == {
        "pooled/layer4_grid2": (3, 2, 2, 96),
        "pooled/layer8_grid2": (3, 2, 2, 96),
    }
