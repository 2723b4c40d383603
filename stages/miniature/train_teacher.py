"""Trains the small diffusion teacher: a VAE on pictures, then a DiT on its latents, one class a scene.

The class is dropped in a tenth of the examples, so that the null class is known; the teacher is read with it. Noise
levels are uniform, as in DiT, and level 0 of the schedule is next to no noise, which is what the paper reads at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from jaxtyping import Float, UInt8
from torch import Tensor

from stages.miniature import DIT_FOLDER
from stages.miniature.draw import TEXTURES
from stages.miniature.pictures import Pictures

STEPS = 1000  # of the noise schedule; linear betas as in DiT


def train_vae(
    images: UInt8[Tensor, "n 3 h w"], *, steps: int, batch: int = 64, log: Callable[[str], None] = print
) -> AutoencoderKL:
    """Reconstruction with a small pull towards a unit Gaussian; its latents then have unit variance and zero mean."""
    torch.manual_seed(21)
    config = json.loads((DIT_FOLDER / "vae" / "config.json").read_text())
    vae = AutoencoderKL.from_config(config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(21)
    for step in range(steps):
        _set_lr(optimizer, 2e-3, step, steps)
        pictures = _unit(images[torch.randint(len(images), (batch,), generator=order)])
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=order)
        reconstruction = vae.decode(latents).sample
        loss = F.l1_loss(reconstruction, pictures) + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            log(f"vae {step + 1}/{steps} loss {float(loss):.4f}")
    vae = vae.eval().requires_grad_(False)
    _give_unit_variance(vae, latents_of(vae, images[:4096]))
    return vae  # type: ignore[no-any-return]


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n c s s"]:
    """Modes of the posterior, the latents that the extractor feeds."""
    parts = [vae.encode(_unit(images[i : i + 256])).latent_dist.mode() for i in range(0, len(images), 256)]
    return torch.cat(parts)


def train_dit(
    vae: AutoencoderKL,
    seen: Pictures,
    images: UInt8[Tensor, "n 3 h w"],
    *,
    steps: int,
    batch: int = 64,
    log: Callable[[str], None] = print,
) -> DiTTransformer2DModel:
    """Noise prediction (Eq. 2) on the latents; an exponential mean of the weights is kept."""
    torch.manual_seed(22)
    dit = DiTTransformer2DModel.from_config(json.loads((DIT_FOLDER / "transformer" / "config.json").read_text()))
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the extractor reads it (DiT's own frequencies)
    latents = latents_of(vae, images)
    classes = torch.tensor([sorted(TEXTURES).index(spec.scene.texture) for spec in seen.specs])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), 0)  # alpha bar of Eq. 3
    mean = [p.detach().clone() for p in dit.parameters()]
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(22)
    null = dit.config.num_embeds_ada_norm
    dit.eval()  # the class is dropped here, by a generator of ours
    losses: list[float] = []
    for step in range(steps):
        _set_lr(optimizer, 1e-3, step, steps)
        rows = torch.randint(len(latents), (batch,), generator=order)
        tau = torch.randint(STEPS, (batch,), generator=order)
        noise = torch.randn(latents[rows].shape, generator=order)
        labels = torch.where(torch.rand(batch, generator=order) < 0.1, null, classes[rows])
        share = kept[tau].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents[rows] + (1 - share).sqrt() * noise
        loss = F.mse_loss(dit(noisy, timestep=tau, class_labels=labels).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(mean, dit.parameters(), strict=True):
                slow.lerp_(fast, max(1 / (step + 1), 0.005))
        losses.append(float(loss))
        if step % 100 == 99 or step == steps - 1:
            log(f"dit {step + 1}/{steps} loss {sum(losses[-100:]) / len(losses[-100:]):.4f}")
    with torch.no_grad():
        for slow, fast in zip(mean, dit.parameters(), strict=True):
            fast.copy_(slow)
    return dit.requires_grad_(False)  # type: ignore[no-any-return]


def _give_unit_variance(vae: AutoencoderKL, latents: Float[Tensor, "n c s s"]) -> None:
    """Fold the latents' mean and standard deviation into the convolutions on either side of them, in place."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    count = len(mean)
    with torch.no_grad():
        quant, back = vae.quant_conv, vae.post_quant_conv
        back.bias.add_(back.weight[:, :, 0, 0] @ mean)  # type: ignore[union-attr]
        back.weight.mul_(std.view(1, -1, 1, 1))  # type: ignore[union-attr]
        quant.weight[:count].div_(std.view(-1, 1, 1, 1))  # type: ignore[union-attr]
        quant.bias[:count].sub_(mean).div_(std)  # type: ignore[index, union-attr]
        # The second half is the log variance of the posterior.
        quant.bias[count:].sub_(2 * std.log())  # type: ignore[index, union-attr]


def _unit(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    return images.float().div(127.5).sub(1)


def _set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
