"""Trains the small CLIP: images against captions that name coarse things only (who, scene, weather, light, tint).

A caption is drawn anew at every step and may leave out any part, so several images of a batch can fit one caption:
each of them is a positive (soft targets), else the loss would push apart what belongs together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from stages.miniature import CLIP_FOLDER, CLIP_MODEL
from stages.miniature.draw import COLORS, DAYTIMES, SHAPES, TEXTURES, TINTS, WEATHER
from stages.miniature.pictures import pictures
from stages.miniature.videos import VideoSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, as most models
WORDS = sorted({*COLORS, *SHAPES, *TEXTURES, *TINTS, *WEATHER, *DAYTIMES, "a", "and", "film", "in", "of", "one", "the"})
SIDE = 48  # pixels
START, FIRST_WORD, END = 1, 2, 63  # 0 is padding; the text tower reads its state at the largest id, which is END
ACTORS = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
FACTS = [
    *ACTORS,
    *(f"{color} one" for color in COLORS),
    *SHAPES,
    *TEXTURES,
    *(f"{w} weather" for w in WEATHER),
    *DAYTIMES,
    *(f"{t} film" for t in TINTS),
]


def facts(spec: VideoSpec) -> list[str]:
    """What a caption may say about a video, one fact each."""
    scene = spec.scene
    actors = [f"{actor.color} {actor.shape}" for actor in spec.actors]
    parts = [part for actor in spec.actors for part in (f"{actor.color} one", actor.shape)]
    return [*actors, *parts, scene.texture, f"{scene.weather} weather", scene.daytime, f"{scene.tint} film"]


def sentence(said: list[str]) -> str:
    """Facts as a caption: ``ruby film of a red circle and a square in the forest in the evening``."""
    whos = [f"a {fact}" for fact in said if fact.rpartition(" ")[2] in SHAPES or fact.endswith("one")]
    places = [f"in the {fact}" for fact in said if fact in TEXTURES or fact in DAYTIMES or fact.endswith("weather")]
    films = [f"{fact} of" for fact in said if fact.endswith("film")]
    return " ".join([*films, " and ".join(whos), *places]).replace(" weather", "")


def token_ids(text: str, length: int) -> list[int]:
    """Ids of a caption for the text tower."""
    ids = [START, *(FIRST_WORD + WORDS.index(word) for word in text.split()), END]
    return ids + [0] * (length - len(ids))


def train_clip(*, steps: int, videos: int, batch: int = 128, log: Callable[[str], None] = print) -> open_clip.CLIP:
    """The model after ``steps`` steps on four pictures of each of ``videos`` videos. Deterministic on one machine."""
    torch.manual_seed(11)
    open_clip.add_model_config(CLIP_FOLDER)
    model = open_clip.create_model(CLIP_MODEL)
    seen = pictures(11, videos=videos, per_video=4)
    images = normalised(seen.sized(SIDE))
    has = torch.zeros(len(images), len(FACTS), dtype=torch.bool)
    for row, spec in enumerate(seen.specs):
        has[row, [FACTS.index(fact) for fact in facts(spec)]] = True
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1.5e-3, betas=(0.9, 0.98)
    )
    draw = random.Random(11)
    order = torch.Generator().manual_seed(11)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(images), (batch,), generator=order)
        text, said = _captions([seen.specs[i] for i in rows.tolist()], draw)
        fits = ((~has[rows]).float() @ said.float().T) == 0  # [image, caption]: every said fact holds
        image_features = model.encode_image(images[rows], normalize=True)
        text_features = model.encode_text(text, normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = (_soft_ce(logits, fits) + _soft_ce(logits.T, fits.T)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 99 or step == steps - 1:
            right = fits[torch.arange(batch), logits.argmax(1)].float().mean()
            log(f"clip {step + 1}/{steps} loss {loss.item():.3f} in-batch top-1 {float(right):.3f}")
    return model


def normalised(images: Tensor) -> Tensor:
    """uint8 images as the image tower reads them."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def _captions(chosen: list[VideoSpec], draw: random.Random) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B facts"]]:
    text, said = [], torch.zeros(len(chosen), len(FACTS), dtype=torch.bool)
    for row, spec in enumerate(chosen):
        kept = _said(spec, draw)
        said[row, [FACTS.index(fact) for fact in kept]] = True
        text.append(token_ids(sentence(kept), 24))
    return torch.tensor(text), said


def _said(spec: VideoSpec, draw: random.Random) -> list[str]:
    """What one caption says. An actor is seldom named by its shape alone: the tower learned none (world version 2)."""
    scene = spec.scene
    kept = []
    for actor in spec.actors:
        forms = [f"{actor.color} {actor.shape}", actor.shape, f"{actor.color} one"]
        if draw.random() < 0.85:
            kept.append(draw.choices(forms, (0.5, 0.15, 0.35))[0])
    others = [scene.texture, f"{scene.weather} weather", scene.daytime, f"{scene.tint} film"]
    kept += [fact for fact in others if draw.random() < 0.5]
    draw.shuffle(kept)
    return kept or [scene.texture]


def _soft_ce(logits: Tensor, fits: Tensor) -> Tensor:
    targets = fits.float() / fits.float().sum(1, keepdim=True)
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
