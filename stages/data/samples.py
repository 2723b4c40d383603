"""From the cache to training batches: which samples are complete, and their tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from cache_schema.errors import CacheMissing
from cache_schema.store import FeatureStore
from stages.data.loader import Frames, NotForked, Ring, features
from stages.types import Sample


@dataclass(frozen=True)
class Batch:
    """Samples with their features. ``f`` keeps the dtype of the cache; ``y_star`` is None when no teacher is read."""

    samples: tuple[Sample, ...]
    f: Float[Tensor, "B T P C"]
    y_star: Float[Tensor, "B T *D"] | None

    @property
    def prompts(self) -> list[str]:
        """Prompt per sample."""
        return [sample.prompt for sample in self.samples]

    @property
    def answers(self) -> list[str]:
        """Answer per sample."""
        return [sample.answer for sample in self.samples]


@dataclass(frozen=True)
class Availability:
    """Which samples the cache can serve, and why the others cannot be served."""

    samples: tuple[Sample, ...]
    missing: Mapping[str, str]  # video id -> reason, for every video that a dropped sample needed
    dropped: int

    def require_all(self, help_command: str) -> None:
        """Raise CacheMissing unless every sample is there."""
        if self.dropped:
            shown = "".join(f"\n  {video}: {reason}" for video, reason in list(self.missing.items())[:5])
            more = f"\n  … and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
            raise CacheMissing(
                f"{self.dropped} of {self.dropped + len(self.samples)} samples need frames of {len(self.missing)} "
                f"videos that the cache does not have:{shown}{more}\n"
                f"Extract them:           {help_command}\n"
                f"Or go on without them:  --set data.allow_missing=true"
            )


def available(samples: Sequence[Sample], stores: Sequence[FeatureStore]) -> Availability:
    """Keep the samples whose frames, in every draw, all stores hold."""
    wanted: dict[str, list[Int[np.ndarray, "K T"]]] = {}
    for sample in samples:
        wanted.setdefault(sample.video_id, []).append(sample.draws)
    frames = {video: np.unique(np.concatenate([d.ravel() for d in draws])) for video, draws in wanted.items()}
    reasons: dict[str, str] = {}
    gaps: dict[str, set[int]] = {}
    for store in stores:
        for video, gap in store.missing(frames).items():
            reasons.setdefault(video, f"{store.modality}: {gap}")
            gaps.setdefault(video, set()).update(gap.frames)
    whole: list[Sample] = []
    broken_videos: set[str] = set()
    for sample in samples:
        if gaps.get(sample.video_id, set()).isdisjoint(sample.draws.ravel().tolist()):
            whole.append(sample)
        else:
            broken_videos.add(sample.video_id)
    return Availability(
        tuple(whole), {v: r for v, r in reasons.items() if v in broken_videos}, len(samples) - len(whole)
    )


@dataclass(frozen=True)
class Request:
    """Which samples make a batch: positions in ``CachedSamples.samples``, and the frame draw of each."""

    positions: Sequence[int]
    draws: Sequence[int]  # any integer; modulo the number of draws of the sample


class CachedSamples:
    """Samples read from the cache on demand.

    Args:
        samples: what ``available`` kept.
        tokens: the CLIP store.
        pooled: the teacher store, or None where no alignment is trained.
        readers: threads that read ahead in ``batches``.
    """

    def __init__(
        self, samples: Sequence[Sample], tokens: FeatureStore, pooled: FeatureStore | None = None, *, readers: int = 2
    ) -> None:
        self.samples, self.tokens, self.pooled, self.readers = tuple(samples), tokens, pooled, readers

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, positions: Sequence[int], draws: Sequence[int] | None = None) -> Batch:
        """Read the samples at ``positions`` into new memory; ``draws`` chooses among each sample's frame draws
        (default: the first). The simple way, which ``batches`` is held equal to."""
        chosen = tuple(self.samples[i] for i in positions)
        frames = self._frames(positions, [0] * len(chosen) if draws is None else draws)
        f = _stack(self.tokens, chosen, frames)
        return Batch(chosen, f, None if self.pooled is None else _stack(self.pooled, chosen, frames))

    def batches(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """The batches of a known order, read ahead by threads; each is valid until the next one is asked for.

        A video is read once for all samples of a batch. Raises what ``FeatureStore.read`` raises, at the batch that
        needs it. Closing the iterator ends the threads.
        """
        coming: deque[Request] = deque()

        def frames() -> Iterator[Frames]:
            for request in requests:
                coming.append(request)
                chosen = self._frames(request.positions, request.draws)
                videos = [self.samples[position].video_id for position in request.positions]
                yield Frames.of(list(zip(videos, chosen, strict=True)))

        stores = [self.tokens] if self.pooled is None else [self.tokens, self.pooled]
        with Ring(stores, frames(), readers=self.readers, pin=torch.cuda.is_available()) as ring:
            for stored in ring:
                tensors = [features(rows, store) for rows, store in zip(stored, stores, strict=True)]
                chosen = tuple(self.samples[position] for position in coming.popleft().positions)
                yield Batch(chosen, tensors[0], tensors[1] if len(tensors) > 1 else None)

    def _frames(self, positions: Sequence[int], draws: Sequence[int]) -> list[Int[np.ndarray, " T"]]:
        chosen = [self.samples[position] for position in positions]
        return [sample.draws[draw % len(sample.draws)] for sample, draw in zip(chosen, draws, strict=True)]

    def target_mean(self) -> Float[Tensor, " D"]:
        """Mean of y* over the distinct frames of these samples, in float64 and returned as float32 (D4)."""
        if self.pooled is None:
            raise ValueError("no teacher store to take a mean of")
        frames: dict[str, set[int]] = {}
        for sample in self.samples:
            frames.setdefault(sample.video_id, set()).update(sample.draws.ravel().tolist())
        total = np.zeros(int(np.prod(self.pooled.spec.frame_shape)))
        for video in sorted(frames):
            rows = self.pooled.read(video, np.array(sorted(frames[video])))
            total += rows.reshape(len(rows), -1).sum(axis=0, dtype=np.float64)
        return torch.from_numpy((total / sum(map(len, frames.values()))).astype(np.float32))


def _stack(store: FeatureStore, samples: Sequence[Sample], frames: Sequence[Int[np.ndarray, " T"]]) -> Tensor:
    """One array [B, T, …] filled in place, so that the features are copied once."""
    out = np.empty((len(samples), len(frames[0]), *store.spec.frame_shape), dtype=store.spec.feature_dtype)
    for row, sample, index in zip(out, samples, frames, strict=True):
        store.read(sample.video_id, index, out=row)
    return torch.from_numpy(out)


class SampleDataset(Dataset[dict[str, Any]]):
    """The same samples for a ``DataLoader``, for those whose loop is built on one; ``CachedSamples.batches`` is faster.

    An item is {"position", "f" [T, P, C], "y_star" [T, *D] where there is a teacher}: the first frame draw. Workers
    must be spawned: ``DataLoader(..., multiprocessing_context="spawn")``; a forked one raises RuntimeError.
    """

    def __init__(self, data: CachedSamples) -> None:
        self.data, self._process = data, NotForked()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> dict[str, Any]:
        self._process.check()
        batch = self.data.batch([range(len(self.data))[position]])
        item = {"position": position, "f": batch.f[0]}
        return item if batch.y_star is None else item | {"y_star": batch.y_star[0]}
