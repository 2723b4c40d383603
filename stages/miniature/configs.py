"""Settings of the small models: what the preset ``miniature`` runs, and what the frozen ones are trained in."""

from __future__ import annotations

from stages.config import ClipConfig, DecodeConfig, StudentConfig, TeacherConfig
from stages.miniature import CLIP_MODEL


def clip() -> ClipConfig:
    """37 tokens of width 96 a frame, one block before the end."""
    return ClipConfig(model=CLIP_MODEL, weights="miniature:clip", layer=5)


def teacher() -> TeacherConfig:
    """The eighth of twelve blocks, clean latents, timestep 0, null class: §4.2 in a small size."""
    return TeacherConfig(model="miniature:dit", layers=(8,), layer=8)


def student() -> StudentConfig:
    """The paper's twelve blocks and thirteen levels; a bank of four for nine frames."""
    return StudentConfig(
        init="miniature:qformer",
        tokenizer="miniature:qformer_tokenizer",
        num_queries=8,
        hidden_size=64,
        num_layers=12,
        num_heads=4,
        intermediate_size=128,
        cross_attention_every=2,
        dropout=0.0,
        memory_len=4,
        max_frames=16,
        spatial_std=1.0,
    )


def decode() -> DecodeConfig:
    """Every answer of the small world is one token and the end of sequence."""
    return DecodeConfig(llm="miniature:llm", max_new_tokens=2, batch_size=128)
