"""FeatureStore: one modality of one cache; the only door the stages use.

A store is a Zarr v3 group with one frame-axis array per modality and one plan shared by all of them (FORMAT.md).
What is committed is what the shard footers say; nothing is concluded from what Zarr returns.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema import descriptors, files, metadata, reading
from cache_schema.connections import ObjectChanged, concurrently
from cache_schema.descriptors import OpenFiles
from cache_schema.errors import CacheError, CacheMismatch, CacheMissing
from cache_schema.index import STATUS, index_arrays, write_index
from cache_schema.object_reads import read_slots
from cache_schema.objects import MAX_SHARD_OBJECT, ObjectPath, StorePath, locate
from cache_schema.plan import Plan, Segment, Task, as_frames
from cache_schema.planfile import PlanFiles
from cache_schema.quantize import ChannelScale
from cache_schema.report import Missing, VideoStatus
from cache_schema.shard import CRC, Layout, Record, Shard, frame_corrupt, identity_now, pread, read_records, read_shard
from cache_schema.spec import FeatureSpec

Array = npt.NDArray[Any]
FrameIndex = Sequence[int] | npt.NDArray[np.integer]
P = ParamSpec("P")
R = TypeVar("R")


def _with_help(
    method: Callable[Concatenate[FeatureStore, P], R],
) -> Callable[Concatenate[FeatureStore, P], R]:
    """Cache errors leave the store ending with its help command."""

    @functools.wraps(method)
    def helped(self: FeatureStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except CacheError as error:
            error.with_help(self.help_command)
            raise

    return helped


class FeatureStore:
    """Features of one modality, keyed by (video, frame index). Make one with ``create`` or ``open``.

    Safe to pickle, to fork and to use from several threads or processes: it holds no lock between calls, and the shards
    that it keeps open for reading are maps of files and descriptors without a position.

    Attributes:
        path: the store's folder, or its place in an object store.
        modality: the array's name, such as ``tokens`` or ``pooled/layer8``.
        spec: how its numbers were made.
        shard_frames: S, the frames of one shard.
        io: how shards are read (cache_schema.reading): ``auto``, ``mmap``, ``pread`` or ``direct``. Speed only.
    """

    def __init__(self, info: metadata.ArrayInfo, help_command: str, io: reading.Io = "auto") -> None:
        reading.check_io(io)
        self.io = io
        self.path, self.modality, self.spec, self.shard_frames = info.store, info.modality, info.spec, info.shard_frames
        self.layout = Layout(info)
        self.help_command = help_command
        self._plan_files = PlanFiles(info.store, info.shard_frames)
        self._shards: dict[int, Shard] = {}
        self._opened: OpenFiles[reading.OpenShard] = OpenFiles()
        self._told: tuple[Shard, tuple[Record, ...]] | None = None  # the shard that facts were asked of last

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | ObjectPath,
        modality: str,
        spec: FeatureSpec,
        *,
        shard_frames: int = 1024,
        help_command: str = "",
        channel_scale: ChannelScale | None = None,
    ) -> FeatureStore:
        """Make the modality, or open it for writing and check that it was made with this spec.

        A new int8 modality needs ``channel_scale`` (cache_schema.quantize); one that exists keeps its own. An existing
        store keeps its own ``shard_frames``. Partial files of dead writers of this host are removed.

        Raises:
            CacheMismatch: it exists with another spec (the differing fields are listed), another modality of the store
                has another frame rule, or the store has a newer format.
            CacheCorrupt: its metadata is damaged.
        """
        store = locate(path)
        help_command = help_command or metadata.default_help(modality)
        try:
            metadata.check_modality(modality)
            metadata.create_group(store, shard_frames)
            shard_frames = metadata.read_group(store)
            _check_frame_rule(store, modality, spec, shard_frames)
            if not (store / modality / "zarr.json").exists():
                info = metadata.ArrayInfo(store, modality, spec, shard_frames, channel_scale)
                if isinstance(store, ObjectPath) and Layout(info).stride * shard_frames > MAX_SHARD_OBJECT:
                    raise ValueError(
                        f"a shard of {shard_frames} frames has more than the 5 GB that an object store copies "
                        "at once.\n"
                        f"Make smaller ones:  --set extract.shard_frames={MAX_SHARD_OBJECT // Layout(info).stride}"
                    )
                metadata.create_array(info)
            metadata.create_parents(store, modality)
            opened = cls.open(store, modality, spec, help_command=help_command)
            for folder in (store, store / "plan", *(store / part for part in metadata.path_to(modality))):
                files.sweep(folder)
            if isinstance(store, ObjectPath):
                files.sweep(store.scratch())
            metadata.grow_array(opened.layout.info, lambda: opened.plan.num_shards)
            return opened
        except CacheError as error:
            error.with_help(help_command)
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | ObjectPath,
        modality: str,
        spec: FeatureSpec | None = None,
        *,
        help_command: str = "",
        io: reading.Io = "auto",
    ) -> FeatureStore:
        """Open an existing modality; nothing is written. With ``spec``, it must be the one the modality was made with.

        Raises:
            CacheMissing: no store, or no such modality in it.
            CacheMismatch: another spec (the differing fields are listed) or a newer format.
            CacheCorrupt: damaged metadata or plan; the file and the field are named.
        """
        store = locate(path)
        help_command = help_command or metadata.default_help(modality)
        try:
            info = metadata.read_array(store, modality, metadata.read_group(store))
            if spec is not None and spec != info.spec:
                raise CacheMismatch.between(str(info.folder), info.spec.differences(spec))
            opened = cls(info, help_command, io)
            opened._plan_files.check_complete()
            return opened
        except CacheError as error:
            error.with_help(help_command)
            raise

    def __getstate__(self) -> dict[str, object]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_opened"}
        return {**kept, "_shards": {}, "_told": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _opened=OpenFiles())

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {self.modality!r})"

    # --- the plan

    @property
    @_with_help
    def plan(self) -> Plan:
        """The store's plan as it is now, other processes' additions included."""
        return self._plan_files.current()

    @_with_help
    def extend_plan(self, wanted: Mapping[str, FrameIndex]) -> Plan:
        """Add the frames of ``wanted`` (video -> frame indices) that are not planned yet; return the plan.

        What is planned never moves. The addition is published whole; of two writers the first wins and the other
        derives its addition anew from what it then finds. All modalities of the store share the plan.
        """
        plan = self._plan_files.extend(wanted)
        metadata.grow_array(self.layout.info, lambda: self.plan.num_shards)
        return plan

    # --- what is there

    @_with_help
    def shard(self, number: int) -> Shard | None:
        """The committed shard, checked; None when it is not committed. Raises CacheCorrupt naming the file."""
        known = self._shards.get(number)
        if known is not None:
            try:
                if identity_now(known.file) == known.identity:
                    return known
            except (FileNotFoundError, NotADirectoryError):
                pass
            self._shards.pop(number, None)
        known_plan = self._plan_files.known  # no row of a plan ever changes, so a longer one would say the same
        plan = known_plan if number < known_plan.num_shards else self.plan
        found = read_shard(self.layout, number, plan.parts(number))
        if found is not None:
            self._shards[number] = found
        return found

    def shards(self, numbers: Iterable[int]) -> dict[int, Shard | None]:
        """``shard`` of each of these; of an object store, many requests are under way at a time."""
        wanted = list(numbers)
        if isinstance(self.path, ObjectPath):
            return dict(zip(wanted, concurrently(self.shard, wanted), strict=True))
        return {number: self.shard(number) for number in wanted}

    def pending(self, *, retry_failed: bool = False) -> list[Task]:
        """Tasks of the plan that this modality has not committed, in order.

        With ``retry_failed`` also the committed ones that hold a failed video, and all have ``retry`` set.
        Raises CacheCorrupt when a shard is there but damaged: it is never taken for missing.
        """
        plan, found = self.plan, dict[int, Task]()
        for number, shard in self.shards(range(plan.num_shards)).items():
            if shard is None or (retry_failed and shard.failed):
                task = plan.task_of(number)
                found[task.shards[0]] = replace(task, retry=retry_failed)
        return list(found.values())

    def status(self) -> dict[str, VideoStatus]:
        """Video -> ok or failed with its reason, for every video with a committed segment, in plan order.

        A video with several segments is failed when one of them is.
        """
        found: dict[str, VideoStatus] = {}
        for segment, status in zip(self.plan.segments, self.segment_status(), strict=True):
            if status is None:
                continue
            before = found.get(segment.video_id)
            if before is not None:
                worst = before if status.ok else status
                status = VideoStatus(worst.ok, worst.kind, worst.reason, before.frames + status.frames)
            found[segment.video_id] = status
        return found

    def segment_status(self) -> list[VideoStatus | None]:
        """One entry per segment of the plan; None where it is not (wholly) committed."""
        found: list[VideoStatus | None] = []
        plan = self.plan
        there = self.shards(range(plan.num_shards))
        for task in plan.tasks():
            shards = [there[number] for number in task.shards]
            for segment in task.segments:
                found.append(_segment_status(segment, shards))
        return found

    def status_codes(self) -> list[int]:
        """``segment_status`` as the numbers of the ``videos`` index."""
        return [STATUS["not committed" if s is None else "ok" if s.ok else "failed"] for s in self.segment_status()]

    @_with_help
    def missing(self, wanted: Mapping[str, FrameIndex]) -> dict[str, Missing]:
        """Video -> the wanted frames that cannot be read, and why; videos that are complete do not appear."""
        plan, found = self.plan, {}
        located = {video_id: plan.find(video_id, frame_index) for video_id, frame_index in wanted.items()}
        numbers = {number for rows in located.values() for number in (rows[rows >= 0] // self.shard_frames).tolist()}
        shards = self.shards(sorted(numbers))
        for video_id, rows in located.items():
            frames = as_frames(video_id, wanted[video_id])
            gone: dict[str, list[int]] = {"not_planned": frames[rows < 0].tolist(), "not_committed": [], "failed": []}
            kind = reason = ""
            for number in np.unique(rows[rows >= 0] // self.shard_frames).tolist():
                here = (rows >= 0) & (rows // self.shard_frames == number)
                shard, slots = shards[number], rows[here] % self.shard_frames
                if shard is None:
                    gone["not_committed"] += frames[here].tolist()
                elif not shard.present[slots].all():
                    record = shard.record_at(int(slots[~shard.present[slots]][0]))
                    kind, reason = record.kind, record.reason
                    gone["failed"] += frames[here][~shard.present[slots]].tolist()
            if any(gone.values()):
                found[video_id] = Missing(
                    **{name: tuple(sorted(set(numbers))) for name, numbers in gone.items()}, kind=kind, reason=reason
                )
        return found

    # --- numbers out

    def read(self, video_id: str, frame_index: FrameIndex, out: Array | None = None, *, verify: bool = False) -> Array:
        """Features [n, *frame_shape] of these frames, in this order; repeats are allowed.

        Args:
            out: C-contiguous array of that shape and the spec's dtype to fill, or rows of ``buffer``; a new one by
                default. Give one that was used before: the pages of new memory cost more than the features.
            verify: check the crc32c of every frame that is read.

        Raises:
            CacheMissing: a frame is not planned, not extracted, or its video failed; the message says which and why.
            CacheCorrupt: naming shard, video and frame.
        """
        scale = self.layout.info.channel_scale
        if scale is None:
            return self.read_stored(video_id, frame_index, out, verify=verify)
        shape = (len(frame_index), *self.spec.frame_shape)
        features = np.empty(shape, np.float16) if out is None else out
        if features.shape != shape or features.dtype != np.float16:
            raise ValueError(f"out must be a float16 array {shape}, not {features.dtype} {features.shape}")
        scale.dequantize(self.read_stored(video_id, frame_index, verify=verify), features)
        return features

    def read_stored(
        self, video_id: str, frame_index: FrameIndex, out: Array | None = None, *, verify: bool = False
    ) -> Array:
        """``read`` without dequantising: rows uint8 [n, frame_bytes] of an int8 store (``quantize.split`` gives scales
        and numbers, ``layout.info.channel_scale`` the rest), the features themselves of any other."""
        if len(frame_index) == 1 and out is not None and not verify and self._read_one(video_id, frame_index[0], out):
            return out
        return self._read_any(video_id, frame_index, out, verify)

    @_with_help
    def _read_any(self, video_id: str, frame_index: FrameIndex, out: Array | None, verify: bool) -> Array:
        out = self._output(out, len(frame_index))
        if isinstance(self.path, ObjectPath):
            self._read_objects(video_id, frame_index, out)
            return out
        for number, slots, at in self._pieces(self._rows(video_id, frame_index)):
            files.fresh(lambda: self._read_piece(video_id, frame_index, number, slots, out[at], verify))  # noqa: B023
        return out

    def _read_piece(
        self, video_id: str, frame_index: FrameIndex, number: int, slots: Array, out: Array, verify: bool
    ) -> None:
        opened = self._open_shard(number)
        if opened is not None and not opened.holds(slots):
            self._opened.drop(number)  # a retry may have put a fuller one in its place
            opened = self._open_shard(number)
        if opened is None or not opened.holds(slots):
            raise self._not_there(video_id, frame_index)
        try:
            reading.read_rows(opened, slots, out, self.io)
        except OSError:
            self._opened.drop(number)  # a stale handle stays stale
            raise
        if verify:
            self._verify(opened, slots, out, video_id)

    @_with_help
    def ask_for(self, video_id: str, frame_index: FrameIndex) -> None:
        """Have the disk fetch exactly these frames into the page cache, without waiting; what is there is left alone.

        Only a hint: frames that cannot be read are passed over here, and named by ``read``. An object store gets none.
        """
        if isinstance(self.path, ObjectPath):
            return
        rows = self._plan_files.known.find(video_id, frame_index)
        for number, slots, _ in self._pieces(rows[rows >= 0]):
            opened = self._open_shard(number)
            if opened is None or not opened.holds(slots) or self.io == "direct":
                continue
            if not reading.is_warm(opened, slots):
                reading.ask_for(opened, slots)

    def _read_one(self, video_id: str, frame: object, out: Array) -> bool:
        """The short way for one frame that is in memory. False: nothing was done, because anything is unusual.

        Copying a frame takes 30 µs; the general way takes as long to find it.
        """
        if not isinstance(frame, (int, np.integer)) or self.io == "pread" or self.io == "direct":
            return False
        number, slot = divmod(self._plan_files.known.row(video_id, frame), self.shard_frames)
        opened = self._opened.get(number)  # a row of -1 is in no shard
        if opened is None or opened.is_remote:
            return False
        if not (opened.present[slot] and opened.is_current() and opened.is_cached(slot)):
            return False
        if not reading.fits(self.layout, out, 1):
            return False
        reading.read_row(opened, slot, out)
        return True

    def _read_objects(self, video_id: str, frame_index: FrameIndex, out: Array) -> None:
        """Every frame comes with its checksum checked."""
        shards, slots = np.divmod(self._rows(video_id, frame_index), self.shard_frames)
        raw = out.view(np.uint8).reshape(len(out), self.layout.frame_bytes)  # a view: rows are contiguous in themselves
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            whole = len(here) == len(raw)
            rows = raw if whole else np.empty((len(here), self.layout.frame_bytes), np.uint8)
            while True:
                shard = self._shards.get(number) or self.shard(number)  # no need to look again: a read is pinned
                if shard is None or not shard.present[slots[here]].all():
                    raise self._not_there(video_id, frame_index)
                try:
                    damaged = read_slots(self.layout, shard, slots[here], rows)
                    break
                except (ObjectChanged, FileNotFoundError):  # by a retry, or somebody removed it
                    self._shards.pop(number, None)
            if damaged is not None:
                raise frame_corrupt(shard, video_id, int(frame_index[here[damaged]]))
            if not whole:
                raw[here] = rows

    def _rows(self, video_id: str, frame_index: FrameIndex) -> Array:
        """Rows [n] of frames that are all planned. Raises CacheMissing."""
        rows = self._plan_files.known.find(video_id, frame_index)
        if (rows < 0).any():
            rows = self.plan.find(video_id, frame_index)  # planned by another process since we looked
        if (rows < 0).any():
            raise self._not_there(video_id, frame_index)
        return rows

    def _pieces(self, rows: Array) -> Iterator[tuple[int, Array, slice]]:
        """(shard, slots, where in the rows) of neighbours in one shard: mostly one piece, for videos lie whole."""
        if len(rows):
            shards, slots = np.divmod(rows, self.shard_frames)
            edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
            for begin, end in itertools.pairwise(edges):
                yield int(shards[begin]), slots[begin:end], slice(begin, end)

    def _open_shard(self, number: int) -> reading.OpenShard | None:
        """The shard held open, checked, and still the file that bears its name; None when it is not committed."""
        opened = self._opened.get(number)
        while opened is None or not opened.is_current():
            self._opened.drop(number)
            shard = self.shard(number)
            if shard is None:
                return None
            try:
                opened = reading.OpenShard(self.layout, shard)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                if not descriptors.relieve():
                    raise descriptors.too_many(shard.file) from error
                continue
            if opened.identity != shard.identity:  # replaced by a retry between the two: its footer is another
                opened = None
                continue
            self._opened.put(number, opened)
        return opened

    def _verify(self, opened: reading.OpenShard, slots: Array, rows: Array, video_id: str) -> None:
        for row, slot in zip(rows, slots.tolist(), strict=True):
            crc = pread(opened.descriptor, CRC.size, slot * self.layout.stride + self.layout.frame_bytes)
            if CRC.pack(crc32c(row.reshape(-1).view(np.uint8).data)) != crc:
                record = opened.shard.record_at(slot)
                raise frame_corrupt(opened.shard, video_id, record.frame_index[slot - record.slot])

    def _not_there(self, video_id: str, frames: FrameIndex) -> CacheMissing:
        why = self.missing({video_id: frames}).get(video_id, "it changed while it was read")
        return CacheMissing(f"{self.path}/{self.modality} cannot give video {video_id!r}: {why}.\nExtract with:")

    def buffer(self, count: int) -> Array:
        """Rows to give to ``read_stored`` again and again: nothing is read faster into another array.

        [count, *frame_shape], so also for ``read``; bytes [count, frame_bytes] of an int8 store.
        """
        return reading.new_buffer(self.layout, count)

    def _output(self, out: Array | None, count: int) -> Array:
        if out is None:
            return np.empty((count, *self.layout.row_shape), self.layout.row_dtype)
        if not reading.fits(self.layout, out, count):
            shape = (count, *self.layout.row_shape)
            raise ValueError(
                f"out must be a C-contiguous {self.layout.row_dtype} array {shape}, or a part of store.buffer(n); "
                f"not {out.dtype} {out.shape}"
            )
        return out

    @_with_help
    def facts(self, video_id: str) -> dict[str, object]:
        """What the frame source said of this video when it was read (size, sha256, …); empty when it failed.

        Of several segments the newest that is committed counts. Raises CacheMissing when there is none.
        """
        for segment in reversed(self.plan.segments_of(video_id)):
            number = segment.start // self.shard_frames
            shard = self._shards.get(number) if isinstance(self.path, ObjectPath) else None  # spares a request a video
            shard = shard or self.shard(number)
            if shard is not None:
                told = self._told
                if told is None or told[0] is not shard:  # a shard holds many videos, which are asked about in turn
                    told = self._told = shard, read_records(self.layout, shard.file)
                return dict(next(r.facts for r in told[1] if r.video_id == video_id))
        raise CacheMissing(f"{self.path}/{self.modality} holds nothing of video {video_id!r}.\nExtract with:")

    # --- the index

    @_with_help
    def finalize(self) -> None:
        """Write the ``videos`` index of the whole store (all modalities) from plan and footers, for plain Zarr readers.

        It is derived data: nothing here reads it to decide what is there, and it can be deleted and made again.
        """

        def derive() -> Mapping[str, Array]:
            status = {}
            for modality in metadata.list_modalities(self.path):
                other = FeatureStore.open(self.path, modality)
                metadata.grow_array(other.layout.info, lambda: self.plan.num_shards)
                status[modality] = other.status_codes()
            return index_arrays(self.plan, status)

        write_index(self.path, derive)


def _segment_status(segment: Segment, shards: Sequence[Shard | None]) -> VideoStatus | None:
    if any(shard is None for shard in shards):
        return None
    records = [r for shard in shards if shard is not None for r in shard.records if r.video_id == segment.video_id]
    failed = next((record for record in records if not record.ok), None)
    if failed is not None:
        return VideoStatus(False, failed.kind, failed.reason, 0)
    return VideoStatus(True, frames=len(segment))


def _check_frame_rule(store: StorePath, modality: str, spec: FeatureSpec, shard_frames: int) -> None:
    # Modalities share (video, frame index) as their key, so an index must mean the same picture in all of them.
    for other in metadata.list_modalities(store):
        rule = metadata.read_array(store, other, shard_frames).spec.frame_rule
        if other != modality and rule != spec.frame_rule:
            raise CacheMismatch.between(
                f"{store / other}, which shares its frames,", {"frame_rule": (rule, spec.frame_rule)}
            )
