"""Training against the cache: L = L_ce + lambda_kd · L_kd (Eq. 9).

Every random choice is a pure function of (seed, epoch) or (seed, step): the order of the samples, the frame draws, and
the dropout masks. So the state of a run is its weights, the optimiser's moments and one integer, and a run that was
stopped after any step continues bit for bit (on CPU).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config import AlignConfig, TrainConfig
from stages.data.samples import Batch, CachedSamples, Request
from stages.train.alignment import Alignment
from stages.train.student import Student, num_aligned_frames
from stages.types import Decoder

Log = Callable[[dict[str, Any]], None]
Save = Callable[[int, dict[str, Tensor], dict[str, Any]], None]


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


def batch_positions(cfg: TrainConfig, schedule: Schedule, num_samples: int, step: int) -> tuple[list[int], list[int]]:
    """Sample positions of a step, and the frame draw of each, from (seed, epoch) alone."""
    epoch, inside = divmod(step, schedule.steps_per_epoch)
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(num_samples)
    draws = rng.integers(0, 2**31, num_samples)
    chosen = order[inside * cfg.batch_size : (inside + 1) * cfg.batch_size]
    return chosen.tolist(), draws[chosen].tolist()


def micro_batches(cfg: TrainConfig, schedule: Schedule, num_samples: int, step: int) -> list[Request]:
    """The batch of a step as it is cut into forward passes."""
    positions, draws = batch_positions(cfg, schedule, num_samples, step)
    size = cfg.micro_batch or len(positions)
    cuts = [slice(first, first + size) for first in range(0, len(positions), size)]
    return [Request(positions[cut], draws[cut]) for cut in cuts]


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

    def accumulate(self, batch: Batch, *, answer_tokens: int, num_samples: int) -> dict[str, float]:
        """Add the gradients of one micro-batch of a step over ``num_samples`` samples with ``answer_tokens`` in all.

        L_ce is a mean over answer tokens (Eq. 8, D21), L_kd over samples and frames (D8), both of the whole batch: so
        the gradients do not depend on how it is cut.
        """
        aligned = self.alignment is not None
        out = self.student(
            batch.f,
            batch.prompts,
            levels=self.align_cfg.levels if aligned else (),
            frames=self.align_cfg.frames if aligned else "last",
        )
        nll, _ = self.decoder.loss_sum(out.prefix, batch.prompts, batch.answers)
        loss = nll / answer_tokens
        logged = {"loss_ce": float(nll.detach()) / answer_tokens}
        if self.alignment is not None:
            if batch.y_star is None:
                raise ValueError("alignment needs teacher targets; this batch has none")
            wanted = num_aligned_frames(self.align_cfg.frames, batch.f.shape[1])
            y_star = batch.y_star[:, -wanted:].to(out.prefix.device)
            kd, share = self.alignment(out.hidden, y_star), len(batch.samples) / num_samples
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

    def step(
        self, data: CachedSamples, step: int, schedule: Schedule, batches: Iterator[Batch] | None = None
    ) -> dict[str, float]:
        """One optimiser step; returns what is logged: losses, gradient norm, learning rate.

        ``batches`` gives the micro-batches of this step, and of the following ones, where they are read ahead.
        """
        requests = micro_batches(self.cfg, schedule, len(data), step)
        positions = [position for request in requests for position in request.positions]
        batches = batches or (data.batch(request.positions, request.draws) for request in requests)
        lr = schedule.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        answer_tokens = self.decoder.count_answer_tokens([data.samples[i].answer for i in positions])
        totals: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seed * 1_000_003 + step)  # dropout masks: a function of (seed, step)
            for batch in itertools.islice(batches, len(requests)):
                parts = self.accumulate(batch, answer_tokens=answer_tokens, num_samples=len(positions))
                for key, value in parts.items():
                    totals[key] = totals.get(key, 0.0) + value
        totals["grad_norm"] = gradient_norm(list(self.trainable().values()))
        self.optimizer.step()
        return totals | {"lr": lr}

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
        save: receives (steps done, tensors, state); called every ``save_every`` steps or epoch, and at the end.
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
    batches = data.batches(r for step in steps for r in micro_batches(trainer.cfg, schedule, len(data), step))
    with contextlib.closing(batches):
        for step in steps:
            last = trainer.step(data, step, schedule, batches)
            done = step + 1
            epoch_ends = done % schedule.steps_per_epoch == 0 or done == schedule.total_steps
            record: dict[str, Any] = {"step": done, "epoch": step // schedule.steps_per_epoch, **last}
            is_best = False
            if epoch_ends and validate is not None:
                trainer.student.eval()
                record["val_top1"] = accuracy = validate()
                trainer.student.train()
                is_best, best = accuracy > best, max(accuracy, best)
            log(record)
            progress(done, schedule.total_steps, f"loss {last['loss_ce']:.3f}")
            due = done % trainer.cfg.save_every == 0 if trainer.cfg.save_every else epoch_ends
            if due or is_best or done == schedule.total_steps:
                save(done, trainer.checkpoint(), {"step": done, "best": best, "is_best": is_best})
    return {
        "steps": schedule.total_steps,
        "first_step": first_step,
        "samples": len(data),
        "seconds": time.monotonic() - started,
        **last,
    }
