"""The plan on disk: one JSON file per growth, each published whole and never changed; beside large ones columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.metadata import newer_format
from cache_schema.objects import ObjectPath, StorePath
from cache_schema.plan import Plan, apply_generation, generation_document
from cache_schema.plan_columns import Columns, pack, unpack

PLAN_VERSION = 1
LARGE = 1 << 20  # bytes of JSON, some 15,000 videos: from here on columns are read many times as fast
_GENERATION = re.compile(r"^\d{6}\.json$")
_COLUMNS = re.compile(r"^\d{6}\.columns$")


def is_generation(name: str) -> bool:
    """Whether a file of the ``plan`` folder is one growth of the plan."""
    return _GENERATION.match(name) is not None


def is_columns(name: str) -> bool:
    """Whether a file of the ``plan`` folder is a growth once more, as columns."""
    return _COLUMNS.match(name) is not None


def generations(store: StorePath) -> list[str]:
    """Names of the growths in the ``plan`` folder of a store, oldest first."""
    return sorted(name for name in files.names_in(store / "plan") if is_generation(name))


class PlanFiles:
    """``plan/000000.json``, ``plan/000001.json``, …: what was read of them, and how the next one is added."""

    def __init__(self, store: StorePath, shard_frames: int) -> None:
        self.folder = store / "plan"
        self._lacking: dict[int, tuple[Plan, Plan]] = {}  # generations that are large and were read as JSON: a to b
        self._read = (0, Plan.empty(shard_frames))  # generations read; one value, so that threads see both or neither

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_lacking": {}, "_read": (0, Plan.empty(self.known.shard_frames))}

    @property
    def known(self) -> Plan:
        """The plan as last read."""
        return self._read[1]

    def current(self) -> Plan:
        """The plan as it is now, other processes' additions included. Raises CacheCorrupt, CacheMismatch."""
        return self._refresh()[1]

    def _refresh(self) -> tuple[int, Plan]:
        generation, plan = self._read
        while True:
            file = self._file(generation)
            try:
                data = files.read_bytes(file, files.MAX_PLAN_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return generation, plan
            columns = self._read_columns(generation, plan, data) if len(data) >= LARGE else None
            grown = _by_json(file, plan, data) if columns is None else plan.grown_by(columns)
            if columns is None and len(data) >= LARGE:
                self._lacking[generation] = (plan, grown)
            generation, plan = generation + 1, grown
            self._read = (generation, plan)

    def _read_columns(self, generation: int, plan: Plan, data: bytes) -> Columns | None:
        try:
            return unpack(files.read_bytes(self._columns(generation), files.MAX_PLAN_BYTES), plan, data)
        except (OSError, CacheCorrupt):  # derived: it may be absent, and whatever is wrong with it, the JSON is there
            return None

    def extend(self, wanted: Mapping[str, Sequence[int] | npt.NDArray[np.integer]]) -> Plan:
        """Add what is not planned yet. First writer wins; the loser derives its addition anew from what it finds."""
        generation, plan = self._refresh()
        while (grown := plan.extended(wanted)) is not plan:
            data = files.canonical_json({"format_version": PLAN_VERSION, **generation_document(plan, grown)})
            ours = files.publish_bytes(self._file(generation), data)
            if ours and len(data) >= LARGE:
                self._write_columns(generation, plan, grown, data)
            generation, plan = self._refresh()
            if ours:
                break
        for generation, (before, after) in self._lacking.items():
            data = files.read_bytes(self._file(generation), files.MAX_PLAN_BYTES)
            self._write_columns(generation, before, after, data)
        self._lacking.clear()
        return plan

    def _write_columns(self, generation: int, before: Plan, after: Plan, data: bytes) -> None:
        columns, file = pack(before, after.segments[len(before.segments) :], data), self._columns(generation)
        if isinstance(file, ObjectPath):
            file.write(columns)
        else:
            files.replace_bytes(file, columns)

    def check_complete(self) -> None:
        """Raise CacheCorrupt when a generation is missing below one that exists."""
        files.refuse_links(self._file(0), self.folder.parent)
        for number, name in enumerate(generations(self.folder.parent)):
            if name != f"{number:06d}.json":
                file = self._file(number)
                raise CacheCorrupt(f"{file} is missing, but {name} exists: restore it", file=file, kind="plan")

    def _file(self, generation: int) -> StorePath:
        return self.folder / f"{generation:06d}.json"

    def _columns(self, generation: int) -> StorePath:
        return self.folder / f"{generation:06d}.columns"


def _by_json(file: StorePath, plan: Plan, data: bytes) -> Plan:
    try:
        document = files.parse_json(data)
        version = document.get("format_version")
        if type(version) is not int or version <= PLAN_VERSION:
            if version != PLAN_VERSION:
                raise ValueError(f"format_version is {version!r}")
            return apply_generation(plan, document)
    except ValueError as error:
        raise CacheCorrupt(f"{file} is damaged: {error}", file=file, kind="plan") from error
    raise newer_format(file, version, PLAN_VERSION)
