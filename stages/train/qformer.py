"""The Q-Former: BERT with query tokens, cross-attention in every second block, and memory banks in front of it.

Parameter names and shapes are those of transformers' ``InstructBlipQFormerModel``, so its state dict loads strictly,
and on one frame without banks the outputs are equal (tested). It is a module of our own because the banks give every
self-attention a key and value source of its own, which no public class offers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stages.train.memory import MemoryBank

LAYER_NORM_EPS = 1e-12  # BERT


class MultiHeadAttention(nn.Module):
    """Queries from one source, keys and values from another (of width ``source_size``)."""

    def __init__(self, hidden_size: int, num_heads: int, source_size: int, dropout: float) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"student.hidden_size {hidden_size} is not a multiple of student.num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(source_size, hidden_size)
        self.value = nn.Linear(source_size, hidden_size)

    def forward(
        self, states: Float[Tensor, "B N E"], source: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B N E"]:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # [B, heads, S, E / heads]

        mixed = F.scaled_dot_product_attention(
            heads(self.query(states)),
            heads(self.key(source)),
            heads(self.value(source)),
            attn_mask=None if keep is None else keep[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return mixed.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Dense, dropout, residual, LayerNorm: BERT's post-norm step."""

    def __init__(self, in_size: int, out_size: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, out_size)
        self.LayerNorm = nn.LayerNorm(out_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class Attention(nn.Module):
    """Attention with its residual step."""

    def __init__(self, hidden_size: int, num_heads: int, source_size: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(hidden_size, num_heads, source_size, dropout)
        self.output = AddNorm(hidden_size, hidden_size, dropout)

    def forward(self, states: Tensor, source: Tensor, keep: Tensor | None) -> Tensor:
        out: Tensor = self.output(self.attention(states, source, keep), states)
        return out


class Expand(nn.Module):
    """The first half of a feed-forward network: dense and exact GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, separate feed-forward networks."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, frame_size: int, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads, hidden_size, dropout)
        self.crossattention = Attention(hidden_size, num_heads, frame_size, dropout) if cross else None
        self.intermediate = Expand(hidden_size, intermediate_size)
        self.output = AddNorm(intermediate_size, hidden_size, dropout)
        self.intermediate_query = Expand(hidden_size, intermediate_size)
        self.output_query = AddNorm(intermediate_size, hidden_size, dropout)

    def forward(
        self,
        states: Float[Tensor, "B N E"],
        self_source: Float[Tensor, "B S E"],
        keep: Bool[Tensor, "B S"] | None,
        visual_source: Float[Tensor, "B Z C"],
        num_queries: int,
    ) -> Float[Tensor, "B N E"]:
        attended = self.attention(states, self_source, keep)
        queries, text = attended[:, :num_queries], attended[:, num_queries:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, visual_source, None)
        return self.feed_forward(queries, text)

    def feed_forward(self, queries: Float[Tensor, "*S E"], text: Float[Tensor, "*Z E"]) -> Float[Tensor, "*N E"]:
        """Queries and text through networks of their own, then together again."""
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[-2] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], dim=-2)


class Embeddings(nn.Module):
    """Query tokens followed by embedded text; only the text has positions."""

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, pad_id: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.layernorm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Float[Tensor, "B Q E"], text_ids: Int[Tensor, "B L"] | None) -> Float[Tensor, "B N E"]:
        out: Tensor = self.dropout(self.normed(queries, text_ids))
        return out

    def normed(self, queries: Float[Tensor, "B Q E"], text_ids: Int[Tensor, "B L"] | None) -> Float[Tensor, "B N E"]:
        """What every frame starts from, before dropout."""
        states = queries
        if text_ids is not None:
            positions = torch.arange(text_ids.shape[1], device=text_ids.device)
            text = self.word_embeddings(text_ids) + self.position_embeddings(positions)[None]
            states = torch.cat([queries, text], dim=1)
        out: Tensor = self.layernorm(states)
        return out


class QFormer(nn.Module):
    """The stack. ``step`` is one frame; who loops over frames, and how, is the student's business.

    Args mirror StudentConfig; ``frame_size`` is C, ``vocab_size`` the tokenizer's.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        frame_size: int,
        cross_attention_every: int,
        dropout: float,
        max_positions: int = 512,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocab_size, hidden_size, max_positions, pad_id, dropout)
        layers = nn.ModuleList(
            QFormerLayer(
                hidden_size, num_heads, intermediate_size, frame_size, dropout, cross=i % cross_attention_every == 0
            )
            for i in range(num_layers)
        )
        self.encoder = nn.ModuleDict({"layer": layers})  # transformers' name: encoder.layer.<i>
        self.num_layers = num_layers

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The blocks, first to last."""
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def embed_over_time(
        self, query_tokens: Float[Tensor, "B Q E"], text_ids: Int[Tensor, "B L"] | None, num_frames: int
    ) -> Float[Tensor, "T B N E"]:
        """The embedding output at every step: the same numbers, under dropout of their own."""
        states = self.embeddings.normed(query_tokens, text_ids)
        out: Tensor = self.embeddings.dropout(states.expand(num_frames, -1, -1, -1))
        return out

    def empty_banks(self, max_len: int) -> tuple[MemoryBank, ...]:
        """One query bank per layer: it holds the detached input of that layer's self-attention, text included."""
        return tuple(MemoryBank.empty(max_len) for _ in range(self.num_layers))

    def step(
        self,
        query_tokens: Float[Tensor, "B Q E"],
        text_ids: Int[Tensor, "B L"] | None,
        text_keep: Bool[Tensor, "B L"] | None,
        visual_source: Float[Tensor, "B Z C"],
        banks: tuple[MemoryBank, ...],
    ) -> tuple[list[Float[Tensor, "B N E"]], tuple[MemoryBank, ...]]:
        """One frame: 13 hidden states for 12 blocks (entry u - 1 is level u), and the banks after this frame.

        Args:
            query_tokens: the learned queries; they restart from these at every frame.
            text_ids, text_keep: instruction tokens and True where they are not padding; None without text.
            visual_source: the visual bank followed by the current frame, as tokens.
            banks: one per layer, as after the previous frame.
        """
        num_queries = query_tokens.shape[1]
        states = self.embeddings(query_tokens, text_ids)
        keep: Tensor | None = None
        if text_keep is not None and not bool(text_keep.all()):
            keep = torch.cat([text_keep.new_ones(len(text_keep), num_queries), text_keep], dim=1)  # [B, N]
        hidden, after = [states], []
        for layer, bank in zip(self.layers, banks, strict=True):
            tiled = None if keep is None else keep.repeat(1, len(bank) + 1)  # the same padding in every slot
            after.append(bank.append(states))
            states = layer(states, bank.followed_by(states), tiled, visual_source, num_queries)
            hidden.append(states)
        return hidden, tuple(after)


def init_like_bert(module: nn.Module, generator: torch.Generator, width: int) -> None:
    """BERT's normal init, in place: std 0.02 at width 768, scaled by sqrt(768 / width); zero biases, unit norms."""
    std = 0.02 * math.sqrt(768 / width)
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.weight.data.normal_(0.0, std, generator=generator)
            child.bias.data.zero_()
        elif isinstance(child, nn.Embedding):
            child.weight.data.normal_(0.0, std, generator=generator)
        elif isinstance(child, nn.LayerNorm):
            child.weight.data.fill_(1.0)
            child.bias.data.zero_()
