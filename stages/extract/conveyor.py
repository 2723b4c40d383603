"""Three threads, one after another along a task: read and resize, encode, write. The encoder never waits for the rest.

    reader thread                       caller's thread                   writer thread
    frames, resized                -->  encoder, one batch at a time  --> checksums, disk, fsync, publication

The encoder runs in the caller's thread, so that a signal's exception ends it between two of its operations. Whatever
ends a line, an error travels along it in its place: what came before is still written, and its video is named.

``make_features`` gives the same features one segment at a time, in the caller's thread, to those who write no tasks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from cache_schema.errors import CacheMissing, SegmentFailed
from cache_schema.plan import Segment, Task
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, write_task
from stages.types import FrameSource, FrozenEncoder, VideoRejected

# Batches and ends of videos that wait between two threads: enough to absorb a slow start of a video or a slow disk.
# More would only hold memory: a batch of 16 is 6 MB of pictures, and 12 MB of EVA-g tokens.
AHEAD = 4
GRACE_S = 1.0  # for the reader to notice that nobody wants more; then its decoder is ended


class Stopped(Exception):
    """The other side of a channel wants no more."""


class Channel:
    """A bounded queue that can be stopped. Made of two SimpleQueues, because those survive a signal's exception."""

    def __init__(self, size: int) -> None:
        self._room: SimpleQueue[Any] = SimpleQueue()
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False
        for _ in range(size):
            self._room.put(None)

    def put(self, item: object) -> None:
        """Waits for room. Raises Stopped."""
        self._take(self._room)
        self._items.put(item)

    def get(self) -> Any:
        """Waits for an item. Raises Stopped, also where items are left."""
        item = self._take(self._items)
        self._room.put(None)
        return item

    def stop(self) -> None:
        """Both sides raise Stopped from now on."""
        self._stopped = True
        self._room.put(None)
        self._items.put(None)

    def _take(self, queue: SimpleQueue[Any]) -> Any:
        item = None if self._stopped else queue.get()
        if self._stopped:
            queue.put(None)  # for another thread that waits here
            raise Stopped
        return item


@dataclass(frozen=True)
class Begin:
    """A task, and the encoders that still owe it something."""

    task: Task
    encoders: Sequence[FrozenEncoder]


@dataclass(frozen=True)
class Batch:
    """Consecutive frames of a segment: pictures on the way to the encoder, features behind it."""

    segment: Segment
    content: Any  # list of Tensor, one per encoder; then Mapping modality -> array


@dataclass(frozen=True)
class End:
    """A segment is over: with the source's facts, or with the reason why its video is rejected."""

    segment: Segment
    facts: Mapping[str, object] | None
    rejected: VideoRejected | None = None


@dataclass(frozen=True)
class Failed:
    """What went wrong upstream. None: nothing, this is the end."""

    error: BaseException | None


def run_tasks(
    tasks: Sequence[Task],
    source: FrameSource,
    encoders: Sequence[FrozenEncoder],
    stores: Mapping[str, FeatureStore],
    *,
    batch_size: int,
    on_video: Callable[[str], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Extract tasks and publish them, in order; returns the frames written. Safe to run twice, and in two places.

    An encoder is not run for a task that all its modalities have. ``on_video`` is called in the caller's thread, when
    the last frame of a video is encoded. Before each task ``stopping`` is asked: no further one is begun then.

    Raises:
        Whatever source, encoder or disk raises, with a note that names the video; partial files are gone then.
        CacheMissing: a shard of these tasks was removed meanwhile.
    """
    return _Line(source, stores, batch_size, stopping).run(tasks, encoders, on_video)


def make_features(
    source: FrameSource, encoders: Sequence[FrozenEncoder], segment: Segment, *, batch_size: int
) -> SegmentResult[Mapping[str, np.ndarray]]:
    """Features of all modalities for any frames of any video, as they are asked for."""

    facts: dict[str, object] = {}

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        index = np.asarray(segment.frame_index)
        try:
            with naming(segment.video_id):
                reading = source.frames(segment.video_id, index, batch_size=batch_size)
                for frames in reading:
                    yield _encoded(encoders, [encoder.view(frames) for encoder in encoders])
        except VideoRejected as rejected:
            raise SegmentFailed(rejected.kind, rejected.reason) from rejected
        facts.update(asdict(reading.facts))

    return SegmentResult(batches(), facts=lambda: facts)


class _Line:
    def __init__(
        self,
        source: FrameSource,
        stores: Mapping[str, FeatureStore],
        batch_size: int,
        stopping: Callable[[], bool],
    ) -> None:
        self.source, self.stores, self.batch_size, self.stopping = source, stores, batch_size, stopping
        self.pictures, self.features = Channel(AHEAD), Channel(AHEAD)
        self.frames = 0
        self.write_error: BaseException | None = None

    def run(self, tasks: Sequence[Task], encoders: Sequence[FrozenEncoder], on_video: Callable[[str], None]) -> int:
        reader = threading.Thread(target=self._read, args=(tasks, encoders), name="extract-read", daemon=True)
        writer = threading.Thread(target=self._write, name="extract-write", daemon=True)
        reader.start()
        writer.start()
        try:
            self._encode(on_video)
        except BaseException as error:
            self.pictures.stop()
            self._tell_writer(error)
            writer.join()
            raise (self.write_error if isinstance(error, Stopped) and self.write_error else error) from None
        finally:
            self.pictures.stop()
            self._end_reader(reader)
        writer.join()
        if self.write_error is not None:
            raise self.write_error
        return self.frames

    def _tell_writer(self, error: BaseException) -> None:
        with contextlib.suppress(Stopped):  # it has failed itself
            self.features.put(Failed(error))

    def _end_reader(self, reader: threading.Thread) -> None:
        reader.join(GRACE_S)
        if reader.is_alive():  # inside a decoder that hangs, or a slow network
            self.source.close()
            reader.join(GRACE_S)

    # ------------------------------------------------------------ reader thread

    def _read(self, tasks: Sequence[Task], encoders: Sequence[FrozenEncoder]) -> None:
        with contextlib.suppress(Stopped):
            try:
                for task in tasks:
                    self._read_task(task, encoders)
            except Stopped:
                raise
            except Exception as error:
                self.pictures.put(Failed(error))
            else:
                self.pictures.put(Failed(None))

    def _read_task(self, task: Task, encoders: Sequence[FrozenEncoder]) -> None:
        owing = [encoder for encoder in encoders if self._owes(encoder, task)]
        if not owing:
            return
        self.pictures.put(Begin(task, owing))
        stores = [self.stores[name] for encoder in owing for name in encoder.specs]
        for segment in task.segments:
            # Of a task that is tried again, the writer copies the good videos.
            if any(store.missing({segment.video_id: segment.frame_index}) for store in stores):
                with naming(segment.video_id):
                    self._read_segment(segment, owing)

    def _owes(self, encoder: FrozenEncoder, task: Task) -> bool:
        return any(lacks(self.stores[name], task) for name in encoder.specs)

    def _read_segment(self, segment: Segment, encoders: Sequence[FrozenEncoder]) -> None:
        index = np.asarray(segment.frame_index)
        try:
            reading = self.source.frames(segment.video_id, index, batch_size=self.batch_size)
            for frames in reading:
                self.pictures.put(Batch(segment, [encoder.view(frames) for encoder in encoders]))
            facts = asdict(reading.facts)
        except VideoRejected as rejected:
            self.pictures.put(End(segment, None, rejected))
        else:
            self.pictures.put(End(segment, facts))

    # ------------------------------------------------------------ caller's thread

    def _encode(self, on_video: Callable[[str], None]) -> None:
        encoders: Sequence[FrozenEncoder] = ()
        while True:
            item = self.pictures.get()
            match item:
                case Begin() if self.stopping():
                    item = Failed(None)
                case Begin():
                    encoders = item.encoders
                case Batch(segment, pictures):
                    with naming(segment.video_id):
                        item = Batch(segment, _encoded(encoders, pictures))
            self.features.put(item)
            match item:
                case End(segment):
                    on_video(segment.video_id)
                case Failed(error) if error is not None:
                    raise error
                case Failed():
                    return

    # ------------------------------------------------------------ writer thread

    def _write(self) -> None:
        try:
            while True:
                match self.features.get():
                    case Begin(task, encoders):
                        self._write_task(task, {n: self.stores[n] for e in encoders for n in e.specs})
                    case Failed():
                        return
        except BaseException as error:
            self.write_error = error
        finally:
            self.features.stop()

    def _write_task(self, task: Task, stores: Mapping[str, FeatureStore]) -> None:
        facts: dict[str, Mapping[str, object]] = {}

        def produce(segment: Segment) -> SegmentResult[Mapping[str, np.ndarray]]:
            return SegmentResult(self._features_of(segment, facts), facts=lambda: facts[segment.video_id])

        reports = write_task(stores, task, produce)
        self.frames += max(report.frames for report in reports.values())

    def _features_of(
        self, segment: Segment, facts: dict[str, Mapping[str, object]]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """What comes along for one segment; leftovers of a video that was given up before are dropped."""
        while True:
            match self.features.get():
                case Batch(of, features) if of == segment:
                    yield features
                case End(of, known, rejected) if of == segment:
                    if rejected is not None:
                        raise SegmentFailed(rejected.kind, rejected.reason) from rejected
                    assert known is not None
                    facts[segment.video_id] = known
                    return
                case Failed(error) if error is not None:
                    raise error
                case Begin() | Failed():
                    raise CacheMissing(f"video {segment.video_id!r} went from the cache while others were tried again")


def _encoded(encoders: Sequence[FrozenEncoder], pictures: Sequence[Tensor]) -> dict[str, np.ndarray]:
    features: dict[str, np.ndarray] = {}
    for encoder, picture in zip(encoders, pictures, strict=True):
        features |= encoder.encode(picture)
    return features


def lacks(store: FeatureStore, task: Task) -> bool:
    """Whether a store has not committed all of a task, or is to try its failed videos again."""
    shards = [store.shard(number) for number in task.shards]
    return any(shard is None or (task.retry and bool(shard.failed)) for shard in shards)


@contextlib.contextmanager
def naming(video_id: str) -> Iterator[None]:
    """Adds the video to an error that passes through."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Stopped):
            error.add_note(f"It happened at video {video_id!r}.")
        raise
