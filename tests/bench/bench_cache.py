"""How near the cache is to memory: every row against a floor in the same process, interleaved, medians.

    python -m tests.bench.bench_cache --json [--dir FOLDER] [--rows warm,ring,write,int8,cold] [--rounds 25]

The last line is one JSON object; 1.0 means as fast as the floor of the row. A video is 100 × 257 × 1408 float16.
Folder: real disk for the cold and the write row; it needs 3 GB and is left empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema import FeatureSpec, FeatureStore, Segment, SegmentResult
from tests.bench.measure import Comparison, compare

VIDEOS, FRAMES, SHAPE = 8, 100, (257, 1408)
FRAME_BYTES = 2 * SHAPE[0] * SHAPE[1]
SPEC = FeatureSpec(
    encoder="open_clip:EVA01-g-14",
    weights="0" * 64,
    layer=39,
    pool="none",
    resize="squash 224 bicubic antialias uint8",
    normalize="mean=0.5 std=0.5",
    latent="",
    timestep=None,
    label=None,
    dtype="float16",
    compute_dtype="float16",
    frame_shape=SHAPE,
    frame_rule="10 fps grid, nearest by presentation time",
    decoder="PyAV 18",
)
Array = npt.NDArray[Any]


def video_features(seed: int) -> Array:
    """One video [100, 257, 1408] float16: token-wise normal numbers with log-normal channel gains, as in a ViT."""
    rng = np.random.default_rng(seed)
    gains = np.exp(np.random.default_rng(1).normal(0, 0.8, SHAPE[1])).astype(np.float32)
    block = rng.standard_normal((10, *SHAPE), np.float32) * gains
    return np.concatenate([np.roll(block, turn, axis=1) for turn in range(FRAMES // 10)]).astype(np.float16)


def make_store(path: Path, videos: int = VIDEOS) -> FeatureStore:
    """A committed store of ``videos`` videos named v0, v1, …"""
    store = FeatureStore.create(path, "tokens", SPEC)
    store.extend_plan({f"v{number}": range(FRAMES) for number in range(videos)})
    for task in store.pending():
        store.write_task(task, _produce)
    return store


def _produce(segment: Segment) -> SegmentResult[Array]:
    return SegmentResult(iter([video_features(int(segment.video_id[1:]))]))


def make_plain(path: Path, videos: int = VIDEOS) -> Path:
    """The same numbers as one bare array file, which is what ``np.memmap`` reads."""
    with path.open("wb") as file:
        for number in range(videos):
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


ROWS = {"warm": warm}


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
    try:
        make_store(folder / "store")
        make_plain(folder / "plain")
        for row in given.rows.split(","):
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
                f"{name:20} {way:12} {timing.wall * 1e3:9.3f} ms  cpu {timing.cpu * 1e3:9.3f} ms  "
                f"× {found.speed[way]:.3f}  cpu × {found.speed_cpu[way]:.3f}",
                file=sys.stderr,
            )
    return {name: round(found.speed["ours"], 3), f"{name}_cpu": round(found.speed_cpu["ours"], 3)}


if __name__ == "__main__":
    main()
