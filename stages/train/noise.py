"""Dropout as a pure function of (seed of a sample, place in the network, time step).

Every evaluation of the student draws the same masks, in whatever order it visits layers and steps, and draws them again
in a backward pass instead of keeping them. A sample's masks do not depend on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float
from torch import Tensor


class Site(IntEnum):
    """Where in a layer."""

    EMBEDDINGS = 0
    SELF_PROBS = 1
    SELF_OUTPUT = 2
    CROSS_PROBS = 3
    CROSS_OUTPUT = 4
    QUERY_OUTPUT = 5
    TEXT_OUTPUT = 6


@dataclass(frozen=True)
class Noise:
    """Dropout with probability ``p``: zeros, and 1 / (1 - p) where something is kept.

    ``layer`` and ``first`` say where the tensors that are asked about stand: a layer, and the step of their first row.
    """

    seeds: tuple[int, ...]  # one per sample
    p: float
    layer: int = 0
    first: int = 0

    @classmethod
    def draw(cls, batch: int, p: float) -> Noise:
        """Fresh seeds from torch's global generator, sample by sample: cutting a batch in two changes none."""
        return cls(tuple(int(torch.randint(2**62, ())) for _ in range(batch)), p)

    def at(self, *, layer: int | None = None, first: int | None = None) -> Noise:
        """The same noise for another place."""
        return replace(self, layer=self.layer if layer is None else layer, first=self.first if first is None else first)

    def drop(self, site: Site, x: Float[Tensor, "T B N E"]) -> Float[Tensor, "T B N E"]:
        """Dropout of hidden states."""
        return x * torch.stack([self.mask(site, t, x.shape[2:], x) for t in range(len(x))])

    def mask(self, site: Site, t: int, shape: torch.Size, like: Tensor) -> Float[Tensor, "B ..."]:
        """The factors of every sample at row ``t`` of the tensors asked about."""
        out = like.new_empty((len(self.seeds), *shape))
        place = (self.layer * len(Site) + site) << 20 | (self.first + t)
        for seed, row in zip(self.seeds, out, strict=True):
            generator = torch.Generator(like.device).manual_seed(_mix(seed, place))
            row.bernoulli_(1 - self.p, generator=generator)
        return out.div_(1 - self.p)


def _mix(seed: int, place: int) -> int:
    """SplitMix64's finalizer: nearby places get unrelated seeds."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 1
