"""Fixtures that several rooms use."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: idle OpenMP threads sleep instead of spinning, which on shared cores is ten times cheaper.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the sizes here are small, and two test processes share the cores

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The team's real clips, hostile files and annotation files; outside this repository, so they may be absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared data is absent")
    return folder
