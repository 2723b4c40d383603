"""MA-LMM's memory bank as a value: appending gives a new bank, nothing is kept on a module.

A bank holds at most K entries. Each entry is a run of consecutive frames, per token index: the arithmetic mean of the
frames in the run. When one entry too many arrives, the most similar pair of neighbours is merged, for every token index
on its own (MA-LMM ``memory_bank_compress``). D25: the size-weighted mean of its code, not the plain mean of its paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

COSINE_EPS = 1e-8  # the least norm that a cosine divides by (torch's default)


def adjacent_similarity(values: Float[Tensor, "B K N C"]) -> Float[Tensor, "B J N"]:
    """Cosine between entry j and entry j + 1, for every token index; J = K - 1. Infinite for a repeat (D26).

    A repeat is an entry that equals the one before it in every number. Their cosine is 1, but only up to rounding,
    which must not choose among several repeats.
    """
    values = values if values.dtype == torch.float64 else values.float()
    left, right = values[:, :-1], values[:, 1:]
    cosine = F.cosine_similarity(left, right, dim=-1, eps=COSINE_EPS)
    return cosine.masked_fill((left == right).all(-1), torch.inf)


def merge_choice(values: Float[Tensor, "B K N C"]) -> Int[Tensor, "B N"]:
    """Index j of the pair (j, j + 1) to merge, per token index: the highest cosine, the first of equals."""
    return adjacent_similarity(values).argmax(dim=1)


def merge_pairs(
    values: Float[Tensor, "B K N C"], sizes: Float[Tensor, "B K N"], choice: Int[Tensor, "B N"]
) -> tuple[Float[Tensor, "B J N C"], Float[Tensor, "B J N"]]:
    """Replace entries ``choice`` and ``choice + 1`` by their size-weighted mean; J = K - 1. Sizes add up."""
    num_entries = values.shape[1]
    position = torch.arange(num_entries - 1, device=values.device)[None, :, None]  # [1, J, 1]
    chosen = choice[:, None, :]  # [B, 1, N]
    # Entry j of the result is the old j up to the merged pair and the old j + 1 after it.
    source = position + (position > chosen).long()  # [B, J, N]
    kept_values = values.gather(1, source[..., None].expand(-1, -1, -1, values.shape[-1]))
    kept_sizes = sizes.gather(1, source)
    next_values = values.gather(1, (chosen + 1)[..., None].expand(-1, -1, -1, values.shape[-1]))
    left_size, right_size = sizes.gather(1, chosen), sizes.gather(1, chosen + 1)
    left_values = values.gather(1, chosen[..., None].expand(-1, -1, -1, values.shape[-1]))
    total = left_size + right_size
    # The size-weighted mean, in the form that leaves two equal numbers as they are: a run of repeats stays one.
    merged = torch.lerp(next_values, left_values, (left_size / total)[..., None])
    here = position == chosen  # [B, J, N]
    return torch.where(here[..., None], merged, kept_values), torch.where(here, total, kept_sizes)


@dataclass(frozen=True)
class MemoryBank:
    """Up to K entries of N tokens: ``values`` [B, k, N, C] and ``sizes`` [B, k, N] (frames per entry).

    The entries are detached: no gradient flows into the past (MA-LMM), unless ``detach`` is off (D10).

    Attributes:
        slots: where each entry would lie in a buffer of K + 1 slots in which a merged entry stays in the slot of its
            first half and the next frame takes the other. Dropout on attention knows entries by slot.
        free: the slot of the next frame.
    """

    max_len: int
    values: Float[Tensor, "B k N C"] | None = None
    sizes: Float[Tensor, "B k N"] | None = None
    slots: Int[Tensor, "B k N"] | None = None
    free: Int[Tensor, "B N"] | None = None
    detach: bool = True

    @classmethod
    def empty(cls, max_len: int, *, detach: bool = True) -> MemoryBank:
        """A bank that has seen nothing. ``max_len`` is K."""
        return cls(max_len, detach=detach)

    def __len__(self) -> int:
        return 0 if self.values is None else self.values.shape[1]

    def append(self, entry: Float[Tensor, "B N C"]) -> MemoryBank:
        """The bank after one more frame. If it is now too long, one pair is merged."""
        values = (entry.detach() if self.detach else entry)[:, None]
        sizes = torch.ones_like(values[..., 0])
        slots = torch.zeros_like(sizes, dtype=torch.long)
        if self.values is not None and self.sizes is not None and self.slots is not None and self.free is not None:
            values, sizes = torch.cat([self.values, values], 1), torch.cat([self.sizes, sizes], 1)
            slots = torch.cat([self.slots, self.free[:, None]], 1)
        if values.shape[1] <= self.max_len:
            free = torch.full_like(slots[:, 0], values.shape[1])
            return MemoryBank(self.max_len, values, sizes, slots, free, self.detach)
        choice = merge_choice(values.detach())
        values, sizes = merge_pairs(values, sizes, choice)
        position = torch.arange(self.max_len, device=slots.device)[None, :, None]
        chosen = choice[:, None, :]
        free = slots.gather(1, chosen + 1)[:, 0]
        slots = slots.gather(1, position + (position > chosen).long())
        return MemoryBank(self.max_len, values, sizes, slots, free, self.detach)

    def followed_by(self, current: Float[Tensor, "B N C"]) -> tuple[Tensor, ...]:
        """Keys' and values' source at one step: all entries, [B, k · N, C], then the current frame with its graph.

        In two parts, so that a caller may leave the detached one out of the differentiation.
        """
        return (current,) if self.values is None else (self.values.flatten(1, 2), current)

    def slots_followed_by(self, current: Float[Tensor, "B N C"]) -> Int[Tensor, "B k N"]:
        """Slots of the entries and of the current frame."""
        if self.slots is None or self.free is None:
            return torch.zeros((len(current), 1, current.shape[1]), dtype=torch.long, device=current.device)
        return torch.cat([self.slots, self.free[:, None]], 1)
