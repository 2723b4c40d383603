"""What a run needs, what is there, and what it costs: counts and id lists, from plain mappings.

Also what a video cannot give (its annotation is longer, a spot is damaged), and whether it is still the file that its
features came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from cache_schema.errors import CacheMissing
from cache_schema.objects import ObjectPath
from cache_schema.store import FeatureStore
from stages.data.sources.frame_grid import CLAMP_STEPS
from stages.types import Extent, FrameSource, Sample, VideoRejected

Wanted = Mapping[str, Int[np.ndarray, " n"]]  # video -> sorted unique grid indices


HASHED_BYTES = 1 << 30  # of touched videos that a start reads to find out whether their bytes changed
THE_FILE = "the file"  # begins why a frame can never be had: no extraction helps


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


# ---------------------------------------------------------------- what a video cannot give


def fitting(wanted: Int[np.ndarray, " n"], extent: Extent) -> Int[np.ndarray, " m"]:
    """The wanted grid indices that the video has, up to two past its end included. All, where it has none of them."""
    kept = wanted < extent.count + CLAMP_STEPS
    for first, last in extent.damaged:
        kept &= (wanted < first) | (wanted > last)
    return wanted[kept] if kept.any() else wanted


def why_absent(frames: Sequence[int], facts: Mapping[str, object]) -> str:
    """Why the file of a video does not have these frames, by the facts of its extraction; empty where it may have them.

    Args:
        frames: grid indices that are not in the cache.
        facts: ``SourceFacts`` as a store gives them back.
    """
    count, damaged = facts.get("count"), facts.get("damaged")
    reasons = []
    if isinstance(count, int) and count and any(frame >= count for frame in frames):
        reasons.append(f"{THE_FILE} has {count} frames")
    for first, last in damaged if isinstance(damaged, list | tuple) else ():
        if any(first <= frame <= last for frame in frames):
            reasons.append(f"{THE_FILE} does not decode at frames {first} to {last}")
    return "; ".join(reasons)


def why_length_differs(wanted: Int[np.ndarray, " n"], count: int, fps: float, *, unseen_s: float) -> str:
    """A sentence where the annotation speaks of a much shorter video than the file is, else the empty string.

    Args:
        wanted: all grid indices that its annotations ask for.
        count: grid frames of the file.
        fps: of the grid.
        unseen_s: seconds at the end of a video that annotations leave out by design (LVU's outro and last stride).
    """
    asked = int(wanted[-1]) + 1
    if (count - asked) / fps <= max(unseen_s, 0.1 * count / fps):
        return ""
    return f"its annotation speaks of {asked} frames ({asked / fps:.1f} s), the file has {count} ({count / fps:.1f} s)"


# ---------------------------------------------------------------- is it still the same file


def changed_sources(store: FeatureStore, source: FrameSource, videos: Sequence[str]) -> tuple[dict[str, str], int]:
    """Videos whose file is another one now than at extraction, and how many were touched but not compared.

    Sizes are compared, and the sha256 of files that were modified after their features were committed, up to 1 GB of
    them. An object store has no such time, so only sizes are compared there. A file that is gone is no change.
    """
    changed: dict[str, str] = {}
    hashed = unsure = 0
    for video in videos:
        try:
            facts, now = store.facts(video), source.file(video)
        except (CacheMissing, VideoRejected):
            continue
        if not facts:
            continue
        if now.size != facts.get("size"):
            changed[video] = f"had {facts.get('size')} bytes when it was extracted and has {now.size} now"
        elif now.modified > _written(store, video):
            hashed += now.size
            if hashed > HASHED_BYTES and now.modified < float("inf"):
                unsure += 1
            elif now.sha256() != facts.get("sha256"):
                changed[video] = "has other bytes now than when it was extracted"
    return changed, unsure


def _written(store: FeatureStore, video: str) -> float:
    """When the newest features of a video were committed, in seconds since 1970; never, of an object store."""
    if isinstance(store.path, ObjectPath):
        return float("inf")
    shards = [store.shard(segment.start // store.shard_frames) for segment in store.plan.segments_of(video)]
    return max(float(shard.identity[2]) / 1e9 for shard in shards if shard is not None)
