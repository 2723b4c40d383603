"""How much memory a training step takes, before it is taken.

The formula counts what the parallel evaluation keeps for its backward pass, plus the working set of the largest layer;
tests/train/test_budget.py holds it to measured peaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stages.train.student import Student

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """One question: frames of its window, how many of them have a graph, tokens a frame, their width, text tokens."""

    num_frames: int
    wanted: int
    tokens: int
    width: int
    text: int


def parse_bytes(text: str) -> int:
    """``20GB``, ``500 MB``, ``8GiB`` as bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"train.memory is an amount such as 20GB or 8GiB; got {text!r}")
    number, prefix, binary = float(match[1]), match[2].upper(), match[3]
    base = UNITS[prefix] if not binary else 1024 ** list(UNITS).index(prefix)
    return int(number * base)


def fixed_bytes(student: Student) -> int:
    """Weights, and for what is trained gradients and both moments of AdamW."""
    parameters = list(student.parameters())
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parameters)


def peak_bytes(student: Student, shape: Shape, *, questions: int, windows: int) -> int:
    """Peak of a forward and backward pass of that many questions about that many windows, each as large as ``shape``.

    Frames, their keys and values belong to a window; queries, text and feed-forward networks to a question. Weights and
    their optimiser state are ``fixed_bytes``.
    """
    cfg, steps = student.cfg, shape.wanted if student.cfg.bank_detach else shape.num_frames
    n = cfg.num_queries + shape.text
    crossing = -(-cfg.num_layers // cfg.cross_attention_every)
    slots = min(shape.num_frames, cfg.memory_len + 1)
    # Attention: queries, keys, values, output twice, the sum before and the states after the norm; feed-forward: what
    # goes into the GELU, the sum before and the states after the norm, and queries and text together again.
    # Dropout keeps its mask of what each of the two adds: a seventh of the layer at the paper's widths.
    dropped = int(cfg.dropout > 0)
    layer = n * ((10 + 2 * dropped) * cfg.hidden_size + cfg.intermediate_size)
    layers_kept = 1 if cfg.recompute_layers else crossing
    question = steps * (n * cfg.hidden_size if cfg.recompute_layers else layer) * cfg.num_layers
    question += steps * (6 + dropped) * cfg.num_queries * cfg.hidden_size * layers_kept
    question += steps * dropped * n * cfg.hidden_size  # of the embeddings: the mask and what it leaves
    window = steps * 2 * shape.tokens * cfg.hidden_size * layers_kept
    window += shape.num_frames * shape.tokens * shape.width * 3 + steps * shape.tokens * shape.width
    merges = max(0, shape.num_frames - 1 - cfg.memory_len)
    # Gradients of keys and values by row, at their own step, joined for two products; buffers of values and gradients:
    # of one attention at a time, to the frames or to the bank of queries.
    rows = max(windows * shape.tokens, questions * n)
    working = rows * 2 * cfg.hidden_size * (shape.num_frames + merges + 3 * steps + 4 * slots)
    # New gradients of a layer lie beside the sums that they are added to.
    layer_gradients = sum(p.numel() for p in next(iter(student.qformer.layers)).parameters())
    total: int = FLOAT * (questions * question + windows * window + working + layer_gradients)
    return total


@dataclass(frozen=True)
class Room:
    """A budget in bytes for one student.

    Raises:
        ValueError: not even one question fits; says what would.
    """

    student: Student
    shape: Shape
    budget: int

    def __post_init__(self) -> None:
        if not self.fits(1, 1):
            least = fixed_bytes(self.student) + peak_bytes(self.student, self.shape, questions=1, windows=1)
            raise ValueError(
                f"train.memory {self.budget / 1e9:.1f} GB is too small: one sample takes {least / 1e9:.1f} GB.\n"
                f"Give more, or:  --set student.recompute_layers=true  or  --set align.frames=last"
            )

    def fits(self, questions: int, windows: int) -> bool:
        """Whether that many questions about that many windows can run together."""
        step = peak_bytes(self.student, self.shape, questions=questions, windows=windows)
        return fixed_bytes(self.student) + step <= self.budget
