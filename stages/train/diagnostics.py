"""What the alignment does, made visible: numbers about a student that training does not need and a reader does.

Cosine and weight per level say what Eq. 5 and 6 are at. What they leave open is answered here: how much of the cosine a
constant vector would get (the common part of the targets, D66), what is left when both sides lose their
means, whether the weights are saturated (D67), whether the levels have become alike (D68), which frames a bank entry
holds, and which frames the last queries read.

Nothing here has a gradient, draws a random number or changes a weight: a run with diagnostics has the weights of a run
without them, bit for bit (tested).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stages.data.samples import Batch
from stages.train.alignment import Alignment, kd_loss
from stages.train.memory import MemoryBank
from stages.train.qformer import MultiHeadAttention
from stages.train.student import Student

PROBE_SAMPLES = 8  # training samples that are looked at again and again
PROBE_SHARE = 0.05  # of the samples that training reads: at most so many are read for a look
HIGH, LOW = 0.99, 0.01  # a single weight beyond these passes less than a hundredth of its gradient: w (1 - w) < 0.01
ALARM = 0.95  # mean weight of a level; above it "adaptive" is a constant near 1
CKA_FRAMES = 1024  # frames that similarities are computed from at most: the cost grows with their square


# ---------------------------------------------------------------- alignment


def constant_cosine(target: Float[Tensor, "n D"]) -> float:
    """The best mean cosine that any constant vector has with these targets: the length of the mean unit target.

    By Cauchy-Schwarz: mean_i c · y_i/|y_i| is largest for c along the mean of y_i/|y_i|. A student that has learned
    nothing about a frame can reach this and no more.
    """
    return float(F.normalize(target.double(), dim=-1, eps=1e-8).mean(0).norm())


def centred_cosine(z: Float[Tensor, "n D"], target: Float[Tensor, "n D"]) -> float:
    """Mean cosine after both sides lost their mean over these frames: what is known about the single frame."""
    z, target = z.double(), target.double()
    return float(F.cosine_similarity(z - z.mean(0), target - target.mean(0), dim=-1, eps=1e-8).mean())


def saturated_share(w: Float[Tensor, ...]) -> float:
    """Share of the single weights beyond HIGH or below LOW, where g_psi hardly learns any more."""
    return float(((w > HIGH) | (w < LOW)).double().mean())


@dataclass(frozen=True)
class Saturation:
    """From ``step`` to the last one, the mean weight of every level is above ALARM (or below 1 - ALARM)."""

    step: int
    level_weights: Mapping[int, float]  # at the last step

    def __str__(self) -> str:
        total = sum(self.level_weights.values())
        return (
            f"all {len(self.level_weights)} level weights are saturated from step {self.step} on (sum {total:.2f}): "
            "the adaptive loss is a plain sum there (D7, D67)"
        )


def saturation(records: Sequence[Mapping[str, Any]]) -> Saturation | None:
    """The alarm, from the records of a run (``w/<level>`` per step); None where some level is still undecided.

    Σ w · (-cos) is smaller the larger w is, for every level with a positive cosine. So all w go to 1 whatever the
    frames show, and Eq. 6 has nothing left to adapt. One-level runs count too. Weights that never move (``uniform``)
    are a setting and no alarm; the caller knows.
    """
    first: int | None = None
    last: dict[int, float] = {}
    for record in records:
        weights = level_values(record, "w/")
        if not weights:
            continue
        if all(w > ALARM or w < 1 - ALARM for w in weights.values()):
            first = int(record["step"]) if first is None else first
        else:
            first = None
        last = weights
    return None if first is None else Saturation(first, last)


def level_values(record: Mapping[str, Any], prefix: str) -> dict[int, float]:
    """Level -> value for the keys ``<prefix><level>`` of one record; values that are not finite were logged as null."""
    found = {
        int(key.removeprefix(prefix)): value
        for key, value in record.items()
        if key.startswith(prefix) and key.removeprefix(prefix).isdecimal() and value is not None
    }
    return dict(sorted(found.items()))


# ---------------------------------------------------------------- similarity of levels


def unbiased_hsic(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"]) -> float:  # noqa: E741 - the letters of the paper
    """HSIC of two Gram matrices, estimated without bias (Song et al. 2012, Eq. 5); needs n >= 4.

    The usual estimate is far above 0 for unrelated features as soon as there are fewer frames than dimensions.
    """
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    cross = float((k * l).sum())
    sums = float(k.sum()) * float(l.sum()) / ((n - 1) * (n - 2))
    rows = 2 * float(k.sum(0) @ l.sum(0)) / (n - 2)
    return (cross + sums - rows) / (n * (n - 3))


def linear_cka(features: Sequence[Float[Tensor, "n _"]]) -> list[list[float]]:
    """Similarity of several feature sets of the same n frames, each with each: linear CKA (Kornblith et al. 2019).

    1 for equal up to rotation and scale, about 0 for unrelated (it may be a little negative). NaN with features that
    are the same for every frame, such as level 1, which has not seen any.
    """
    grams = [_gram(x) for x in features]
    own = [unbiased_hsic(gram, gram) for gram in grams]
    return [[_ratio(unbiased_hsic(a, b), own[i], own[j]) for j, b in enumerate(grams)] for i, a in enumerate(grams)]


def _gram(x: Float[Tensor, "n E"]) -> Float[Tensor, "n n"]:
    """Inner products of centred rows, of scale one; zeros where the rows are equal but for rounding."""
    x = x.double()
    spread = x - x.mean(0)
    if float(spread.norm()) <= 1e-5 * float(x.norm()):
        spread = torch.zeros_like(x)
    gram = spread @ spread.T
    return gram / gram.diagonal().mean().clamp_min(1e-300)


def _ratio(cross: float, a: float, b: float) -> float:
    return cross / math.sqrt(a * b) if a > 0 and b > 0 else math.nan


def mean_similarity(cka: Sequence[Sequence[float]]) -> float:
    """Mean over the pairs of different levels, without those that are undefined: 1 where all levels are alike."""
    pairs = [cka[i][j] for i in range(len(cka)) for j in range(i) if math.isfinite(cka[i][j])]
    return sum(pairs) / len(pairs) if pairs else math.nan


# ---------------------------------------------------------------- looking at a student


@dataclass(frozen=True)
class Observed:
    """What a student makes of some samples, all frames. ``z``, ``w`` and ``target`` are empty without an alignment."""

    hidden: dict[int, Float[Tensor, "B T E"]]  # mean over the queries, every level
    z: dict[int, Float[Tensor, "B T D"]]  # aligned levels
    w: dict[int, Float[Tensor, "B T"]]
    target: Float[Tensor, "B T D"] | None  # as the loss sees it (D4)

    def cosine(self) -> dict[int, Float[Tensor, "B T"]]:
        """Raw cosine, -L_kd of Eq. 5, per aligned level, sample and frame."""
        assert self.target is not None
        return {u: -kd_loss(z, self.target) for u, z in self.z.items()}

    def cka(self, *others: Float[Tensor, "B T _"]) -> list[list[float]]:
        """Similarity of all levels in order, then ``others``, over at most CKA_FRAMES evenly spaced frames."""
        flat = [x.flatten(0, 1) for x in (*self.hidden.values(), *others)]
        step = math.ceil(len(flat[0]) / CKA_FRAMES)
        return linear_cka([x[::step] for x in flat])


def observe(student: Student, alignment: Alignment | None, batches: Iterable[Batch]) -> Observed:
    """Run the student over the batches in evaluation mode, without gradients.

    Only means over the queries are kept, so the memory needed is that of one batch.
    """
    parts: dict[tuple[str, int], list[Tensor]] = {}
    targets: list[Tensor] = []
    levels = range(1, student.cfg.num_layers + 2)
    with torch.no_grad(), evaluating(student):
        for batch in batches:
            hidden = student(batch.f, batch.prompts, levels=levels, frames="all", windows=batch.windows).hidden
            for u in levels:
                parts.setdefault(("hidden", u), []).append(hidden[u].mean(2).float().cpu())
            if alignment is None or batch.y_star is None:
                continue
            target = alignment.normalised(batch.per_sample(batch.y_star).to(hidden[1].device))
            targets.append(target.float().cpu())
            for u in alignment.cfg.levels:
                z = alignment.project(u, hidden[u])
                parts.setdefault(("z", u), []).append(z.float().cpu())
                parts.setdefault(("w", u), []).append(alignment.weigh(z, target).float().cpu())
    whole: dict[str, dict[int, Tensor]] = {"hidden": {}, "z": {}, "w": {}}
    for (kind, u), tensors in parts.items():
        whole[kind][u] = torch.cat(tensors)
    return Observed(whole["hidden"], whole["z"], whole["w"], torch.cat(targets) if targets else None)


@contextmanager
def evaluating(module: nn.Module) -> Any:
    """In evaluation mode (no dropout), and back to the mode it was in."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def scalars(seen: Observed, *, last_frames: int | None = None) -> dict[str, float]:
    """What is logged while training, under ``probe/``.

    Args:
        seen: what ``observe`` gave.
        last_frames: how many of the last frames are aligned (D9); default: all. Similarities use all frames anyway.
    """
    similarity = mean_similarity(seen.cka())
    found = {"probe/cka": similarity} if math.isfinite(similarity) else {}
    if seen.target is None:
        return found
    first = 0 if last_frames is None else seen.target.shape[1] - last_frames
    target = seen.target[:, first:].flatten(0, 1)
    found["probe/constant"] = constant_cosine(target)
    for u, cosine in seen.cosine().items():
        found[f"probe/cos/{u}"] = float(cosine[:, first:].mean())
        found[f"probe/centred/{u}"] = centred_cosine(seen.z[u][:, first:].flatten(0, 1), target)
        found[f"probe/w/{u}"] = float(seen.w[u][:, first:].mean())
    found["probe/saturated"] = saturated_share(torch.stack([w[:, first:] for w in seen.w.values()]))
    return found


def probe_due(done: int, total: int, *, batch_size: int, num_samples: int) -> bool:
    """Whether training looks at its probe samples after ``done`` steps: first, last, and seldom enough between."""
    looked_at = min(PROBE_SAMPLES, num_samples)
    every = math.ceil(looked_at / (PROBE_SHARE * min(batch_size, num_samples)))
    return done in (1, total) or done % every == 0


# ---------------------------------------------------------------- banks and attention


@dataclass(frozen=True)
class Reading:
    """How the last step came to its queries, for each sample.

    ``sizes`` [B, k, P]: frames per bank entry at the last step, in order of time, per token index; the current frame
    is not in it. ``mass`` [B, X, S, P]: cross-attention of every block that has one (X), mean over heads and queries,
    per slot (the k entries, then the current frame; S = k + 1) and token index; sums to 1 over S and P.
    ``starts`` [B, T, T]: at step t, share of token indices where a bank entry begins at frame s.
    """

    sizes: Float[Tensor, "B k P"]
    mass: Float[Tensor, "B X S P"]
    starts: Float[Tensor, "B T T"]

    @property
    def all_sizes(self) -> Float[Tensor, "B S P"]:
        """``sizes`` and a 1 for the current frame."""
        return torch.cat([self.sizes, torch.ones_like(self.mass[:, 0, :1])], 1)


def read_frames(student: Student, f: Float[Tensor, "B T P C"], prompts: Sequence[str]) -> Reading:
    """The reference evaluation of the student, frame by frame, with its banks and its last attention kept.

    T is at least 1. With one frame ``sizes`` has no entries.
    """
    num_frames = f.shape[1]
    with torch.no_grad(), evaluating(student):
        text_ids, text_keep = student.tokenize(prompts)
        queries = student.query_tokens.expand(len(f), -1, -1)
        visual, banks = MemoryBank.empty(student.cfg.memory_len), student.qformer.empty_banks(student.cfg.memory_len)
        starts = torch.zeros(len(f), num_frames, num_frames)
        for t in range(num_frames - 1):
            f_t = student.frame_features(f[:, t], t)
            _, banks = student.qformer.step(queries, text_ids, text_keep, f_t, visual, banks)
            visual = visual.append(f_t)
            assert visual.sizes is not None
            starts[:, t + 1, : t + 1] = entry_starts(visual.sizes.cpu(), t + 1)
        f_t = student.frame_features(f[:, -1], num_frames - 1)
        with _listening(student) as heard:
            student.qformer.step(queries, text_ids, text_keep, f_t, visual, banks)
        mass = torch.stack([attention_mass(*call) for call in heard], 1)  # [B, X, S · P]
    sizes = torch.zeros(len(f), 0, f.shape[2]) if visual.sizes is None else visual.sizes.float().cpu()
    return Reading(sizes, mass.unflatten(2, (-1, f.shape[2])).cpu(), starts)


@contextmanager
def _listening(student: Student) -> Any:
    """Collects (attention module, queries' input, source) of every cross-attention that is called inside."""
    heard: list[tuple[MultiHeadAttention, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, MultiHeadAttention)
        heard.append((module, inputs[0], torch.cat(tuple(inputs[1]), 1)))

    blocks = [layer.crossattention for layer in student.qformer.layers if layer.crossattention is not None]
    handles = [block.attention.register_forward_pre_hook(note) for block in blocks]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def attention_mass(
    attention: MultiHeadAttention, states: Float[Tensor, "B Q E"], source: Float[Tensor, "B Z C"]
) -> Float[Tensor, "B Z"]:
    """softmax(q k / sqrt(d)), mean over heads and queries: how much of the reading goes to each source token."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)

    q, k = heads(attention.query(states)).float(), heads(attention.key(source)).float()
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((1, 2))


def entry_starts(sizes: Float[Tensor, "B k P"], num_frames: int) -> Float[Tensor, "B T"]:
    """Share of token indices where some entry begins at frame s; frame 0 always begins one."""
    begins = (sizes.cumsum(1) - sizes).long()  # [B, k, P]: entries are runs of frames, one after another
    return F.one_hot(begins, num_frames).sum(1).float().mean(1)


def slot_frames(sizes: Float[Tensor, "B S P"], num_frames: int) -> Float[Tensor, "B S T"]:
    """Which frames each slot holds: share of token indices whose slot s contains frame t. Columns sum to 1."""
    return _holds(sizes, num_frames).mean(2)


def frame_attention(
    mass: Float[Tensor, "B S P"], sizes: Float[Tensor, "B S P"], num_frames: int
) -> Float[Tensor, "B T"]:
    """Share of the attention per frame: an entry is the mean of its frames, so they share it equally. Sums to 1."""
    return (_holds(sizes, num_frames) * (mass / sizes)[..., None]).sum((1, 2))


def _holds(sizes: Float[Tensor, "B S P"], num_frames: int) -> Float[Tensor, "B S P T"]:
    end = sizes.cumsum(1)
    frame = torch.arange(num_frames)
    return ((frame >= (end - sizes)[..., None]) & (frame < end[..., None])).float()
