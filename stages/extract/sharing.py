"""The claims of one running extraction, so that several of them on one store share its tasks (cache_schema/claims.py).

There is a claim for every encoder of a task: an extraction of both shares with one of either. The reader thread takes
them, reader and encoder say that there is progress, and the writer gives them up when the task is published.
"""

from __future__ import annotations

from collections.abc import Mapping

from cache_schema import claims
from cache_schema.plan import Task
from cache_schema.store import FeatureStore
from stages.types import FrozenEncoder


class Shares:
    """What this extraction has claimed; ``close`` gives up all of it. Needs no lock: every step is one of a dict."""

    def __init__(self, stores: Mapping[str, FeatureStore]) -> None:
        self._stores = stores
        self._held: dict[tuple[str, int], claims.Claim] = {}
        self._closed = False

    def take(self, encoder: FrozenEncoder, task: Task) -> bool:
        """Claim an encoder's part of a task. False while another extraction is at it. Raises OSError."""
        key = self._key(encoder, task)
        claim = claims.take(self._stores[key[0]].layout.info.folder, key[1])
        if claim is None:
            return False
        self._held[key] = claim
        if self._closed:  # a reader that hung, and came back after the end
            self.give_up(encoder, task)
        return not self._closed

    def touch(self) -> None:
        """There was progress."""
        for claim in tuple(self._held.values()):
            claim.touch()

    def give_up(self, encoder: FrozenEncoder, task: Task) -> None:
        """This part of a task is done, or not to be done here."""
        claim = self._held.pop(self._key(encoder, task), None)
        if claim is not None:
            claim.give_up()

    def close(self) -> None:
        """Give up what is left. Nothing is claimed from now on."""
        self._closed = True
        while self._held:
            self._held.popitem()[1].give_up()

    def _key(self, encoder: FrozenEncoder, task: Task) -> tuple[str, int]:
        return min(encoder.specs), task.shards[0]
