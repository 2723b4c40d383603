"""The Q-Former: BERT with query tokens, cross-attention in every second block, and memory banks in front of it.

Parameter names and shapes are those of transformers' ``InstructBlipQFormerModel``, so its state dict loads strictly,
and on one frame without banks the outputs are equal (tested). It is a module of our own because the banks give every
self-attention a key and value source of its own, which no public class offers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stages.train.memory import MemoryBank
from stages.train.noise import Noise, Site

LAYER_NORM_EPS = 1e-12  # BERT


class MultiHeadAttention(nn.Module):
    """Queries from one source, keys and values from another (of width ``source_size``)."""

    def __init__(self, hidden_size: int, num_heads: int, source_size: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"student.hidden_size {hidden_size} is not a multiple of student.num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(source_size, hidden_size)
        self.value = nn.Linear(source_size, hidden_size)

    def forward(
        self,
        states: Float[Tensor, "B N E"],
        sources: Sequence[Float[Tensor, "B _ C"]],
        keep: Bool[Tensor, "B S"] | None,
        factors: Float[Tensor, "B H N S"] | None = None,
    ) -> Float[Tensor, "B N E"]:
        """``sources`` are projected one by one, attended to as one; ``factors`` (dropout) scale the probabilities."""

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # [B, heads, S, E / heads]

        q = heads(self.query(states))
        k, v = (heads(torch.cat([part(x) for x in sources], 1)) for part in (self.key, self.value))
        mask = None if keep is None else keep[:, None, None, :]
        if factors is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            mixed = (scores.softmax(-1) * factors) @ v
        return mixed.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Dense, dropout, residual, LayerNorm: BERT's post-norm step."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, out_size)
        self.LayerNorm = nn.LayerNorm(out_size, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, residual: Tensor, noise: Noise | None, site: Site) -> Tensor:
        dense = self.project(x)
        out: Tensor = self.LayerNorm((dense if noise is None else noise.drop(site, dense)) + residual)
        return out

    def project(self, x: Tensor) -> Tensor:
        """The dense part."""
        dense: Tensor = self.dense(x)
        return dense


class Attention(nn.Module):
    """Attention with its residual step."""

    def __init__(self, hidden_size: int, num_heads: int, source_size: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(hidden_size, num_heads, source_size)
        self.output = AddNorm(hidden_size, hidden_size)


class Intermediate(nn.Module):
    """The first half of a feed-forward network, before its GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        dense: Tensor = self.dense(x)
        return dense


class Output(AddNorm):
    """The second half: exact GELU, dense, residual step."""

    def project(self, x: Tensor) -> Tensor:
        """GELU and dense."""
        dense: Tensor = _GeluDense.apply(x, self.dense.weight, self.dense.bias)
        return dense


class _GeluDense(torch.autograd.Function):
    """dense(gelu(x)) that keeps x alone for its backward pass: gelu(x), as large as x, costs next to nothing again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        rows = grad.flatten(0, -2)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            active = F.gelu(x)
        grad_weight = rows.mT @ active.detach().flatten(0, -2).to(rows.dtype)
        (grad_x,) = torch.autograd.grad(active, x, (grad @ weight.to(grad.dtype)).to(active.dtype))
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, separate feed-forward networks.

    ``after_*`` are the steps between the attentions, on tensors of any time layout [T, B, N, E]; they are shared by all
    evaluations of the student.
    """

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, frame_size: int, cross: bool) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads, hidden_size)
        self.crossattention = Attention(hidden_size, num_heads, frame_size) if cross else None
        self.intermediate = Intermediate(hidden_size, intermediate_size)
        self.output = Output(intermediate_size, hidden_size)
        self.intermediate_query = Intermediate(hidden_size, intermediate_size)
        self.output_query = Output(intermediate_size, hidden_size)

    def feed_forward(
        self, queries: Float[Tensor, "T B Q E"], text: Float[Tensor, "T B L E"], noise: Noise | None
    ) -> Float[Tensor, "T B N E"]:
        """Queries and text through networks of their own, then together again."""
        queries = self.output_query(self.intermediate_query(queries), queries, noise, Site.QUERY_OUTPUT)
        if text.shape[-2] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text, noise, Site.TEXT_OUTPUT)], dim=-2)

    def step(
        self,
        states: Float[Tensor, "B N E"],
        bank: MemoryBank,
        keep: Bool[Tensor, "B N"] | None,
        visual: MemoryBank,
        frame: Float[Tensor, "B P C"],
        num_queries: int,
        noise: Noise | None,
        lean: bool,
    ) -> Float[Tensor, "B N E"]:
        """One frame. Both banks are as after the frame before."""

        def attend(
            part: Attention, states: Tensor, bank: MemoryBank, current: Tensor, sites: tuple[Site, Site]
        ) -> Tensor:
            sources = bank.followed_by(current)
            sources = sources if lean else (torch.cat(sources, 1),)
            tiled = None if keep is None or sites[0] != Site.SELF_PROBS else keep.repeat(1, len(bank) + 1)
            factors = None
            if noise is not None:
                slots = bank.slots_followed_by(current)
                shape = (part.attention.num_heads, states.shape[1], bank.max_len + 1, current.shape[1])
                by_slot = noise.mask(sites[0], 0, torch.Size(shape), states)  # [B, heads, A, K + 1, N]
                index = slots[:, None, None].expand(-1, *shape[:2], -1, -1)
                factors = by_slot.gather(3, index).flatten(3)
            mixed = part.attention(states, sources, tiled, factors)
            out: Tensor = part.output(mixed[None], states[None], noise, sites[1])[0]
            return out

        attended = attend(self.attention, states, bank, states, (Site.SELF_PROBS, Site.SELF_OUTPUT))
        queries, text = attended[:, :num_queries], attended[:, num_queries:]
        if self.crossattention is not None:
            queries = attend(self.crossattention, queries, visual, frame, (Site.CROSS_PROBS, Site.CROSS_OUTPUT))
        return self.feed_forward(queries[None], text[None], noise)[0]


class Embeddings(nn.Module):
    """Query tokens followed by embedded text; only the text has positions."""

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, pad_id: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.layernorm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, queries: Float[Tensor, "B Q E"], text_ids: Int[Tensor, "B L"] | None) -> Float[Tensor, "B N E"]:
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
        max_positions: int = 512,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocab_size, hidden_size, max_positions, pad_id)
        layers = nn.ModuleList(
            QFormerLayer(hidden_size, num_heads, intermediate_size, frame_size, cross=i % cross_attention_every == 0)
            for i in range(num_layers)
        )
        self.encoder = nn.ModuleDict({"layer": layers})  # transformers' name: encoder.layer.<i>
        self.num_layers = num_layers

    @property
    def layers(self) -> Iterable[QFormerLayer]:
        """The blocks, first to last."""
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers  # type: ignore[return-value]

    def embed(
        self,
        query_tokens: Float[Tensor, "B Q E"],
        text_ids: Int[Tensor, "B L"] | None,
        num_frames: int,
        noise: Noise | None,
    ) -> Float[Tensor, "T B N E"]:
        """The embedding output at every step: the same numbers, under dropout of their own."""
        states = self.embeddings(query_tokens, text_ids).expand(num_frames, -1, -1, -1)
        return states if noise is None else noise.drop(Site.EMBEDDINGS, states)

    def empty_banks(self, max_len: int, *, detach: bool = True) -> tuple[MemoryBank, ...]:
        """One query bank per layer: it holds the input of that layer's self-attention, text included."""
        return tuple(MemoryBank.empty(max_len, detach=detach) for _ in range(self.num_layers))

    def step(
        self,
        query_tokens: Float[Tensor, "B Q E"],
        text_ids: Int[Tensor, "B L"] | None,
        text_keep: Bool[Tensor, "B L"] | None,
        frame: Float[Tensor, "B P C"],
        visual: MemoryBank,
        banks: tuple[MemoryBank, ...],
        *,
        noise: Noise | None = None,
        lean: bool = False,
    ) -> tuple[list[Float[Tensor, "B N E"]], tuple[MemoryBank, ...]]:
        """One frame: 13 hidden states for 12 blocks (entry u - 1 is level u), and the banks after this frame.

        Args:
            query_tokens: the learned queries; they restart from these at every frame.
            text_ids, text_keep: instruction tokens and True where they are not padding; None without text.
            frame: tokens of the current frame.
            visual, banks: the visual bank and one bank per layer, as after the previous frame.
            noise: dropout of this frame.
            lean: project banks apart from the current frame, so that nothing is differentiated through the past.
        """
        num_queries = query_tokens.shape[1]
        states = self.embed(query_tokens, text_ids, 1, noise)[0]
        keep = padding(text_keep, num_queries)
        hidden, after = [states], []
        for i, (layer, bank) in enumerate(zip(self.layers, banks, strict=True)):
            after.append(bank.append(states))
            here = None if noise is None else noise.at(layer=i)
            states = layer.step(states, bank, keep, visual, frame, num_queries, here, lean)
            hidden.append(states)
        return hidden, tuple(after)


def padding(text_keep: Bool[Tensor, "B L"] | None, num_queries: int) -> Bool[Tensor, "B N"] | None:
    """True at queries and at text that is not padding; None where nothing is padding."""
    if text_keep is None or bool(text_keep.all()):
        return None
    return torch.cat([text_keep.new_ones(len(text_keep), num_queries), text_keep], dim=1)


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
