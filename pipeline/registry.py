"""The parts that a configuration names, as import strings: adding one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pipeline.errors import ConfigError
from pipeline.overrides import nearest

ENCODERS = {  # clip.source
    "open_clip": "stages.extract.clip:build",
    "instructblip": "stages.extract.clip:build",
}
TEACHERS = {
    "dit": "stages.extract.dit:build",
}
DATASETS = {  # data.name
    "lvu": "stages.data.lvu:LvuDataset",
    "msvd_qa": "stages.data.msvd:MsvdQaDataset",
    "clips": "stages.data.clips:ClipsDataset",
}
STUDENTS = {
    "malmm": "stages.train.student:build",
    "no_memory": "stages.train.variants:no_memory",
    "per_frame": "stages.train.variants:per_frame",
}
DECODERS = {
    "causal_lm": "stages.decode.llm:build",
}
PROBES = {  # what `baselines` fits; those named teacher_… read the teacher's features
    "majority": "stages.train.probes:majority",
    "clip_mean": "stages.train.probes:clip_mean",
    "clip_frames": "stages.train.probes:clip_frames",
    "clip_last": "stages.train.probes:clip_last",
    "clip_flat": "stages.train.probes:clip_flat",
    "clip_attentive": "stages.train.probes:clip_attentive",
    "teacher_mean": "stages.train.probes:teacher_mean",
    "teacher_frames": "stages.train.probes:teacher_frames",
    "teacher_attentive": "stages.train.probes:teacher_attentive",
}
KINDS = {
    "encoder": ENCODERS,
    "teacher": TEACHERS,
    "dataset": DATASETS,
    "student": STUDENTS,
    "decoder": DECODERS,
    "probe": PROBES,
}


def import_string(kind: str, name: str) -> str:
    """What is registered as ``name`` among ``kind`` (a key of KINDS); imports nothing.

    Raises:
        ConfigError: nothing is registered under that name; the nearest names are listed.
    """
    parts = KINDS[kind]
    if name not in parts:
        known = nearest(name, parts) or sorted(parts)
        raise ConfigError(f"no {kind} is called {name!r}; known: {', '.join(known)}")
    return parts[name]


def load(kind: str, name: str) -> Any:
    """The callable that is registered under a name; imports its module. Raises what ``import_string`` raises."""
    module, _, attribute = import_string(kind, name).partition(":")
    return getattr(import_module(module), attribute)
