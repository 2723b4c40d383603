"""More training or val videos beside a drawn world: ``python -m tests.bench.more_videos --help``.

Half of a world is test, so a larger world costs more in test than in other videos. This draws only the training (or
val) videos of a larger world that ``--world`` does not hold, into the same folder of videos, and writes an annotation
folder in the LVU layout for every count: ``lvu_train5000`` has so many training videos, and the val and test videos of
``--world``. A video follows from (seed, number), so these are the files of a larger ``pipeline synth``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from stages.miniature.videos import FPS, SPLIT_CYCLE, SPLITS, VideoSpec, render, specs
from stages.miniature.world import _lvu_entry, encode


def main() -> None:
    """Draw what is absent, then write the annotation folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("cache/miniature/world"))
    parser.add_argument("--train", type=int, nargs="+", default=[], help="training videos of each annotation folder")
    parser.add_argument("--val", type=int, nargs="+", default=[], help="val videos of each annotation folder")
    asked = parser.parse_args()
    seed = json.loads((asked.world / "world.json").read_text())["seed"]
    for split, counts in (("train", asked.train), ("val", asked.val)):
        if counts:
            found = _first(max(counts), split, seed)
            _draw(found, asked.world / "videos")
            for count in counts:
                _write(found[:count], split, asked.world)


def _first(count: int, split: str, seed: int) -> list[VideoSpec]:
    """The first ``count`` videos of a split."""
    share = SPLIT_CYCLE.count(split)
    numbers = (count // share + 1) * len(SPLIT_CYCLE)
    return [spec for spec in specs(numbers, seed) if spec.split == split][:count]


def _draw(wanted: list[VideoSpec], folder: Path) -> None:
    started, drawn = time.process_time(), 0
    for spec in wanted:
        path = folder / f"{spec.video_id}.mp4"
        if path.exists():
            continue
        temporary = path.with_suffix(".part")
        temporary.write_bytes(encode(render(spec, [n / FPS for n in range(spec.num_frames)])))
        temporary.replace(path)
        drawn += 1
        if drawn % 500 == 0:
            print(f"{drawn} drawn, {time.process_time() - started:.0f} CPU-s", flush=True)


def _write(part: list[VideoSpec], split: str, world: Path) -> None:
    folder = world / f"lvu_{split}{len(part)}"
    folder.mkdir(exist_ok=True)
    for name in SPLITS:
        (folder / f"{name}.json").write_text((world / "lvu" / f"{name}.json").read_text())
    entries = {spec.video_id: _lvu_entry(spec) for spec in part}
    (folder / f"{split}.json").write_text(json.dumps(entries, indent=1))
    print(f"{folder}: {len(part)} {split} videos")


if __name__ == "__main__":
    main()
