"""Pretrains the student's start on coarse questions through the frozen language model, as InstructBLIP's is.

The paper's student starts from InstructBLIP's Q-Former: it can look, and it can talk to the language model. So can this
one, about what captions mention (who, scene, weather, light, tint). It is never asked a fine question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.config import StudentConfig
from stages.data.lvu import lvu_prompt
from stages.data.msvd import PROMPT, clean_question
from stages.miniature.pictures import FIRST_HIDDEN_SEED
from stages.miniature.sayings import questions
from stages.miniature.videos import COARSE_TASKS, VideoSpec, labels, render, specs
from stages.train.student import INSTRUCTBLIP_PARTS, Student, build
from stages.types import Decoder, FrozenEncoder

FRAMES = 2  # of a video: enough to meet a memory bank


def coarse_questions(spec: VideoSpec) -> list[tuple[str, str]]:
    """(prompt, answer) of everything that captions mention."""
    known = labels(spec)
    asked = [(lvu_prompt(task, style), known[task]) for task in COARSE_TASKS for style in ("malmm", "paper")]
    return asked + [(PROMPT.format(clean_question(question)), answer) for _, question, answer in questions(spec)]


def _drawn_from(spec: VideoSpec) -> list[tuple[str, str]]:
    """Coarse questions, those about the other colour four times: asked no more than the rest, a coin is as good."""
    asked = coarse_questions(spec)
    return asked + [question for question in asked if " one?" in question[0]] * 3


def train_qformer(
    cfg: StudentConfig,
    encoder: FrozenEncoder,
    decoder: Decoder,
    *,
    steps: int,
    videos: int,
    batch: int = 32,
    log: Callable[[str], None] = print,
) -> Student:
    """The student after ``steps`` steps. PE is not trained: like InstructBLIP's it has none. Deterministic."""
    known = specs(videos, FIRST_HIDDEN_SEED + 41)
    features = torch.stack([_tokens(encoder, spec) for spec in known])  # [n, FRAMES, P, C]
    student = build(cfg, clip_width=features.shape[-1], llm_width=decoder.width)
    student.image_pe.weight.requires_grad_(False)
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    draw = random.Random(41)
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = [draw.randrange(videos) for _ in range(batch)]
        prompts, answers = zip(*(draw.choice(_drawn_from(known[row])) for row in rows), strict=True)
        prefix = student(features[rows], prompts).prefix
        nll, count = decoder.loss_sum(prefix, prompts, answers)
        optimizer.zero_grad(set_to_none=True)
        (nll / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        recent.append(float(nll.detach()) / count)
        if step % 100 == 99 or step == steps - 1:
            log(f"qformer {step + 1}/{steps} loss {sum(recent[-100:]) / len(recent[-100:]):.4f}")
    return student.eval().requires_grad_(False)


@torch.no_grad()
def coarse_accuracy(student: Student, encoder: FrozenEncoder, decoder: Decoder, *, videos: int = 200) -> float:
    """Share of coarse questions answered by the best beam, on videos that it was not trained on."""
    right = total = 0
    for spec in specs(videos, FIRST_HIDDEN_SEED + 42):
        prompts, answers = zip(*coarse_questions(spec), strict=True)
        features = _tokens(encoder, spec).expand(len(prompts), -1, -1, -1)
        beams = decoder.generate(student(features, prompts).prefix, prompts)
        right += sum(said[0] == answer for said, answer in zip(beams, answers, strict=True))
        total += len(answers)
    return right / total


def instructblip_tensors(student: Student) -> dict[str, Tensor]:
    """The trained parts under the names of an InstructBLIP checkpoint."""
    theirs = {ours: name for name, ours in INSTRUCTBLIP_PARTS.items()}
    found = {}
    for name, tensor in student.state_dict().items():
        ours = next((prefix for prefix in theirs if name.startswith(prefix)), None)
        if ours is not None:
            found[theirs[ours] + name[len(ours) :]] = tensor
    return found


def _tokens(encoder: FrozenEncoder, spec: VideoSpec) -> Float[Tensor, "T P C"]:
    draw = random.Random(f"frames {spec.video_id}")
    times = sorted(draw.uniform(0, spec.seconds - 0.25) for _ in range(FRAMES))
    return torch.from_numpy(np.asarray(encoder(render(spec, times))["tokens"], dtype=np.float32))
