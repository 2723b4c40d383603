"""The frozen teacher: a cut DiT equals the whole one, is told the right things, and gets the right latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from stages.extract import dit
from stages.extract.resize import Resize
from stages.types import FrozenEncoder
from tests.extract.tiny import frames
from tests.extract.tiny_dit import build, copied, hooked, latents_of, rewrite, save_pipeline, whole


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    return copied(pipeline, tmp_path / "copy")


# ---------------------------------------------------------------- the right layer


@pytest.mark.parametrize("layer", [1, 8, 12])
def test_the_cut_teacher_is_bitwise_a_hook_on_the_whole_net(pipeline: Path, layer: int) -> None:
    encoder = build(pipeline, layers=(layer,))
    ours = encoder(frames())[f"pooled/layer{layer}"]
    theirs = hooked(whole(pipeline), latents_of(encoder, frames()), layer).mean(1).numpy()
    assert ours.shape == (3, 24)
    assert (ours == theirs).all()


def test_the_cut_teacher_is_bitwise_what_diffusers_loads_with_fewer_layers(pipeline: Path) -> None:
    encoder = build(pipeline)
    theirs = hooked(whole(pipeline, num_layers=8), latents_of(encoder, frames()), 8).mean(1).numpy()
    assert (encoder(frames())["pooled/layer8"] == theirs).all()


@pytest.mark.parametrize("timestep", [0, 261])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_the_constant_conditioning_is_bitwise_the_librarys_own(pipeline: Path, batch: int, timestep: int) -> None:
    # The library's blocks on the same weights in memory: where weights lie changes the last bits of a batch of one.
    teacher: Any = build(pipeline)._teacher  # type: ignore[attr-defined]
    with torch.inference_mode():
        latents = torch.randn(batch, 4, 8, 8)
        tokens = teacher.dit.pos_embed(latents)
        tau, labels = torch.full((batch,), timestep), torch.full((batch,), 10)
        for _ in range(2):  # computed, then taken from what is kept
            theirs = tokens
            for block, ours in zip(teacher.dit.transformer_blocks, teacher.hidden(latents, timestep, 10), strict=True):
                theirs = block(theirs, timestep=tau, class_labels=labels)
                assert (ours == theirs).all()


def test_the_conditioning_is_computed_once_per_batch_size(pipeline: Path) -> None:
    encoder: Any = build(pipeline)
    calls: list[int] = []
    for block in encoder._teacher.dit.transformer_blocks:
        block.norm1.linear.register_forward_hook(lambda _m, _i, out: calls.append(len(out)))
    for batch in (5, 5, 2, 5, 2):
        encoder(frames(batch))
    assert calls == [5] * 8 + [2] * 8


def test_several_layers_in_one_pass_are_bitwise_the_layers_alone(pipeline: Path) -> None:
    together = build(pipeline, layers=(12, 3, 8))
    features = together(frames())
    assert sorted(features) == ["pooled/layer12", "pooled/layer3", "pooled/layer8"] == sorted(together.specs)
    for layer in (3, 8, 12):
        alone = build(pipeline, layers=(layer,))
        name = f"pooled/layer{layer}"
        assert (features[name] == alone(frames())[name]).all()
        assert together.specs[name] == alone.specs[name]


def test_the_layers_are_counted_from_one_and_differ(pipeline: Path) -> None:
    encoder: Any = build(pipeline, layers=(1, 7, 8))
    features = encoder(frames())
    embedded = encoder._teacher.dit.pos_embed(latents_of(encoder, frames())).mean(1).detach().numpy()
    assert np.abs(features["pooled/layer1"] - embedded).max() > 0.01
    assert np.abs(features["pooled/layer8"] - features["pooled/layer7"]).max() > 0.01


def test_a_seeded_layer_does_not_depend_on_which_deeper_layers_are_asked_for(pipeline: Path) -> None:
    short, long = build(pipeline, weights="seed:4", layers=(3,)), build(pipeline, weights="seed:4", layers=(3, 9))
    assert short.specs["pooled/layer3"] == long.specs["pooled/layer3"]
    assert (short(frames())["pooled/layer3"] == long(frames())["pooled/layer3"]).all()


# ---------------------------------------------------------------- pooling


def test_the_mean_is_taken_over_tokens_in_float32() -> None:
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [6.0, 60.0]]], dtype=torch.float16)
    pooled = dit.pool_tokens(tokens, 1)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[3.0, 30.0]]


def test_a_grid_holds_the_means_of_its_cells_in_picture_order() -> None:
    side, grid, width = 6, 2, 5
    tokens = torch.randn(3, side * side, width, generator=torch.Generator().manual_seed(0))
    pooled = dit.pool_tokens(tokens, grid)
    assert pooled.shape == (3, grid, grid, width)
    square = tokens.reshape(3, side, side, width)
    assert torch.allclose(pooled[:, 0, 1], square[:, 0:3, 3:6].mean((1, 2)), atol=1e-6)
    assert torch.allclose(pooled[:, 1, 0], square[:, 3:6, 0:3].mean((1, 2)), atol=1e-6)


def test_grid_features_average_to_the_token_mean(pipeline: Path) -> None:
    grid, mean = build(pipeline, grid=2), build(pipeline)
    features = grid(frames())["pooled/layer8_grid2"]
    assert features.shape == (3, 2, 2, 24)
    assert np.abs(features.mean((1, 2)) - mean(frames())["pooled/layer8"]).max() < 1e-5
    assert grid.specs["pooled/layer8_grid2"].pool == "grid2"
    assert mean.specs["pooled/layer8"].pool == "mean"


def test_a_grid_must_divide_the_tokens(pipeline: Path) -> None:
    with pytest.raises(ValueError, match=r"4×4 tokens; possible: \[1, 2, 4\]"):
        build(pipeline, grid=3)


# ---------------------------------------------------------------- what the teacher is told


def test_the_label_is_the_null_class_of_the_config(pipeline: Path) -> None:
    encoder = build(pipeline)
    latents, model = latents_of(encoder, frames()), whole(pipeline)
    null, first = (hooked(model, latents, 8, label=label).mean(1).numpy() for label in (10, 0))
    features = encoder(frames())["pooled/layer8"]
    assert (features == null).all()
    assert np.abs(null - first).max() > 0.01
    assert encoder.specs["pooled/layer8"].label == 10


def test_timestep_zero_differs_from_another_and_is_in_the_spec(pipeline: Path) -> None:
    clean, later = build(pipeline), build(pipeline, timestep=500)
    difference = np.abs(clean(frames())["pooled/layer8"] - later(frames())["pooled/layer8"])
    assert difference.max() > 1e-3
    assert clean.specs["pooled/layer8"].differences(later.specs["pooled/layer8"]) == {"timestep": (0, 500)}


def test_timesteps_above_zero_use_the_frequencies_dit_was_trained_with(pipeline: Path) -> None:
    encoder = build(pipeline, timestep=500)
    latents, model = latents_of(encoder, frames()), whole(pipeline)
    as_diffusers = hooked(model, latents, 8, tau=500).mean(1).numpy()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    as_trained = hooked(model, latents, 8, tau=500).mean(1).numpy()
    features = encoder(frames())["pooled/layer8"]
    assert (features == as_trained).all()
    assert np.abs(features - as_diffusers).max() > 1e-4
    # Worked by hand: frequency i of 128 is 10000 ** (-i / 128), cosines first.
    expected = torch.cos(torch.tensor(500.0) * torch.tensor(10000.0) ** (-torch.arange(128) / 128))
    shown = model.transformer_blocks[0].norm1.emb.time_proj(torch.tensor([500]))[0, :128]
    assert torch.allclose(shown, expected, atol=1e-3)


# ---------------------------------------------------------------- latents


def test_latents_are_the_vae_mode_times_the_scaling_factor_once(pipeline: Path) -> None:
    encoder, pictures = build(pipeline), frames(2, 16, 16)
    vae: Any = AutoencoderKL.from_pretrained(pipeline, subfolder="vae").eval()
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert scaled.min() < -0.9
    with torch.inference_mode():
        by_hand = vae.encode(scaled.contiguous()).latent_dist.mean * 0.31
    assert by_hand.abs().max() > 0.05
    assert (latents_of(encoder, pictures) - by_hand).abs().max() < 1e-5
    pooled = hooked(whole(pipeline), by_hand, 8).mean(1).numpy()
    assert np.abs(encoder(pictures)["pooled/layer8"] - pooled).max() < 1e-5
    assert encoder.specs["pooled/layer8"].latent == "mode*0.31"


def test_a_forgotten_scaling_factor_would_show(pipeline: Path) -> None:
    encoder = build(pipeline)
    features = encoder(frames())["pooled/layer8"]
    unscaled = hooked(whole(pipeline), latents_of(encoder, frames()) / 0.31, 8).mean(1).numpy()
    assert np.abs(features - unscaled).max() > 0.01


def test_samples_of_the_posterior_depend_on_the_picture_and_on_nothing_else(pipeline: Path) -> None:
    encoder, mode = build(pipeline, posterior="sample"), build(pipeline)
    pictures = frames(5)
    torch.manual_seed(1)
    together = encoder(pictures)["pooled/layer8"]
    torch.manual_seed(2)
    turned = encoder(pictures[::-1].copy())["pooled/layer8"][::-1]
    alone = np.concatenate([encoder(pictures[i : i + 1])["pooled/layer8"] for i in range(5)])
    assert np.abs(together - turned).max() < 1e-5
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together - mode(pictures)["pooled/layer8"]).max() > 1e-3
    assert encoder.specs["pooled/layer8"].latent == "sample*0.31"


def test_latents_of_another_size_than_the_dit_was_made_for_are_refused(pipeline: Path) -> None:
    encoder: Any = build(pipeline)
    encoder._resize = Resize(12)
    with pytest.raises(AssertionError, match="8×8"):
        encoder(frames())


def test_the_picture_is_resized_to_the_latent_size_times_the_stride_of_the_vae(pipeline: Path) -> None:
    assert build(pipeline).specs["pooled/layer8"].resize == "squash 16 bicubic antialias uint8"


def test_a_vae_for_another_dit_is_refused(copy: Path) -> None:
    document = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps(document | {"shift_factor": 0.1}))
    with pytest.raises(ValueError, match="shift_factor"):
        build(copy)
    (copy / "vae" / "config.json").write_text(json.dumps(document | {"latent_channels": 16}))
    with pytest.raises(ValueError, match="16 channels"):
        build(copy)


def test_clip_and_teacher_must_see_the_same_geometry(pipeline: Path) -> None:
    with pytest.raises(ValueError, match=r"clip\.geometry=shortest_center"):
        build(pipeline, clip_geometry="shortest_center")
    center, squash = build(pipeline, geometry="shortest_center"), build(pipeline)
    assert np.abs(center(frames())["pooled/layer8"] - squash(frames())["pooled/layer8"]).max() > 1e-3


def test_swapped_colour_channels_give_other_features_and_floats_are_refused(pipeline: Path) -> None:
    encoder, pictures = build(pipeline), frames()
    other = encoder(pictures[..., ::-1].copy())["pooled/layer8"]
    assert np.abs(encoder(pictures)["pooled/layer8"] - other).max() > 1e-3
    with pytest.raises((ValueError, TypeError), match=r"(?i)uint8"):
        encoder(pictures.astype(np.float32) / 255)


# ---------------------------------------------------------------- frozen


def test_the_encoder_keeps_its_protocol(pipeline: Path) -> None:
    encoder = build(pipeline, dtype="float16", layers=(2, 8), grid=2)
    assert isinstance(encoder, FrozenEncoder)
    features = encoder(frames())
    assert features.keys() == encoder.specs.keys()
    for name, spec in encoder.specs.items():
        assert features[name].shape == (3, *spec.frame_shape)
        assert features[name].dtype == np.float16
        assert (spec.frame_rule, spec.decoder, spec.normalize) == ("by hand", "none", "x/127.5-1")


def test_features_do_not_depend_on_the_batch(pipeline: Path) -> None:
    encoder, pictures = build(pipeline), frames(7)
    together = encoder(pictures)["pooled/layer8"]
    alone = np.concatenate([encoder(pictures[i : i + 1])["pooled/layer8"] for i in range(7)])
    assert np.abs(together - alone).max() < 1e-5


def test_the_same_frames_give_the_same_bits_twice(pipeline: Path) -> None:
    encoder = build(pipeline)
    assert (encoder(frames())["pooled/layer8"] == encoder(frames())["pooled/layer8"]).all()


def test_the_weights_are_the_same_before_and_after(pipeline: Path) -> None:
    encoder: Any = build(pipeline)
    before = encoder.weights_digest()
    encoder(frames())
    assert encoder.weights_digest() == before
    assert not any(parameter.requires_grad for parameter in encoder._teacher.parameters())
    with torch.no_grad():
        encoder._teacher.vae.quant_conv.bias[0] += 1e-3
    assert encoder.weights_digest() != before


def test_training_mode_cannot_leak_into_the_features(copy: Path) -> None:
    document = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(document | {"dropout": 0.5}))
    encoder: Any = build(copy)
    before = encoder(frames())["pooled/layer8"]
    encoder._teacher.train()
    assert (encoder(frames())["pooled/layer8"] == before).all()
    drops = [block.norm1.emb.class_embedder.dropout_prob for block in encoder._teacher.dit.transformer_blocks]
    assert drops == [0.0] * 8


def test_only_weights_below_a_layer_enter_its_spec(copy: Path) -> None:
    before = build(copy, layers=(3, 8)).specs

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer_blocks.5.ff.net.2.bias"][0] += 1

    rewrite(copy / "transformer" / "diffusion_pytorch_model.safetensors", change)
    after = build(copy, layers=(3, 8)).specs
    assert after["pooled/layer3"] == before["pooled/layer3"]
    assert after["pooled/layer8"].differences(before["pooled/layer8"]).keys() == {"weights"}


def test_settings_without_a_trace_in_the_weights_are_part_of_the_encoder_name(copy: Path) -> None:
    before = build(copy).specs["pooled/layer8"]
    document = json.loads((copy / "transformer" / "config.json").read_text())
    heads = {"num_attention_heads": 4, "attention_head_dim": 6}
    (copy / "transformer" / "config.json").write_text(json.dumps(document | heads))
    assert build(copy).specs["pooled/layer8"].differences(before).keys() == {"encoder"}


def test_seeded_weights_are_reproducible_and_leave_the_global_generator_alone(pipeline: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (build(pipeline, weights=f"seed:{seed}") for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.specs == again.specs
    assert first.specs["pooled/layer8"].weights != other.specs["pooled/layer8"].weights


def test_half_precision_runs_the_dit_only_and_stays_close(pipeline: Path) -> None:
    exact, half = build(pipeline), build(pipeline, compute_dtype="bfloat16")
    assert half._teacher.vae.dtype == torch.float32  # type: ignore[attr-defined]
    assert half._teacher.dit.dtype == torch.bfloat16  # type: ignore[attr-defined]
    difference = np.abs(exact(frames())["pooled/layer8"] - half(frames())["pooled/layer8"])
    assert 0 < difference.max() < 0.05
