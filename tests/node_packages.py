"""npm packages that some tests need. pip cannot install them, so each has a folder of its own in the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def node_package(name: str) -> Path:
    """The folder whose node_modules holds this package; skips the test by name where it or node is absent.

    It is ``DIFF_LMM_<NAME>`` or ``~/.cache/diff-lmm/<name>``.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diff-lmm"
    folder = Path(os.environ.get(f"DIFF_LMM_{name.upper()}") or cache / name)
    if shutil.which("node") is None:
        pytest.skip(f"node is absent, so the npm package {name} cannot run")
    if not (folder / "node_modules" / name).is_dir():
        pytest.skip(f"the npm package {name} is absent: npm install --prefix {cache / name} {name}")
    return folder
