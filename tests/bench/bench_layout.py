"""What the frozen features of the miniature know of layout: ``python -m tests.bench.bench_layout [--json]``.

Ridge regression (penalty chosen on val) from the features of one frame to where the pair is, on the world that
``./run.sh`` drew and extracted. The paper's §3.2 says that CLIP loses layout and a diffusion model keeps it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cache_schema.store import FeatureStore
from pipeline import presets
from pipeline.inputs import load_dataset, open_stores
from stages.miniature.videos import positions, specs
from stages.train.probes import ridge_r2
from stages.types import Sample

TARGETS = ("x", "y", "abs_dx", "abs_dy", "distance")  # of the pair's centre, and of one actor from the other


def main() -> None:
    """Print R² on test for every feature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/miniature/features"))
    parser.add_argument(
        "--videos", type=int, default=700, help="of each of train and test, and at most half as many of val"
    )
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    config = presets.miniature()
    dataset = load_dataset(config)
    clip, teacher = open_stores(config, asked.cache, aligned=True)
    parts = [_frames(dataset.samples(split), asked.videos) for split in ("train", "val", "test")]
    truth = [np.array([where(*frame, fps=config.data.fps) for frame in part]) for part in parts]
    features = {
        "CLIP, mean over tokens": [_read(clip, part).mean(axis=1) for part in parts],
        "CLIP, all tokens": [_read(clip, part).reshape(len(part), -1) for part in parts],
        "teacher, pooled": [_read(teacher, part).reshape(len(part), -1) for part in parts],
    }
    found: dict[str, Any] = {"frames": {"train": len(parts[0]), "val": len(parts[1]), "test": len(parts[2])}}
    for name, values in features.items():
        r2 = ridge_r2(*zip(values, truth, strict=True))
        found[name] = dict(zip(TARGETS, (round(float(value), 3) for value in r2), strict=True))
        if not asked.json:
            print(f"{name:26}", "  ".join(f"{target} {value:.3f}" for target, value in found[name].items()))
    print(json.dumps(found))


def _frames(samples: list[Sample], videos: int) -> list[tuple[str, int]]:
    """Three frames of one window of each video: first, middle, last."""
    windows = {sample.video_id: sample.frame_index for sample in samples}
    return [(video, int(index[i])) for video, index in list(windows.items())[:videos] for i in (0, len(index) // 2, -1)]


def where(video: str, frame: int, *, fps: float) -> Float[np.ndarray, " K"]:
    """The TARGETS of one frame of a video of the world."""
    seed, number = map(int, re.findall(r"[sv](\d+)", video))
    known = _spec(seed, number)
    one, two = map(np.array, positions(known, frame / fps))
    (x, y), (dx, dy) = (one + two) / 2, np.abs(one - two)
    return np.array([x, y, dx, dy, np.hypot(dx, dy)])


_KNOWN: dict[int, list[Any]] = {}


def _spec(seed: int, number: int) -> Any:
    if number >= len(_KNOWN.get(seed, [])):
        _KNOWN[seed] = specs(max(4000, number + 1), seed)
    return _KNOWN[seed][number]


def _read(store: FeatureStore, frames: list[tuple[str, int]]) -> Float[np.ndarray, "n ..."]:
    return np.stack([store.read(video, np.array([frame]))[0] for video, frame in frames]).astype(np.float64)


if __name__ == "__main__":
    main()
