"""Training against the cache: L = L_ce + lambda_kd · L_kd (Eq. 9).

Every random choice is a pure function of (seed, epoch) or (seed, step, micro-batch): the order of the samples, the
frame draws, and the dropout masks. So the state of a run is its weights, the optimiser's moments and one integer, a run
that was stopped after any step continues bit for bit (on CPU), and runs may take turns on one batch (``grid.py``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config import AlignConfig, TrainConfig
from stages.data.samples import Batch, CachedSamples, Request
from stages.stopping import whole_steps
from stages.train import budget, diagnostics
from stages.train.alignment import Alignment
from stages.train.noise import Noise
from stages.train.student import Student, last_frames, num_aligned_frames
from stages.types import Decoder

Log = Callable[[dict[str, Any]], None]
Save = Callable[[int, dict[str, Tensor], dict[str, Any]], None]
Cuts = list[tuple[list[int], list[int]]]  # sample positions and frame draws of every micro-batch of a step
STEPS_AHEAD = 16  # whose cuts are remembered: reading is a few micro-batches before learning


class TrainingDiverged(ValueError):
    """The loss is not a finite number any more."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate per optimiser step (D24).

    ``malmm``: linear warm-up over ``warmup_steps``, but inside the first epoch only; from the second epoch on a half
    cosine that changes once per epoch (LAVIS ``linear_warmup_cosine_lr``).
    ``cosine_steps``: warm-up, then a half cosine that changes at every step.
    """

    cfg: TrainConfig
    steps_per_epoch: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of the step with this 0-based number."""
        cfg = self.cfg
        if cfg.schedule == "malmm":
            epoch, inside = divmod(step, self.steps_per_epoch)
            if epoch == 0 and cfg.warmup_steps:
                return min(cfg.lr, cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * inside / cfg.warmup_steps)
            return self._half_cosine(epoch / cfg.epochs)
        if step < cfg.warmup_steps:
            return cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / cfg.warmup_steps
        return self._half_cosine((step - cfg.warmup_steps) / max(1, self.total_steps - cfg.warmup_steps))

    def _half_cosine(self, progress: float) -> float:
        return self.cfg.min_lr + 0.5 * (self.cfg.lr - self.cfg.min_lr) * (1 + math.cos(math.pi * progress))


def make_schedule(cfg: TrainConfig, num_samples: int) -> Schedule:
    """Steps per epoch and in all. ``drop_last`` drops an incomplete last batch unless it would be the only one."""
    whole, rest = divmod(num_samples, cfg.batch_size)
    steps_per_epoch = max(1, whole + (1 if rest and not cfg.drop_last else 0))
    total = steps_per_epoch * cfg.epochs
    return Schedule(cfg, steps_per_epoch, min(total, cfg.max_steps) if cfg.max_steps else total)


def batch_positions(
    cfg: TrainConfig, schedule: Schedule, num_samples: int, step: int, window_of: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Sample positions of a step, and the frame draw of each, from (seed, epoch) alone.

    Args:
        window_of: a number per sample, equal where samples ask about the same window. With it the windows are shuffled,
            their samples stay together, and they use one draw of frames (D41). A batch may cut a window in two.
    """
    epoch, inside = divmod(step, schedule.steps_per_epoch)
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(num_samples)
    draws = rng.integers(0, 2**31, num_samples)
    if window_of is not None:
        windows = np.asarray(window_of)
        rank = rng.permutation(int(windows.max()) + 1)
        order = order[np.argsort(rank[windows[order]], kind="stable")]
        draws = draws[windows]  # a window's number is below the number of samples
    chosen = order[inside * cfg.batch_size : (inside + 1) * cfg.batch_size]
    return chosen.tolist(), draws[chosen].tolist()


Fits = Callable[[int, int], bool]  # (questions, windows) -> whether they can run together


def micro_batches(windows: Sequence[int], fits: Fits) -> list[slice]:
    """Neighbours of a batch that run together: as many as fit.

    Questions about one window stay together, so that they share its projections, unless they alone are too many.

    Args:
        windows: which window each sample asks about; neighbours with the same number share it.
        fits: one question always does.
    """
    parts, first, count = [], 0, len(windows)
    while first < count:
        end, seen = first + 1, 1
        while end < count:
            more = seen + (windows[end] != windows[end - 1])
            if not fits(end + 1 - first, more):
                break
            end, seen = end + 1, more
        if end < count and windows[end] == windows[end - 1] != windows[first]:
            while windows[end] == windows[end - 1]:
                end -= 1
        parts.append(slice(first, end))
        first = end
    return parts


def parameter_groups(modules: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices; none for biases and vectors (MA-LMM: ``ndim < 2`` or a bias)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim < 2 or "bias" in name else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@dataclass
class Trainer:
    """Student, alignment and optimiser, with the arithmetic of one step.

    ``alignment`` is None when lambda_kd is 0: then no teacher is read, which is MA-LMM.
    """

    student: Student
    alignment: Alignment | None
    decoder: Decoder
    cfg: TrainConfig
    align_cfg: AlignConfig
    _room: tuple[CachedSamples, Fits] | None = field(default=None, init=False, repr=False)  # of the data seen last

    def __post_init__(self) -> None:
        self.modules: dict[str, nn.Module] = {"student": self.student}
        if self.alignment is not None:
            self.modules["alignment"] = self.alignment
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.modules, self.cfg.weight_decay), lr=self.cfg.lr, betas=self.cfg.betas
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by its name in a checkpoint."""
        return {
            f"{room}.{name}": parameter
            for room, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def autocast(self) -> torch.autocast:
        """The student's precision."""
        device = self.student.query_tokens.device.type
        if self.cfg.precision == "bfloat16" and device != "cuda":
            raise ValueError("train.precision=bfloat16 is for CUDA; on the CPU it is slower than float32")
        return torch.autocast(device, torch.bfloat16, enabled=self.cfg.precision == "bfloat16")

    def begin(self, lr: float) -> None:
        """Start an optimiser step: no gradients, this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(
        self, batch: Batch, *, step: int, first: int, answer_tokens: int, num_samples: int
    ) -> dict[str, float]:
        """Add the gradients of the micro-batch that starts with sample ``first`` of the ``num_samples`` of a step.

        All of them together have ``answer_tokens`` answer tokens.

        L_ce is a mean over answer tokens (Eq. 8, D21), L_kd over samples and frames (D8), both of the whole batch: so
        the gradients do not depend on how it is cut. Neither do dropout masks: sample i of a step draws the i-th
        seed of a stream that (seed, step) begins.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, step]).generate_state(1, np.uint64)[0]))
            Noise.draw(first, 0.0)  # those of the samples before
            return self._accumulate(batch, answer_tokens, num_samples)

    def _accumulate(self, batch: Batch, answer_tokens: int, num_samples: int) -> dict[str, float]:
        aligned = self.alignment is not None
        with self.autocast():
            out = self.student(
                batch.f,
                batch.prompts,
                levels=self.align_cfg.levels if aligned else (),
                frames=self.align_cfg.frames if aligned else "last",
                windows=batch.windows,
                lengths=batch.lengths,
                names=batch.names,
            )
        nll, _ = self.decoder.loss_sum(out.prefix, batch.prompts, batch.answers)
        loss = nll / answer_tokens
        logged = {"loss_ce": float(nll.detach()) / answer_tokens}
        if self.alignment is not None:
            if batch.y_star is None:
                raise ValueError("alignment needs teacher targets; this batch has none")
            lengths = batch.lengths or (batch.f.shape[1],) * len(batch.f)
            counts = [num_aligned_frames(self.align_cfg.frames, length) for length in lengths]
            y_star = last_frames(batch.y_star, lengths, max(counts))
            if batch.windows is not None:
                y_star, counts = y_star[list(batch.windows)], [counts[window] for window in batch.windows]
            kd = self.alignment(out.hidden, y_star.to(out.prefix.device), counts if batch.lengths else None)
            share = len(batch.samples) / num_samples
            loss = loss + self.cfg.lambda_kd * share * kd.total
            logged["loss_kd"] = float(kd.total.detach()) * share
            for level in self.align_cfg.levels:
                logged[f"kd/{level}"] = float(kd.per_level[level]) * share
                logged[f"w/{level}"] = float(kd.weights[level]) * share
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"loss became {float(loss.detach())} (parts: {logged}); lower train.lr or train.lambda_kd"
            )
        loss.backward()
        return logged

    def room(self, data: CachedSamples) -> Fits:
        """Which micro-batches the settings allow: ``train.micro_batch``, or what ``train.memory`` has room for."""
        size = self.cfg.micro_batch
        if size or not self.cfg.memory:
            return lambda questions, _: not size or questions <= size
        return budget.Room(self.student, self.shape(data), budget.parse_bytes(self.cfg.memory)).fits

    def shape(self, data: CachedSamples) -> budget.Shape:
        """The largest sample: most frames, longest prompt."""
        longest = max(sample.draws.shape[1] for sample in data.samples)
        wanted = num_aligned_frames(self.align_cfg.frames, longest) if self.alignment is not None else 1
        text = self.student.tokenize([sample.prompt for sample in data.samples])[0].shape[1]
        tokens, width = data.tokens.spec.frame_shape
        return budget.Shape(longest, wanted, tokens, width, text)

    def cuts(self, data: CachedSamples, step: int, schedule: Schedule) -> Cuts:
        """What a step reads: sample positions and frame draws of every micro-batch."""
        window_of = data.window_of() if self.cfg.group_windows else None
        positions, draws = batch_positions(self.cfg, schedule, len(data), step, window_of)
        if self._room is None or self._room[0] is not data:
            self._room = data, self.room(data)
        windows = range(len(positions)) if window_of is None else [window_of[i] for i in positions]
        return [(positions[part], draws[part]) for part in micro_batches(windows, self._room[1])]

    def step(
        self, data: CachedSamples, step: int, schedule: Schedule, ahead: tuple[Cuts, Iterator[Batch]] | None = None
    ) -> dict[str, float]:
        """One optimiser step; returns what is logged: losses, gradient norm, learning rate.

        ``ahead``: the cuts of this step, and the micro-batches of it and of the following ones, where they are read
        ahead.
        """
        cuts = ahead[0] if ahead else self.cuts(data, step, schedule)
        batches = ahead[1] if ahead else (data.batch(*cut) for cut in cuts)
        answers = [data.samples[i].answer for positions, _ in cuts for i in positions]
        answer_tokens = self.decoder.count_answer_tokens(answers)
        totals: dict[str, float] = {}
        self.begin(schedule.lr(step))
        first = 0
        for batch in itertools.islice(batches, len(cuts)):
            counts = {"answer_tokens": answer_tokens, "num_samples": len(answers)}
            add(totals, self.accumulate(batch, step=step, first=first, **counts))
            first += len(batch.samples)
        return totals | self.finish()

    def finish(self) -> dict[str, float]:
        """Let the optimiser use what was accumulated. Returns gradient norm and learning rate."""
        norm = gradient_norm(list(self.trainable().values()))
        self.optimizer.step()
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    def probe(self, data: CachedSamples) -> dict[str, float]:
        """Diagnostics on the first training samples with as many frames as the first one has, always the same ones.

        No trained number depends on it.
        """
        length = data.samples[0].draws.shape[1]
        alike = (i for i, sample in enumerate(data.samples) if sample.draws.shape[1] == length)
        looked_at = list(itertools.islice(alike, diagnostics.PROBE_SAMPLES))
        size = self.cfg.micro_batch or len(looked_at)
        batches = (data.batch(looked_at[first : first + size]) for first in range(0, len(looked_at), size))
        seen = diagnostics.observe(self.student, self.alignment, batches)
        return diagnostics.scalars(seen, last_frames=num_aligned_frames(self.align_cfg.frames, seen.hidden[1].shape[1]))

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights and optimiser moments as flat named tensors; on the CPU they are the live ones, so write them now."""
        tensors = {
            f"{room}.{name}": tensor
            for room, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }
        for name, parameter in self.trainable().items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{moment}.{name}"] = value
        return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what ``checkpoint`` gave. Raises RuntimeError, naming the keys, when it does not fit."""
        for room, module in self.modules.items():
            module.load_state_dict(module_weights(room, tensors), strict=True)
        for name, parameter in self.trainable().items():
            state: dict[str, Tensor] = {}
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"optimizer.{moment}.{name}")) is not None:
                    state[moment] = value.clone() if moment == "step" else value.to(parameter.device).clone()
            if state:
                self.optimizer.state[parameter] = state


def module_weights(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one module ("student", "alignment") inside the tensors of a checkpoint."""
    prefix = f"{room}."
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def add(totals: dict[str, float], parts: Mapping[str, float]) -> None:
    """Add the logged parts of a micro-batch to those of its step, in place."""
    for key, value in parts.items():
        totals[key] = totals.get(key, 0.0) + value


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """L2 norm over all gradients."""
    grads = [p.grad.detach().flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(grads).norm()) if grads else 0.0


def train(
    trainer: Trainer,
    data: CachedSamples,
    *,
    log: Log,
    save: Save,
    first_step: int = 0,
    best: float = -1.0,
    validate: Callable[[], float] | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Run the remaining steps of a run.

    Args:
        log: receives one record per step.
        save: receives (steps done, tensors, state); called every ``save_every`` steps or epoch, at the end, and when a
            signal asks to stop: after the step at hand, before the signal has its effect.
            ``state["is_best"]`` marks the best epoch so far where ``validate`` is given.
        first_step: steps already done, from a checkpoint.
        best: best validation accuracy so far, from the same checkpoint.
        validate: accuracy on the validation split, asked for after every epoch (MA-LMM selects the epoch by it).

    Raises:
        ValueError: no samples.
        TrainingDiverged: the loss is not finite; the last checkpoint stays.
    """
    if not len(data):
        raise ValueError("no training samples: the split is empty, or nothing of it is cached")
    schedule = make_schedule(trainer.cfg, len(data))
    trainer.student.train()
    started, last = time.monotonic(), {}
    steps = range(first_step, schedule.total_steps)
    # The order is a function of (seed, epoch): the next batches are read while this one is learnt from.
    cuts = functools.lru_cache(STEPS_AHEAD)(lambda step: trainer.cuts(data, step, schedule))
    batches = data.batches(Request(*cut) for step in steps for cut in cuts(step))
    with whole_steps() as asked_to_stop, contextlib.closing(batches):
        for step in steps:
            last = trainer.step(data, step, schedule, (cuts(step), batches))
            done = step + 1
            epoch_ends = done % schedule.steps_per_epoch == 0 or done == schedule.total_steps
            record: dict[str, Any] = {"step": done, "epoch": step // schedule.steps_per_epoch, **last}
            is_best = False
            if epoch_ends and validate is not None:
                trainer.student.eval()
                record["val_top1"] = accuracy = validate()
                trainer.student.train()
                is_best, best = accuracy > best, max(accuracy, best)
            size = trainer.cfg.batch_size
            if diagnostics.probe_due(done, schedule.total_steps, batch_size=size, num_samples=len(data)):
                record |= trainer.probe(data)
            log(record)
            progress(done, schedule.total_steps, f"loss {last['loss_ce']:.3f}")
            due = done % trainer.cfg.save_every == 0 if trainer.cfg.save_every else epoch_ends
            stopping = asked_to_stop()
            if due or is_best or done == schedule.total_steps or stopping:
                save(done, trainer.checkpoint(), {"step": done, "best": best, "is_best": is_best})
            if stopping:
                break
    return {
        "steps": schedule.total_steps,
        "first_step": first_step,
        "samples": len(data),
        "seconds": time.monotonic() - started,
        **last,
    }
