"""Extraction: from video files to committed shards, inline or on Dask workers.

One task is one shard, or the shards of one long video. It is a pure function of (job, task) and publishes by itself,
so it does not matter who runs it, how often, or in what order; a task that somebody else finished does nothing.
Workers return a small report, never features. How a task is worked off is in conveyor.py. Several jobs divide the tasks
of one store without talking: ``part=(3, 8)`` takes every eighth task of the plan, from the third on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from cache_schema import metadata
from cache_schema.errors import SegmentFailed
from cache_schema.objects import StorePath
from cache_schema.plan import Plan, Segment, Task
from cache_schema.quantize import LIMIT, ChannelScale, calibrate
from cache_schema.spec import FeatureSpec
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult
from stages.config import PipelineConfig
from stages.data.frames import open_source
from stages.data.manifest import changed_sources, fitting, why_absent, why_length_differs
from stages.extract.conveyor import make_features, run_tasks
from stages.extract.fitting import Fitting
from stages.stopping import STOP, ignore_stop_signals, whole_steps
from stages.types import FrameSource, FrozenEncoder, VideoRejected

Progress = Callable[[int, int, str], None]
CALIBRATION_VIDEOS, CALIBRATION_FRAMES = 50, 200  # of int8, see cache_schema.quantize
TASKS_AHEAD = 2  # queued per Dask worker: enough to keep it busy, few enough that nothing is stolen and run twice
# Of glibc. Dask has its workers give all freed memory back; the next batch of an encoder then takes it anew.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": 1 << 40, "MALLOC_TOP_PAD_": 64 << 20, "MALLOC_MMAP_MAX_": 0}


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to know; small, and pickled by Dask.

    Args:
        config: the complete configuration.
        builders: import strings of the encoders' ``build`` (lines of pipeline.registry). All read the same frames.
        cache: path of the store.
        device: torch device of the encoder.
        help_command: what to type when the cache does not fit.
        calibration: (video, frame indices) to take the channel scales of a new int8 modality from.
    """

    config: PipelineConfig
    builders: tuple[str, ...]
    cache: StorePath
    device: str
    help_command: str = ""
    calibration: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass
class ExtractionReport:
    """What an extraction did: ``videos`` were asked for; of them the cache now holds ``frames``."""

    videos: int = 0  # asked for
    frames: int = 0
    skipped: int = 0  # of videos: those that were cached before
    failures: dict[str, str] = field(default_factory=dict)  # video -> reason
    elsewhere: tuple[str, ...] = ()  # asked for, but only other parts' tasks hold frames of it
    lacking: int = 0  # of those: not in the cache yet
    part: tuple[int, int] = (1, 1)
    missing: dict[str, str] = field(default_factory=dict)  # asked for, but the source has nothing under the id: why
    left_out: dict[str, str] = field(default_factory=dict)  # video -> why some of its wanted frames cannot be had
    left_out_frames: int = 0
    lengths: dict[str, str] = field(default_factory=dict)  # video -> how its length differs from its annotation
    hdr: dict[str, str] = field(default_factory=dict)  # video -> PQ, HLG or BT.2020 (D82)
    changed: dict[str, str] = field(default_factory=dict)  # video -> how its file was replaced since it was extracted
    touched: int = 0  # videos that may have been replaced, too many to compare
    unannotated: int = 0  # videos of the source that nobody asks for
    clamped: int = 0  # frames past the end of a video, answered with its last one
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The keys that ``--json`` promises, and what else is known."""
        failures = self.failures | self.missing
        return {
            "videos": self.videos,
            "frames": self.frames,
            "failed": len(failures),
            "skipped": self.skipped,
            "failures": [{"video": video, "reason": reason} for video, reason in sorted(failures.items())],
            "missing": len(self.missing),
            "part": list(self.part),
            "other_parts_lack": self.lacking,
            "left_out_frames": self.left_out_frames,
            "left_out": [{"video": video, "reason": reason} for video, reason in sorted(self.left_out.items())],
            "length_differs": [{"video": video, "reason": reason} for video, reason in sorted(self.lengths.items())],
            "hdr": dict(sorted(self.hdr.items())),
            "changed": [{"video": video, "reason": reason} for video, reason in sorted(self.changed.items())],
            "touched": self.touched,
            "unannotated": self.unannotated,
            "clamped_frames": self.clamped,
            "seconds": round(self.seconds, 3),
        }


@functools.lru_cache(maxsize=1)
def tools(job: Job) -> tuple[FrameSource, tuple[FrozenEncoder, ...]]:
    """The open source and the encoders of this process; built once per job. ``release`` closes them."""
    source = open_source(job.config.data)
    return source, tuple(_encoder(job, builder, source) for builder in job.builders)


@functools.lru_cache(maxsize=1)
def worker(job: Job) -> tuple[FrameSource, tuple[FrozenEncoder, ...], dict[str, FeatureStore]]:
    """The tools and the stores that they write; stores that are not there are made."""
    source, encoders = tools(job)
    return source, encoders, open_stores(job, specs_made(encoders), functools.partial(_calibrate, job))


def release(job: Job) -> None:
    """Close the source and forget the encoders of this process."""
    if tools.cache_info().currsize:
        tools(job)[0].close()
    tools.cache_clear()
    worker.cache_clear()


def _encoder(job: Job, builder: str, source: FrameSource) -> FrozenEncoder:
    module, _, name = builder.partition(":")
    build = getattr(importlib.import_module(module), name)
    encoder: FrozenEncoder = build(job.config, device=job.device, frame_rule=source.frame_rule, decoder=source.decoder)
    return Fitting(encoder)


def specs_made(encoders: Sequence[FrozenEncoder]) -> dict[str, FeatureSpec]:
    """What each modality of these encoders is made by."""
    return {modality: spec for encoder in encoders for modality, spec in encoder.specs.items()}


def open_stores(
    job: Job, specs: Mapping[str, FeatureSpec], calibrate: Callable[[str], ChannelScale] | None = None
) -> dict[str, FeatureStore]:
    """Create or open one store per modality; a new int8 one is calibrated first.

    Raises CacheMismatch when an existing one was made otherwise, TooInexact when int8 would spoil the features.
    """
    stores = {}
    for modality, spec in specs.items():
        is_new = spec.dtype == "int8" and not (job.cache / modality / "zarr.json").exists()
        stores[modality] = FeatureStore.create(
            job.cache,
            modality,
            spec,
            shard_frames=job.config.extract.shard_frames,
            help_command=job.help_command,
            channel_scale=calibrate(modality) if is_new and calibrate is not None else None,
        )
    return stores


def calibration_frames(wanted: Mapping[str, Int[np.ndarray, " n"]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """About 200 of the wanted frames, of at most 50 videos: the same for the same wish, whatever its order."""
    rng = np.random.default_rng(0)
    videos = sorted(wanted)
    chosen = [videos[at] for at in rng.permutation(len(videos))[:CALIBRATION_VIDEOS].tolist()]
    each = -(-CALIBRATION_FRAMES // max(1, len(chosen)))
    picks = []
    for video in chosen:
        frames = np.asarray(wanted[video])
        kept = np.sort(rng.permutation(len(frames))[:each])
        picks.append((video, tuple(frames[kept].tolist())))
    return tuple(picks)


def _calibrate(job: Job, modality: str) -> ChannelScale:
    source, encoders = tools(job)
    makers = [encoder for encoder in encoders if modality in encoder.specs]
    parts = []
    for video, index in job.calibration:
        segment = Segment(video, index, 0)
        try:
            made = make_features(source, makers, segment, batch_size=job.config.extract.batch_size)
            parts += [batch[modality] for batch in made.features]
        except SegmentFailed:
            continue  # it will be quarantined by name when its turn comes
    features = np.concatenate(parts) if parts else np.empty((0, 1, 1), np.float16)
    scale = calibrate(features[np.random.default_rng(0).permutation(len(features))])
    print(
        f"{modality} as int8: error {100 * scale.error:.2f} % (limit {100 * LIMIT:.1f} %), smallest cosine "
        f"{scale.min_cosine:.5f}, on frames that the {scale.frames} of the calibration do not include",
        file=sys.stderr,
    )
    return scale


def run_task(job: Job, task: Task) -> dict[str, int]:
    """Extract one task and publish it (on a Dask worker); returns counts only."""
    source, encoders, stores = worker(job)
    frames = run_tasks([task], source, encoders, stores, batch_size=job.config.extract.batch_size)
    return {"videos": len(task.segments), "frames": frames}


def features_of(job: Job, segment: Segment) -> SegmentResult[Mapping[str, np.ndarray]]:
    """Features as an extraction makes them, for those who write no task: repair and semantic checks."""
    source, encoders = tools(job)
    return make_features(source, encoders, segment, batch_size=job.config.extract.batch_size)


def specs_of(job: Job) -> dict[str, FeatureSpec]:
    """The specs of the job's encoders (a Dask worker answers this: the client needs no copy of the weights)."""
    return specs_made(worker(job)[1])


def extract(
    job: Job,
    wanted: Mapping[str, Int[np.ndarray, " n"]],
    *,
    workers: int = 0,
    retry_failed: bool = False,
    part: tuple[int, int] = (1, 1),
    unseen_s: float = 2.0,
    progress: Progress = lambda *_: None,
) -> ExtractionReport:
    """Bring every wanted frame that its video has into the cache; what is there already is not touched.

    Args:
        wanted: video -> sorted unique frame indices.
        workers: Dask worker processes; 0 runs in this process.
        retry_failed: try the quarantined videos again.
        part: (i, n): only the tasks i, i + n, … of the plan; the other parts are left to other jobs.
        unseen_s: seconds at the end of a video that annotations leave out by design.
        progress: called with (videos done, videos to do, name).

    Raises:
        cache_schema.errors.CacheMismatch: the store at this path was made with other settings.
        OSError: the disk is full, or cannot be written; nothing committed is harmed.
    """
    started = time.monotonic()
    report = ExtractionReport(videos=len(wanted), part=part)
    with contextlib.closing(open_source(job.config.data)) as source:
        report.missing = _missing(source, wanted)
        report.unannotated = len(source.unasked(wanted))
        store = _existing(job.cache)
        if store is not None:
            report.changed, report.touched = changed_sources(store, source, sorted(wanted))
        present = {video: frames for video, frames in wanted.items() if video not in report.missing}
        present = _fitting(source, present, store.plan if store else None, max(1, workers), progress)
    job = replace(job, calibration=calibration_frames(present))
    with _Engine(job, workers) as engine:
        stores = list(open_stores(job, engine.specs()).values())
        if present:
            stores[0].extend_plan(present)
        everything, present = present, _of_part(stores[0].plan, present, part)
        before = set(present) - set(_gaps(stores, present))
        tasks = _pending(stores, present, part, retry_failed=retry_failed)
        with whole_steps(STOP) as stopping:  # Ctrl-C drops the shard at hand; a batch system has time for it
            engine.run(tasks, progress, stopping)
        stores[0].finalize()
    report.seconds = time.monotonic() - started
    for video, gap in _gaps(stores, present).items():
        report.failures[video] = gap
    others = {video: frames for video, frames in everything.items() if video not in present}
    report.elsewhere, report.lacking = tuple(others), len(_gaps(stores, others))
    done = [video for video in present if video not in report.failures]
    report.videos, report.frames = len(present) + len(report.missing), sum(len(present[video]) for video in done)
    report.skipped = len(before & set(done))
    for video in done:
        _note_facts(
            report, video, wanted[video], everything[video], stores[0].facts(video), job.config.data.fps, unseen_s
        )
    return report


def _missing(source: FrameSource, wanted: Mapping[str, Int[np.ndarray, " n"]]) -> dict[str, str]:
    """Video -> why the source has nothing under its id."""
    missing = {}
    for video in sorted(wanted):
        if not source.has(video):
            try:
                source.file(video)
            except VideoRejected as rejected:
                missing[video] = rejected.reason
    return missing


def _existing(cache: StorePath) -> FeatureStore | None:
    """One modality of a store, for what all of them share; None where there is none yet."""
    names = metadata.list_modalities(cache) if (cache / "zarr.json").exists() else ()
    return FeatureStore.open(cache, min(names)) if names else None


def _fitting(
    source: FrameSource,
    wanted: Mapping[str, Int[np.ndarray, " n"]],
    planned: Plan | None,
    threads: int,
    progress: Progress,
) -> dict[str, Int[np.ndarray, " m"]]:
    """The wanted frames that each video has; only videos with frames that are not planned yet are asked.

    A video that cannot be asked keeps all its frames: its extraction says why.
    """
    fits = dict(wanted)
    new = [v for v, frames in wanted.items() if planned is None or (planned.find(v, frames) < 0).any()]

    def ask(video: str) -> Int[np.ndarray, " n"]:
        try:
            return fitting(np.asarray(wanted[video]), source.extent(video))
        except VideoRejected:
            return wanted[video]

    with ThreadPoolExecutor(threads) as pool:
        for number, (video, frames) in enumerate(zip(new, pool.map(ask, new), strict=True)):
            fits[video] = frames
            if number % 100 == 99:
                progress(number + 1, len(new), "asking videos for their length")
    return fits


def _note_facts(
    report: ExtractionReport,
    video: str,
    wanted: Int[np.ndarray, " n"],
    present: Int[np.ndarray, " m"],
    facts: Mapping[str, object],
    fps: float,
    unseen_s: float,
) -> None:
    report.clamped += _clamped(facts)
    if len(present) < len(wanted):
        absent = np.setdiff1d(wanted, present)
        report.left_out_frames += len(absent)
        reason = why_absent(absent.tolist(), facts)
        report.left_out[video] = f"{len(absent)} of {len(wanted)} frames cannot be had: {reason}"
    count = facts.get("count")
    if isinstance(count, int) and (differs := why_length_differs(np.asarray(wanted), count, fps, unseen_s=unseen_s)):
        report.lengths[video] = differs
    if hdr := facts.get("hdr"):
        report.hdr[video] = str(hdr)


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


def _tasks_of(plan: Plan, part: tuple[int, int]) -> tuple[Task, ...]:
    """Every n-th task of the plan from the i-th on: jobs that never talk agree on who does which."""
    number, parts = part
    return plan.tasks()[number - 1 :: parts]


def _of_part(plan: Plan, wanted: Mapping[str, Int[np.ndarray, " n"]], part: tuple[int, int]) -> dict[str, np.ndarray]:
    """The wanted frames that lie in the tasks of this part."""
    if part == (1, 1):
        return dict(wanted)
    planned: dict[str, list[int]] = {}
    for segment in (segment for task in _tasks_of(plan, part) for segment in task.segments):
        planned.setdefault(segment.video_id, []).extend(segment.frame_index)
    shares = {video: np.intersect1d(wanted[video], planned[video]) for video in wanted if video in planned}
    return {video: frames for video, frames in shares.items() if len(frames)}


def _pending(
    stores: Sequence[FeatureStore],
    wanted: Mapping[str, Int[np.ndarray, " n"]],
    part: tuple[int, int],
    *,
    retry_failed: bool,
) -> list[Task]:
    """Tasks of this part that some store lacks and that hold a wanted video, in shard order, each once."""
    tasks = {task.shards: task for store in stores for task in store.pending(retry_failed=retry_failed)}
    if part != (1, 1):
        mine = {task.shards for task in _tasks_of(stores[0].plan, part)}
        tasks = {shards: task for shards, task in tasks.items() if shards in mine}
    return [tasks[key] for key in sorted(tasks) if any(s.video_id in wanted for s in tasks[key].segments)]


class _Engine:
    """Runs tasks inline, or on a local Dask cluster of ``workers`` processes."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers = job, workers

    def __enter__(self) -> _Engine:
        if self.workers:
            from dask import config
            from distributed import Client, LocalCluster, Security

            spawn = "distributed.nanny.pre-spawn-environ"
            with config.set({f"{spawn}.{name}": value for name, value in KEEP_FREED.items()}):
                self.cluster = LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=1,
                    dashboard_address=None,
                    host="127.0.0.1",
                    # Whoever can talk to a scheduler can run code as its owner, and other users reach 127.0.0.1 too. A
                    # key that is only in the memory of these processes keeps them out, in both directions (D76).
                    security=Security.temporary(),
                )
            self.client = Client(self.cluster)
            self.client.run(ignore_stop_signals)  # those of a process group or job step reach the workers as well
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

    def run(self, tasks: Sequence[Task], progress: Progress, stopping: Callable[[], bool]) -> None:
        """Run all; raises what a task raised. When ``stopping``, those at work are finished and no others are begun."""
        total = sum(len(task.segments) for task in tasks)

        def count(videos: int, name: str) -> None:
            progress(min(videos, total), total, name)

        work = self._on_workers if self.workers else self._inline
        work(tasks, count, stopping)

    def _inline(
        self, tasks: Sequence[Task], progress: Callable[[int, str], None], stopping: Callable[[], bool]
    ) -> None:
        videos = 0

        def count(video: str) -> None:
            nonlocal videos
            videos += 1
            progress(videos, video)

        source, encoders, stores = worker(self.job)
        batch_size = self.job.config.extract.batch_size
        run_tasks(tasks, source, encoders, stores, batch_size=batch_size, on_video=count, stopping=stopping)

    def _on_workers(
        self, tasks: Sequence[Task], progress: Callable[[int, str], None], stopping: Callable[[], bool]
    ) -> None:
        from distributed import as_completed

        waiting, videos = iter(tasks), 0
        futures = as_completed(with_results=True)

        def submit(count: int) -> None:
            for task in [] if stopping() else _take(waiting, count):
                futures.add(self._submit(task))

        submit(TASKS_AHEAD * self.workers)
        for _, result in futures:
            videos += result["videos"]
            progress(videos, "")
            submit(1)

    def _submit(self, task: Task) -> Any:
        # A task may run again after its worker died, even when it had finished: it then finds its shard committed.
        return self.client.submit(run_task, self.job, task, key=f"shard-{task.shards[0]:06}", pure=False, retries=3)


def _take(tasks: Iterator[Task], count: int) -> list[Task]:
    return [task for _, task in zip(range(count), tasks, strict=False)]
