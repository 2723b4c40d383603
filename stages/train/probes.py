"""Probes: what a small classifier reads straight from the frozen features, without Q-Former and language model.

They are the baselines of every result table. A probe on the teacher's pooled features bounds what alignment can bring;
one on pooled CLIP tokens says what a task needs beyond them. Penalty, learning rate and stopping point are chosen on
val, never on test. Every probe is a deterministic function of features, samples and (attentive only) a seed.

A probe does not read the question, so one is fitted for every task (``tasks``) and knows its answers only. Where a task
has too little to fit one, the most frequent answer stands in, and ``fit_tasks`` says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from cache_schema.store import FeatureStore
from stages.types import Sample

Stores = Mapping[str, FeatureStore]  # "clip" and, where a teacher probe is asked for, "teacher"
Pool = Literal["mean", "frames", "last", "flat"]
Log = Callable[[int, int], None]  # work done, of how much

IN_MEMORY_BYTES = 4 << 30  # features of one split: kept in memory up to here, else read again in every step
MAX_FLAT = 1 << 17  # numbers per sample that a linear probe takes
MAX_CLASSES = 512  # open questions have thousands of answers: no probe for those
MAX_PROMPTS = 64  # up to here every prompt is a task of its own,
OFTEN = 10  # where each is asked this often in training: open questions are mostly asked once
PENALTIES = tuple(10.0**power for power in range(-5, 3))  # of the mean cross-entropy; features are standardised
RIDGE_PENALTIES = tuple(10.0**power for power in range(-4, 6))  # of the mean squared error
ATTENTIVE_WIDTH, ATTENTIVE_QUERIES, ATTENTIVE_HEADS = 64, 4, 4
ATTENTIVE_RATES = (1e-3, 4e-3)
ATTENTIVE_STEPS, ATTENTIVE_BATCH, ATTENTIVE_CHECK = 600, 64, 50


class Splits(NamedTuple):
    """The samples of one task."""

    train: Sequence[Sample]
    val: Sequence[Sample]
    test: Sequence[Sample]


class ProbeRefused(ValueError):
    """This probe has no meaning or no room here; the message says why. Other tasks and other baselines go on."""


@dataclass(frozen=True)
class Answers:
    """What a probe says about the samples of one test set, in their order."""

    labels: tuple[str, ...]  # the answers of the training set, sorted
    log_probs: Float[np.ndarray, "N K"] = field(repr=False)
    chosen: Mapping[str, float | int]  # what val decided, and the accuracy there

    def ranked(self, top: int = 5) -> list[tuple[str, ...]]:
        """Per sample the most probable labels, best first; the first in alphabetical order among equals."""
        order = np.argsort(-self.log_probs, axis=1, kind="stable")[:, :top]
        return [tuple(self.labels[k] for k in row) for row in order]


# ---------------------------------------------------------------- features


class Frames:
    """Features [T, P, C] of every sample at its evaluation frames; a pooled teacher has P = 1.

    Read once where they fit into memory, else whenever they are asked for.

    Raises:
        ProbeRefused: the samples have different numbers of frames.
    """

    def __init__(self, store: FeatureStore, samples: Sequence[Sample]) -> None:
        self.store, self.samples = store, samples
        lengths = {len(sample.frame_index) for sample in samples}
        if len(lengths) > 1:
            raise ProbeRefused(f"the samples have {min(lengths)} to {max(lengths)} frames; a probe needs one number")
        shape = store.spec.frame_shape
        tokens, width = (shape[0], shape[1]) if store.modality == "tokens" else (1, math.prod(shape))
        self.shape = (len(samples[0].frame_index), tokens, width)
        itemsize = np.dtype(store.spec.feature_dtype).itemsize
        fits = len(samples) * math.prod(self.shape) * itemsize <= IN_MEMORY_BYTES
        self._all: Tensor | None = self._read(range(len(samples))) if fits else None

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, positions: Sequence[int] | Int[Tensor, " n"]) -> Float[Tensor, "n T P C"]:
        """The features of these samples in float32."""
        chosen = [int(i) for i in positions]
        rows = self._read(chosen) if self._all is None else self._all[chosen]
        return rows.float()

    def chunks(self, size: int = 64) -> list[Sequence[int]]:
        """All positions, a few at a time."""
        return [range(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    def _read(self, positions: Sequence[int]) -> Tensor:
        spec = self.store.spec
        out = np.empty((len(positions), self.shape[0], *spec.frame_shape), dtype=spec.feature_dtype)
        for row, position in zip(out, positions, strict=True):
            self.store.read(self.samples[position].video_id, self.samples[position].frame_index, out=row)
        return torch.from_numpy(out).reshape(len(positions), *self.shape)


def pooled(frames: Frames, pool: Pool) -> Float[np.ndarray, "N F"]:
    """One vector per sample.

    ``mean``: over frames and tokens. ``frames``: over the tokens of each frame, the frames side by side. ``last``: all
    tokens of the last frame. ``flat``: everything.

    Raises:
        ProbeRefused: more than MAX_FLAT numbers per sample.
    """
    length, tokens, width = frames.shape
    size = {"mean": width, "frames": length * width, "last": tokens * width, "flat": length * tokens * width}[pool]
    if size > MAX_FLAT:
        raise ProbeRefused(f"{size:,} numbers per sample; a linear probe takes up to {MAX_FLAT:,}")
    parts = []
    for positions in frames.chunks():
        rows = frames.rows(positions).double()
        if pool == "mean":
            rows = rows.mean(dim=(1, 2))
        elif pool == "frames":
            rows = rows.mean(dim=2)
        elif pool == "last":
            rows = rows[:, -1]
        parts.append(rows.flatten(1))
    joined: Float[np.ndarray, "N F"] = torch.cat(parts).numpy()
    return joined


# ---------------------------------------------------------------- linear


@dataclass(frozen=True)
class Space:
    """Standardised features, turned into as few coordinates as the training set spans.

    A penalty on the squared norm does not see a rotation, and the solution lies in the span of the training features:
    so with more features than samples the probe in these coordinates is the same probe, only smaller.
    """

    mean: Float[np.ndarray, " F"]
    scale: Float[np.ndarray, " F"]  # 0 where a feature is constant
    basis: Float[np.ndarray, "F R"] | None

    @classmethod
    def of(cls, x: Float[np.ndarray, "N F"]) -> Space:
        """The space of a training set."""
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        varies = deviation > 1e-6 * max(1e-12, float(np.abs(x).max()))
        space = cls(mean, np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0), None)
        if x.shape[1] <= len(x):
            return space
        z = space(x)
        values, vectors = np.linalg.eigh(z @ z.T)
        kept = values > 1e-10 * max(values[-1], 1e-300)
        basis = (z.T @ vectors[:, kept]) / np.sqrt(values[kept])
        return cls(space.mean, space.scale, basis)

    def __call__(self, x: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N R"]:
        """Coordinates of features of any split."""
        z: Float[np.ndarray, "N R"] = (x - self.mean) * self.scale
        return z if self.basis is None else z @ self.basis


def fit_logistic(
    x: Float[Tensor, "N R"], y: Int[Tensor, " N"], *, penalty: float, start: Float[Tensor, "R1 K"]
) -> Float[Tensor, "R1 K"]:
    """Multinomial logistic regression: argmin mean cross-entropy + penalty / 2 · |W|², by L-BFGS in float64.

    The last row of the result is the intercept, which is not penalised. ``start`` is a guess of the same shape.
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=400, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        loss = cross_entropy(logits, y) + 0.5 * penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear(
    stores: Stores, splits: Splits, *, source: str, pool: Pool, seed: int = 0, log: Log = lambda *_: None
) -> Answers:
    """Linear probe on pooled features; the penalty with the best accuracy on val (then likelihood) is taken."""
    del seed  # nothing is drawn
    labels = _labels(splits.train)
    x = {name: pooled(Frames(stores[source], part), pool) for name, part in splits._asdict().items()}
    space = Space.of(x["train"])
    z = {name: torch.from_numpy(space(part)) for name, part in x.items()}
    y, y_val = _targets(splits.train, labels), _targets(splits.val, labels)
    weights = torch.zeros(z["train"].shape[1] + 1, len(labels), dtype=torch.float64)
    best: tuple[tuple[float, float], float, Tensor] | None = None
    for number, penalty in enumerate(
        sorted(PENALTIES, reverse=True)
    ):  # each starts from the next stronger one's solution
        log(number, len(PENALTIES))
        weights = fit_logistic(z["train"], y, penalty=penalty, start=weights)
        worth = _worth(z["val"] @ weights[:-1] + weights[-1], y_val)
        if best is None or worth > best[0]:
            best = worth, penalty, weights
    assert best is not None
    worth, penalty, weights = best
    log_probs = log_softmax(z["test"] @ weights[:-1] + weights[-1], dim=-1).numpy()
    return Answers(labels, log_probs, {"penalty": penalty, "features": x["train"].shape[1], "val_top1": worth[0]})


def ridge_r2(
    train: tuple[Float[np.ndarray, "N F"], Float[np.ndarray, "N K"]],
    val: tuple[Float[np.ndarray, "M F"], Float[np.ndarray, "M K"]],
    test: tuple[Float[np.ndarray, "L F"], Float[np.ndarray, "L K"]],
) -> Float[np.ndarray, " K"]:
    """Share of a target's variance on test that a linear map of the features explains (R², at most 1, may be negative).

    Features are standardised; the penalty of each target is the one with the best R² on val.
    """
    space = Space.of(train[0])
    z, z_val, z_test = space(train[0]), space(val[0]), space(test[0])
    offset = train[1].mean(axis=0)
    left, spectrum, right = np.linalg.svd(z, full_matrices=False)
    projected = left.T @ (train[1] - offset)  # [R, K]
    best_val = np.full(train[1].shape[1], -np.inf)
    best_test = np.zeros_like(best_val)
    for penalty in RIDGE_PENALTIES:
        weights = right.T @ (projected * (spectrum / (spectrum**2 + penalty * len(z)))[:, None])
        on_val = r_squared(z_val @ weights + offset, val[1])
        better = on_val > best_val
        best_test = np.where(better, r_squared(z_test @ weights + offset, test[1]), best_test)
        best_val = np.where(better, on_val, best_val)
    return best_test


def r_squared(guess: Float[np.ndarray, "N K"], truth: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " K"]:
    """1 - residual / total sum of squares, per target; 0 for a target that does not vary."""
    residual = ((guess - truth) ** 2).sum(axis=0)
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    share: Float[np.ndarray, " K"] = np.where(total > 0, 1 - residual / np.where(total > 0, total, 1.0), 0.0)
    return share


# ---------------------------------------------------------------- attentive


class AttentivePool(nn.Module):
    """A few learned queries look at all tokens of all frames once; a linear layer reads what they found.

    Frames and tokens get a learned position each, so that "where" and "when" can be asked for.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int, int], classes: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        length, tokens, width = shape
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.project = nn.Linear(width, ATTENTIVE_WIDTH)
        # As large as the projected features: a position that starts at zero is found only after long training.
        self.when = nn.Parameter(0.5 * torch.randn(length, 1, ATTENTIVE_WIDTH))
        self.where = nn.Parameter(0.5 * torch.randn(1, tokens, ATTENTIVE_WIDTH))
        self.queries = nn.Parameter(torch.randn(1, ATTENTIVE_QUERIES, ATTENTIVE_WIDTH))
        self.attention = nn.MultiheadAttention(ATTENTIVE_WIDTH, ATTENTIVE_HEADS, batch_first=True)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.LayerNorm(ATTENTIVE_QUERIES * ATTENTIVE_WIDTH),
            nn.Linear(ATTENTIVE_QUERIES * ATTENTIVE_WIDTH, classes),
        )

    def forward(self, f: Float[Tensor, "B T P C"]) -> Float[Tensor, "B K"]:
        tokens = self.project((f - self.mean) * self.scale) + self.when + self.where
        tokens = tokens.flatten(1, 2)
        found, _ = self.attention(self.queries.expand(len(f), -1, -1), tokens, tokens, need_weights=False)
        logits: Tensor = self.head(found)
        return logits


def attentive(stores: Stores, splits: Splits, *, source: str, seed: int = 0, log: Log = lambda *_: None) -> Answers:
    """Attentive probe on all tokens (or, for the teacher, on the vectors of all frames), by AdamW.

    Two learning rates; of both, the step with the best accuracy on val (then the best likelihood) is taken.
    """
    labels = _labels(splits.train)
    frames = {name: Frames(stores[source], part) for name, part in splits._asdict().items()}
    mean, scale = _channel_moments(frames["train"])
    y, y_val = _targets(splits.train, labels), _targets(splits.val, labels)
    best: tuple[tuple[float, float], float, int, dict[str, Tensor]] | None = None
    with torch.random.fork_rng(devices=[]):
        for number, rate in enumerate(ATTENTIVE_RATES):
            torch.manual_seed(seed)
            model = AttentivePool(frames["train"].shape, len(labels), mean, scale)
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
            order: list[int] = []
            for step in range(1, ATTENTIVE_STEPS + 1):
                if len(order) < ATTENTIVE_BATCH:
                    order += torch.randperm(len(splits.train)).tolist()
                batch, order = order[:ATTENTIVE_BATCH], order[ATTENTIVE_BATCH:]
                warm, rest = min(1.0, step / 30), (step - 1) / ATTENTIVE_STEPS
                optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * rest))
                optimizer.zero_grad()
                cross_entropy(model(frames["train"].rows(batch)), y[batch]).backward()
                optimizer.step()
                log(number * ATTENTIVE_STEPS + step, len(ATTENTIVE_RATES) * ATTENTIVE_STEPS)
                if step % ATTENTIVE_CHECK == 0:
                    worth = _worth(_all_logits(model, frames["val"]), y_val)
                    if best is None or worth > best[0]:
                        best = worth, rate, step, {k: v.clone() for k, v in model.state_dict().items()}
    assert best is not None
    worth, rate, step, state = best
    model.load_state_dict(state)
    log_probs = log_softmax(_all_logits(model, frames["test"]).double(), dim=-1).numpy()
    return Answers(labels, log_probs, {"lr": rate, "step": step, "val_top1": worth[0]})


@torch.no_grad()
def _all_logits(model: nn.Module, frames: Frames) -> Float[Tensor, "N K"]:
    return torch.cat([model(frames.rows(positions)) for positions in frames.chunks(256)])


def _channel_moments(frames: Frames) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and 1 / standard deviation of every channel over all tokens."""
    total = square = torch.zeros(frames.shape[-1], dtype=torch.float64)
    for positions in frames.chunks():
        rows = frames.rows(positions).double().flatten(0, 2)
        total, square = total + rows.sum(0), square + rows.square().sum(0)
    count = len(frames) * frames.shape[0] * frames.shape[1]
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(0).sqrt()
    floor = 1e-6 * max(1e-12, float(deviation.max()))
    return mean.float(), torch.where(deviation > floor, 1 / deviation.clamp_min(floor), 0.0).float()


# ---------------------------------------------------------------- what the registry names


def majority(stores: Stores, splits: Splits, *, seed: int = 0, log: Log = lambda *_: None) -> Answers:
    """Always the most frequent answer of the training set, then the second, …"""
    del stores, seed, log
    counts = Counter(sample.answer for sample in splits.train)
    labels = tuple(sorted(counts))
    shares = np.log(np.array([counts[label] for label in labels]) / len(splits.train))
    return Answers(labels, np.tile(shares, (len(splits.test), 1)), {})


clip_mean = partial(linear, source="clip", pool="mean")
clip_frames = partial(linear, source="clip", pool="frames")
clip_last = partial(linear, source="clip", pool="last")
clip_flat = partial(linear, source="clip", pool="flat")
clip_attentive = partial(attentive, source="clip")
teacher_mean = partial(linear, source="teacher", pool="mean")
teacher_frames = partial(linear, source="teacher", pool="frames")
teacher_attentive = partial(attentive, source="teacher")


def tasks(splits: Splits) -> dict[str, Splits]:
    """The splits cut into the tasks of test: by prompt where there are few, each asked often, else by group.

    The group is the question type in the QA layout, and the label in LVU's, where it has one prompt.
    """
    asked = Counter(sample.prompt for sample in splits.train)
    by_prompt = len(asked) <= MAX_PROMPTS and all(asked[sample.prompt] >= OFTEN for sample in splits.test)
    cut: dict[str, tuple[list[Sample], list[Sample], list[Sample]]] = {}
    for number, part in enumerate(splits):
        for sample in part:
            cut.setdefault(sample.prompt if by_prompt else sample.group, ([], [], []))[number].append(sample)
    return {name: Splits(*parts) for name, parts in sorted(cut.items()) if parts[2]}


@dataclass(frozen=True)
class TaskAnswers:
    """What a probe says to the test samples of one task."""

    task: str
    samples: Sequence[Sample]
    answers: Answers
    refused: str  # why the most frequent training answer stands in for the probe; empty where it does not


def fit_tasks(
    probe: Callable[..., Answers], stores: Stores, splits: Splits, *, seed: int, log: Log = lambda *_: None
) -> list[TaskAnswers]:
    """Fit a probe to every task of the test split.

    A task that it cannot be fitted to (no val samples, too many answers) is answered by ``majority``, so that every
    baseline answers the same questions.

    Raises:
        ProbeRefused: it can be fitted to no task at all.
    """
    found = []
    cut = tasks(splits)
    for number, (task, parts) in enumerate(cut.items()):

        def part_done(done: int, total: int, number: int = number) -> None:
            log(100 * number + 100 * done // total, 100 * len(cut))

        known = parts if parts.train else parts._replace(train=splits.train)
        refused = ""
        try:
            if probe is not majority and not (parts.train and parts.val):
                counts = f"{len(parts.train)} training and {len(parts.val)} val samples"
                raise ProbeRefused(f"{task!r} has {counts}; a probe needs both")
            answers = probe(stores, known, seed=seed, log=part_done)
        except ProbeRefused as error:
            refused, answers = str(error), majority(stores, known)
        found.append(TaskAnswers(task, parts.test, answers, refused))
    if all(part.refused for part in found):
        raise ProbeRefused("; ".join(dict.fromkeys(part.refused for part in found)))
    return found


def _labels(train: Sequence[Sample]) -> tuple[str, ...]:
    labels = tuple(sorted({sample.answer for sample in train}))
    if len(labels) > MAX_CLASSES:
        raise ProbeRefused(f"{len(labels):,} different answers; a probe takes up to {MAX_CLASSES}")
    return labels


def _targets(samples: Sequence[Sample], labels: tuple[str, ...]) -> Int[Tensor, " N"]:
    """Class numbers; -1 for an answer that training never shows, which no probe can get right."""
    known = {label: k for k, label in enumerate(labels)}
    return torch.tensor([known.get(sample.answer, -1) for sample in samples])


def _worth(logits: Float[Tensor, "N K"], y: Int[Tensor, " N"]) -> tuple[float, float]:
    """What a choice on val goes by: accuracy over all samples, then likelihood of those with a known answer."""
    accuracy = float((logits.argmax(dim=-1) == y).double().mean())
    return accuracy, -float(cross_entropy(logits.double(), y, ignore_index=-1, reduction="sum"))
