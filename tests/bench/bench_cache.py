"""How near the cache is to memory: every row against a floor in the same process, interleaved, medians.

    python -m tests.bench.bench_cache --json [--dir FOLDER] [--rows warm,ring,…] [--rounds 25]

The last line is one JSON object; 1.0 means as fast as the floor of the row. A video is 100 × 257 × 1408 float16.
Folder: real disk for the cold and the write row; it needs 3 GB and is left empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from cache_schema import (
    ChannelScale,
    FeatureSpec,
    FeatureStore,
    Segment,
    SegmentResult,
    calibrate,
    reading,
    verify,
)
from cache_schema.plan import Plan
from cache_schema.plan_columns import pack
from cache_schema.shard import ShardWriter
from tests.bench.measure import Comparison, compare
from tests.cache_schema.makers import TOKENS, write_single

VIDEOS, FRAMES, SHAPE = 8, 100, (257, 1408)
FRAME_BYTES = 2 * SHAPE[0] * SHAPE[1]
SPEC = dataclasses.replace(TOKENS, encoder="open_clip:EVA01-g-14", layer=39, compute_dtype="float16", frame_shape=SHAPE)
Array = npt.NDArray[Any]


@functools.cache
def _block() -> Array:
    rng = np.random.default_rng(0)
    gains = np.exp(rng.normal(0, 0.8, SHAPE[1])).astype(np.float32)  # log-normal channel gains, as in a ViT
    return (rng.standard_normal((10, *SHAPE), np.float32) * gains).astype(np.float16)


def video_features(number: int) -> Array:
    """One video [100, 257, 1408] float16; every token of a block is another one in every repeat."""
    return np.concatenate([np.roll(_block(), 10 * number + turn, axis=1) for turn in range(FRAMES // 10)])


def make_store(path: Path, spec: FeatureSpec = SPEC, channel_scale: ChannelScale | None = None) -> FeatureStore:
    """A committed store of videos named v0, v1, …"""
    store = FeatureStore.create(path, "tokens", spec, channel_scale=channel_scale)
    store.extend_plan({f"v{number}": range(FRAMES) for number in range(VIDEOS)})
    for task in store.pending():
        write_single(store, task, _produce)
    return store


def _produce(segment: Segment) -> SegmentResult[Array]:
    return SegmentResult(iter([video_features(int(segment.video_id[1:]))]))


def make_plain(path: Path) -> Path:
    """The same numbers as one bare array file, which is what ``np.memmap`` reads."""
    with path.open("wb") as file:
        for number in range(VIDEOS):
            file.write(video_features(number).tobytes())
    return path


def memmap(path: Path) -> Array:
    """All frames of ``make_plain``."""
    return np.memmap(path, np.float16, "r").reshape(-1, *SHAPE)


def warm(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """Whole video, 20 of 100 frames, and one frame, from the page cache into a reused buffer, one thread."""
    store, plain = FeatureStore.open(folder / "store", "tokens"), memmap(folder / "plain")
    plain_out, out = np.zeros((FRAMES, *SHAPE), np.float16), store.buffer(FRAMES)
    whole, some, buffer_some, buffer_one = np.arange(FRAMES), np.arange(0, FRAMES, 5), out[:20], out[:1]
    order = np.random.default_rng(0).integers(0, VIDEOS * FRAMES, 4096)  # far more bytes than any processor cache

    def floor_whole(n: int) -> None:
        first = n % VIDEOS * FRAMES
        np.copyto(plain_out, plain[first : first + FRAMES])

    def floor_some(n: int) -> None:
        first = n % VIDEOS * FRAMES
        np.copyto(plain_out[:20], plain[first : first + FRAMES : 5])

    def floor_one(n: int) -> None:
        np.copyto(plain_out[0], plain[order[n % 4096]])

    def one(n: int, out: Array) -> None:
        video, frame = divmod(int(order[n % 4096]), FRAMES)
        store.read(f"v{video}", [frame], out=out)

    for number in range(VIDEOS):  # both are mapped before the clock runs
        floor_whole(number)
        store.read(f"v{number}", whole, out=out)
        assert (out == plain[number * FRAMES : (number + 1) * FRAMES]).all()
    ways: dict[str, Callable[[int], object]] = {
        "memmap": floor_whole,
        "ours": lambda n: store.read(f"v{n % VIDEOS}", whole, out=out),
        "ours, numpy buffer": lambda n: store.read(f"v{n % VIDEOS}", whole, out=plain_out),
    }
    yield "warm_whole", compare(ways, floor="memmap", rounds=rounds, calls=4)
    ways = {
        "memmap": floor_some,
        "ours": lambda n: store.read(f"v{n % VIDEOS}", some, out=buffer_some),
        "ours, numpy buffer": lambda n: store.read(f"v{n % VIDEOS}", some, out=plain_out[:20]),
    }
    yield "warm_strided", compare(ways, floor="memmap", rounds=rounds, calls=20)
    ways = {
        "memmap": floor_one,
        "ours": lambda n: one(n, buffer_one),
        "ours, numpy buffer": lambda n: one(n, plain_out[:1]),
    }
    yield "warm_frame", compare(ways, floor="memmap", rounds=rounds, calls=400)


def ring(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """16 whole videos: two reader threads, against two threads that only copy, and against a loop over a memmap."""
    from stages.data.loader import Frames, Ring

    store, plain = FeatureStore.open(folder / "store", "tokens"), memmap(folder / "plain")
    items = [Frames.of([(f"v{number % VIDEOS}", np.arange(FRAMES))]) for number in range(16)]
    buffers = [store.buffer(FRAMES) for _ in range(4)]  # as many as the ring has
    out = np.zeros((FRAMES, *SHAPE), np.float16)
    pool = ThreadPoolExecutor(2)

    def copy(number: int) -> None:
        first = number % VIDEOS * FRAMES
        np.copyto(buffers[number % 4], plain[first : first + FRAMES])

    def loop(_: int) -> None:
        for number in range(16):
            first = number % VIDEOS * FRAMES
            np.copyto(out, plain[first : first + FRAMES])

    def ours(_: int) -> None:
        for _ in kept:
            pass

    def endless() -> Iterator[Frames]:
        while True:
            yield from items

    with Ring([store], endless(), readers=2) as endless_ring:
        # Buffers are made once in a run, not once a round; the ring runs ahead by its four places in every round alike.
        kept = _Every16(endless_ring)
        ours(0)
        ways: dict[str, Callable[[int], object]] = {
            "memcpy, 2 threads": lambda _: list(pool.map(copy, range(16))),
            "memmap loop": loop,
            "ours": ours,
        }
        found = compare(ways, floor="memcpy, 2 threads", rounds=rounds)
    pool.shutdown()
    yield "ring2_vs_memcpy2", found
    yield "ring2_vs_memmap_loop", found.against("memmap loop")
    gigabytes = 16 * FRAMES * FRAME_BYTES / 1e9
    print(f"ring: {found.timings['ours'].cpu / gigabytes:.3f} processor seconds per GB", file=sys.stderr)


class _Every16:
    def __init__(self, ring: Iterator[object]) -> None:
        self.ring = ring

    def __iter__(self) -> Iterator[object]:
        return itertools.islice(self.ring, 16)


def write(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """A shard of four videos, with crc32c of every frame, published, against pwrite and fsync of the same bytes."""
    videos = [video_features(number) for number in range(4)]
    store = FeatureStore.create(folder / "written", "tokens", SPEC, shard_frames=4 * FRAMES)
    store.extend_plan({f"v{number}": range(FRAMES) for number in range(4)})
    (task,), target = store.pending(), folder / "raw"

    def raw(_: int) -> None:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for number, video in enumerate(videos):
            for frame in range(FRAMES):
                os.pwrite(descriptor, video[frame].data.cast("B"), (number * FRAMES + frame) * FRAME_BYTES)
        os.fsync(descriptor)
        os.close(descriptor)

    def ours(_: int) -> None:
        write_single(store, task, lambda s: SegmentResult(iter(np.split(videos[int(s.video_id[1:])], 4))))

    def remove() -> None:
        store.layout.info.shard_file(0).unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        os.sync()

    yield "write_vs_pwrite", compare({"pwrite": raw, "ours": ours}, floor="pwrite", rounds=rounds, before=remove)
    shutil.rmtree(folder / "written")
    target.unlink(missing_ok=True)


def int8(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """Whole videos as int8 and scales: the same numbers in half the bytes, against float16 from a memmap."""
    spec = dataclasses.replace(SPEC, dtype="int8")
    scale = calibrate(np.concatenate([video_features(number)[:20] for number in range(2)]))
    store = make_store(folder / "int8", spec=spec, channel_scale=scale)
    plain, whole = memmap(folder / "plain"), np.arange(FRAMES)
    plain_out, out = np.zeros((FRAMES, *SHAPE), np.float16), store.buffer(FRAMES)

    def floor(n: int) -> None:
        first = n % VIDEOS * FRAMES
        np.copyto(plain_out, plain[first : first + FRAMES])

    for number in range(VIDEOS):
        floor(number)
        store.read_stored(f"v{number}", whole, out=out)
    ways = {"memmap": floor, "ours": lambda n: store.read_stored(f"v{n % VIDEOS}", whole, out=out)}
    print(f"int8: held-out error {scale.error:.4f}, smallest cosine {scale.min_cosine:.5f}", file=sys.stderr)
    yield "int8_vs_memmap", compare(ways, floor="memmap", rounds=rounds, calls=4)
    shutil.rmtree(folder / "int8")


def cold(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """The files are dropped from the page cache before every read (needs a real disk)."""
    os.sync()
    shard = folder / "store" / "tokens" / "c.0.0.0"
    out = np.zeros((FRAMES, *SHAPE), np.float16)

    def drop() -> None:
        for path in (shard, folder / "plain"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def by_memmap(number: int, step: int) -> None:
        plain = memmap(folder / "plain")  # opened anew: pages that are mapped are not dropped
        first = number % VIDEOS * FRAMES
        np.copyto(out[: FRAMES // step], plain[first : first + FRAMES : step])

    def ours(number: int, step: int, io: reading.Io) -> None:
        store = FeatureStore.open(folder / "store", "tokens", io=io)
        store.read(f"v{number % VIDEOS}", np.arange(0, FRAMES, step), out=buffer[: FRAMES // step])

    buffer = FeatureStore.open(folder / "store", "tokens").buffer(FRAMES)
    drop()
    ours(0, 1, "auto")  # the probe of this disk
    for name, step, floor in (("cold_strided", 5, "memmap"), ("cold_whole", 1, "pread")):
        ways: dict[str, Callable[[int], object]] = {"memmap": functools.partial(by_memmap, step=step)}
        for io in get_args(reading.Io):
            ways["ours" if io == "auto" else io] = functools.partial(ours, step=step, io=io)
        yield name, compare(ways, floor=floor, rounds=rounds, before=drop)


def open_million(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """Open a store of a million videos and find a frame in it, against reading the same bytes of its plan."""
    path, frames, count = folder / "million", tuple(range(FRAMES)), 1_000_000
    store = FeatureStore.create(path, "tokens", SPEC)
    per_shard = store.shard_frames // FRAMES
    starts = (n // per_shard * store.shard_frames + n % per_shard * FRAMES for n in range(count))
    plan = Plan(store.shard_frames, tuple(Segment(f"v{n:07}", frames, start) for n, start in enumerate(starts)))
    before = Plan.empty(store.shard_frames)
    # What extend_plan writes, without the minute that it takes to derive.
    (path / "plan" / "000000.npz").write_bytes(pack(before, plan.segments))
    wanted = plan.find("v0777777", [42])
    del plan

    def floor(_: int) -> None:
        (path / "plan" / "000000.npz").read_bytes()

    def ours(_: int) -> None:
        opened = FeatureStore.open(path, "tokens")
        assert opened.plan.num_shards == count // per_shard
        assert opened.plan.find("v0777777", [42]) == wanted

    found = compare({"read the bytes": floor, "ours": ours}, floor="read the bytes", rounds=min(rounds, 7))
    print(f"open_million: {found.timings['ours'].cpu:.3f} processor seconds", file=sys.stderr)
    yield "open_million", found
    shutil.rmtree(path)


def scan_10k(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """What is still to do in a store of 10,000 committed shards of ten videos each: the start of a resumed extraction.

    The floor looks at the same files (open, fstat, read of the tail) and checks nothing.
    """
    path, shards, videos, per_video = folder / "scan", 10_000, 10, 100
    spec = dataclasses.replace(SPEC, frame_shape=(1, 2))
    store = FeatureStore.create(path, "tokens", spec, shard_frames=videos * per_video)
    store.extend_plan({f"v{number:06}": range(per_video) for number in range(shards * videos)})
    numbers, facts = np.zeros((per_video, 1, 2), np.float16), {"size": 1, "sha256": "0" * 64}
    flush, os.fsync = os.fsync, lambda _: None  # the making of the store is not what is measured
    try:
        for number in range(shards):
            writer, final = ShardWriter(store.layout, number), store.layout.info.shard_file(number)
            for part in store.plan.parts(number):
                writer.begin(part)
                writer.append(numbers)
                writer.end(facts)
            writer.finish()
            os.rename(writer.partial, str(final))
            writer.discard()
    finally:
        os.fsync = flush
    files_there = [store.layout.info.shard_file(number) for number in range(shards)]
    tail = store.layout.index_bytes + (32 << 10)

    def floor(_: int) -> None:
        for file in files_there:
            descriptor = os.open(file, os.O_RDONLY)
            size = os.fstat(descriptor).st_size
            os.pread(descriptor, tail, max(0, size - tail))
            os.close(descriptor)

    def ours(_: int) -> None:
        assert FeatureStore.open(path, "tokens").pending() == []

    found = compare({"look at the files": floor, "ours": ours}, floor="look at the files", rounds=min(rounds, 5))
    print(f"scan_10k: {found.timings['ours'].cpu:.3f} processor seconds", file=sys.stderr)
    yield "scan_10k", found
    shutil.rmtree(path)


def verified(folder: Path, rounds: int) -> Iterator[tuple[str, Comparison]]:
    """``verify.full`` of the store, from the page cache, against one copy of the same frames into a reused buffer."""
    store, plain = FeatureStore.open(folder / "store", "tokens"), memmap(folder / "plain")
    out = store.buffer(1)

    def floor(_: int) -> None:
        for frame in plain:
            np.copyto(out[0], frame)

    def ours(_: int) -> None:
        assert verify.full(FeatureStore.open(folder / "store", "tokens")) == []

    found = compare({"memcpy": floor, "ours": ours}, floor="memcpy", rounds=min(rounds, 9))
    size = VIDEOS * FRAMES * FRAME_BYTES / 1e9
    for way, timing in found.timings.items():
        print(f"verify: {way} {size / timing.cpu:.2f} GB per processor second", file=sys.stderr)
    yield "verify", found


ROWS = {
    "verify": verified,
    "warm": warm,
    "ring": ring,
    "write": write,
    "int8": int8,
    "cold": cold,
    "open_million": open_million,
    "scan_10k": scan_10k,
}


def main() -> None:
    """Measure the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_cache_", dir=given.dir))
    result: dict[str, object] = {}
    rows = given.rows.split(",")
    try:
        if not set(rows) <= {"open_million", "scan_10k", "write"}:
            make_store(folder / "store")
            make_plain(folder / "plain")
        for row in rows:
            for name, found in ROWS[row](folder, given.rounds):
                result |= report(name, found, quiet=given.json)
    finally:
        shutil.rmtree(folder)
    result["load"] = os.getloadavg()[0]
    print(json.dumps(result))


def report(name: str, found: Comparison, *, quiet: bool) -> dict[str, object]:
    """The numbers of one row for the JSON line; the whole row on stderr."""
    if not quiet:
        for way, timing in found.timings.items():
            print(
                f"{name:20} {way:18} {timing.wall * 1e3:9.3f} ms  cpu {timing.cpu * 1e3:9.3f} ms  "
                f"× {found.speed[way]:.3f}  cpu × {found.speed_cpu[way]:.3f}",
                file=sys.stderr,
            )
    sys.stderr.flush()
    return {name: round(found.speed["ours"], 3), f"{name}_cpu": round(found.speed_cpu["ours"], 3)}


if __name__ == "__main__":
    main()
