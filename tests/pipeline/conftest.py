"""What several files use: a small world with its cache, and a stand-in for pipeline.compose.

The stand-in is for tests of the command line alone; the stages are tested elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pipeline
from tests.conftest import PROJECT

EXTRACTED = {
    "videos": 7,
    "frames": 350,
    "failed": 0,
    "skipped": 0,
    "failures": [],
    "left_out": [],
    "length_differs": [],
    "hdr": {},
    "changed": [],
    "touched": 0,
    "seconds": 12.5,
}
EVALUATED = {
    "n": 91,
    "correct": 63,
    "top1": 63 / 91,
    "top5": 80 / 91,
    "majority": 42 / 91,
    "interval": [0.591, 0.778],
    "videos": 41,
    "seed": 42,
    "published_n": 91,
    "per_class": {"friend": {"n": 42, "correct": 38, "top1": 38 / 42, "top5": 1.0, "interval": [0.77, 0.96]}},
    "per_group": {"relationship": {"n": 91, "correct": 63, "top1": 63 / 91, "top5": 80 / 91, "majority": 42 / 91}},
}
TRAINED = {"steps": 80, "first_step": 0, "samples": 298, "seconds": 61.0, "loss_ce": 0.25}


QUIET: dict[str, Any] = {"device": "cpu", "dry_run": False, "progress": lambda *_: None}
SEEDED = (  # untrained models of the miniature's sizes: quicker to make, and nothing here is about accuracy
    *("clip.weights=seed:0", "teacher.weights=seed:0", "student.init=seed:0"),
    *("decode.llm=seed:0", f"decode.llm_config={PROJECT}/stages/miniature/llm"),
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen drawn videos with the annotations of every task."""
    from stages.miniature.world import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder, videos=18, seed=3)
    return folder


@pytest.fixture(scope="session")
def seeded(world: Path) -> list[str]:
    """Settings of the miniature on that world with untrained models; the students have four blocks: levels 1 to 5."""
    return [
        *(f"data.videos={world}/videos", f"data.annotations={world}/lvu", *SEEDED),
        *("student.num_layers=4", "align.levels=3-5", "train.max_samples=8", "train.batch_size=4"),
    ]


@pytest.fixture(scope="session")
def seeded_cache(seeded: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of both encoders, for the settings of ``seeded``."""
    from pipeline import compose, presets
    from pipeline.overrides import apply

    path = tmp_path_factory.mktemp("cache") / "features"
    options = {"workers": 0, "retry_failed": False, "splits": [], **QUIET}
    config = apply(presets.miniature(), seeded)
    assert compose.extract(config, which="both", cache=path, **options)["failed"] == 0
    return path


def options_of(sets: list[str]) -> list[str]:
    """``--set`` before each."""
    return [word for item in sets for word in ("--set", item)]


class Composed:
    """Records the calls of the commands and answers with ``returns``, or raises it where it is an exception."""

    def __init__(self, returns: dict[str, Any]) -> None:
        self.returns, self.calls = returns, list[tuple[str, tuple[Any, ...], dict[str, Any]]]()

    def function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.returns[name]
            if isinstance(answer, BaseException):
                raise answer
            return answer(*args, **kwargs) if callable(answer) else answer

        return call


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Composed:
    """Installs the stand-in; change ``composed.returns`` to say what a stage does."""
    stand_in = Composed({"extract": EXTRACTED, "train": TRAINED, "evaluate": EVALUATED})
    module = ModuleType("pipeline.compose")
    for name in stand_in.returns:
        setattr(module, name, stand_in.function(name))
    monkeypatch.setitem(sys.modules, "pipeline.compose", module)
    monkeypatch.setattr(pipeline, "compose", module, raising=False)
    return stand_in
