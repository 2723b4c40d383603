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
from cache_schema.report import Missing
from cache_schema.store import FeatureStore
from stages.data.loader import Frames, NotForked, Ring, features
from stages.data.manifest import THE_FILE, why_absent
from stages.types import Sample


@dataclass(frozen=True)
class Batch:
    """Samples with their features, one row per window: samples of one video and the same frames share it.

    Attributes:
        samples: the questions.
        f: CLIP tokens in the dtype of the cache.
        y_star: teacher targets; None when no teacher is read.
        windows: row of ``f`` and ``y_star`` that each sample asks about; None = row b for sample b.
        lengths: frames of each row where they differ; the rest of the row is zeros. None = all T.
        names: video and frame indices of each row; None where nobody says.
    """

    samples: tuple[Sample, ...]
    f: Float[Tensor, "V T P C"]
    y_star: Float[Tensor, "V T *D"] | None
    windows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    names: tuple[tuple[str, bytes], ...] | None = None

    def per_sample(self, rows: Float[Tensor, "V T *D"]) -> Float[Tensor, "B T *D"]:
        """``f`` or ``y_star`` with one row per sample instead of one per window."""
        return rows if self.windows is None else rows[list(self.windows)]

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
            can_be_made = any(THE_FILE not in reason for reason in self.missing.values())
            extract = f"Extract them:           {help_command}\nOr go" if can_be_made else "Go"
            raise CacheMissing(
                f"{self.dropped} of {self.dropped + len(self.samples)} samples need frames of {len(self.missing)} "
                f"videos that the cache does not have:{shown}{more}\n"
                f"{extract} on without them:  --set data.allow_missing=true"
            )

    def summary(self) -> tuple[str, ...]:
        """A sentence about the samples that are left out and why, where there are any."""
        if not self.dropped:
            return ()
        shown = "; ".join(f"{video}: {reason}" for video, reason in list(self.missing.items())[:3])
        more = f"; and {len(self.missing) - 3} more videos" if len(self.missing) > 3 else ""
        return (f"{self.dropped} of {self.dropped + len(self.samples)} samples are left out: {shown}{more}",)


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
            reasons.setdefault(video, f"{store.modality}: {gap}{_why(store, video, gap)}")
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


def _why(store: FeatureStore, video: str, gap: Missing) -> str:
    """Why frames that nobody planned are not in the video's file, as far as its extraction knows."""
    if not gap.not_planned:
        return ""
    try:
        facts = store.facts(video)
    except CacheMissing:
        return ""
    return f" ({reason})" if (reason := why_absent(gap.not_planned, facts)) else ""


def few(samples: Sequence[Sample], count: int, seed: int) -> tuple[Sample, ...]:
    """``count`` of the samples, chosen by the seed and in their old order; all of them where ``count`` is 0."""
    if not count or count >= len(samples):
        return tuple(samples)
    chosen = np.random.default_rng([seed, len(samples)]).permutation(len(samples))[:count]
    return tuple(samples[i] for i in sorted(chosen.tolist()))


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
        self._windows: list[int] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def window_of(self) -> list[int]:
        """A number per sample, equal where two ask about the same frames of the same video in every draw."""
        if self._windows is None:
            numbers: dict[tuple[str, bytes], int] = {}
            keys = [(sample.video_id, sample.draws.tobytes()) for sample in self.samples]
            self._windows = [numbers.setdefault(key, len(numbers)) for key in keys]
        return self._windows

    def batch(self, positions: Sequence[int], draws: Sequence[int] | None = None) -> Batch:
        """Read the samples at ``positions`` into new memory; ``draws`` chooses among each sample's frame draws
        (default: the first). The simple way, which ``batches`` is held equal to."""
        asked = self._asked(positions, [0] * len(positions) if draws is None else draws)
        pooled = None if self.pooled is None else _stack(self.pooled, asked.wanted)
        return asked.batch(_stack(self.tokens, asked.wanted), pooled)

    def batches(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """The batches of a known order, read ahead by threads; each is valid until the next one is asked for.

        A frame is read once for all samples of a batch. Raises what ``FeatureStore.read`` raises, at the batch that
        needs it. Closing the iterator ends the threads.
        """
        coming: deque[_Asked] = deque()

        def frames() -> Iterator[Frames]:
            for request in requests:
                coming.append(self._asked(request.positions, request.draws))
                yield Frames.of(coming[-1].wanted)

        stores = [self.tokens] if self.pooled is None else [self.tokens, self.pooled]
        with Ring(stores, frames(), readers=self.readers, pin=torch.cuda.is_available()) as ring:
            for stored in ring:
                tensors = [features(rows, store) for rows, store in zip(stored, stores, strict=True)]
                yield coming.popleft().batch(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def _asked(self, positions: Sequence[int], draws: Sequence[int]) -> _Asked:
        chosen = tuple(self.samples[position] for position in positions)
        frames = [sample.draws[draw % len(sample.draws)] for sample, draw in zip(chosen, draws, strict=True)]
        rows: dict[tuple[str, bytes], int] = {}
        windows = tuple(
            rows.setdefault((sample.video_id, np.asarray(index).tobytes()), len(rows))
            for sample, index in zip(chosen, frames, strict=True)
        )
        firsts = [windows.index(row) for row in range(len(rows))]
        return _Asked(chosen, windows, [(chosen[i].video_id, frames[i]) for i in firsts])

    def target_moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
        """Mean and covariance of y* over the distinct frames of these samples, from sums in float64 (D4)."""
        if self.pooled is None:
            raise ValueError("no teacher store to take a mean of")
        frames: dict[str, set[int]] = {}
        for sample in self.samples:
            frames.setdefault(sample.video_id, set()).update(sample.draws.ravel().tolist())
        width, count = int(np.prod(self.pooled.spec.frame_shape)), sum(map(len, frames.values()))
        total, products = np.zeros(width), np.zeros((width, width))
        for video in sorted(frames):
            rows = self.pooled.read(video, np.array(sorted(frames[video])))
            flat = rows.reshape(len(rows), -1).astype(np.float64)
            total += flat.sum(axis=0)
            products += flat.T @ flat
        mean = total / count
        covariance = products / count - np.outer(mean, mean)
        return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(covariance.astype(np.float32))


@dataclass(frozen=True)
class _Asked:
    """A batch before its features: the samples, and the (video, frame indices) of each distinct window."""

    samples: tuple[Sample, ...]
    windows: tuple[int, ...]  # of each sample
    wanted: list[tuple[str, Int[np.ndarray, " _"]]]

    def batch(self, f: Tensor, y_star: Tensor | None) -> Batch:
        lengths = tuple(len(index) for _, index in self.wanted)
        names = tuple((video, np.asarray(index).tobytes()) for video, index in self.wanted)
        return Batch(self.samples, f, y_star, self.windows, lengths if len(set(lengths)) > 1 else None, names)


def _stack(store: FeatureStore, wanted: Sequence[tuple[str, Int[np.ndarray, " _"]]]) -> Tensor:
    """One array [V, T, …] filled in place, zeros after the end of shorter ones."""
    shape = (len(wanted), max(len(index) for _, index in wanted), *store.spec.frame_shape)
    out = np.zeros(shape, dtype=store.spec.feature_dtype)
    for row, (video, index) in zip(out, wanted, strict=True):
        store.read(video, index, out=row[: len(index)])
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
