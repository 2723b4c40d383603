"""The cache beside other ways to keep features, each written and read as its own documents say.

    python -m tests.bench.bench_cache_peers --json [--dir FOLDER] [--rows litdata,mds,…] [--rounds 5]

The peers need an environment of their own, for mosaicml-streaming asks for an older numpy and transformers than this
project does. Beside this project's dependencies it holds:

    python -m venv peers && peers/bin/pip install -e . tensorstore
    peers/bin/pip install litdata mosaicml-streaming zarrs

pip then says that diff-lmm wants newer ones of what it replaced; nothing that is measured here uses those. A peer that
is not installed is skipped by name.

16 videos of 100 × 257 × 1408 float16 (72 MB each) lie in the page cache. A way of reading is a pass over all of them;
all ways of a row run in one process, one after the other, in a new order every round. Timed is the steady part of a
pass, from the delivery of video 4 to that of video 16, so that the start of workers or threads is on nobody's bill;
processor time is that of this process and its workers. A video counts as delivered when its numbers are in memory that
is the reader's to keep: a view into a map of a file is copied into a buffer that is used again. Before the clock runs,
everything that a way delivers is compared with the source.

The last line is one JSON object: how many times as fast as the peer this project's cache is, by the wall clock and by
processor time. The folder needs 4 GB and is left empty.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from crc32c import crc32c

from cache_schema import FeatureStore, Segment, SegmentResult
from stages.data.loader import Frames, Ring
from tests.bench.bench_cache import FRAMES, SHAPE, SPEC, video_features
from tests.cache_schema.makers import write_single

VIDEOS, WARM_UP, WORKERS = 16, 4, 2
WHOLE = np.arange(FRAMES)
GOALS = {
    "litdata_iteration": 2.3,
    "litdata_loader": 7,
    "mds_loader": 7,
    "webdataset_loader": 7,
    "safetensors": 1.3,
    "zarr": 6,
    "zarrs": 3.5,
    "tensorstore": 2.5,
}
PEERS = ["litdata", "mosaicml-streaming", "webdataset", "safetensors", "zarr", "zarrs", "tensorstore"]
Array = npt.NDArray[Any]
Pass = Callable[[], Iterator[Any]]  # gives every video once; each is valid until the next is asked for


class Timing(NamedTuple):
    """Seconds per video of one pass, and until its first video."""

    wall: float
    cpu: float
    first: float


class Row(NamedTuple):
    """What is measured together, by name; goals are for the first of ours."""

    ours: Mapping[str, Pass]
    peers: Mapping[str, Pass]


# --- our side


def one_thread(store: FeatureStore) -> Iterator[Array]:
    """Whole videos into one buffer."""
    buffer = store.buffer(FRAMES)
    for number in range(VIDEOS):
        yield store.read(f"v{number}", WHOLE, out=buffer)


def ring(store: FeatureStore) -> Iterator[torch.Tensor]:
    """The trainer's loader with as many threads as the peers have worker processes."""
    batches = [Frames.of([(f"v{number}", WHOLE)]) for number in range(VIDEOS)]
    with Ring([store], batches, readers=WORKERS) as reader:
        for (video,) in reader:
            yield video


def make_store(path: Path) -> FeatureStore:
    """A committed store of all videos."""
    store = FeatureStore.create(path, "tokens", SPEC)
    store.extend_plan({f"v{number}": WHOLE for number in range(VIDEOS)})
    for task in store.pending():
        write_single(store, task, _produce)
    return store


def _produce(segment: Segment) -> SegmentResult[Array]:
    return SegmentResult(iter([video_features(int(segment.video_id[1:]))]))


# --- the peers: each writes the videos into the folder, then tells how it reads them


def video_tensor(number: int) -> torch.Tensor:
    """For litdata, whose writer imports this in a process of its own."""
    return torch.from_numpy(video_features(number))


def litdata(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """Uncompressed chunks. A tensor of its data set is a view of a map and is copied once, a numpy array is its own;
    its loader stacks the tensors in worker processes."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder / "optimizing")  # else outside of the folder
    import litdata

    def written(name: str, fn: Callable[[int], object]) -> str:
        target, videos = str(folder / name), list(range(VIDEOS))
        litdata.optimize(fn=fn, inputs=videos, output_dir=target, num_workers=1, chunk_bytes="64MB", verbose=False)
        multiprocessing.set_start_method(None, force=True)  # its writer had left another one for all workers to come
        return target

    where = written("tensors", video_tensor)
    # Made once and gone through once a round, as in training: from the second time on its maps are there.
    tensors, arrays = litdata.StreamingDataset(where), litdata.StreamingDataset(written("arrays", video_features))

    def iterate() -> Iterator[Array]:
        buffer = page_aligned_buffer()
        for video in tensors:
            np.copyto(buffer, video.numpy())
            yield buffer

    yield Row(
        {"ours": lambda: one_thread(store), "ours, ring": lambda: ring(store)},
        {"litdata_iteration": iterate, "litdata_iteration_numpy": lambda: iter(arrays)},
    )
    loader = litdata.StreamingDataLoader(litdata.StreamingDataset(where), batch_size=1, num_workers=WORKERS)
    yield Row({"ours, ring": lambda: ring(store)}, {"litdata_loader": lambda: iter(loader)})


def mds(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """MDS shards without compression or hashes (its quick start has zstd, which would be slower)."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    shape = ",".join(map(str, (FRAMES, *SHAPE)))
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:float16:{shape}"}) as writer:
        for number in range(VIDEOS):
            writer.write({"tokens": video_features(number)})
    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=1)
    loader = StreamingDataLoader(dataset, batch_size=1, num_workers=WORKERS)
    yield Row({"ours, ring": lambda: ring(store)}, {"mds_loader": lambda: (batch["tokens"] for batch in loader)})


def webdataset(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """Tar files of 4 videos as npy, so that each worker has its own."""
    import webdataset as wds

    with wds.ShardWriter(str(folder / "videos-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(VIDEOS):
            writer.write({"__key__": f"v{number}", "npy": video_features(number)})
    dataset = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode()
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    yield Row({"ours, ring": lambda: ring(store)}, {"webdataset_loader": lambda: (item["npy"] for item in loader)})


def safetensors(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """One file per video. Its torch tensor is a view of a map and is copied once; its numpy array is its own."""
    from safetensors import safe_open
    from safetensors.numpy import load_file
    from safetensors.torch import save_file

    for number in range(VIDEOS):
        save_file({"tokens": video_tensor(number)}, folder / f"v{number}.safetensors")

    def read() -> Iterator[Array]:
        buffer = page_aligned_buffer()
        for number in range(VIDEOS):
            with safe_open(folder / f"v{number}.safetensors", framework="pt", device="cpu") as file:
                np.copyto(buffer, file.get_tensor("tokens").numpy())
            yield buffer

    def load() -> Iterator[Array]:
        return (load_file(folder / f"v{number}.safetensors")["tokens"] for number in range(VIDEOS))

    yield Row({"ours": lambda: one_thread(store)}, {"safetensors": read, "safetensors_numpy": load})


def zarr(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """This project's own store, read by zarr-python."""
    del folder  # nothing is written
    yield Row({"ours": lambda: one_thread(store)}, {"zarr": _by_zarr(store, {})})


def zarrs(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """The same through the pipeline of zarrs, with one thread as ours has, and with as many as it takes by itself."""
    del folder
    import zarrs  # noqa: F401  # not used: zarr finds it by the name below

    pipeline: dict[str, object] = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    one_thread_only = {**pipeline, "threading.max_workers": 1}
    peers = {"zarrs": _by_zarr(store, one_thread_only), "zarrs_default": _by_zarr(store, pipeline)}
    yield Row({"ours": lambda: one_thread(store)}, peers)


def _by_zarr(store: FeatureStore, config: dict[str, object]) -> Pass:
    import zarr

    with zarr.config.set(config):
        array = zarr.open_array(Path(str(store.path)) / store.modality, mode="r")
    return lambda: (array[first : first + FRAMES] for first in rows_of_videos(store))


def tensorstore(folder: Path, store: FeatureStore) -> Iterator[Row]:
    """The same by tensorstore into a buffer that is used again, with one thread and with as many as it takes."""
    del folder
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.path}/{store.modality}"}}

    def reader(limits: dict[str, object]) -> Pass:
        context = tensorstore.Context(limits)
        array = tensorstore.open(spec, open=True, read=True, context=context).result()

        def read() -> Iterator[Array]:
            buffer = page_aligned_buffer()
            target = tensorstore.array(buffer, copy=False, write=True, context=context)
            for first in rows_of_videos(store):
                target.write(array[first : first + FRAMES].translate_to[0]).result()
                yield buffer

        return read

    one = {"limit": 1}
    peers = {
        "tensorstore": reader({"data_copy_concurrency": one, "file_io_concurrency": one}),
        "tensorstore_default": reader({}),
    }
    yield Row({"ours": lambda: one_thread(store)}, peers)


def rows_of_videos(store: FeatureStore) -> list[int]:
    """Where each video starts along the frame axis; its frames follow each other."""
    return [int(store.plan.find(f"v{number}", WHOLE[:1])[0]) for number in range(VIDEOS)]


def page_aligned_buffer() -> Array:
    """[FRAMES, *SHAPE] on a page, as good a target as ours is: some processors copy to others three times as slowly."""
    memory = np.zeros(2 * FRAMES * int(np.prod(SHAPE)) + 4096, np.uint8)
    start = -memory.__array_interface__["data"][0] % 4096
    return memory[start : start + memory.size - 4096].view(np.float16).reshape(FRAMES, *SHAPE)


ROWS = {
    "litdata": litdata,
    "mds": mds,
    "webdataset": webdataset,
    "safetensors": safetensors,
    "zarr": zarr,
    "zarrs": zarrs,
    "tensorstore": tensorstore,
}


# --- the clock


def check(name: str, videos: Iterator[Any], sources: list[int]) -> None:
    """Raise ValueError unless the pass gives exactly the source's videos, in any order."""
    found = []
    for video in videos:
        array = video.numpy() if isinstance(video, torch.Tensor) else video
        if array.dtype != np.float16 or array.shape not in [(FRAMES, *SHAPE), (1, FRAMES, *SHAPE)]:
            raise ValueError(f"{name} gave {array.dtype} {array.shape}")
        found.append(checksum(array))
    if sorted(found) != sorted(sources):
        raise ValueError(f"{name} gave other videos than were written")


def checksum(array: Array) -> int:
    """Of all numbers, bit for bit."""
    return crc32c(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def timed(videos: Iterator[Any]) -> Timing:
    """One pass."""
    began = time.perf_counter()
    first = start = wall = cpu = 0.0
    workers: list[psutil.Process] = []
    for number, _ in enumerate(videos, 1):
        if number == 1:
            first = time.perf_counter() - began
            workers = psutil.Process().children(recursive=True)  # slow to find, so not while the clock runs
        if number == WARM_UP:
            cpu, start = processor_seconds(workers), time.perf_counter()
        elif number == VIDEOS:  # before the pass ends: its workers are still there to be asked
            wall, cpu = time.perf_counter() - start, processor_seconds(workers) - cpu
    return Timing(wall / (VIDEOS - WARM_UP), cpu / (VIDEOS - WARM_UP), first)


def processor_seconds(workers: list[psutil.Process]) -> float:
    """Of this process and of these."""
    spent = time.process_time()
    for times in (worker.cpu_times() for worker in workers):
        spent += times.user + times.system
    return spent


def measure(ways: Mapping[str, Pass], rounds: int, seed: int = 0) -> dict[str, list[Timing]]:
    """Every way in every round, in a new random order."""
    rng, found = random.Random(seed), {name: list[Timing]() for name in ways}
    for _ in range(rounds):
        for name in rng.sample(list(ways), len(ways)):
            found[name].append(timed(ways[name]()))
    return found


def report(row: Row, found: Mapping[str, list[Timing]], *, quiet: bool) -> dict[str, float]:
    """For the JSON line: medians over the rounds of peer / ours. The timings behind them on stderr."""
    result = {}
    for name, timings in found.items():
        wall, cpu, first = (1e3 * statistics.median(values) for values in zip(*timings, strict=True))
        if not quiet:
            print(f"{name:20} {wall:8.2f} ms  cpu {cpu:8.2f} ms  first after {first:8.1f} ms", file=sys.stderr)
    for peer in row.peers:
        for ours in row.ours:
            both = list(zip(found[peer], found[ours], strict=True))
            key = peer if ours == next(iter(row.ours)) else f"{peer}_vs_ring"
            result[key] = round(statistics.median(a.wall / b.wall for a, b in both), 2)
            result[f"{key}_cpu"] = round(statistics.median(a.cpu / b.cpu for a, b in both if b.cpu), 2)
    return result


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for package in [*PEERS, "torch", "numpy"]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--dir", type=Path, default=None, help="folder to write to")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_cache_peers_", dir=given.dir))
    tempfile.tempdir = str(folder)  # streaming leaves lock files in the usual one
    result: dict[str, object] = {}
    skipped = []
    try:
        store = make_store(folder / "store")
        sources = [checksum(video_features(number)) for number in range(VIDEOS)]
        for name in given.rows.split(","):
            room = folder / name
            room.mkdir()
            try:
                for row in ROWS[name](room, store):
                    ways = {**row.ours, **row.peers}
                    for way, videos in ways.items():
                        check(way, videos(), sources)
                    result |= report(row, measure(ways, given.rounds), quiet=given.json)
            except ModuleNotFoundError as error:
                print(f"{name}: skipped, {error.name} is not installed", file=sys.stderr)
                skipped.append(name)
            shutil.rmtree(room)
    finally:
        shutil.rmtree(folder)
    missed = [name for name, goal in GOALS.items() if float(str(result.get(name, goal))) < goal]
    result |= {"skipped": skipped, "missed": missed, "versions": versions(), "load": os.getloadavg()[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
