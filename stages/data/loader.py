"""Reader threads that fill a ring of reused buffers, so that the trainer finds its next batch in memory.

No worker processes: a video is 72 MB, and a worker would copy it into new shared memory, map that, and copy it again,
which takes four times as long as reading it. Copying and reading release the interpreter lock, so threads are enough.

What is read is known before: the state of the order is (epoch, step), and a reader that starts in the middle gives the
batches that an uninterrupted one would have given. The disk is asked for exactly the byte ranges of what comes next.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from cache_schema.reading import strided_rows
from cache_schema.store import FeatureStore

RING_BYTES = 2 << 30  # of buffers, where batches are large; two are always there
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Frames:
    """The frames of one batch, each of them once.

    ``videos`` holds (video, sorted unique frame indices); row ``rows[v, t]`` of all of them one after the other is
    frame t of window v, -1 after the end of a shorter one. Windows of one video overlap: it is read once.
    """

    videos: tuple[tuple[str, Int[np.ndarray, " _"]], ...]
    rows: Int[np.ndarray, "V T"] = field(repr=False)

    @classmethod
    def of(cls, wanted: Sequence[tuple[str, Int[np.ndarray, " _"]]]) -> Frames:
        """From (video, frame indices) of every window."""
        together: dict[str, list[Array]] = {}
        for video, index in wanted:
            together.setdefault(video, []).append(index)
        videos = {video: np.unique(np.concatenate(indices)) for video, indices in together.items()}
        first = dict(zip(videos, np.cumsum([0, *map(len, videos.values())]).tolist(), strict=False))
        rows = np.full((len(wanted), max(len(index) for _, index in wanted)), -1)
        for row, (video, index) in zip(rows, wanted, strict=True):
            row[: len(index)] = first[video] + np.searchsorted(videos[video], index)
        return cls(tuple(videos.items()), rows)

    @property
    def count(self) -> int:
        """Distinct frames."""
        return sum(len(index) for _, index in self.videos)

    @property
    def in_order(self) -> bool:
        """Whether the windows are the frames as they are read: nothing is shared, repeated, out of order or short."""
        return bool((self.rows.ravel() == np.arange(self.count)).all()) if self.rows.size == self.count else False


class _Slot:
    """One place of the ring: a buffer per store, and what is still missing in it."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []
        self.pending = 0
        self.error: BaseException | None = None
        self.frames: Frames | None = None


class _Buffer:
    """Memory for rows of one store that only ever grows. Pinned where it is copied to a GPU."""

    def __init__(self, store: FeatureStore, pin: bool) -> None:
        self.store, self.pin = store, pin
        self.rows = self._gathered = store.buffer(0)

    def make_room(self, count: int) -> None:
        """At least ``count`` rows in ``rows``."""
        if len(self.rows) < count:
            self.rows = self._new(count)

    def tensor(self, frames: Frames) -> Tensor:
        """[V, T, *row_shape]: a view of the buffer where it can be one. Zeros after the end of a shorter window."""
        rows = self.rows[: frames.count]
        if not frames.in_order:
            if len(self._gathered) < frames.rows.size:
                self._gathered = self._new(frames.rows.size)
            for target, row in zip(self._gathered, frames.rows.ravel().tolist(), strict=False):
                target[...] = rows[row] if row >= 0 else 0
            rows = self._gathered[: frames.rows.size]
        batch: Tensor = torch.from_numpy(rows).unflatten(0, frames.rows.shape)
        return batch

    def _new(self, count: int) -> Array:
        if not self.pin:
            return self.store.buffer(count)
        memory = torch.empty(count * self.store.layout.stride, dtype=torch.uint8, pin_memory=True)
        return strided_rows(self.store.layout, memory.numpy().data, count)


class Ring:
    """Iterates over batches of stored frames: tensors [V, T, *row_shape], one per store (``features`` decodes int8).

    A batch is valid until the next one is asked for: its buffer is then filled again. Use it as a context manager; on
    leaving, the threads end. An error of a reader is raised where its batch would have come, and names video and shard.

    Args:
        stores: what is read of every batch.
        batches: the order; taken from as buffers become free.
        readers: threads.
        pin: page-locked buffers, for copies to a GPU that run beside the computation.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], batches: Iterable[Frames], *, readers: int = 2, pin: bool = False
    ) -> None:
        self._stores, self._coming, self._pin = tuple(stores), iter(batches), pin
        self._ring_size = readers + 2
        self._free: list[_Slot] = []
        self._made = 0
        self._filling: deque[_Slot] = deque()  # in the order of the batches
        self._out: _Slot | None = None
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._read, daemon=True, name=f"reader-{n}") for n in range(readers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads after the read that each is in. Repeating it does nothing."""
        with self._change:
            self._closed = True
            self._jobs.clear()
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        if self._out is not None:
            self._free.append(self._out)
            self._out = None
        self._fill_free_slots()
        if not self._filling:
            raise StopIteration
        slot = self._filling.popleft()
        with self._change:
            self._change.wait_for(lambda: slot.pending == 0 or slot.error is not None or self._closed)
        if slot.error is not None:
            self.close()
            raise slot.error
        if self._closed or slot.frames is None:
            raise RuntimeError("the ring was closed while it was read")
        self._out = slot
        return tuple(buffer.tensor(slot.frames) for buffer in slot.buffers)

    def _fill_free_slots(self) -> None:
        while self._free or self._made < self._ring_size:
            frames = next(self._coming, None)
            if frames is None:
                return
            if not self._made:
                size = frames.count * sum(store.layout.stride for store in self._stores)
                self._ring_size = max(2, min(self._ring_size, RING_BYTES // max(1, size)))
            self._start(self._free.pop() if self._free else self._new_slot(), frames)

    def _new_slot(self) -> _Slot:
        self._made += 1
        slot = _Slot()
        slot.buffers = [_Buffer(store, self._pin) for store in self._stores]
        return slot

    def _start(self, slot: _Slot, frames: Frames) -> None:
        slot.frames, slot.error, jobs = frames, None, []
        for buffer in slot.buffers:
            buffer.make_room(frames.count)
            first = 0
            for video, index in frames.videos:
                jobs.append(_Job(slot, buffer.store, video, index, buffer.rows[first : first + len(index)]))
                first += len(index)
        self._filling.append(slot)
        with self._change:
            slot.pending = len(jobs)
            self._jobs.extend(jobs)
            self._change.notify_all()

    def _read(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs.popleft()
                ahead = [later for later in list(self._jobs)[: len(self._threads)] if not later.asked]
                for later in ahead:
                    later.asked = True
            error: BaseException | None = None
            try:
                for later in ahead:  # the disk works on the next videos while this one is copied
                    later.store.ask_for(later.video, later.index)
                job.store.read_stored(job.video, job.index, out=job.out)
            except BaseException as caught:  # handed to the consumer, whatever it is
                error = caught
            with self._change:
                job.slot.pending -= 1
                job.slot.error = job.slot.error or error
                self._change.notify_all()


@dataclass
class _Job:
    slot: _Slot
    store: FeatureStore
    video: str
    index: Int[np.ndarray, " n"]
    out: Array
    asked: bool = False


def features(stored: Tensor, store: FeatureStore) -> Tensor:
    """Features [V, T, *frame_shape] of stored rows, on the device that these are on.

    The rows of an int8 store are half the bytes to read and to send; a GPU multiplies them for nothing. The arithmetic
    is that of ``ChannelScale.dequantize``, so the result is the same bit for bit.
    """
    scale, shape = store.layout.info.channel_scale, store.spec.frame_shape
    if scale is None:
        return stored
    scale_bytes = 2 * int(np.prod(shape[:-1]))
    token_scale = stored[..., :scale_bytes].contiguous().view(torch.float16).unflatten(-1, shape[:-1])
    q = stored[..., scale_bytes:].view(torch.int8).unflatten(-1, shape)
    x: Tensor = q.float().mul_(token_scale.float().unsqueeze(-1))
    return x.mul_(torch.from_numpy(scale.values).to(stored.device)).half()


class NotForked:
    """Remembers its process: a copy that came by ``fork`` is refused, one that was pickled (spawn) is not.

    A fork copies locks that threads of the parent hold (zarr and torch have some); the child then waits forever.
    """

    def __init__(self) -> None:
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._process = os.getpid()

    def check(self) -> None:
        """Raise RuntimeError in a forked child."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this data set was forked into a DataLoader worker, which may deadlock; use\n"
                "  DataLoader(..., num_workers=n, multiprocessing_context='spawn')  or  num_workers=0"
            )
