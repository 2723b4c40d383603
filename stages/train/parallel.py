"""The student layer by layer over all time steps at once, equal to the sequential loop.

The bank of layer l holds inputs of layer l at earlier steps, and the queries start anew at every step, so step t of
layer l needs steps <= t of layer l - 1 and nothing else. Everything here is time first: [T, B, tokens, width].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.train.bank_attention import bank_attention
from stages.train.plan import MergePlan, merge_plan
from stages.train.qformer import Attention, QFormer


def hidden_states(
    qformer: QFormer,
    frames: Float[Tensor, "T B P C"],
    query_tokens: Float[Tensor, "B Q E"],
    text_ids: Int[Tensor, "B L"] | None,
    text_keep: Bool[Tensor, "B L"] | None,
    *,
    max_len: int,
    detach: bool = True,
) -> list[Float[Tensor, "T B Q E"]]:
    """Query states of every level (entry u - 1 is level u) at every step."""
    num_frames, num_queries = len(frames), query_tokens.shape[1]
    states = qformer.embed_over_time(query_tokens, text_ids, num_frames)  # [T, B, N, E]
    keep: Tensor | None = None
    if text_keep is not None and not bool(text_keep.all()):
        keep = torch.cat([text_keep.new_ones(len(text_keep), num_queries), text_keep], dim=1)  # [B, N]
    visual_plan = merge_plan(frames, max_len)
    hidden = [states[:, :, :num_queries]]

    def attend(part: Attention, states: Tensor, source: Tensor, plan: MergePlan, keep: Tensor | None) -> Tensor:
        inner = part.attention
        mixed = bank_attention(
            inner.query(states), source, inner.key, inner.value, plan,
            num_heads=inner.num_heads, keep=keep, detach=detach,
        )
        return part.output(mixed, states)

    for layer in qformer.layers:
        attended = attend(layer.attention, states, states, merge_plan(states, max_len), keep)
        queries, text = attended[:, :, :num_queries], attended[:, :, num_queries:]
        if layer.crossattention is not None:
            queries = attend(layer.crossattention, queries, frames, visual_plan, None)
        states = layer.feed_forward(queries, text)
        hidden.append(states[:, :, :num_queries])
    return hidden
