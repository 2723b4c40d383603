"""How fast the parallel student is against the sequential one, in CPU seconds of this process on one thread.

    python -m tests.bench.bench_student --json          # the first row: 2 layers, T=40, K=10
    python -m tests.bench.bench_student --json --full    # every row that fits this machine (about an hour)

Widths are the paper's (768, 12 heads, 257 × 1408 tokens a frame, 32 queries and 10 text tokens). Both sides run in this
process, in turn, after one warm-up each; a figure is the median. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
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


def make(*, layers: int, memory_len: int, dtype: torch.dtype = torch.float32, small: bool = False) -> Student:
    """A seeded student of the paper's widths, or of tiny ones."""
    sizes = {"hidden_size": 24, "num_heads": 3, "intermediate_size": 40, "num_queries": 5} if small else {}
    cfg = StudentConfig(init="seed:0", num_layers=layers, memory_len=memory_len, dropout=0.0, **sizes)
    student = Student(cfg, _Words(), clip_width=20 if small else CLIP_WIDTH, llm_width=32)
    generator = torch.Generator().manual_seed(0)
    init_like_bert(student.qformer, generator, cfg.hidden_size)
    for parameter in (student.query_tokens, student.image_pe.weight, student.llm_proj.weight):
        parameter.data.normal_(0, 0.02, generator=generator)
    ids = torch.arange(1, TEXT + 1)

    def tokenize(prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return ids.expand(len(prompts), -1), torch.ones(len(prompts), TEXT, dtype=torch.bool)

    student.tokenize = tokenize  # type: ignore[method-assign, assignment]
    return student.to(dtype)


def clip_tokens(num_frames: int, *, dtype: torch.dtype = torch.float32, small: bool = False) -> torch.Tensor:
    """AR(1) features: neighbouring frames are alike, as in a video."""
    shape = (1, num_frames, 7, 20) if small else (1, num_frames, TOKENS, CLIP_WIDTH)
    f = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for t in range(1, num_frames):
        f[:, t] = 0.9 * f[:, t - 1] + 0.4359 * f[:, t]
    return f


def run(
    student: Student, evaluation: str, f: torch.Tensor, *, backward: bool, frames: str = "all", questions: int = 1
) -> dict[str, torch.Tensor]:
    """One evaluation. Sequential ones take the questions one by one, as MA-LMM does."""
    student.cfg = student.cfg.model_copy(update={"evaluation": evaluation})
    student.zero_grad()
    levels = tuple(range(2, student.cfg.num_layers + 2)) if frames == "all" else ()
    parts = [questions] if evaluation == "parallel" else [1] * questions
    values = {}
    for size in parts:
        with torch.set_grad_enabled(backward):
            out = student(f, ["q"] * size, levels=levels, frames=frames, windows=[0] * size)
            if backward:
                loss = out.prefix.square().sum() + sum(h.square().sum() for h in out.hidden.values())
                loss.backward()
        values = {"prefix": out.prefix.detach(), **{str(u): h.detach() for u, h in out.hidden.items()}}
    if backward:
        values |= {f"grad {n}": p.grad for n, p in student.named_parameters() if p.grad is not None}
    return values


def timed(action: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def medians(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Every action once to warm up, then in turn."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(timed(action))
    return {name: statistics.median(values) for name, values in times.items()}


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
    seconds = medians({"gemm": lambda: (x @ w, y @ v)}, 3)["gemm"]
    return both / seconds


def largest_difference_fp64() -> float:
    """Outputs and gradients of a small student, relative to each tensor's largest entry or 1e-3 of all."""
    student, f = (
        make(layers=4, memory_len=4, dtype=torch.float64, small=True),
        clip_tokens(13, dtype=torch.float64, small=True),
    )
    want, got = (run(student, evaluation, f, backward=True) for evaluation in ("reference", "parallel"))
    largest = max(float(g.abs().max()) for n, g in want.items() if n.startswith("grad"))
    return max(
        float((got[n] - w).abs().max()) / max(float(w.abs().max()), 1e-3 * largest if n.startswith("grad") else 0.0)
        for n, w in want.items()
    )


def row(*, layers: int, num_frames: int, memory_len: int, repeats: int, lean: bool = True) -> dict[str, float]:
    """One line of the table."""
    student, f = make(layers=layers, memory_len=memory_len), clip_tokens(num_frames)
    names = ["parallel", "reference", *(["lean"] if lean else [])]
    forward = medians({n: lambda n=n: run(student, n, f, backward=False) for n in names}, repeats)
    both = medians({n: lambda n=n: run(student, n, f, backward=True) for n in names}, repeats)
    sizes = {"layers": layers, "num_frames": num_frames, "memory_len": memory_len}
    once, often = (flops(projected_once=p, **sizes) for p in (True, False))
    found = {
        "seconds_forward": forward["parallel"],
        "seconds_forward_backward": both["parallel"],
        "speedup_forward": forward["reference"] / forward["parallel"],
        "speedup_forward_backward": both["reference"] / both["parallel"],
        "flops_ratio": often / once,
        "gemm_efficiency": once / forward["parallel"] / gemm_rate(num_frames),
    }
    if lean:
        found["speedup_forward_vs_lean"] = forward["lean"] / forward["parallel"]
        found["speedup_vs_lean"] = both["lean"] / both["parallel"]
    return found


def ratio(*, num_frames: int, memory_len: int, frames: str, questions: int, repeats: int) -> float:
    """Forward and backward, 2 layers, sequential over parallel."""
    student, f = make(layers=2, memory_len=memory_len), clip_tokens(num_frames)
    options = {"backward": True, "frames": frames, "questions": questions}
    times = medians({n: lambda n=n: run(student, n, f, **options) for n in ("parallel", "reference")}, repeats)
    return times["reference"] / times["parallel"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"max_abs_diff_fp64": largest_difference_fp64()}
    student, f = make(layers=2, memory_len=10), clip_tokens(40)
    run(student, "parallel", f, backward=True)
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the sequential form has run
    print(found, file=sys.stderr, flush=True)
    found |= row(layers=2, num_frames=40, memory_len=10, repeats=options.repeats)
    if options.full:
        print(found, file=sys.stderr, flush=True)
        found["t20_8_questions"] = ratio(num_frames=20, memory_len=10, frames="all", questions=8, repeats=1)
        found["t40_ce_only"] = ratio(num_frames=40, memory_len=10, frames="last", questions=1, repeats=1)
        print(found, file=sys.stderr, flush=True)
        found["t100_2_layers"] = row(layers=2, num_frames=100, memory_len=20, repeats=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
