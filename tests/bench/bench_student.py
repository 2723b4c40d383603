"""How fast the parallel student is against the sequential one, in CPU seconds of this process on one thread.

    python -m tests.bench.bench_student --json                 # the first row: 2 layers, T=40, K=10
    python -m tests.bench.bench_student --json --full          # every row (about an hour of CPU, 11 GiB)
    python -m tests.bench.bench_student --json --only twelve   # one of them, by its name in ROWS

Widths are the paper's (768, 12 heads, 257 × 1408 tokens a frame, 32 queries and 10 text tokens) except in the rows of
the miniature. Both sides of a row run in this process, in turn. The parallel one is warmed up by a run, sequential
ones by a few frames; a figure is the median over ``--repeats``. Forward is timed with its graph, as the first part of
forward and backward, except in ``twelve_forward``. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.config import StudentConfig
from stages.train.qformer import init_like_bert
from stages.train.student import Student

TOKENS, CLIP_WIDTH, TEXT = 257, 1408, 10


class _Words:
    """Enough of a tokenizer to size the word table; the prompts are fixed ids."""

    def __len__(self) -> int:
        return 30_523


@dataclass(frozen=True)
class Scale:
    """Widths of a student and shape of its input."""

    tokens: int
    clip_width: int
    student: dict[str, int]
    batch: int = 1


PAPER = Scale(TOKENS, CLIP_WIDTH, {})
TINY = Scale(7, 20, {"hidden_size": 24, "num_heads": 3, "intermediate_size": 40, "num_queries": 5})
MINIATURE = Scale(
    37, 64, {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "num_queries": 8}, batch=16
)  # the preset of that name


def make(*, layers: int, memory_len: int, dtype: torch.dtype = torch.float32, scale: Scale = PAPER) -> Student:
    """A seeded student."""
    cfg = StudentConfig(init="seed:0", num_layers=layers, memory_len=memory_len, dropout=0.0, **scale.student)
    student = Student(cfg, _Words(), clip_width=scale.clip_width, llm_width=32)
    generator = torch.Generator().manual_seed(0)
    init_like_bert(student.qformer, generator, cfg.hidden_size)
    for parameter in (student.query_tokens, student.image_pe.weight, student.llm_proj.weight):
        parameter.data.normal_(0, 0.02, generator=generator)
    ids = torch.arange(1, TEXT + 1)

    def tokenize(prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return ids.expand(len(prompts), -1), torch.ones(len(prompts), TEXT, dtype=torch.bool)

    student.tokenize = tokenize  # type: ignore[method-assign, assignment]
    return student.to(dtype)


def clip_tokens(num_frames: int, *, dtype: torch.dtype = torch.float32, scale: Scale = PAPER) -> torch.Tensor:
    """AR(1) features: neighbouring frames are alike, as in a video."""
    shape = (scale.batch, num_frames, scale.tokens, scale.clip_width)
    f = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for t in range(1, num_frames):
        f[:, t] = 0.9 * f[:, t - 1] + 0.4359 * f[:, t]
    return f


def run(
    student: Student,
    evaluation: str,
    f: torch.Tensor,
    *,
    backward: bool = True,
    frames: str = "all",
    questions: int = 1,
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Values and gradients of one evaluation, with its CPU seconds: the forward pass, and all.

    Sequential ones take the questions one by one, as MA-LMM does: one is run, and its seconds count once for each.
    """
    student.cfg = student.cfg.model_copy(update={"evaluation": evaluation})
    student.zero_grad()
    levels = tuple(range(2, student.cfg.num_layers + 2)) if frames == "all" else ()
    together, apart = (questions, 1) if evaluation == "parallel" else (1, questions)
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        windows = [window for window in range(len(f)) for _ in range(together)]
        out = student(f, ["q"] * len(windows), levels=levels, frames=frames, windows=windows)
        forward = time.process_time() - start
        if backward:
            (out.prefix.square().sum() + sum(h.square().sum() for h in out.hidden.values())).backward()
    total = time.process_time() - start
    values = {"prefix": out.prefix.detach(), **{str(u): h.detach() for u, h in out.hidden.items()}}
    if backward:
        values |= {f"grad {n}": p.grad for n, p in student.named_parameters() if p.grad is not None}
    return values, forward * apart, total * apart


def medians(
    student: Student, f: torch.Tensor, evaluations: Sequence[str], repeats: int, **options: Any
) -> dict[str, tuple[float, float]]:
    """Forward and total seconds of every evaluation, in turn; those that run for long are warmed up on a few frames."""
    for evaluation in evaluations:
        if evaluation != "parallel":
            run(student, evaluation, f[:, : student.cfg.memory_len + 2], **options)
    times: dict[str, list[tuple[float, float]]] = {evaluation: [] for evaluation in evaluations}
    for _ in range(repeats):
        for evaluation in evaluations:
            _, *seconds = run(student, evaluation, f, **options)
            times[evaluation].append((seconds[0], seconds[1]))
            print(evaluation, [round(x, 2) for x in seconds], file=sys.stderr, flush=True)
    return {
        evaluation: (statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken))
        for evaluation, taken in times.items()
    }


def flops(*, layers: int, num_frames: int, memory_len: int, projected_once: bool) -> float:
    """Multiply-adds × 2 of one forward pass."""
    queries, width, inner, n = 32, 768, 3072, 32 + TEXT
    crossing = (layers + 1) // 2
    slots = sum(min(t, memory_len) + 1 for t in range(num_frames))
    rows = num_frames if projected_once else slots
    self_attention = layers * (
        2 * rows * n * width * width + num_frames * 2 * n * width * width + slots * 2 * n * n * width
    )
    cross = crossing * (
        2 * rows * TOKENS * CLIP_WIDTH * width
        + num_frames * 2 * queries * width * width
        + slots * 2 * queries * TOKENS * width
    )
    feed_forward = layers * num_frames * 2 * n * width * inner
    return 2.0 * (self_attention + cross + feed_forward)


def gemm_rate(num_frames: int) -> float:
    """FLOP/s of the two plain products that dominate, at their sizes."""
    x, w = torch.randn(num_frames * TOKENS, CLIP_WIDTH), torch.randn(CLIP_WIDTH, 1536)
    y, v = torch.randn(num_frames * 42, 768), torch.randn(768, 3072)
    both = 2.0 * (x.shape[0] * w.numel() + y.shape[0] * v.numel())
    seconds = []
    for _ in range(4):
        start = time.process_time()
        _ = x @ w, y @ v
        seconds.append(time.process_time() - start)
    return both / statistics.median(seconds[1:])


def largest_difference_fp64() -> float:
    """Outputs and gradients of a small student, relative to each tensor's largest entry or 1e-3 of all."""
    student = make(layers=4, memory_len=4, dtype=torch.float64, scale=TINY)
    f = clip_tokens(13, dtype=torch.float64, scale=TINY)
    want, got = (run(student, evaluation, f)[0] for evaluation in ("reference", "parallel"))
    largest = max(float(g.abs().max()) for n, g in want.items() if n.startswith("grad"))
    return max(
        float((got[n] - w).abs().max()) / max(float(w.abs().max()), 1e-3 * largest if n.startswith("grad") else 0.0)
        for n, w in want.items()
    )


def row(
    *,
    layers: int = 2,
    num_frames: int,
    memory_len: int,
    repeats: int,
    scale: Scale = PAPER,
    against: Sequence[str] = ("reference", "lean"),
    **options: Any,
) -> dict[str, float]:
    """One line of the table; ``options`` are those of ``run``."""
    student, f = make(layers=layers, memory_len=memory_len, scale=scale), clip_tokens(num_frames, scale=scale)
    start = resident_gib()
    _, *cold = run(student, "parallel", f, **options)
    found = {"peak_gib": peak_gib(), "start_gib": start, "cold_seconds": cold[1]}  # no sequential form has run yet
    print(found, file=sys.stderr, flush=True)
    times = medians(student, f, ["parallel", *against], repeats, **options)
    forward, total = times["parallel"]
    found |= {"seconds_forward": forward, "seconds_forward_backward": total}
    if scale is PAPER and not options.keys() & {"frames", "questions"}:
        once, often = (
            flops(layers=layers, num_frames=num_frames, memory_len=memory_len, projected_once=p) for p in (True, False)
        )
        found["flops_ratio"] = often / once
        found["gemm_efficiency"] = once / forward / gemm_rate(num_frames)
    for name in against:
        suffix = "" if name == "reference" else f"_vs_{name}"
        found[f"speedup_forward{suffix}"] = times[name][0] / forward
        found["speedup_vs_lean" if suffix else "speedup_forward_backward"] = times[name][1] / total
    return found


def peak_gib() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_gib() -> float:
    """Memory that it holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


# A row that stands for a peak is best run alone: the peak is the process's.
ROWS: dict[str, dict[str, Any]] = {
    "first": {"num_frames": 40, "memory_len": 10},
    "ce_only": {"num_frames": 40, "memory_len": 10, "frames": "last"},
    "questions": {"num_frames": 20, "memory_len": 10, "questions": 8, "against": ["reference"]},
    "long": {"num_frames": 100, "memory_len": 20},
    "twelve_forward": {
        "layers": 12,
        "num_frames": 100,
        "memory_len": 20,
        "backward": False,
        "against": ["reference"],
    },
    "twelve": {"layers": 12, "num_frames": 100, "memory_len": 20, "against": ()},  # the loop's graph is 50 GiB
    "twelve_30": {"layers": 12, "num_frames": 30, "memory_len": 20},  # as many frames as the loop's graph has room for
    "miniature_9": {"layers": 12, "num_frames": 9, "memory_len": 4, "scale": MINIATURE},
    "miniature_5": {"layers": 12, "num_frames": 5, "memory_len": 4, "scale": MINIATURE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=ROWS, help="this row alone")
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"max_abs_diff_fp64": largest_difference_fp64()}
    found |= row(**ROWS[options.only or "first"], repeats=options.repeats)
    for name in list(ROWS)[1:] if options.full else []:
        print(found, file=sys.stderr, flush=True)
        found[name] = row(**ROWS[name], repeats=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
