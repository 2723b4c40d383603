"""The student layer by layer over all time steps at once, equal to the sequential loop.

The bank of layer l holds inputs of layer l at earlier steps, and the queries start anew at every step, so step t of
layer l needs steps <= t of layer l - 1 and nothing else. Everything here is time first: [T, B, tokens, width].

Where only the last frames are asked for, the earlier ones run without a graph: the banks are detached, so nothing flows
back from them but the gradient of the projections, through the bank at the first frame with a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.train.bank_attention import Factors, Past, bank_after, bank_attention
from stages.train.noise import Noise, Site
from stages.train.plan import MergePlan, merge_plan
from stages.train.qformer import Attention, QFormer, QFormerLayer, padding


@dataclass(frozen=True)
class Frames:
    """Frame features with their plan, shared by all layers and by all questions about a window.

    ``past`` are frames without a graph, ``now`` those with one.
    """

    past: Float[Tensor, "F V P C"]
    now: Float[Tensor, "T V P C"]
    plan: MergePlan
    questions: Questions

    @property
    def first(self) -> int:
        """The first step with a graph."""
        return len(self.past)


@dataclass(frozen=True)
class Questions:
    """Which samples ask about which window: ``sample[v, g]`` is the g-th question of window v, padded with sample 0."""

    window: Int[Tensor, " B"]
    place: Int[Tensor, " B"]
    sample: Int[Tensor, "V G"]

    @classmethod
    def group(cls, windows: Sequence[int], device: torch.device) -> Questions:
        """``windows[b]`` is the row of the frames that sample b reads."""
        asked: list[list[int]] = [[] for _ in range(max(windows) + 1)]
        place = []
        for b, window in enumerate(windows):
            place.append(len(asked[window]))
            asked[window].append(b)
        most = max(map(len, asked))
        sample = [row + [0] * (most - len(row)) for row in asked]
        return cls(*(torch.tensor(x, device=device) for x in (list(windows), place, sample)))

    def together(self, x: Float[Tensor, "T B Q E"]) -> Float[Tensor, "T V A E"]:
        """The queries of all questions about a window side by side."""
        return x[:, self.sample].flatten(2, 3)

    def apart(self, x: Float[Tensor, "T V A E"]) -> Float[Tensor, "T B Q E"]:
        """The inverse."""
        apart: Tensor = x.unflatten(2, (self.sample.shape[1], -1))[:, self.window, self.place]
        return apart


def hidden_states(
    qformer: QFormer,
    frames: Frames,
    query_tokens: Float[Tensor, "B Q E"],
    text_ids: Int[Tensor, "B L"] | None,
    text_keep: Bool[Tensor, "B L"] | None,
    *,
    noise: Noise | None = None,
    detach: bool = True,
    recompute: bool = False,
) -> list[Float[Tensor, "T B Q E"]]:
    """Query states of every level (entry u - 1 is level u) at the steps with a graph.

    Args:
        recompute: keep each layer's input only, and compute the layer again in the backward pass.
    """
    first, num_queries = frames.first, query_tokens.shape[1]
    keep = padding(text_keep, num_queries)
    past: Tensor | None = None
    if first:
        with torch.no_grad():
            past = qformer.embed(query_tokens, text_ids, first, noise)
    later = None if noise is None else noise.at(first=first)
    now = qformer.embed(query_tokens, text_ids, len(frames.now), later)
    hidden = [now[:, :, :num_queries]]
    layers = list(qformer.layers)
    visual_past = _visual_past(frames)
    for i, layer in enumerate(layers):
        here = None if noise is None else noise.at(layer=i)
        run = _Layer(layer, frames, visual_past, keep, here, num_queries, detach)
        states = now.detach() if past is None else torch.cat([past, now.detach()])
        # Query states are nearly alike from step to step: in float32 rounding would decide many of their merges (D40).
        plan = merge_plan(states.double(), frames.plan.max_len)
        if recompute and torch.is_grad_enabled():
            later_now = checkpoint(run.differentiated, now, past, plan, use_reentrant=False, preserve_rng_state=False)
        else:
            later_now = run.differentiated(now, past, plan)
        if past is not None and i + 1 < len(layers):  # nobody reads the last layer's earlier steps
            past = run.earlier(past, plan)
        now = later_now
        hidden.append(now[:, :, :num_queries])
    return hidden


def _visual_past(frames: Frames) -> Tensor | None:
    """Means of the frames in the visual bank where the graph sets in, [V, R, P, C]."""
    return bank_after(frames.past, frames.plan) if frames.first else None


@dataclass(frozen=True)
class _Layer:
    """One layer over time."""

    layer: QFormerLayer
    frames: Frames
    visual_past: Tensor | None
    keep: Tensor | None
    noise: Noise | None
    num_queries: int
    detach: bool

    def differentiated(self, now: Tensor, past: Tensor | None, plan: MergePlan) -> Tensor:
        """The steps with a graph."""
        frames, first = self.frames, self.frames.first
        noise = None if self.noise is None else self.noise.at(first=first)
        bank = visual_bank = None
        if past is not None:
            bank = Past(first, bank_after(past, plan))
            if self.layer.crossattention is not None and self.visual_past is not None:
                visual_bank = Past(first, self.visual_past)
        return self._run(now, frames.now, plan, noise, bank, visual_bank)

    @torch.no_grad()
    def earlier(self, past: Tensor, plan: MergePlan) -> Tensor:
        """The steps without one."""
        return self._run(past, self.frames.past, plan, self.noise, None, None)

    def _run(
        self,
        states: Tensor,
        x: Tensor,
        plan: MergePlan,
        noise: Noise | None,
        bank: Past | None,
        visual_bank: Past | None,
    ) -> Tensor:
        layer, num_queries = self.layer, self.num_queries
        mixed = self._attend(layer.attention, states, states, plan, Site.SELF_PROBS, noise, bank)
        attended = layer.attention.output(mixed, states, noise, Site.SELF_OUTPUT)
        queries, text = attended[:, :, :num_queries], attended[:, :, num_queries:]
        if layer.crossattention is not None:
            plan = self.frames.plan
            mixed = self._attend(layer.crossattention, queries, x, plan, Site.CROSS_PROBS, noise, visual_bank)
            queries = layer.crossattention.output(mixed, queries, noise, Site.CROSS_OUTPUT)
        return layer.feed_forward(queries, text, noise)

    def _attend(
        self,
        part: Attention,
        states: Tensor,
        x: Tensor,
        plan: MergePlan,
        site: Site,
        noise: Noise | None,
        past: Past | None,
    ) -> Tensor:
        inner, questions = part.attention, self.frames.questions
        crossing = site == Site.CROSS_PROBS
        shared = crossing and questions.sample.shape[1] > 1
        q = inner.query(states)
        mixed = bank_attention(
            questions.together(q) if shared else q,
            x,
            (inner.key, inner.value),
            plan,
            num_heads=inner.num_heads,
            keep=None if crossing else self.keep,
            factors=None if noise is None else self._factors(noise, site, q, x, plan, inner.num_heads, shared),
            past=past,
            detach=self.detach,
        )
        return questions.apart(mixed) if shared else mixed

    def _factors(
        self, noise: Noise, site: Site, q: Tensor, x: Tensor, plan: MergePlan, num_heads: int, shared: bool
    ) -> Factors:
        like, sample = q.detach(), self.frames.questions.sample
        shape = torch.Size((num_heads, q.shape[2], plan.max_len + 1, x.shape[2]))

        def at(step: int) -> Tensor:
            mask = noise.mask(site, step, shape, like)[:, :, :, : plan.num_slots].flatten(3)  # [B, heads, A, S]
            if shared:
                mask = mask[sample].transpose(1, 2).flatten(2, 3)  # [V, heads, G · A, S]
            return mask.flatten(0, 1)

        return at
