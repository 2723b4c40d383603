"""Baseline students without memory banks, under the same settings, weights and alignment as the ordinary one.

Every frame goes through the Q-Former on its own; with one frame, and PE, both are the ordinary student.

``no_memory``: the language model reads the last frame's Q tokens. What the banks bring, at the same prefix.
``per_frame``: it reads the Q tokens of every frame, T · Q in all. This is what MA-LMM does with
``memory_bank_length=0``, where it adds no PE(t) either (D96: ``student.per_frame_pe``), and the shape of Video-LLaMA's
image branch before its temporal pooling. Long videos may not fit into the language model's positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from stages.config import StudentConfig
from stages.train.memory import MemoryBank
from stages.train.noise import Noise
from stages.train.student import Frames, Student, build, num_aligned_frames
from stages.types import StudentOutput


class LastFrame(Student):
    """Frames on their own; the prefix is that of the last one."""

    reads_every_frame: ClassVar[bool] = False

    @property
    def adds_pe(self) -> bool:
        """Whether PE(t) is added to frame t."""
        return True

    def forward(
        self,
        f: Float[Tensor, "V T P C"],
        prompts: Sequence[str],
        *,
        levels: Iterable[int] = (),
        frames: Frames = "last",
        windows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        names: Sequence[Hashable] | None = None,  # noqa: ARG002  # there is no bank to plan
    ) -> StudentOutput:
        """As ``Student.forward``, with frames as part of the batch; only frames that somebody wants are run.

        Raises:
            ValueError: also for windows of different lengths.
        """
        if lengths is not None and any(n != f.shape[1] for n in lengths):
            raise ValueError(f"a student without banks wants windows of one length in a batch, got {list(lengths)}")
        levels = tuple(levels)
        f = f if windows is None else f[list(windows)]
        num_frames, queries = f.shape[1], self.cfg.num_queries
        self.check(num_frames, levels)
        aligned = num_aligned_frames(frames, num_frames)
        run = num_frames if self.reads_every_frame else aligned
        first = num_frames - run
        text_ids, text_keep = (part.repeat_interleave(run, dim=0) for part in self.tokenize(prompts))
        visual = self.look(f[:, first:].to(self.query_tokens.device, self.ln_vision.weight.dtype))
        if self.adds_pe:
            visual = visual + self.image_pe.weight[first:num_frames, None]  # [B, run, P, C]
        hidden, _ = self.qformer.step(
            self.query_tokens.expand(len(text_ids), -1, -1),
            text_ids,
            text_keep,
            visual.flatten(0, 1),
            MemoryBank.empty(1),
            self.qformer.empty_banks(1),
            noise=Noise.draw(len(text_ids), self.cfg.dropout) if self.training and self.cfg.dropout else None,
        )
        states = {u: hidden[u - 1][:, :queries].unflatten(0, (len(f), run)) for u in (*levels, len(hidden))}
        last = states[len(hidden)]  # [B, run, Q, E]
        prefix = self.llm_proj(last.flatten(1, 2) if self.reads_every_frame else last[:, -1])
        return StudentOutput(prefix, {u: states[u][:, -aligned:] for u in levels})


class EveryFrame(LastFrame):
    """Frames on their own; the prefix is all of theirs, in order."""

    reads_every_frame = True

    def __init__(self, cfg: StudentConfig, tokenizer: Any, *, clip_width: int, llm_width: int) -> None:
        super().__init__(cfg, tokenizer, clip_width=clip_width, llm_width=llm_width)
        self.image_pe.requires_grad_(self.image_pe.weight.requires_grad and self.adds_pe)

    @property
    def adds_pe(self) -> bool:
        """As ``student.per_frame_pe`` says."""
        return self.cfg.per_frame_pe


no_memory = partial(build, kind=LastFrame)
per_frame = partial(build, kind=EveryFrame)
