"""A small real world of videos, and jobs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import presets
from pipeline.overrides import apply
from stages.config import PipelineConfig
from stages.extract.run import Job
from stages.miniature.world import write_world
from tests.extract import tiny

BUILDERS = {"clip": "stages.extract.clip:build", "teacher": "stages.extract.dit:build"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn videos with their annotations."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, videos=8, seed=1)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local hub cache, and no network."""
    return tiny.empty_hub(tmp_path, monkeypatch)


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """A job of the miniature preset on a folder of videos, with small shards; settings may be replaced."""

    def make(videos: Path, cache: Path, *sets: str, which: str = "clip") -> Job:
        config: PipelineConfig = apply(
            presets.miniature(),
            ["data.name=clips", f"data.videos={videos}", "data.annotations=", "extract.shard_frames=16", *sets],
        )
        names = ("clip", "teacher") if which == "both" else (which,)
        return Job(config, tuple(BUILDERS[name] for name in names), cache, "cpu")

    return make


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path`` with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def wanted(videos: Path, frames: int = 5) -> dict[str, Any]:
    """The first grid frames of every video in a folder."""
    import numpy as np

    return {file.stem: np.arange(frames) * 2 for file in sorted(videos.iterdir())}
