"""Which bank entries merge, decided for all time steps before anything is attended to.

A bank entry is the mean of a run of frames, so the cosine of two entries follows from inner products of frames alone:
with S the sum of the Gram matrix over a block, cos = S_ab / sqrt(S_aa · S_bb). Blocks come from two-dimensional prefix
sums, and after a merge only three cosines change. Decisions are those of ``memory.MemoryBank``, ties included (D26).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.train.memory import COSINE_EPS


@dataclass(frozen=True)
class MergePlan:
    """The merges of T frames into at most K entries, per token index n and sample b.

    A buffer of K + 1 slots holds the bank and the current frame. Frame t <= K is written to slot t. After step K + j
    merge j replaces the entry in ``kept_slot`` by its mean with the entry in ``freed_slot``, and frame K + 1 + j is
    written to the freed slot. Attention does not depend on the order of the slots. The last frame merges nothing.

    Rows name entries over time: row t is frame t alone, row T + j is the result of merge j.
    """

    num_frames: int
    max_len: int
    position: Int[Tensor, "J B N"]  # index of the pair's first entry among the K + 1 entries in order of time
    kept_slot: Int[Tensor, "J B N"]
    freed_slot: Int[Tensor, "J B N"]
    kept_row: Int[Tensor, "J B N"]
    freed_row: Int[Tensor, "J B N"]
    last_row: Int[Tensor, "R B N"]  # row in each slot after the last frame was written
    weight: Float[Tensor, "J B N"]  # share of the kept entry in the mean: its number of frames over both

    @property
    def num_merges(self) -> int:
        """J."""
        return len(self.position)

    @property
    def num_slots(self) -> int:
        """Slots that are ever used: K + 1, or T where there are fewer frames."""
        return min(self.num_frames, self.max_len + 1)

    def slots_at(self, t: int) -> int:
        """Slots in use at step t, the current frame included."""
        return min(t + 1, self.max_len + 1)

    def rows_at(self, t: int) -> Int[Tensor, "R B N"]:
        """Row in every slot before frame t is written. Unused slots name rows that do not exist yet, each another."""
        _, *shape = self.position.shape
        slots = torch.arange(self.num_slots, device=self.position.device)
        rows = slots[:, None, None].expand(-1, *shape).contiguous()
        for j in range(max(0, min(t - self.max_len, self.num_merges))):
            rows.scatter_(0, self.kept_slot[j][None], self.num_frames + j)
            if self.max_len + 1 + j < t:
                rows.scatter_(0, self.freed_slot[j][None], self.max_len + 1 + j)
        return rows

    @property
    def nbytes(self) -> int:
        """Memory that its fields take."""
        return sum(field.nbytes for field in self._fields())

    def packed(self, b: int) -> MergePlan:
        """The plan of sample b alone, in main memory and in small integers; ``joined`` undoes it."""
        small = torch.int16 if 2 * self.num_frames < 1 << 15 else torch.int64
        own = (field[:, b : b + 1].cpu().clone() for field in self._fields())
        fields = (field if field.is_floating_point() else field.to(small) for field in own)
        return MergePlan(self.num_frames, self.max_len, *fields)

    @classmethod
    def joined(cls, plans: Sequence[MergePlan], device: torch.device) -> MergePlan:
        """One plan of the samples of several packed ones, which have the same T and K."""
        both = (torch.cat(parts, 1).to(device) for parts in zip(*(plan._fields() for plan in plans), strict=True))
        fields = (field if field.is_floating_point() else field.long() for field in both)
        return cls(plans[0].num_frames, plans[0].max_len, *fields)

    def _fields(self) -> tuple[Tensor, ...]:
        places = self.position, self.kept_slot, self.freed_slot, self.kept_row, self.freed_row, self.last_row
        return (*places, self.weight)


class PlanCache:
    """Plans of windows that look the same in every epoch, made once.

    It fills up to ``limit`` bytes of main memory and then stays as it is: every epoch asks for all windows once, and
    to forget one for another would only trade them.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit, self.nbytes = limit, 0
        self._plans: dict[Hashable, MergePlan] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def plan(self, names: Sequence[Hashable], x: Float[Tensor, "T B N C"], max_len: int) -> MergePlan:
        """``merge_plan`` of x, of which only the samples whose name is new are looked at.

        ``names[b]`` stands for all that decides x[:, b] but its padding to T frames.
        """
        keys = [(name, len(x), max_len) for name in names]
        here = {key: self._plans[key] for key in keys if key in self._plans}
        lacking = [b for b, key in enumerate(keys) if key not in here]
        if lacking:
            made = merge_plan(x[:, lacking], max_len)
            for place, b in enumerate(lacking):
                plan = here[keys[b]] = made.packed(place)
                if keys[b] not in self._plans and self.nbytes + plan.nbytes <= self.limit:
                    self._plans[keys[b]] = plan
                    self.nbytes += plan.nbytes
        return MergePlan.joined([here[key] for key in keys], x.device)


def merge_plan(x: Float[Tensor, "T B N C"], max_len: int) -> MergePlan:
    """Decide every merge of the banks that T frames fill.

    The Gram matrix is float32 (float64 for float64 input) and its prefix sums are float64, autocast or not: a block sum
    is a difference of large numbers.

    Args:
        x: what the bank will hold, time first; only values are read.
        max_len: K.
    """
    num_frames, batch, num_tokens, _ = x.shape
    num_merges = max(0, num_frames - 1 - max_len)
    if num_merges == 0:
        none = torch.empty(0, batch, num_tokens, dtype=torch.long, device=x.device)
        last_row = torch.arange(num_frames, device=x.device)[:, None, None].expand(-1, batch, num_tokens)
        return MergePlan(num_frames, max_len, none, none, none, none, none, last_row, none.double())
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        columns = x.detach().flatten(1, 2).transpose(0, 1)  # [B·N, T, C]
        columns = columns if columns.dtype == torch.float64 else columns.float()
        gram = torch.bmm(columns, columns.mT)
        prefix = F.pad(gram.double().cumsum_(1).cumsum_(2), (1, 0, 1, 0)).flatten(1)  # [B·N, (T + 1)²]
        run = F.pad(~_repeats(x), (0, 0, 0, 0, 1, 0)).cumsum(0).flatten(1).mT  # [B·N, T]
        fields = _scan(prefix, run, num_frames, max_len)
    return MergePlan(num_frames, max_len, *(field.view(-1, batch, num_tokens) for field in fields))


def _repeats(x: Float[Tensor, "T B N C"]) -> Bool[Tensor, "_ B N"]:
    """Whether each frame but the first equals the one before it in every number."""
    later, earlier = x[1:], x[:-1]
    repeats = later[..., 0] == earlier[..., 0]  # rarely by chance, so hardly a row has to be read to its end
    repeats[repeats.clone()] = (later[repeats] == earlier[repeats]).all(-1)
    return repeats


def _scan(prefix: Float[Tensor, "S Z"], run: Int[Tensor, "S T"], num_frames: int, max_len: int) -> list[Tensor]:
    """The fields of MergePlan, [J, S] each, from the prefix sums of S columns.

    ``run`` numbers the runs of frames that repeat each other.
    """
    side, device = num_frames + 1, prefix.device
    order = torch.arange(max_len + 1, device=device)
    columns = len(prefix)
    # The K + 1 entries in order of time: entry i covers frames [bounds[i], bounds[i + 1]).
    bounds = torch.arange(max_len + 2, device=device).repeat(columns, 1)
    slots = order.repeat(columns, 1)
    rows = slots.clone()

    def cosine(first: Int[Tensor, "S z"]) -> Float[Tensor, "S z"]:
        """Cosine of entries ``first`` and ``first + 1``; infinite where all their frames repeat one."""
        b0, b1, b2 = (bounds.gather(1, first + i) for i in range(3))
        pairs = ((b0, b0), (b0, b1), (b0, b2), (b1, b1), (b1, b2), (b2, b2))
        corners = torch.stack([low * side + high for low, high in pairs], 1).flatten(1)
        p00, p01, p02, p11, p12, p22 = prefix.gather(1, corners).view(columns, 6, -1).unbind(1)
        left, right = (b1 - b0).double(), (b2 - b1).double()
        across = (p12 - p02 - p11 + p01) / (left * right)
        norms = [
            ((p11 - 2 * p01 + p00).clamp_min(0).sqrt() / left).clamp_min(COSINE_EPS),
            ((p22 - 2 * p12 + p11).clamp_min(0).sqrt() / right).clamp_min(COSINE_EPS),
        ]
        repeats = run.gather(1, b0) == run.gather(1, b2 - 1)
        return (across / (norms[0] * norms[1])).masked_fill(repeats, torch.inf)

    cosines = cosine(order[:-1].expand(columns, -1))  # [S, K]
    record: list[list[Tensor]] = []
    for j in range(num_frames - 1 - max_len):
        i = cosines.argmax(1, keepdim=True)  # the first of equals
        b0, b1, b2 = (bounds.gather(1, i + d) for d in range(3))
        kept_slot, freed_slot = slots.gather(1, i), slots.gather(1, i + 1)
        kept_row, freed_row = rows.gather(1, i), rows.gather(1, i + 1)
        record.append([i, kept_slot, freed_slot, kept_row, freed_row, (b1 - b0).double() / (b2 - b0).double()])
        # Entry i now reaches to b2, entry i + 1 is gone, the later ones move up, and the next frame comes last.
        source = order + (order > i)  # [S, K + 1]
        frame = torch.full_like(i, max_len + 1 + j)
        bounds = torch.cat([bounds.gather(1, source), frame + 1], 1)
        source = source[:, :-1]
        slots = torch.cat([slots.gather(1, source), freed_slot], 1)
        rows = torch.cat([rows.scatter(1, i, num_frames + j).gather(1, source), frame], 1)
        cosines = torch.cat([cosines, cosines[:, -1:]], 1).gather(1, source)
        changed = torch.cat([(i - 1).clamp_min(0), i.clamp_max(max_len - 1), torch.full_like(i, max_len - 1)], 1)
        cosines = cosines.scatter(1, changed, cosine(changed))
    last_row = torch.empty_like(rows).scatter_(1, slots, rows).mT.contiguous()  # [K + 1, S]
    *merges, weight = (torch.stack(field).squeeze(-1) for field in zip(*record, strict=True))
    return [*merges, last_row, weight]
