"""Extraction: from video files to committed shards, inline or on Dask workers.

One task is one shard, or the shards of one long video. It is a pure function of (job, task) and publishes by itself,
so it does not matter who runs it, how often, or in what order; a task that somebody else finished does nothing.
Workers return a small report, never features. Several extractions of one store share its tasks by claims
(cache_schema/claims.py), so that none is done twice.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from cache_schema import claims
from cache_schema.plan import Segment, Task
from cache_schema.spec import FeatureSpec
from cache_schema.store import FeatureStore, SegmentFailed, SegmentResult, write_tasks_together
from cache_schema.write import close_features
from stages.config import PipelineConfig
from stages.data.frames import open_source
from stages.types import FrameSource, FrozenEncoder, VideoRejected

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Produce = Callable[[Segment], SegmentResult[Mapping[str, np.ndarray]]]
TASKS_AHEAD = 2  # queued per Dask worker: enough to keep it busy, few enough that nothing is stolen and run twice
PAUSE_S = 1.0  # before asking again for a task that another extraction has claimed


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to know; small, and pickled by Dask.

    Args:
        config: the complete configuration.
        builder: import string of the encoder's ``build`` (a line of pipeline.registry).
        cache: path of the store.
        device: torch device of the encoder.
        help_command: what to type when the cache does not fit.
    """

    config: PipelineConfig
    builder: str
    cache: Path
    device: str
    help_command: str = ""


@dataclass
class ExtractionReport:
    """What an extraction did: ``videos`` were asked for; of them the cache now holds ``frames``."""

    videos: int = 0  # asked for
    frames: int = 0
    skipped: int = 0  # of videos: those that were cached before
    failures: dict[str, str] = field(default_factory=dict)  # video -> reason
    missing: tuple[str, ...] = ()  # asked for, but the source has nothing under the id
    clamped: int = 0  # frames past the end of a video, answered with its last one
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The keys that ``--json`` promises, and what else is known."""
        failures = dict(self.failures) | dict.fromkeys(self.missing, "no such video in data.videos")
        return {
            "videos": self.videos,
            "frames": self.frames,
            "failed": len(failures),
            "skipped": self.skipped,
            "failures": [{"video": video, "reason": reason} for video, reason in sorted(failures.items())],
            "missing": len(self.missing),
            "clamped_frames": self.clamped,
            "seconds": round(self.seconds, 3),
        }


@functools.lru_cache(maxsize=1)
def tools(job: Job) -> tuple[FrameSource, FrozenEncoder]:
    """The open source and the encoder of this process; built once per job. ``release`` closes them."""
    source = open_source(job.config.data)
    module, _, name = job.builder.partition(":")
    build = getattr(importlib.import_module(module), name)
    return source, build(job.config, device=job.device, frame_rule=source.frame_rule, decoder=source.decoder)


@functools.lru_cache(maxsize=1)
def worker(job: Job) -> tuple[FrameSource, FrozenEncoder, dict[str, FeatureStore]]:
    """The tools and the stores that they write; stores that are not there are made."""
    source, encoder = tools(job)
    return source, encoder, open_stores(job, encoder.specs)


def release(job: Job) -> None:
    """Close the source and forget the encoder of this process."""
    if tools.cache_info().currsize:
        tools(job)[0].close()
    tools.cache_clear()
    worker.cache_clear()


def open_stores(job: Job, specs: Mapping[str, FeatureSpec]) -> dict[str, FeatureStore]:
    """Create or open one store per modality. Raises CacheMismatch when an existing one was made otherwise."""
    return {
        modality: FeatureStore.create(
            job.cache,
            modality,
            spec,
            shard_frames=job.config.extract.shard_frames,
            help_command=job.help_command,
        )
        for modality, spec in specs.items()
    }


def producer(job: Job, on_video: Callable[[str], None] = lambda _: None) -> Produce:
    """Features of all modalities for any frames of any video, from the job's source and encoder."""
    source, encoder = tools(job)

    def produce(segment: Segment) -> SegmentResult[Mapping[str, np.ndarray]]:
        def batches() -> Iterator[Mapping[str, np.ndarray]]:
            index = np.asarray(segment.frame_index)
            try:
                for frames in source.frames(segment.video_id, index, batch_size=job.config.extract.batch_size):
                    yield encode(encoder, frames)
            except VideoRejected as rejected:
                raise SegmentFailed(rejected.kind, rejected.reason) from rejected
            finally:
                on_video(segment.video_id)

        return SegmentResult(batches(), facts=lambda: asdict(source.facts(segment.video_id)))

    return produce


def encode(encoder: FrozenEncoder, frames: UInt8[np.ndarray, "b h w 3"]) -> Mapping[str, np.ndarray]:
    """The encoder on a batch; when that is too much for the memory, once more on its two halves.

    Features do not depend on the batch size, so neither does the store.
    """
    try:
        return _encode(encoder, frames)
    except Exception as error:
        if len(frames) < 2 or not _out_of_memory(error):
            raise
    half = len(frames) // 2
    log.warning("%d frames at once are too much for the memory; going on with %d", len(frames), half)
    parts = [_encode(encoder, frames[:half]), _encode(encoder, frames[half:])]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _encode(encoder: FrozenEncoder, frames: UInt8[np.ndarray, "b h w 3"]) -> Mapping[str, np.ndarray]:
    try:
        return encoder(frames)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        size = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} at once"
        if type(error) is RuntimeError:  # what torch raises on a CPU
            raise MemoryError(f"{size}: {error}") from error
        error.add_note(f"That was with {size}.")
        raise


def _out_of_memory(error: Exception) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}  # torch is not imported here for its class alone
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "can't allocate memory" in str(error)


def run_task(job: Job, task: Task, on_video: Callable[[str], None] = lambda _: None) -> dict[str, int] | None:
    """Extract one task and publish it; returns counts only, or None while another extraction is at it.

    Safe to run twice, and in two places at once.
    """
    _, _, stores = worker(job)
    first = stores[min(stores)]  # claims of one job lie with one modality: the clip and the teacher never wait
    claim = claims.take(first.layout.info.folder, task.shards[0])
    if claim is None:
        return None
    with claim:
        produce = producer(job, on_video)

        def watched(segment: Segment) -> SegmentResult[Mapping[str, np.ndarray]]:
            result = produce(segment)
            return SegmentResult(_touching(claim, result.features), result.facts)

        reports = write_tasks_together(stores, task, watched)
    return {"videos": len(task.segments), "frames": max(report.frames for report in reports.values())}


def _touching(claim: claims.Claim, batches: Iterator[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, np.ndarray]]:
    try:
        for batch in batches:
            claim.touch()
            yield batch
    finally:
        close_features(batches)


def specs_of(job: Job) -> dict[str, FeatureSpec]:
    """The specs of the job's encoder (a Dask worker answers this, so that the client needs no copy of the weights)."""
    return worker(job)[1].specs


def extract(
    job: Job,
    wanted: Mapping[str, Int[np.ndarray, " n"]],
    *,
    workers: int = 0,
    retry_failed: bool = False,
    progress: Progress = lambda *_: None,
) -> ExtractionReport:
    """Bring every wanted frame into the cache; what is there already is not touched.

    Args:
        wanted: video -> sorted unique frame indices.
        workers: Dask worker processes; 0 runs in this process.
        retry_failed: try the quarantined videos again.
        progress: called with (videos done, videos to do, name).

    Raises:
        cache_schema.errors.CacheMismatch: the store at this path was made with other settings.
        OSError: the disk is full, or cannot be written; nothing committed is harmed.
    """
    started = time.monotonic()
    source = open_source(job.config.data)
    try:
        missing = tuple(video for video in sorted(wanted) if not source.has(video))
    finally:
        source.close()
    present = {video: frames for video, frames in wanted.items() if video not in set(missing)}
    with _Engine(job, workers) as engine:
        stores = list(open_stores(job, engine.specs()).values())
        if present:
            stores[0].extend_plan(present)
        before = set(present) - set(_gaps(stores, present))
        tasks = _pending(stores, present, retry_failed=retry_failed)
        engine.run(tasks, progress)
        stores[0].finalize()
    report = ExtractionReport(missing=missing, seconds=time.monotonic() - started)
    for video, gap in _gaps(stores, present).items():
        report.failures[video] = gap
    done = [video for video in present if video not in report.failures]
    report.videos, report.frames = len(wanted), sum(len(present[video]) for video in done)
    report.skipped = len(before & set(done))
    report.clamped = sum(_clamped(stores[0].facts(video)) for video in done)
    return report


def _gaps(stores: Sequence[FeatureStore], wanted: Mapping[str, Int[np.ndarray, " n"]]) -> dict[str, str]:
    """Video -> why some modality lacks some of its frames."""
    gaps: dict[str, str] = {}
    for store in stores:
        for video, gap in store.missing(wanted).items():
            gaps.setdefault(video, gap.reason or str(gap))
    return gaps


def _clamped(facts: Mapping[str, object]) -> int:
    count = facts.get("clamped", 0)
    return count if isinstance(count, int) else 0


def _pending(
    stores: Sequence[FeatureStore], wanted: Mapping[str, Int[np.ndarray, " n"]], *, retry_failed: bool
) -> list[Task]:
    """Tasks that some store lacks and that hold a wanted video, in shard order, each once."""
    tasks = {task.shards: task for store in stores for task in store.pending(retry_failed=retry_failed)}
    return [tasks[key] for key in sorted(tasks) if any(s.video_id in wanted for s in tasks[key].segments)]


class _Engine:
    """Runs tasks inline, or on a local Dask cluster of ``workers`` processes."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers, self.rounds = job, workers, 0

    def __enter__(self) -> _Engine:
        if self.workers:
            from distributed import Client, LocalCluster

            self.cluster = LocalCluster(
                n_workers=self.workers, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
            )
            self.client = Client(self.cluster)
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers:
            self.client.close()
            self.cluster.close()
        else:
            release(self.job)

    def specs(self) -> dict[str, FeatureSpec]:
        if self.workers:
            specs: dict[str, FeatureSpec] = self.client.submit(specs_of, self.job, pure=False).result()
            return specs
        return specs_of(self.job)

    def run(self, tasks: Sequence[Task], progress: Progress) -> None:
        """Run all, those that another extraction has claimed last; raises what a task raised."""
        total = sum(len(task.segments) for task in tasks)
        done = 0
        while tasks:

            def count(videos: int, name: str, before: int = done) -> None:
                progress(min(before + videos, total), total, name)

            busy = self._on_workers(tasks, count) if self.workers else self._inline(tasks, count)
            done = total - sum(len(task.segments) for task in busy)
            if len(busy) == len(tasks):
                progress(done, total, "waiting for another extraction")
                time.sleep(PAUSE_S)
            tasks = busy

    def _inline(self, tasks: Sequence[Task], progress: Callable[[int, str], None]) -> list[Task]:
        """Run what is free in this process; returns the tasks that are not."""
        busy, videos = [], 0

        def count(video: str) -> None:
            nonlocal videos
            videos += 1
            progress(videos, video)

        for task in tasks:
            if run_task(self.job, task, count) is None:
                busy.append(task)
        return busy

    def _on_workers(self, tasks: Sequence[Task], progress: Callable[[int, str], None]) -> list[Task]:
        """The same on the cluster."""
        from distributed import as_completed

        waiting, running, busy, videos = iter(tasks), {}, [], 0
        futures = as_completed(with_results=True)

        def submit(count: int) -> None:
            for task in _take(waiting, count):
                future = self._submit(task)
                running[future.key] = task
                futures.add(future)

        self.rounds += 1
        submit(TASKS_AHEAD * self.workers)
        for future, result in futures:
            task = running.pop(future.key)
            if result is None:
                busy.append(task)
            else:
                videos += result["videos"]
                progress(videos, "")
            submit(1)
        return busy

    def _submit(self, task: Task) -> Any:
        # A task may run again after its worker died, even when it had finished: it then finds its shard committed.
        key = f"shard-{task.shards[0]:06}-{self.rounds}"
        return self.client.submit(run_task, self.job, task, key=key, pure=False, retries=3)


def _take(tasks: Iterator[Task], count: int) -> list[Task]:
    return [task for _, task in zip(range(count), tasks, strict=False)]
