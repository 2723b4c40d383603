"""What the files of a run folder must look like before a page is made from them.

A run folder may be damaged, half-written, or made by another version; a page is made from many. So each file is checked
whole when it is read, and nothing behind this module needs to ask whether a number is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from pipeline.diagnose import FORMAT
from pipeline.printing import in_one_line

DAMAGED = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading such a file may raise; the folder is a stranger's."""

LIMIT = 1e30
Number = Annotated[float, Field(allow_inf_nan=False, ge=-LIMIT, le=LIMIT)]
Count = Annotated[int, Field(ge=0, le=10**15)]
LevelName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}$")]
Row = list[Number | None]  # null stands for NaN


class _File(BaseModel):
    """Strict: a number written as text is damage. Keys that the page does not need may be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Levels(_File):
    constant: Number | None
    similarity: Number | None
    cka: list[Row]
    cka_teacher: Row
    cosine: dict[LevelName, Number | None]
    centred: dict[LevelName, Number | None] = {}
    weight: dict[LevelName, Number | None] = {}
    saturated: dict[LevelName, Number | None] = {}


class _Sample(_File):
    cosine: dict[LevelName, Row] = {}
    attention: list[Number] = []
    slots: list[list[Number]] = []


class _Operations(_File):
    training_sample: Number | None = None
    encoder_frame: Number | None = None
    teacher_frame: Number | None = None


class _MadeFrom(_File):
    checkpoint: str = ""  # sha256 of its tensors


class Diagnostics(_File):
    """``diagnostics.json``: every row over frames has the same length, and the similarities are a square."""

    format: int
    made_from: _MadeFrom = _MadeFrom()
    num_frames: Annotated[int, Field(ge=1, le=10**6)]
    levels: _Levels
    per_frame: dict[LevelName, Row]
    starts: list[list[Number]] | None
    per_sample: dict[str, _Sample]
    operations: _Operations

    @model_validator(mode="before")
    @classmethod
    def _of_this_format(cls, value: Any) -> Any:
        """First of all: another format has other keys too."""
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise ValueError(f"it is of format {value.get('format')!r:.20}; this version reads {FORMAT}")
        return value

    @model_validator(mode="after")
    def _shapes(self) -> Diagnostics:
        samples = self.per_sample.values()
        over_frames: list[Sequence[Any]] = [*self.per_frame.values(), *(self.starts or [])]
        over_frames += [row for sample in samples for row in sample.cosine.values()]
        over_frames += [row for sample in samples for row in sample.slots]
        over_frames += [sample.attention for sample in samples if sample.attention]
        if any(len(row) != self.num_frames for row in over_frames) or len(self.starts or []) not in (
            0,
            self.num_frames,
        ):
            raise ValueError(f"a row over frames has not {self.num_frames} entries")
        if len({len(sample.slots) for sample in samples if sample.slots}) > 1:
            raise ValueError("the samples have different numbers of bank entries")
        if any(len(row) != len(self.levels.cka) for row in self.levels.cka):
            raise ValueError("levels.cka is not square")
        return self


class Session(_File):
    """One line of ``sessions.jsonl``."""

    command: str = ""
    seconds: Number | None = None
    cpu_seconds: Number | None = None
    bytes_read: Number | None = None


class Environment(_File):
    """``environment.json``."""

    packages: dict[str, str] = {}
    python: str | None = None
    platform: str | None = None
    gpu: str | None = None
    commit: str | None = None


class _NotFitted(_File):
    samples: Count
    reason: str


class Probe(_File):
    """``probe.json`` of a baseline."""

    probe: str
    seed: int | None = None
    not_fitted: dict[str, _NotFitted] = {}


class Record(_File):
    """One line of ``metrics.jsonl``: numbers by name."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Number | str | bool | None]

    step: Count
    loss_ce: Number | None = None
    val_top1: Number | None = None

    @model_validator(mode="after")
    def _levels(self) -> Record:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if key.startswith(("kd/", "w/", "probe/")) and not isinstance(value, float | int | None):
                raise ValueError(f"{key} is not a number")
        return self


_RECORDS = TypeAdapter(list[Record])
_SESSIONS = TypeAdapter(list[Session])


def read(path: Path, kind: type[_File]) -> dict[str, Any]:
    """The values of a JSON file that fits ``kind``. Raises one of DAMAGED."""
    return kind.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump()


def records(values: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The lines of ``metrics.jsonl``, checked. Raises one of DAMAGED."""
    _RECORDS.validate_python(values)
    return tuple(values)


def sessions(values: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The lines of ``sessions.jsonl``, checked. Raises one of DAMAGED."""
    _SESSIONS.validate_python(values)
    return tuple(values)


def why(error: Exception) -> str:
    """One line on what is wrong with a file: of many problems the first, by place."""
    if not isinstance(error, ValidationError):
        return in_one_line(error)
    first, *rest = error.errors()
    place = ".".join(map(str, first["loc"]))
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{place}{': ' if place else ''}{first['msg'].removeprefix('Value error, ')}{more}"
