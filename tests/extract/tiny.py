"""What the tests of both encoders share: small pictures, an empty hub cache, a hostile object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image


def frames(count: int = 3, height: int = 30, width: int = 45, seed: int = 0) -> np.ndarray:
    """Smooth random pictures: uint8 [count, height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    rows = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in noise]
    return np.stack([np.asarray(row) for row in rows])


def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a fixture: an empty local hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repository: str) -> Path:
    """The snapshot folder of a repository in the local hub cache, made as the hub's client makes it."""
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


class Touch:
    """What a hostile checkpoint does on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)
