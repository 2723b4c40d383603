"""The trainable student: ln_vision, PE(t), Q-Former with memory banks, llm_proj (§3.1; MA-LMM).

Two evaluations give equal results (``student.evaluation``, D38): ``reference`` runs one frame after another, as the paper
describes it, and ``parallel`` runs layer by layer over all frames.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stages import weights
from stages.config import StudentConfig
from stages.train import parallel
from stages.train.memory import MemoryBank
from stages.train.qformer import QFormer, init_like_bert
from stages.types import StudentOutput

LN_VISION_EPS = 1e-5  # LAVIS; the vision tower inside InstructBLIP uses 1e-6 for the same tensor

# Where the parts of an InstructBLIP checkpoint go: its prefix -> ours.
INSTRUCTBLIP_PARTS = {
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
    "language_projection.": "llm_proj.",
    "vision_model.post_layernorm.": "ln_vision.",
}

TIED_TO_OTHER_WIDTHS = re.compile(r"llm_proj\.|ln_vision\.|.*\.crossattention\.attention\.(key|value)\.weight")

Frames = Literal["all", "last"] | int


def num_aligned_frames(frames: Frames, num_frames: int) -> int:
    """How many of the last frames an ``align.frames`` setting means (D9)."""
    if frames == "all":
        return num_frames
    return min(1 if frames == "last" else frames, num_frames)


class Student(nn.Module):
    """CLIP tokens of T frames and an instruction in, Q visual tokens for the language model out.

    Args:
        cfg: sizes and switches.
        tokenizer: BERT tokenizer of the instruction.
        clip_width: C.
        llm_width: V.
    """

    def __init__(self, cfg: StudentConfig, tokenizer: Any, *, clip_width: int, llm_width: int) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.ln_vision = nn.LayerNorm(clip_width, eps=LN_VISION_EPS)
        self.image_pe = nn.Embedding(cfg.max_frames, clip_width)
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.num_queries, cfg.hidden_size))
        self.qformer = QFormer(
            vocab_size=len(tokenizer),
            hidden_size=cfg.hidden_size,
            num_layers=cfg.num_layers,
            num_heads=cfg.num_heads,
            intermediate_size=cfg.intermediate_size,
            frame_size=clip_width,
            cross_attention_every=cfg.cross_attention_every,
            dropout=cfg.dropout,
        )
        self.llm_proj = nn.Linear(cfg.hidden_size, llm_width)
        self.image_pe.weight.requires_grad_(cfg.pe == "learned")
        self.ln_vision.requires_grad_(cfg.train_ln_vision)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Instruction ids [CLS] … [SEP], padded to the longest, and True where they are not padding."""
        encoded = self.tokenizer(
            list(prompts), padding="longest", truncation=True, max_length=self.cfg.max_text_tokens, return_tensors="pt"
        )
        device = self.query_tokens.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].bool().to(device)

    def frame_features(self, tokens: Float[Tensor, "B P C"], t: int) -> Float[Tensor, "B P C"]:
        """f_t = ln_vision(s_t) + PE(t) (Eq. 1), in float32 whatever the cache holds."""
        tokens = tokens.to(device=self.query_tokens.device, dtype=self.ln_vision.weight.dtype)
        out: Tensor = self.ln_vision(tokens) + self.image_pe.weight[t]
        return out

    def check(self, num_frames: int, levels: Sequence[int]) -> None:
        """Raise ValueError for more frames than PE has rows, or a level that does not exist."""
        if num_frames > self.cfg.max_frames:
            raise ValueError(f"{num_frames} frames, but student.max_frames is {self.cfg.max_frames}; raise it")
        if any(u > self.cfg.num_layers + 1 for u in levels):
            raise ValueError(f"align.levels {tuple(levels)}: this student has levels 1 to {self.cfg.num_layers + 1}")

    def forward(
        self,
        f: Float[Tensor, "B T P C"],
        prompts: Sequence[str],
        *,
        levels: Iterable[int] = (),
        frames: Frames = "last",
    ) -> StudentOutput:
        """Run the frames in order and read the last one's queries.

        Args:
            f: CLIP tokens as cached, before ln_vision. T may differ from call to call, up to ``max_frames``.
            prompts: one instruction per sample.
            levels: 1-based levels whose query states are wanted (13 = last block).
            frames: at which frames they are wanted: all, last, or the last k. Earlier frames are run without a graph:
                the banks are detached, so nothing could flow back from them.

        Raises:
            ValueError: more frames than PE has rows, or a level that does not exist.
        """
        num_frames = f.shape[1]
        levels = tuple(levels)
        self.check(num_frames, levels)
        first_wanted = num_frames - num_aligned_frames(frames, num_frames)
        text_ids, text_keep = self.tokenize(prompts)
        evaluate = self._parallel if self.cfg.evaluation == "parallel" else self._sequential
        last, hidden = evaluate(f, text_ids, text_keep, levels, first_wanted)
        return StudentOutput(self.llm_proj(last), hidden)

    def _parallel(
        self,
        f: Float[Tensor, "B T P C"],
        text_ids: Int[Tensor, "B L"],
        text_keep: Bool[Tensor, "B L"],
        levels: Sequence[int],
        first_wanted: int,
    ) -> tuple[Float[Tensor, "B Q E"], dict[int, Float[Tensor, "B F Q E"]]]:
        """All frames at once. Query states of the last level at the last frame, and those that are wanted."""
        f = f.transpose(0, 1).to(device=self.query_tokens.device, dtype=self.ln_vision.weight.dtype)
        frames = self.ln_vision(f) + self.image_pe.weight[: len(f), None, None]  # [T, B, P, C]
        queries = self.query_tokens.expand(len(text_ids), -1, -1)
        hidden = parallel.hidden_states(
            self.qformer, frames, queries, text_ids, text_keep, max_len=self.cfg.memory_len
        )
        return hidden[-1][-1], {u: hidden[u - 1][first_wanted:].transpose(0, 1) for u in levels}

    def _sequential(
        self,
        f: Float[Tensor, "B T P C"],
        text_ids: Int[Tensor, "B L"],
        text_keep: Bool[Tensor, "B L"],
        levels: Sequence[int],
        first_wanted: int,
    ) -> tuple[Float[Tensor, "B Q E"], dict[int, Float[Tensor, "B F Q E"]]]:
        """One frame after another. Frames before the first wanted one are run without a graph: the banks are detached,
        so nothing could flow back from them.
        """
        queries = self.query_tokens.expand(len(f), -1, -1)
        visual, banks = MemoryBank.empty(self.cfg.memory_len), self.qformer.empty_banks(self.cfg.memory_len)
        kept: dict[int, list[Tensor]] = {u: [] for u in levels}
        for t in range(f.shape[1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= first_wanted):
                f_t = self.frame_features(f[:, t], t)
                hidden, banks = self.qformer.step(queries, text_ids, text_keep, visual.followed_by(f_t), banks)
                visual = visual.append(f_t)
            if t >= first_wanted:
                for u in levels:
                    kept[u].append(hidden[u - 1][:, : self.cfg.num_queries])
        last = hidden[-1][:, : self.cfg.num_queries]
        return last, {u: torch.stack(states, dim=1) for u, states in kept.items()}


def load_tokenizer(cfg: StudentConfig) -> Any:
    """The instruction tokenizer: ``student.tokenizer``, or ``qformer_tokenizer/`` of the InstructBLIP checkpoint."""
    from transformers import AutoTokenizer

    if cfg.tokenizer:
        folder = weights.resolve(cfg.tokenizer, cfg.revision, patterns=["tokenizer*"])
    elif weights.parse_seed(cfg.init) is not None:
        raise ValueError("student.init is a seed, so student.tokenizer must name a folder with a BERT tokenizer")
    else:
        folder = weights.resolve(cfg.init, cfg.revision, patterns=["qformer_tokenizer/*"]) / "qformer_tokenizer"
    return AutoTokenizer.from_pretrained(folder)


def build(cfg: StudentConfig, *, clip_width: int, llm_width: int, kind: type[Student] = Student) -> Student:
    """A student with seeded weights, or with those of an InstructBLIP checkpoint (D19).

    ``kind`` is the class to make: all have the same parameters and start from the same values.

    Raises:
        ValueError: settings that do not fit together.
        stages.weights.WeightsMissing: the checkpoint is not here; names the command that fetches it.
    """
    student = kind(cfg, load_tokenizer(cfg), clip_width=clip_width, llm_width=llm_width)
    seed = weights.parse_seed(cfg.init)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    init_like_bert(student.qformer, generator, cfg.hidden_size)
    init_like_bert(student.llm_proj, generator, cfg.hidden_size)
    student.query_tokens.data.normal_(0.0, 0.02 * (768 / cfg.hidden_size) ** 0.5, generator=generator)
    nn.init.zeros_(student.image_pe.weight)  # MA-LMM: PE starts at zero
    if seed is None:
        load_instructblip(student, weights.resolve_weights(cfg.init, cfg.revision, prefixes=tuple(INSTRUCTBLIP_PARTS)))
    return student


def load_instructblip(student: Student, folder: Path) -> None:
    """Q-Former, query tokens, ln_vision and llm_proj of an InstructBLIP checkpoint into ``student``, in place.

    Only the tensors under those prefixes are read. Parts that meet another width here (C of another CLIP, V of another
    language model) keep their seeded start, with a warning that names them; anything else that does not fit is an
    error.

    Raises:
        ValueError: a tensor is missing or has a wrong shape.
    """
    tensors = weights.read_tensors(folder, tuple(INSTRUCTBLIP_PARTS))
    ours = student.state_dict()
    loaded: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next(p for p in INSTRUCTBLIP_PARTS if key.startswith(p))
        loaded[INSTRUCTBLIP_PARTS[prefix] + key[len(prefix) :]] = tensor
    wanted = set(ours) - {"image_pe.weight"}  # not in InstructBLIP; starts at zero
    missing, unexpected = sorted(wanted - set(loaded)), sorted(set(loaded) - wanted)
    if missing or unexpected:
        raise ValueError(f"{folder}: not the Q-Former that student.* describes; missing {missing}, extra {unexpected}")
    kept_seeded = []
    for key, tensor in loaded.items():
        if tensor.shape == ours[key].shape:
            ours[key].copy_(tensor)
        elif TIED_TO_OTHER_WIDTHS.match(key):
            kept_seeded.append(f"{key} {tuple(tensor.shape)} -> {tuple(ours[key].shape)}")
        else:
            raise ValueError(f"{folder}: {key} is {tuple(tensor.shape)}, student.* wants {tuple(ours[key].shape)}")
    if kept_seeded:
        warnings.warn(
            "these parts of the checkpoint have another width than your CLIP or LLM and start from random weights "
            "instead: " + "; ".join(kept_seeded),
            stacklevel=2,
        )
