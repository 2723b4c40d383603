"""Attention over a memory bank for all time steps, every frame projected to keys and values once.

Averaging commutes with the projection (W · mean = mean · W, and the bias survives), so the bank may hold projected
entries: merging two of them is the projection of the merged entry.

Gradients are those of the sequential form: a frame gets gradient where it is the current one; through the bank only
the projections do, unless ``detach`` is off (D10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from stages.train.plan import MergePlan

Factors = Callable[[int], Float[Tensor, "H A S"]]  # step -> dropout factors of its probabilities, by slot


@dataclass(frozen=True)
class Past:
    """A bank where a differentiated walk sets in: at step ``first``, after frames without a graph.

    Only what is in the bank then can matter later, so the gradient of the projections needs these few entries, not the
    frames that they are means of.
    """

    first: int
    values: Float[Tensor, "B R N C"]  # what each slot holds, not projected


def bank_attention(
    q: Float[Tensor, "T B A E"],
    x: Float[Tensor, "T B N C"],
    projection: tuple[nn.Linear, nn.Linear],
    plan: MergePlan,
    *,
    num_heads: int,
    keep: Bool[Tensor, "B N"] | None = None,
    factors: Factors | None = None,
    past: Past | None = None,
    detach: bool = True,
) -> Float[Tensor, "T B A E"]:
    """At every step t: q[t] attends to the bank of the frames before t and to frame t.

    Args:
        q: projected queries.
        x: frames (or query states), not projected; the bank holds them.
        projection: to keys and to values.
        plan: merges of all frames, those of the past included.
        keep: False at tokens that nobody may attend to, in every slot alike.
        factors: dropout.
        past: the bank at the first step of ``q`` and ``x``; None where that is step 0.
        detach: no gradient into the past (MA-LMM).
    """
    weight, bias = stacked(projection)
    out: Tensor = _InPlace.apply(q, x, weight, bias, plan, num_heads, keep, factors, past, detach)
    return out


def stacked(projection: tuple[nn.Linear, nn.Linear]) -> tuple[Float[Tensor, "G C"], Float[Tensor, " G"]]:
    """Weight and bias of both projections as one."""
    key, value = projection
    return torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias])


@torch.no_grad()
def bank_after(x: Float[Tensor, "T B N C"], plan: MergePlan) -> Float[Tensor, "B R N C"]:
    """What every slot holds when the first len(x) frames are in the bank."""
    *_, (_, buffer) = _walk(split_heads(x, 1), _Places(plan, 1, 1), 0, None, len(x))  # one buffer, run to the end
    return buffer[0]


def _projected(
    values: Float[Tensor, "B R N C"], weight: Tensor, bias: Tensor, num_heads: int
) -> Float[Tensor, "2 H R N d"]:
    """Keys and values of a bank: a few entries, where the frames that they are means of are many."""
    entries = split_heads(F.linear(values.transpose(0, 1), weight, bias), num_heads, 2)
    return entries.permute(1, 2, 0, 3, 4).contiguous()


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
        factors: Factors | None,
        past: Past | None,
        detach: bool,
    ) -> Tensor:
        kv = split_heads(F.linear(x, weight, bias), num_heads, 2)  # [T, 2, B · heads, N, d]
        queries = split_heads(q, num_heads)[:, 0].to(kv.dtype)
        mask = None if keep is None else _padding_mask(keep, plan.num_slots, kv.dtype)
        places, first = _Places(plan, num_heads, 2), 0 if past is None else past.first
        start = None if past is None else _projected(past.values, weight, bias, num_heads)
        out = torch.empty_like(queries)
        tokens = kv.shape[3]
        for t, buffer in _walk(kv, places, first, start, first + len(x)):
            used = plan.slots_at(t) * tokens
            keys, values = buffer.flatten(2, 3)[:, :, :used]
            part = None if mask is None else mask[..., :used]
            step = t - first
            if factors is None:
                here, k, v = (rows.unflatten(0, (-1, num_heads)) for rows in (queries[step], keys, values))
                out[step] = F.scaled_dot_product_attention(here, k, v, attn_mask=part).flatten(0, 1)
            else:
                probs = _probabilities(queries[step] * queries.shape[-1] ** -0.5, keys, part, num_heads)
                out[step] = torch.bmm(probs.mul_(factors(step)[..., :used]), values)
        ctx.save_for_backward(queries, x, weight, kv, out, mask, start, None if past is None else past.values)
        ctx.places, ctx.num_heads, ctx.detach, ctx.factors, ctx.first = places, num_heads, detach, factors, first
        ctx.dtypes = q.dtype, weight.dtype
        return join_heads(out[:, None], num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, x, weight, kv, out, mask, start, past_values = ctx.saved_tensors
        places, num_heads, factors, first = ctx.places, ctx.num_heads, ctx.factors, ctx.first
        grad_out = split_heads(grads[0], num_heads)[:, 0].to(kv.dtype)
        grad_q = torch.empty_like(queries)
        gathered = _Gathered(kv, places, first)
        scale, tokens = queries.shape[-1] ** -0.5, kv.shape[3]
        for t, buffer in _walk(kv, places, first, start, first + len(x)):
            used, step = places.plan.slots_at(t) * tokens, t - first
            keys, values = buffer.flatten(2, 3)[:, :, :used]
            q = queries[step] * scale
            probs = _probabilities(q, keys, None if mask is None else mask[..., :used], num_heads)
            delta = (grad_out[step] * out[step]).sum(-1, keepdim=True)
            grad_probs = torch.bmm(grad_out[step], values.mT)
            if factors is None:
                grad_scores = grad_probs.sub_(delta).mul_(probs)
            else:
                kept = factors(step)[..., :used]
                grad_scores = grad_probs.mul_(kept).sub_(delta).mul_(probs)
                probs = probs.mul_(kept)
            grad_q[step] = torch.bmm(grad_scores, keys).mul_(scale)
            _add_product(gathered.keys[:, :used], grad_scores.mT, q)
            _add_product(gathered.values[:, :used], probs.mT, grad_out[step])
            gathered.end_step(t)
        current, everything, entries = gathered.finish()
        del gathered, probs, grad_probs, grad_scores  # each of what follows is as large as all frames' keys and values
        grad_x = None
        if ctx.needs_input_grad[1]:
            to_x = current if ctx.detach else everything
            grad_x = torch.matmul(join_heads(to_x, num_heads).to(kv.dtype), weight.to(kv.dtype)).to(x.dtype)
            del to_x
        del current
        rows, columns = join_heads(everything, num_heads).flatten(0, -2), x.reshape(-1, x.shape[-1])
        del everything
        if past_values is not None:
            rows = torch.cat([rows, join_heads(entries, num_heads).flatten(0, -2)])
            held = past_values.transpose(0, 1)[: len(entries)]
            columns = torch.cat([columns, held.reshape(-1, x.shape[-1])])
        rows = rows.to(columns.dtype)
        grad_weight, grad_bias = (rows.mT @ columns).to(ctx.dtypes[1]), rows.sum(0).to(ctx.dtypes[1])
        grad_q = join_heads(grad_q[:, None], num_heads).to(ctx.dtypes[0])
        return grad_q, grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def _probabilities(
    scaled_q: Float[Tensor, "H A d"], keys: Float[Tensor, "H S d"], mask: Tensor | None, num_heads: int
) -> Float[Tensor, "H A S"]:
    scores = torch.bmm(scaled_q, keys.mT)
    if mask is not None:
        scores.unflatten(0, (-1, num_heads)).add_(mask)
    return torch.softmax(scores, -1)


class _Places:
    """Row numbers of the blocks that a plan names.

    ``freed[j]`` and ``kept[j]`` index a buffer [parts · B · heads, slots, N, d] flattened to rows of d, the others a
    table [rows, parts · B · heads, N, d]. ``parts`` is 2 for keys and values.
    """

    def __init__(self, plan: MergePlan, num_heads: int, parts: int) -> None:
        self.plan = plan
        _, batch, tokens = plan.last_row.shape
        blocks, slots, device = parts * batch * num_heads, plan.num_slots, plan.last_row.device
        n = torch.arange(tokens, device=device)
        block = torch.arange(blocks, device=device)[:, None]

        def spread(named: Shaped[Tensor, "Z B N"]) -> Shaped[Tensor, "Z Y N"]:
            """The same for every part and every head."""
            return named[:, None, :, None].expand(-1, parts, -1, num_heads, -1).reshape(len(named), blocks, tokens)

        def in_buffer(slot: Int[Tensor, "Z B N"]) -> Int[Tensor, "Z X"]:
            return ((block * slots + spread(slot)) * tokens + n).flatten(1)

        def in_table(row: Int[Tensor, "Z B N"]) -> Int[Tensor, "Z X"]:
            return ((spread(row) * blocks + block) * tokens + n).flatten(1)

        self.in_table = in_table
        self.kept, self.freed = in_buffer(plan.kept_slot), in_buffer(plan.freed_slot)
        self.weight = spread(plan.weight).flatten(1)[..., None]


def _walk(
    frames: Float[Tensor, "T z H N d"],
    places: _Places,
    first: int,
    start: Float[Tensor, "z H R N d"] | None,
    stop: int,
) -> Iterator[tuple[int, Float[Tensor, "z H R N d"]]]:
    """Per step t the buffer that it attends to, bank and current frame; valid until the next step.

    ``frames[0]`` is frame ``first``, and ``start`` the bank that it finds. After the last step the buffer is as the
    next step would find it.
    """
    plan = places.plan
    _, parts, heads, tokens, size = frames.shape
    empty = (parts, heads, plan.num_slots, tokens, size)
    buffer = frames.new_zeros(empty) if start is None else start.clone()
    rows, weight = buffer.view(-1, size), places.weight.to(frames.dtype)
    for t in range(first, stop):
        if t <= plan.max_len:
            buffer[:, :, t] = frames[t - first]
        else:
            rows.index_copy_(0, places.freed[t - plan.max_len - 1], frames[t - first].view(-1, size))
        yield t, buffer
        if 0 <= (j := t - plan.max_len) < plan.num_merges:
            kept, freed = rows.index_select(0, places.kept[j]), rows.index_select(0, places.freed[j])
            rows.index_copy_(0, places.kept[j], torch.lerp(freed, kept, weight[j]))


class _Gathered:
    """Gradient that the entries of a buffer gather during a walk, and what becomes of it."""

    def __init__(self, kv: Float[Tensor, "T 2 H N d"], places: _Places, first: int) -> None:
        self.places, self.first, plan = places, first, places.plan
        self.kept_row, self.freed_row = places.in_table(plan.kept_row), places.in_table(plan.freed_row)
        # Sums over a hundred steps: not in half precision.
        dtype = kv.dtype if kv.dtype == torch.float64 else torch.float32
        _, _, heads, tokens, size = kv.shape
        self.slots = kv.new_zeros((2, heads, plan.num_slots, tokens, size), dtype=dtype)
        self.keys, self.values = self.slots.flatten(2, 3)
        self.current = torch.empty_like(kv, dtype=dtype)  # what frame t got at its own step
        self.rows = kv.new_zeros((plan.num_frames + plan.num_merges, *kv.shape[1:]), dtype=dtype)  # through the bank

    def end_step(self, t: int) -> None:
        """Take the current frame's own part out, then move what the merged entries gathered to their rows."""
        places, plan, current = self.places, self.places.plan, self.current[t - self.first]
        slots, rows = (block.view(-1, block.shape[-1]) for block in (self.slots, self.rows))
        if t <= plan.max_len:
            current.copy_(self.slots[:, :, t])
            self.slots[:, :, t] = 0
        else:
            place = places.freed[t - plan.max_len - 1]
            current.copy_(slots.index_select(0, place).view(current.shape))
            slots.index_fill_(0, place, 0)
        if 0 <= (j := t - plan.max_len) < plan.num_merges:
            for place, row in ((places.kept[j], self.kept_row[j]), (places.freed[j], self.freed_row[j])):
                rows.index_copy_(0, row, slots.index_select(0, place))
                slots.index_fill_(0, place, 0)

    def finish(self) -> tuple[Float[Tensor, "T 2 H N d"], Float[Tensor, "T 2 H N d"], Float[Tensor, "R 2 H N d"]]:
        """Gradient per frame at its own step, per frame over all paths, and per entry of the bank at the start."""
        places, plan = self.places, self.places.plan
        rows = self.rows.view(-1, self.rows.shape[-1])
        last = places.in_table(plan.last_row)
        for slot in range(plan.num_slots):
            rows.index_copy_(0, last[slot], self.slots[:, :, slot].reshape(-1, rows.shape[-1]))
        weight = places.weight.to(rows.dtype)
        for j in reversed(range(max(0, self.first - plan.max_len), plan.num_merges)):
            merged = self.rows[plan.num_frames + j].view(-1, rows.shape[-1])
            rows.index_add_(0, self.kept_row[j], merged * weight[j])
            rows.index_add_(0, self.freed_row[j], merged * (1 - weight[j]))
        held = plan.rows_at(self.first)[: self.first]  # slots from ``first`` on are still empty
        entries = rows.index_select(0, places.in_table(held).flatten()).view(len(held), *self.rows.shape[1:])
        return self.current, self.rows[self.first : self.first + len(self.current)].add_(self.current), entries


def _add_product(total: Float[Tensor, "H S d"], left: Float[Tensor, "H S A"], right: Float[Tensor, "H A d"]) -> None:
    """``total += left @ right`` in place; the fused form is one call per matrix where ``total`` has gaps."""
    if total.is_contiguous() and total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def split_heads(x: Float[Tensor, "T B N G"], num_heads: int, parts: int = 1) -> Float[Tensor, "T z H N d"]:
    """[T, B, N, parts · E] to [T, parts, B · heads, N, d], contiguous: every product over heads is one batch."""
    split = x.unflatten(-1, (parts, num_heads, -1)).permute(0, 3, 1, 4, 2, 5)
    heads: Tensor = split.contiguous().flatten(2, 3)
    return heads


def join_heads(x: Float[Tensor, "T z H N d"], num_heads: int) -> Float[Tensor, "T B N G"]:
    """The inverse of ``split_heads``."""
    joined: Tensor = x.unflatten(2, (-1, num_heads)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return joined


def _padding_mask(keep: Bool[Tensor, "B N"], num_slots: int, dtype: torch.dtype) -> Float[Tensor, "B 1 1 S"]:
    """0 at tokens that count, minus infinity at padding, the same in every slot."""
    mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
    return mask.repeat(1, num_slots)[:, None, None]
