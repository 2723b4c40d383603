"""Adaptive multi-level alignment of query states with the diffusion teacher (§3.2, Eq. 4–7).

What the paper leaves open is numbered in stages/DECISIONS.md (D1–D9 there) and set in ``AlignConfig``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stages.config import AlignConfig
from stages.types import AlignmentLoss


def kd_loss(z: Float[Tensor, "*batch D"], y_star: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """L_kd of Eq. 4: minus the cosine between projected query output and pooled target; in [-1, 1].

    A zero vector has cosine 0 (eps 1e-8), so no frame can make the loss NaN.
    """
    return -F.cosine_similarity(z, y_star, dim=-1, eps=1e-8)


def projection_head(kind: str, in_size: int, out_size: int, hidden: int) -> nn.Module:
    """h_phi, "an MLP layer" (Eq. 4; D5): E -> D per token."""
    if kind == "linear":
        return nn.Linear(in_size, out_size)
    if kind == "repa":  # REPA's three-layer head
        return nn.Sequential(
            nn.Linear(in_size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_size)
        )
    return nn.Sequential(nn.Linear(in_size, out_size), nn.GELU(), nn.Linear(out_size, out_size))


def whitening_of(covariance: Float[Tensor, "D D"], floor: float = 1e-3) -> Float[Tensor, "D D"]:
    """The symmetric map that gives targets of this covariance unit variance in every direction (ZCA).

    Directions with less than ``floor`` of the mean variance are noise; they are not blown up beyond that.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = values.clamp_min(0).add(floor * values.mean()).rsqrt()
    white: Tensor = ((vectors * scale) @ vectors.T).to(covariance.dtype)
    return white


class Alignment(nn.Module):
    """Projection heads h_phi, one per level, and the weight net g_psi, shared by the levels.

    Args:
        cfg: levels, head, weights.
        hidden_size: E.
        target_size: D, or g · g · D for a grid target (flattened).
        target_mean: dataset mean of y* over the training frames, for ``target_norm`` center and whiten.
        target_covariance: their covariance, for ``whiten``.
    """

    target_mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        cfg: AlignConfig,
        *,
        hidden_size: int,
        target_size: int,
        target_mean: Float[Tensor, " D"] | None = None,
        target_covariance: Float[Tensor, "D D"] | None = None,
    ) -> None:
        super().__init__()
        if cfg.target_norm != "none" and target_mean is None:
            raise ValueError(f"align.target_norm={cfg.target_norm} needs the mean of the training targets")
        if cfg.target_norm == "whiten" and target_covariance is None:
            raise ValueError("align.target_norm=whiten needs the covariance of the training targets")
        self.cfg = cfg
        self.heads = nn.ModuleDict(
            {str(u): projection_head(cfg.head, hidden_size, target_size, cfg.head_hidden) for u in cfg.levels}
        )
        quarter = max(1, target_size // 4)
        self.weight_net = (
            nn.Sequential(nn.Linear(target_size, quarter), nn.GELU(), nn.Linear(quarter, 1))
            if cfg.weights == "adaptive"
            else None
        )
        mean = torch.zeros(target_size) if target_mean is None else target_mean
        self.register_buffer("target_mean", mean.clone())
        if cfg.target_norm == "whiten":
            assert target_covariance is not None
            self.register_buffer("whitening", whitening_of(target_covariance))

    def normalised(self, y_star: Float[Tensor, "B T *D"]) -> Float[Tensor, "B T Z"]:
        """The target as the loss sees it: flattened, and without its common part where D4 says so."""
        target = y_star.flatten(2).to(self.target_mean.dtype)
        if self.cfg.target_norm != "none":
            target = target - self.target_mean
        if self.cfg.target_norm == "whiten":
            target = target @ self.whitening
        return target

    def project(self, level: int, hidden: Float[Tensor, "B T Q E"]) -> Float[Tensor, "B T D"]:
        """z = mean over the queries of h_phi(h) (D2)."""
        out: Tensor = self.heads[str(level)](hidden).mean(dim=2)
        return out

    def weigh(self, z: Float[Tensor, "B T D"], y_star: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
        """w_u of Eq. 6 in (0, 1) from the projected h plus y*; or the constant of the "average" arm of Table 4."""
        if self.weight_net is None:
            return z.new_full(z.shape[:2], self.cfg.uniform_weight)
        mixed = z + y_star
        if self.cfg.detach_weight_inputs:
            mixed = mixed.detach()
        return torch.sigmoid(self.weight_net(mixed)).squeeze(-1)

    def forward(
        self,
        hidden: dict[int, Float[Tensor, "B T Q E"]],
        y_star: Float[Tensor, "B T *D"],
        counts: Sequence[int] | None = None,
    ) -> AlignmentLoss:
        """Eq. 7: sum over levels, mean over frames and batch (D8).

        Args:
            hidden: query states of every configured level at the aligned frames.
            y_star: teacher targets of the same frames; a grid is flattened.
            counts: how many of the frames, the last ones, are a sample's own, where that differs. The mean is over its
                frames first, then over samples (D54).
        """

        def mean(x: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
            if counts is None:
                return x.mean()
            own = torch.tensor(counts, device=x.device)[:, None]
            place = torch.arange(x.shape[1], device=x.device)
            return (x.where(place >= x.shape[1] - own, 0.0).sum(1) / own[:, 0]).mean()

        target = self.normalised(y_star)
        total = target.new_zeros(())
        per_level: dict[int, Tensor] = {}
        weights: dict[int, Tensor] = {}
        for level in self.cfg.levels:
            z = self.project(level, hidden[level])
            loss, weight = kd_loss(z, target), self.weigh(z, target)  # [B, T]
            total = total + mean(weight * loss)
            per_level[level], weights[level] = mean(loss).detach(), mean(weight).detach()
        return AlignmentLoss(total, per_level, weights)
