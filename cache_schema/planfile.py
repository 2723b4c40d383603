"""The plan on disk: one JSON file per growth, each published whole and never changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.metadata import newer_format
from cache_schema.objects import StorePath
from cache_schema.plan import Plan, apply_generation, generation_document

PLAN_VERSION = 1
_GENERATION = re.compile(r"^\d{6}\.json$")


def is_generation(name: str) -> bool:
    """Whether a file of the ``plan`` folder is one growth of the plan."""
    return _GENERATION.match(name) is not None


class PlanFiles:
    """``plan/000000.json``, ``plan/000001.json``, …: what was read of them, and how the next one is added."""

    def __init__(self, store: StorePath, shard_frames: int) -> None:
        self.folder = store / "plan"
        self._read = (0, Plan.empty(shard_frames))  # generations read; one value, so that threads see both or neither

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_read": (0, Plan.empty(self.known.shard_frames))}

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
                document = files.read_json(file, files.MAX_PLAN_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return generation, plan
            version = document.get("format_version")
            if type(version) is int and version > PLAN_VERSION:
                raise newer_format(file, version, PLAN_VERSION)
            try:
                if version != PLAN_VERSION:
                    raise ValueError(f"format_version is {version!r}")
                plan = apply_generation(plan, document)
            except ValueError as error:
                raise CacheCorrupt(f"{file} is damaged: {error}", file=file, kind="plan") from error
            generation += 1
            self._read = (generation, plan)

    def extend(self, wanted: Mapping[str, Sequence[int] | npt.NDArray[np.integer]]) -> Plan:
        """Add what is not planned yet. First writer wins; the loser derives its addition anew from what it finds."""
        generation, plan = self._refresh()
        while (grown := plan.extended(wanted)) is not plan:
            document = {"format_version": PLAN_VERSION, **generation_document(plan, grown)}
            files.publish_bytes(self._file(generation), files.canonical_json(document))
            generation, plan = self._refresh()
        return plan

    def check_complete(self) -> None:
        """Raise CacheCorrupt when a generation is missing below one that exists."""
        files.refuse_links(self._file(0), self.folder.parent)
        names = (name for name in files.names_in(self.folder) if is_generation(name))
        for number, name in enumerate(sorted(names)):
            if name != f"{number:06d}.json":
                file = self._file(number)
                raise CacheCorrupt(f"{file} is missing, but {name} exists: restore it", file=file, kind="plan")

    def _file(self, generation: int) -> StorePath:
        return self.folder / f"{generation:06d}.json"
