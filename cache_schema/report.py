"""Small values that say what is there, what is not, and what was done. All are picklable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cache_schema.plan import shorten


@dataclass(frozen=True)
class VideoStatus:
    """Whether a video's features are there; ``kind`` and ``reason`` say why not. ``frames`` counts those that are."""

    ok: bool
    kind: str = ""
    reason: str = ""
    frames: int = 0


@dataclass(frozen=True)
class SourceFile:
    """The file of a video as it is now. ``sha256`` reads it."""

    size: int  # bytes
    modified: float  # seconds since 1970
    sha256: Callable[[], str] = field(repr=False)


@dataclass(frozen=True)
class TaskReport:
    """What one call wrote for one modality. Small and picklable: it is what a worker returns."""

    modality: str
    shards: tuple[int, ...]
    skipped: bool  # already committed, by an earlier run or by another writer meanwhile
    videos: int = 0  # produced and good
    frames: int = 0
    failed: dict[str, VideoStatus] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """The frames of one video that cannot be read, by reason."""

    not_planned: tuple[int, ...] = field(default=(), repr=False)
    not_committed: tuple[int, ...] = field(default=(), repr=False)
    failed: tuple[int, ...] = field(default=(), repr=False)
    kind: str = ""  # why the failed ones failed
    reason: str = ""

    @property
    def frames(self) -> tuple[int, ...]:
        """All of them, sorted."""
        return tuple(sorted(self.not_planned + self.not_committed + self.failed))

    def __str__(self) -> str:
        parts = [
            f"{what}: frame{'s' * (len(frames) > 1)} {shorten(frames)}"
            for frames, what in (
                (self.not_planned, "not planned"),
                (self.not_committed, "not extracted yet"),
                (self.failed, f"failed as {self.kind} ({self.reason})"),
            )
            if frames
        ]
        return "; ".join(parts)
