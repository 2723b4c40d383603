"""Attention over a memory bank for all time steps, every frame projected to keys and values once.

Averaging commutes with the projection (W · mean = mean · W, and the bias survives), so the bank may hold projected
entries: merging two of them is the projection of the merged entry.

Gradients are those of the sequential form: a frame gets gradient where it is the current one; through the bank only
the projections do, unless ``detach`` is off (D10).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from stages.train.plan import MergePlan


def bank_attention(
    q: Float[Tensor, "T B A E"],
    x: Float[Tensor, "T B N C"],
    key: nn.Linear,
    value: nn.Linear,
    plan: MergePlan,
    *,
    num_heads: int,
    keep: Bool[Tensor, "B N"] | None = None,
    detach: bool = True,
) -> Float[Tensor, "T B A E"]:
    """At every step t: q[t] attends to the bank of the frames before t and to frame t.

    Args:
        q: projected queries.
        x: frames (or query states), not projected; the bank holds them.
        key, value: their projections.
        plan: merges of ``x``.
        keep: False at tokens that nobody may attend to, in every slot alike.
        detach: no gradient into the past (MA-LMM).
    """
    weight, bias = torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias])
    out: Tensor = _InPlace.apply(q, x, weight, bias, plan, num_heads, keep, detach)
    return out


class _InPlace(torch.autograd.Function):
    """A walk over time on a buffer of K + 1 slots.

    Frame t overwrites the slot that the last merge freed, so nothing is shifted or masked, and per step one frame is
    written and one merged. The backward walks forward in time again with accumulators of the buffer's shape: a merge
    moves what its two entries have gathered to their rows, and after the walk the rows of merged entries hand their
    share down, the latest first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        plan: MergePlan,
        num_heads: int,
        keep: Tensor | None,
        detach: bool,
    ) -> Tensor:
        kv = _split_heads(F.linear(x, weight, bias), num_heads, 2)  # [T, 2, B · heads, N, d]
        queries = _split_heads(q, num_heads)[:, 0]
        mask = None if keep is None else _padding_mask(keep, plan.num_slots, q.dtype)
        places = _Places(plan, num_heads)
        out = torch.empty_like(queries)
        for t, (keys, values) in _walk(kv, places):
            part = None if mask is None else mask[..., : keys.shape[1]]
            four = [rows.unflatten(0, (-1, num_heads)) for rows in (queries[t], keys, values)]
            out[t] = F.scaled_dot_product_attention(*four, attn_mask=part).flatten(0, 1)
        ctx.save_for_backward(queries, x, weight, kv, out, mask)
        ctx.places, ctx.num_heads, ctx.detach = places, num_heads, detach
        return _join_heads(out[:, None], num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, x, weight, kv, out, mask = ctx.saved_tensors
        places, num_heads = ctx.places, ctx.num_heads
        grad_out = _split_heads(grads[0], num_heads)[:, 0]
        grad_q = torch.empty_like(queries)
        gathered = _Gathered(kv, places)
        mask = None if mask is None else mask.flatten(1, 2).repeat_interleave(num_heads, 0)  # [B · heads, 1, S]
        scale = queries.shape[-1] ** -0.5
        for t, (keys, values) in _walk(kv, places):
            num_keys = keys.shape[1]
            q = queries[t] * scale
            scores = torch.bmm(q, keys.mT)
            probs = torch.softmax(scores if mask is None else scores.add_(mask[..., :num_keys]), -1)
            delta = (grad_out[t] * out[t]).sum(-1, keepdim=True)
            grad_scores = torch.bmm(grad_out[t], values.mT).sub_(delta).mul_(probs)
            grad_q[t] = torch.bmm(grad_scores, keys).mul_(scale)
            _add_product(gathered.keys[:, :num_keys], grad_scores.mT, q)
            _add_product(gathered.values[:, :num_keys], probs.mT, grad_out[t])
            gathered.end_step(t)
        current, everything = (_join_heads(part, num_heads) for part in gathered.finish())
        rows, columns = everything.flatten(0, -2), x.reshape(-1, x.shape[-1])
        grad_x = torch.matmul(current if ctx.detach else everything, weight) if ctx.needs_input_grad[1] else None
        return _join_heads(grad_q[:, None], num_heads), grad_x, rows.mT @ columns, rows.sum(0), None, None, None, None


class _Places:
    """Row numbers of the blocks that a plan names, for tensors [blocks, N, d] and [rows, 2 · B · heads, N, d].

    ``freed[j]`` and ``kept[j]`` index the buffer [2 · B · heads, slots, N, d] flattened to rows of d.
    """

    def __init__(self, plan: MergePlan, num_heads: int) -> None:
        self.plan = plan
        _, batch, tokens = plan.last_row.shape
        blocks, slots, device = 2 * batch * num_heads, plan.num_slots, plan.last_row.device
        n = torch.arange(tokens, device=device)
        block = torch.arange(blocks, device=device)[:, None]

        def spread(named: Shaped[Tensor, "Z B N"]) -> Shaped[Tensor, "Z Y N"]:
            """The same for keys and values and for every head."""
            return named[:, None, :, None].expand(-1, 2, -1, num_heads, -1).reshape(len(named), blocks, tokens)

        def in_buffer(slot: Tensor) -> Tensor:
            return ((block * slots + spread(slot)) * tokens + n).flatten(1)

        def in_table(row: Tensor) -> Tensor:
            return ((spread(row) * blocks + block) * tokens + n).flatten(1)

        self.kept, self.freed = in_buffer(plan.kept_slot), in_buffer(plan.freed_slot)
        self.kept_row, self.freed_row = in_table(plan.kept_row), in_table(plan.freed_row)
        self.last_row = in_table(plan.last_row)  # [slots, blocks · N]
        self.weight = spread(plan.weight).flatten(1)[..., None]


def _walk(kv: Float[Tensor, "T 2 H N d"], places: _Places) -> Iterator[tuple[int, Float[Tensor, "2 H S d"]]]:
    """Per step the keys and values that it attends to, bank and current frame; valid until the next step."""
    plan = places.plan
    _, _, heads, tokens, size = kv.shape
    buffer = kv.new_empty((2, heads, plan.num_slots, tokens, size))
    rows = buffer.view(-1, size)
    weight = places.weight.to(kv.dtype)
    for t in range(plan.num_frames):
        if t <= plan.max_len:
            buffer[:, :, t] = kv[t]
        else:
            rows.index_copy_(0, places.freed[t - plan.max_len - 1], kv[t].view(-1, size))
        yield t, buffer.flatten(2, 3)[:, :, : plan.slots_at(t) * tokens]
        if 0 <= (j := t - plan.max_len) < plan.num_merges:
            kept, freed = rows.index_select(0, places.kept[j]), rows.index_select(0, places.freed[j])
            rows.index_copy_(0, places.kept[j], torch.lerp(freed, kept, weight[j]))


class _Gathered:
    """Gradient that the entries of a buffer gather during a walk, and what becomes of it."""

    def __init__(self, kv: Float[Tensor, "T 2 H N d"], places: _Places) -> None:
        self.places, plan = places, places.plan
        _, _, heads, tokens, size = kv.shape
        self.slots = kv.new_zeros((2, heads, plan.num_slots, tokens, size))
        self.keys, self.values = self.slots.flatten(2, 3)
        self.current = torch.empty_like(kv)  # what frame t got at its own step
        self.rows = kv.new_empty((plan.num_frames + plan.num_merges, *kv.shape[1:]))  # by row, through the bank

    def end_step(self, t: int) -> None:
        """Take the current frame's own part out, then move what the merged entries gathered to their rows."""
        places, plan = self.places, self.places.plan
        slots, rows = (block.view(-1, block.shape[-1]) for block in (self.slots, self.rows))
        if t <= plan.max_len:
            self.current[t] = self.slots[:, :, t]
            self.slots[:, :, t] = 0
        else:
            place = places.freed[t - plan.max_len - 1]
            self.current[t] = slots.index_select(0, place).view(self.current[t].shape)
            slots.index_fill_(0, place, 0)
        if 0 <= (j := t - plan.max_len) < plan.num_merges:
            for place, row in ((places.kept[j], places.kept_row[j]), (places.freed[j], places.freed_row[j])):
                rows.index_copy_(0, row, slots.index_select(0, place))
                slots.index_fill_(0, place, 0)

    def finish(self) -> tuple[Float[Tensor, "T 2 H N d"], Float[Tensor, "T 2 H N d"]]:
        """Gradient per frame: at its own step, and over all paths."""
        places, plan = self.places, self.places.plan
        rows = self.rows.view(-1, self.rows.shape[-1])
        for slot in range(plan.num_slots):
            rows.index_copy_(0, places.last_row[slot], self.slots[:, :, slot].reshape(-1, rows.shape[-1]))
        weight = places.weight.to(rows.dtype)
        for j in reversed(range(plan.num_merges)):
            merged = self.rows[plan.num_frames + j].view(-1, rows.shape[-1])
            rows.index_add_(0, places.kept_row[j], merged * weight[j])
            rows.index_add_(0, places.freed_row[j], merged * (1 - weight[j]))
        return self.current, self.rows[: plan.num_frames].add_(self.current)


def _add_product(total: Float[Tensor, "H S d"], left: Float[Tensor, "H S A"], right: Float[Tensor, "H A d"]) -> None:
    """``total += left @ right`` in place; the fused form is one call per matrix where ``total`` has gaps."""
    if total.is_contiguous():
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _split_heads(x: Float[Tensor, "T B N G"], num_heads: int, parts: int = 1) -> Float[Tensor, "T z H N d"]:
    """[T, B, N, parts · E] to [T, parts, B · heads, N, d]: contiguous, so that every product over heads is one batch."""
    split = x.unflatten(-1, (parts, num_heads, -1)).permute(0, 3, 1, 4, 2, 5)
    return split.contiguous().flatten(2, 3)


def _join_heads(x: Float[Tensor, "T z H N d"], num_heads: int) -> Float[Tensor, "T B N G"]:
    """The inverse of ``_split_heads``."""
    return x.unflatten(2, (-1, num_heads)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def _padding_mask(keep: Bool[Tensor, "B N"], num_slots: int, dtype: torch.dtype) -> Float[Tensor, "B 1 1 S"]:
    """0 at tokens that count, minus infinity at padding, the same in every slot."""
    mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
    return mask.repeat(1, num_slots)[:, None, None]
