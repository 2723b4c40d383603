"""What the ``pipeline cache`` commands do between reading their options and printing: each returns what --json prints.

Nothing here loads torch unless features must be made again.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cache_schema import export as exports
from cache_schema import files, metadata, orphans, verify
from cache_schema.copy import copy_store
from cache_schema.errors import CacheCorrupt, CacheError, CacheMissing
from cache_schema.objects import StorePath
from cache_schema.repair import Produce, repair_shard
from cache_schema.report import SourceFile
from cache_schema.shard import identity_now
from cache_schema.store import FeatureStore
from cache_schema.verify import Problem
from pipeline.errors import ConfigError
from pipeline.progress import OnProgress

if TYPE_CHECKING:
    from stages.config import PipelineConfig

Which = Literal["clip", "teacher"]
ENCODER_OF: dict[str, Which] = {"tokens": "clip", "pooled": "teacher"}  # by the first part of a modality's name
DEPTH = 4  # how far below a folder stores are looked for


class Options:
    """What every command is told: the store, and the settings that its encoders are made from."""

    def __init__(self, config: PipelineConfig, sets: Sequence[str], cache: StorePath) -> None:
        self.config, self.sets, self.cache = config, list(sets), cache

    def command(self, *words: str) -> str:
        """What to type next, on the same store with the same settings."""
        sets = [part for item in self.sets for part in ("--set", item)]
        return shlex.join(["pipeline", *words, "--preset", self.config.preset, "--cache", str(self.cache), *sets])

    def fitted(self, stores: Mapping[str, FeatureStore]) -> Options:
        """The same with the preset, and the settings besides, that make the features of these stores.

        Without ``--preset`` a store may be anybody's; a command of another preset would be refused, or fill it with
        other features.
        """
        from pipeline import inputs, presets
        from pipeline.overrides import apply

        def wrong(config: PipelineConfig) -> dict[str, dict[str, object]]:
            encoders = {name: _which(store) for name, store in stores.items() if "/" not in name or _main(name, config)}
            return {name: inputs.differing(stores[name], config, which) for name, which in encoders.items()}

        def distance(config: PipelineConfig) -> int:
            return sum(map(len, wrong(config).values()))

        names = list(dict.fromkeys((self.config.preset, *presets.PRESETS)))
        configs = [self.config, *(apply(presets.get(name), self.sets) for name in names[1:])]
        best = min(configs, key=distance)  # the first of equals
        more = [
            item
            for name, fields in wrong(best).items()
            for item in inputs.settings_of(stores[name], best, _which(stores[name]), fields)
        ]
        return Options(apply(best, more), [*self.sets, *dict.fromkeys(more)], self.cache)

    def stores(self, *, lost: bool = False) -> dict[str, FeatureStore]:
        """All modalities. Raises CacheMissing where there is no store, CacheCorrupt for damaged metadata.

        Args:
            lost: go on where the zarr.json of a modality is gone, with the others.
        """
        metadata.read_group(self.cache)
        names = metadata.list_modalities(self.cache)
        gone = verify.lost(self.cache)
        for name, problem in [] if lost else gone:
            raise CacheCorrupt(f"{problem.message}:\n  {self.extract(name)}")
        if not names and not gone:
            raise CacheMissing(f"{self.cache} holds no features yet. Make them with:\n  {self.extract('tokens')}")
        return {name: FeatureStore.open(self.cache, name, help_command=self.extract(name)) for name in sorted(names)}

    def extract(self, modality: str) -> str:
        """The command that makes a modality."""
        return self.command(f"extract-{ENCODER_OF.get(modality.partition('/')[0], 'clip')}")


# ---------------------------------------------------------------- what is there


def list_stores(place: StorePath) -> dict[str, Any]:
    """Every store below a folder or prefix: modalities with videos, frames, bytes and the digest of their settings."""
    if not place.is_dir():
        raise ConfigError(f"{place} holds nothing.\nName a folder or s3://… with stores:  pipeline cache ls FOLDER")
    return {"stores": [_describe(store) for store in sorted(_find_stores(place, DEPTH), key=str)]}


def _find_stores(place: StorePath, depth: int) -> Iterator[StorePath]:
    with contextlib.suppress(FileNotFoundError, PermissionError, ValueError):
        attributes = json.loads(files.read_bytes(place / "zarr.json", files.MAX_METADATA_BYTES)).get("attributes")
        if (attributes or {}).get("format") == metadata.FORMAT:
            yield place
            return
    if depth:
        with contextlib.suppress(PermissionError):
            for folder in files.folders_in(place):
                yield from _find_stores(folder, depth - 1)


def _describe(store: StorePath) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(store), "modalities": []}
    try:
        metadata.read_group(store)
        for name in metadata.list_modalities(store):
            facts["modalities"].append(_describe_modality(FeatureStore.open(store, name)))
        for _, problem in verify.lost(store):
            facts["error"] = problem.message
    except CacheError as error:
        facts["error"] = str(error)
    return facts


def _describe_modality(store: FeatureStore) -> dict[str, Any]:
    facts: dict[str, Any] = {"modality": store.modality, "digest": store.spec.digest(), "encoder": store.spec.encoder}
    try:
        status = store.status()
        good = [entry for entry in status.values() if entry.ok]
        facts |= {
            "videos": len(good),
            "failed": len(status) - len(good),
            "planned": len(store.plan.videos),
            "frames": sum(entry.frames for entry in status.values()),
        }
    except CacheError as error:
        facts["error"] = str(error)
    return facts | {"bytes": _bytes(store)}


def _bytes(store: FeatureStore) -> int:
    total = 0
    for number in range(store.plan.num_shards):
        with contextlib.suppress(OSError):
            total += identity_now(store.layout.info.shard_file(number))[1]
    return total


def inspect(options: Options, video: str) -> dict[str, Any]:
    """One video in every modality: where it lies, whether it is sound, what its features look like."""
    stores = options.stores()
    plan = next(iter(stores.values())).plan
    if not plan.segments_of(video):
        near = difflib.get_close_matches(video, plan.videos, n=3)
        hint = f"; there is {' or '.join(map(repr, near))}" if near else ""
        raise CacheMissing(f"{options.cache} has no video {video!r}{hint}")
    return {"video": video, "modalities": [_inspect(store, video) for store in stores.values()]}


def _inspect(store: FeatureStore, video: str) -> dict[str, Any]:
    segments = store.plan.segments_of(video)
    index = np.unique(np.concatenate([np.array(segment.frame_index, np.int64) for segment in segments]))
    first, last = segments[0].start // store.shard_frames, (segments[-1].stop - 1) // store.shard_frames
    facts: dict[str, Any] = {
        "modality": store.modality,
        "planned_frames": len(index),
        "first_frame": int(index[0]),
        "last_frame": int(index[-1]),
        "rows": [[segment.start, segment.stop] for segment in segments],
        "shards": [first, last],
    }
    try:
        status = store.status().get(video)
        if status is None:
            return facts | {"status": "not extracted"}
        if not status.ok:
            return facts | {"status": "failed", "kind": status.kind, "reason": status.reason}
        source = {key: value for key, value in store.facts(video).items() if key != "pts"}
        features = store.read(video, index, verify=True).astype(np.float64)
    except CacheMissing as error:
        return facts | {"status": "incomplete", "reason": str(error).partition("\n")[0]}
    except CacheCorrupt as error:
        return facts | {"status": "damaged", "reason": str(error).partition("\n")[0]}
    lengths = np.linalg.norm(features.reshape(len(index), -1), axis=1)
    return facts | {
        "status": "ok",
        "source": source,
        "mean": float(features.mean()),
        "std": float(features.std()),
        "min": float(features.min()),
        "max": float(features.max()),
        "zero_frames": int((lengths == 0).sum()),  # a cosine with such a target is 0, whatever the student does
    }


# ---------------------------------------------------------------- what is wrong


def check(
    options: Options,
    *,
    full: bool,
    semantic: int,
    tolerance: float,
    seed: int,
    sources: bool,
    hashed: bool,
    device: Callable[[], str],
    progress: OnProgress,
) -> dict[str, Any]:
    """Problems of all modalities, and what to type about them. ``semantic`` is a number of frames to make again."""
    stores = options.stores(lost=True)
    problems = verify.lost(options.cache)
    checked = [{"modality": name, "shards": 0, "problems": 1} for name, _ in problems]
    for number, (name, store) in enumerate(stores.items()):
        progress(number, len(stores), f"{'full' if full else 'quick'} check of {name}")
        found = (verify.full if full else verify.quick)(store)
        if sources and not verify.damaged_shards(found):
            with _look(options) as look:
                found += verify.sources(store, look, hashed=hashed)
        line = {"modality": name, "shards": store.plan.num_shards}
        if semantic and not verify.damaged_shards(found):
            with _producer(options, [store], device) as produce:
                more, worst = verify.semantic(store, produce, frames=semantic, seed=seed, tolerance=tolerance)
            found, line = found + more, line | {"largest_error": worst}
        checked.append(line | {"problems": len(found)})
        problems += [(name, problem) for problem in found]
    progress(len(stores), len(stores), "checked")
    return {
        "cache": str(options.cache),
        "checks": [
            *(["full"] if full else ["quick"]),
            *(["semantic"] if semantic else []),
            *(["sources"] if sources else []),
        ],
        "modalities": checked,
        "problems": [_problem(name, problem) for name, problem in problems],
        "next": _next(options.fitted(stores), problems) if problems else [],
    }


def _problem(modality: str, problem: Problem) -> dict[str, Any]:
    return {
        "modality": modality,
        "shard": problem.shard,
        "video": problem.video_id,
        "frame": problem.frame_index,
        "kind": problem.kind,
        "message": problem.message,
    }


def _next(options: Options, problems: Collection[tuple[str, Problem]]) -> list[str]:
    """The commands that help, each once, in the order in which to type them."""
    commands = []
    kinds = {problem.kind for _, problem in problems}
    damaged = any(p.shard is not None and p.kind not in verify.NO_DAMAGE for _, p in problems)
    if damaged or "videos_index" in kinds:
        commands.append(options.command("cache", "repair"))
    if "source_changed" in kinds:
        commands.append(options.command("cache", "repair", "--sources"))
    for modality in dict.fromkeys(name for name, problem in problems if problem.kind in ("missing", "lost")):
        commands.append(options.command(f"extract-{ENCODER_OF.get(modality.partition('/')[0], 'clip')}"))
    if "unplanned" in kinds:
        commands.append(options.command("cache", "gc", "--dry-run"))
    return list(dict.fromkeys(commands))


def repair(
    options: Options,
    *,
    quick: bool,
    sources: bool,
    hashed: bool,
    dry_run: bool,
    device: Callable[[], str],
    progress: OnProgress,
) -> dict[str, Any]:
    """Make the damaged shards anew and nothing else, then the index of the store where it does not fit."""
    stores = options.stores()
    changed: set[str] = set()
    todo: list[tuple[FeatureStore, int]] = []
    index_damaged = False
    for name, store in stores.items():
        progress(0, 0, f"looking at {name}")
        found = (verify.quick if quick else verify.full)(store)
        index_damaged |= any(problem.kind == "videos_index" for problem in found)
        shards = set(verify.damaged_shards(found))
        if sources:
            changed_here, more = _changed(options, store, shards, hashed)
            changed |= changed_here
            shards |= more
        todo += [(store, number) for number in sorted(shards)]
    report: dict[str, Any] = {
        "cache": str(options.cache),
        "damaged": [{"modality": store.modality, "shard": number} for store, number in todo],
        "changed_videos": sorted(changed),
        "index_damaged": index_damaged,
        "repaired": 0,
        "left": [],
        "dry_run": dry_run,
    }
    if dry_run or not (todo or index_damaged):
        return report
    done = list(_repair_all(options, todo, changed, device, progress))
    report["repaired"] = sum(result["repaired"] for result in done)
    report["left"] = [result for result in done if not result["repaired"]]
    with contextlib.suppress(CacheCorrupt):  # of a shard that was left as it is: it is listed
        next(iter(stores.values())).finalize()
    return report


def _changed(
    options: Options, store: FeatureStore, damaged: Collection[int], hashed: bool
) -> tuple[set[str], set[int]]:
    """Videos whose file was replaced, and the shards that hold them."""
    if damaged:
        raise CacheCorrupt(
            f"{store.path}/{store.modality} has damaged shards, which do not say what they were made from. First:\n"
            f"  {options.command('cache', 'repair')}"
        )
    with _look(options) as look:
        found = verify.sources(store, look, hashed=hashed)
    videos = {p.video_id for p in found if p.kind == "source_changed" and p.video_id is not None}
    shards: set[int] = set()
    for video in videos:
        for segment in store.plan.segments_of(video):
            shards |= set(store.plan.task_of(segment.start // store.shard_frames).shards)
    return videos, {number for number in shards if store.shard(number) is not None}


def _repair_all(
    options: Options,
    todo: Sequence[tuple[FeatureStore, int]],
    changed: Collection[str],
    device: Callable[[], str],
    progress: OnProgress,
) -> Iterator[dict[str, Any]]:
    done = 0
    for which in dict.fromkeys(_which(store) for store, _ in todo):
        ours = [(store, number) for store, number in todo if _which(store) == which]
        with _producer(options, [store for store, _ in ours], device) as produce:
            for store, number in ours:
                progress(done, len(todo), f"{store.modality}, shard {number}")
                result = repair_shard(store, number, produce, changed=changed)
                done += 1
                yield {
                    "modality": result.modality,
                    "shard": result.shard,
                    "repaired": result.repaired,
                    "copied_videos": result.copied,
                    "produced_videos": result.produced,
                    "reason": result.reason,
                }
    progress(done, len(todo), "repaired")


def _main(modality: str, config: PipelineConfig) -> bool:
    """Whether a teacher's modality is the layer that a configuration trains on."""
    return modality.removeprefix("pooled/layer").partition("_")[0] == str(config.teacher.layer)


def _which(store: FeatureStore) -> Which:
    which = ENCODER_OF.get(store.modality.partition("/")[0])
    if which is None:
        raise ConfigError(f"no command of this program makes {store.modality!r}, so it cannot be made again")
    return which


@contextlib.contextmanager
def _producer(options: Options, stores: Sequence[FeatureStore], device: Callable[[], str]) -> Iterator[Produce]:
    """Features as extraction makes them. Raises CacheMismatch when the settings are not those of the stores."""
    from pipeline import compose
    from stages.extract import run

    which = _which(stores[0])
    job = compose.make_job(options.config, which=which, cache=options.cache, device=device())
    try:
        specs = run.specs_made(run.tools(job)[1])
        for store in stores:
            if store.modality not in specs:
                raise ConfigError(
                    f"these settings make {', '.join(specs)}, and not {store.modality!r}.\n"
                    "Give the settings that the store was extracted with, such as --set teacher.layers=4,8"
                )
            FeatureStore.open(options.cache, store.modality, specs[store.modality], help_command=job.help_command)
        yield functools.partial(run.features_of, job)
    finally:
        run.release(job)


@contextlib.contextmanager
def _look(options: Options) -> Iterator[Callable[[str], SourceFile | None]]:
    from stages.data.frames import open_source
    from stages.types import VideoRejected

    def look(video: str) -> SourceFile | None:
        try:
            return source.file(video)
        except VideoRejected:
            return None

    with contextlib.closing(open_source(options.config.data)) as source:
        yield look


# ---------------------------------------------------------------- what is left over, and what goes out


def collect_garbage(options: Options, *, dead_hosts: Collection[str], unplanned: bool, dry_run: bool) -> dict[str, Any]:
    """Partial files of dead processes, and with ``unplanned`` what nobody planned."""
    metadata.read_group(options.cache)  # refuses a folder that is no store
    found = orphans.find(options.cache, dead_hosts=dead_hosts)
    listed = []
    for orphan in found:
        gone = orphan.dead or (unplanned and orphan.kind == "unplanned")  # never features
        if gone and not dry_run:
            orphans.remove(orphan)
        path = str(orphan.path).removeprefix(f"{options.cache}/")
        listed.append({"path": path, "kind": orphan.kind, "why": orphan.why, "bytes": orphan.bytes, "removed": gone})
    return {
        "cache": str(options.cache),
        "orphans": listed,
        "removed": sum(entry["removed"] for entry in listed),
        "bytes": sum(entry["bytes"] for entry in listed if entry["removed"]),
        "dry_run": dry_run,
    }


def copy(source: StorePath, target: StorePath, *, dry_run: bool, progress: OnProgress) -> dict[str, Any]:
    """Every committed shard of a store that the destination lacks, checked on its way."""
    if str(source) == str(target):
        raise ConfigError(f"{source} cannot be copied onto itself; name another folder or URL")
    results = copy_store(source, target, dry_run=dry_run, progress=progress)
    damaged = [message for result in results for message in result.damaged]
    return {
        "from": str(source),
        "to": str(target),
        "modalities": [
            {"modality": r.modality, "copied": r.copied, "present": r.present, "bytes": r.bytes} for r in results
        ],
        "bytes": sum(result.bytes for result in results),
        "damaged": damaged,
        "next": [shlex.join(["pipeline", "cache", "verify", "--full", "--cache", str(source)])] if damaged else [],
        "dry_run": dry_run,
    }


def export(options: Options, out: Path, *, form: str, modalities: Sequence[str]) -> dict[str, Any]:
    """The features of every video that all chosen modalities hold, in another format."""
    if form not in exports.FORMATS:
        raise ConfigError(f"--format {form}: expected {' or '.join(exports.FORMATS)}")
    stores = options.stores()
    unknown = sorted(set(modalities) - set(stores))
    if unknown:
        raise ConfigError(f"{options.cache} has no {unknown[0]!r}; it has {', '.join(stores)}")
    chosen: Mapping[str, FeatureStore] = {name: stores[name] for name in modalities or stores}
    report = exports.FORMATS[form](chosen, out)
    return {
        "out": str(out),
        "format": form,
        "modalities": list(chosen),
        "videos": report.videos,
        "frames": report.frames,
        "files": report.files,
        "bytes": report.bytes,
        "skipped": [{"video": video, "reason": reason} for video, reason in report.skipped.items()],
    }
