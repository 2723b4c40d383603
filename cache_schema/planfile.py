"""The plan on disk: one file per growth, each published whole and never changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.metadata import other_format
from cache_schema.objects import StorePath
from cache_schema.plan import Plan
from cache_schema.plan_columns import OtherVersion, pack, unpack

_GENERATION = re.compile(r"^\d{6}\.npz$")


def is_generation(name: str) -> bool:
    """Whether a file of the ``plan`` folder is one growth of the plan."""
    return _GENERATION.match(name) is not None


def generations(store: StorePath) -> list[str]:
    """Names of the growths in the ``plan`` folder of a store, oldest first."""
    return sorted(name for name in files.names_in(store / "plan") if is_generation(name))


class PlanFiles:
    """``plan/000000.npz``, ``plan/000001.npz``, …: what was read of them, and how the next one is added."""

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
        generation, plan = self._read
        while True:
            file = self._file(generation)
            try:
                data = files.read_bytes(file, files.MAX_PLAN_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return plan
            try:
                plan = plan.grown_by(unpack(data, plan))
            except OtherVersion as other:
                raise other_format(file, other.args[0]) from None
            except ValueError as error:
                raise CacheCorrupt(f"{file} is damaged: {error}", file=file, kind="plan") from error
            generation += 1
            self._read = (generation, plan)

    def extend(self, wanted: Mapping[str, Sequence[int] | npt.NDArray[np.integer]]) -> Plan:
        """Add what is not planned yet. First writer wins; the loser derives its addition anew from what it finds."""
        plan = self.current()
        while (grown := plan.extended(wanted)) is not plan:
            file = self._file(self._read[0])
            published = files.publish_bytes(file, pack(plan, grown.segments[len(plan.segments) :]))
            plan = self.current()
            if published:
                break
        return plan

    def check_complete(self) -> None:
        """Raise CacheCorrupt when a generation is missing below one that exists."""
        files.refuse_links(self._file(0), self.folder.parent)
        for number, name in enumerate(generations(self.folder.parent)):
            if name != f"{number:06d}.npz":
                file = self._file(number)
                raise CacheCorrupt(f"{file} is missing, but {name} exists: restore it", file=file, kind="plan")

    def _file(self, generation: int) -> StorePath:
        return self.folder / f"{generation:06d}.npz"
