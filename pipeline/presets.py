"""Complete configurations by name: the miniature that runs anywhere, and the paper's runs.

A preset says everything, so reading one is reading the run. Weights are names (hub ids, or folders on this machine)
with revisions; what cannot be loaded is named together with the command that fetches it. Costs are arithmetic, not
timings.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.overrides import DRAWN, nearest
from stages.config import (
    AlignConfig,
    ClipConfig,
    DataConfig,
    DecodeConfig,
    ExtractConfig,
    PipelineConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from stages.miniature import configs
from stages.urls import without_credentials

LVU_TASKS = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")  # Table 1, left to right
WORLD = DRAWN.rstrip("/")


@dataclass(frozen=True)
class Preset:
    """A configuration and the name of the cache that it shares with its relatives (same encoders, same videos)."""

    build: Callable[[], PipelineConfig]
    cache: str


def miniature() -> PipelineConfig:
    """The embedded default: a small world, and small frozen models that were trained on it (stages/miniature/CARD.md).

    It aims at no number of the paper; it shows real learning, on two cores. ``data.task`` is any of the world's tasks:
    scene, director, genre (coarse: captions mention them) · relationship, writer, way_speaking, year · spot, contact,
    axis, first (fine: no caption mentions them).

    Command: ``./run.sh``. Cost: nothing is downloaded.
    """
    return PipelineConfig(
        preset="miniature",
        data=DataConfig(
            name="clips",
            videos=f"{WORLD}/videos",
            annotations=f"{WORLD}/lvu",  # f"{WORLD}/msvd_qa" asks questions instead
            task="spot",
            fps=2.0,
            num_frames=9,  # a window of 5 s, its first to its last second
            history_s=5,
            stride_s=2,
        ),
        clip=configs.clip(),
        teacher=configs.teacher(),
        extract=ExtractConfig(batch_size=64, shard_frames=1024),
        student=configs.student(),
        train=TrainConfig(
            epochs=1000,
            max_steps=250,
            batch_size=16,
            lr=2e-3,
            warmup_steps=20,
            schedule="cosine_steps",
            drop_last=True,
            select="last",
        ),
        decode=configs.decode(),
    )


def lvu(task: str) -> PipelineConfig:
    """One task of LVU (Table 1): presets ``lvu-relationship``, ``lvu-way-speaking``, …

    Top-1 of the paper on the test windows, and of its base MA-LMM:

    ============  ================  =======
    task          Diff-LMM          MA-LMM
    ============  ================  =======
    relationship  69.2 (63/91)      58.2
    way_speaking  45.2 (214/473)    44.8
    scene         80.3 (175/218)    80.3
    director      71.6 (192/268)    74.6
    genre         63.2 (816/1291)   61.0
    writer        75.0 (324/432)    70.4
    year          48.96 (165/337)   51.9
    ============  ================  =======

    Command: ``PRESET=lvu-relationship ./run.sh``, or the four commands with ``--preset lvu-relationship``. Videos and
    MA-LMM's annotation files go to data/lvu/, or ``--set data.videos=DIR --set data.annotations=DIR``; frame folders
    (``frame%06d.jpg`` at 10 fps) with ``--set data.source=frame_folders``. The vision tower inside the InstructBLIP
    checkpoint is the other source of the same encoder:
    ``--set clip.source=instructblip --set clip.model=Salesforce/instructblip-vicuna-7b``.

    Cost of relationship: 228 videos, 28,080 frames, 20.3 GB of tokens and 0.13 GB of targets; 24 PFLOP of frozen
    encoders, once; 298 windows × 20 epochs × 49 TFLOP of student and LLM, forward and back = 290 PFLOP of training. All
    seven tasks share one cache: 8,198 videos, 1,052,940 frames, 762 GB.
    """
    return PipelineConfig(
        preset=f"lvu-{task.replace('_', '-')}",
        data=DataConfig(
            name="lvu",
            videos="data/lvu/videos",
            annotations="data/lvu/annotation",
            source="files",
            task=task,
            prompt_style="malmm",
            fps=10.0,
            num_frames=100,
            history_s=100,
            stride_s=20,
        ),
        clip=_paper_clip(),
        teacher=_paper_teacher(),
        extract=ExtractConfig(batch_size=64),
        student=_paper_student(memory_len=20, max_text_tokens=30),
        align=_paper_align(),
        train=_paper_train(lambda_kd=1.0, epochs=20, batch_size=64),
        decode=_paper_decode(max_new_tokens=4, length_penalty=1.0, max_prompt_tokens=30),
    )


def msvd_qa(reading: Literal["malmm", "literal"]) -> PipelineConfig:
    """MSVD-QA (Table 3): presets ``msvd-qa-malmm`` and ``msvd-qa-literal``.

    The paper reports 60.8 (MA-LMM: 60.6), a difference of 26 of 13,157 questions. Its §4.2 gives one block of numbers
    for both datasets, which is MA-LMM's script for LVU; MA-LMM's own script for MSVD-QA has others. ``literal`` takes
    §4.2 by the word (100 frames, bank 20, 20 epochs, batch 64); ``malmm`` is the likelier run (20 frames, bank 10,
    5 epochs, batch 128).

    Command: ``PRESET=msvd-qa-malmm ./run.sh``; videos and MA-LMM's qa_*.json go to data/msvd/.

    Cost of ``malmm``: 1,910 videos of at most 20 frames, 28 GB of tokens (``literal``: at most 138 GB); 30,933
    questions × 5 epochs × 6 TFLOP of student and LLM = 0.9 EFLOP of training.
    """
    literal = reading == "literal"
    return PipelineConfig(
        preset=f"msvd-qa-{reading}",
        data=DataConfig(
            name="msvd_qa",
            videos="data/msvd/videos",
            annotations="data/msvd/annotation",
            source="files",
            task="qa",
            fps=10.0,
            num_frames=100 if literal else 20,
            draws=1,
        ),
        clip=_paper_clip(),
        teacher=_paper_teacher(),
        extract=ExtractConfig(batch_size=64),
        student=_paper_student(memory_len=20 if literal else 10, max_text_tokens=128),
        align=_paper_align(),
        train=_paper_train(lambda_kd=0.0005, epochs=20 if literal else 5, batch_size=64 if literal else 128),
        decode=_paper_decode(max_new_tokens=9, length_penalty=0.0, max_prompt_tokens=128),
    )


def _paper_clip() -> ClipConfig:
    """EVA-CLIP g/14 without its last block, as in InstructBLIP (MA-LMM runs it in half precision)."""
    return ClipConfig(
        source="open_clip",
        model="EVA01-g-14",
        weights="laion400m_s11b_b41k",
        layer=39,
        geometry="squash",
        dtype="float16",
        compute_dtype="float16",
    )


def _paper_teacher() -> TeacherConfig:
    """§4.2: DiT-XL/2 at 256 × 256, eighth layer, timestep 0; the null class comes from the model's config."""
    return TeacherConfig(
        model="facebook/DiT-XL-2-256",
        layers=(8,),
        layer=8,
        grid=1,
        timestep=0,
        posterior="mode",
        geometry="squash",
        dtype="float32",
        compute_dtype="float32",
    )


def _paper_student(*, memory_len: int, max_text_tokens: int) -> StudentConfig:
    return StudentConfig(
        init="Salesforce/instructblip-vicuna-7b",
        num_queries=32,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        cross_attention_every=2,
        dropout=0.1,
        memory_len=memory_len,
        max_frames=120,
        max_text_tokens=max_text_tokens,
    )


def _paper_align() -> AlignConfig:
    return AlignConfig(levels=(8, 9, 10, 11, 12, 13), head="mlp", weights="adaptive", target_norm="none", frames="all")


def _paper_train(*, lambda_kd: float, epochs: int, batch_size: int) -> TrainConfig:
    """§4.2 for what it states; MA-LMM's scripts for schedule, warm-up, seed and the rest."""
    return TrainConfig(
        lambda_kd=lambda_kd,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=1,  # one window keeps the graphs of all its frames; a large GPU takes more
        lr=1e-4,
        min_lr=0.0,
        warmup_steps=1000,
        warmup_lr=1e-8,
        schedule="malmm",
        betas=(0.9, 0.999),
        weight_decay=0.05,
        drop_last=True,
        seed=42,
        select="best_val",
    )


def _paper_decode(*, max_new_tokens: int, length_penalty: float, max_prompt_tokens: int) -> DecodeConfig:
    return DecodeConfig(
        llm="lmsys/vicuna-7b-v1.1",
        dtype="float16",
        prompt_template="{prompt}",
        num_beams=5,
        num_return=5,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.5,
        length_penalty=length_penalty,
        end_cut_answers=True,
        max_prompt_tokens=max_prompt_tokens,
    )


PRESETS: dict[str, Preset] = {
    "miniature": Preset(miniature, "miniature"),
    **{f"lvu-{task.replace('_', '-')}": Preset(partial(lvu, task), "lvu") for task in LVU_TASKS},
    "msvd-qa-malmm": Preset(partial(msvd_qa, "malmm"), "msvd-qa"),
    "msvd-qa-literal": Preset(partial(msvd_qa, "literal"), "msvd-qa"),
}


def get(name: str) -> PipelineConfig:
    """The configuration of a preset. Raises ConfigError, naming the nearest ones."""
    if name not in PRESETS:
        known = nearest(name.replace("_", "-"), PRESETS) or list(PRESETS)
        raise ConfigError(f"no preset is called {name!r}; known: {', '.join(known)}\nTake it:  --preset {known[0]}")
    return PRESETS[name].build()


def default_cache(config: PipelineConfig) -> Path:
    """Where features go without ``--cache``: one folder per family of presets.

    Other videos than the preset's get a folder of their own, named after theirs: video ids of two collections may be
    equal, and the cache knows videos by id only.
    """
    if config.preset not in PRESETS:
        return Path("cache") / _slug(config.preset)
    preset = PRESETS[config.preset]
    if config.data.videos == preset.build().data.videos:
        return Path("cache") / preset.cache / "features"
    videos = without_credentials(config.data.videos)  # a signature lasts for hours, the folder for years
    place = videos if "://" in videos else os.path.abspath(videos)
    digest = hashlib.sha256(place.encode()).hexdigest()[:6]
    return Path("cache") / f"{_slug(Path(place).name)}-{digest}" / "features"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "videos"
