"""What a run needs, what is there, and what it costs: counts and id lists, from plain mappings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from stages.types import Sample

Wanted = Mapping[str, Int[np.ndarray, " n"]]  # video -> sorted unique grid indices


@dataclass(frozen=True)
class Coverage:
    """Where the videos of one split stand. Every id list is sorted.

    ``found``: the source holds something under the id. ``decoded``: its features are committed (the source may be gone
    by then). ``failed``: tried and refused, with the reason. ``missing``: neither found, nor decoded, nor failed.
    ``pending``: found, not tried yet. So wanted = decoded + failed + missing + pending.
    """

    wanted: tuple[str, ...]
    found: tuple[str, ...]
    decoded: tuple[str, ...]
    failed: Mapping[str, str]
    missing: tuple[str, ...]
    pending: tuple[str, ...]

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.wanted)} videos wanted", f"{len(self.found)} found", f"{len(self.decoded)} decoded"]
        rest = {"failed": self.failed, "missing": self.missing, "not tried yet": self.pending}
        return ", ".join([*parts, *(f"{len(ids)} {name}" for name, ids in rest.items() if ids)])

    def to_json(self) -> dict[str, object]:
        """Counts, and the ids of everything that is not decoded."""
        return {
            "wanted": len(self.wanted),
            "found": len(self.found),
            "decoded": len(self.decoded),
            "failed": dict(self.failed),
            "missing": list(self.missing),
            "pending": list(self.pending),
        }


def coverage(
    wanted: Mapping[str, Wanted], *, has: Callable[[str], bool], status: Mapping[str, str | None]
) -> dict[str, Coverage]:
    """Coverage per split.

    Args:
        wanted: split -> video -> frames, such as ``{s: dataset.wanted([s]) for s in dataset.splits}``.
        has: whether the source holds a video (``FrameSource.has``); asked once per video.
        status: what the store says of videos that were tried: None = committed, a text = why it failed.
    """
    there = {video: has(video) for video in sorted({video for videos in wanted.values() for video in videos})}
    return {split: _covered(sorted(videos), there, status) for split, videos in wanted.items()}


def _covered(videos: Sequence[str], there: Mapping[str, bool], status: Mapping[str, str | None]) -> Coverage:
    failed = {video: reason for video in videos if (reason := status.get(video)) is not None}
    untried = [video for video in videos if video not in status]
    return Coverage(
        wanted=tuple(videos),
        found=tuple(video for video in videos if there[video]),
        decoded=tuple(video for video in videos if video in status and video not in failed),
        failed=failed,
        missing=tuple(video for video in untried if not there[video]),
        pending=tuple(video for video in untried if there[video]),
    )


@dataclass(frozen=True)
class Estimate:
    """The size of an extraction, before it starts."""

    videos: int
    frames: int
    bytes_per_modality: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all modalities together."""
        return sum(self.bytes_per_modality.values())

    def to_json(self) -> dict[str, object]:
        """The same numbers for ``--json``."""
        return {
            "videos": self.videos,
            "frames": self.frames,
            "bytes": self.total_bytes,
            "bytes_per_modality": dict(self.bytes_per_modality),
        }


def estimate(wanted: Wanted, bytes_per_frame: Mapping[str, int]) -> Estimate:
    """Videos, frames and bytes of features, given the bytes of one frame in each modality."""
    frames = sum(len(index) for index in wanted.values())
    return Estimate(len(wanted), frames, {name: frames * size for name, size in bytes_per_frame.items()})


def majority_answer(samples: Sequence[Sample]) -> str:
    """The most frequent answer, the first in alphabetical order among equals: the baseline beside every accuracy."""
    counts = Counter(sample.answer for sample in samples)
    return min(counts, key=lambda answer: (-counts[answer], answer))
