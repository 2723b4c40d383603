"""A stand-in for pipeline.compose: the command line is tested here, the stages elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import pipeline

EXTRACTED = {
    "videos": 7,
    "frames": 350,
    "failed": 0,
    "skipped": 0,
    "failures": [],
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
