"""More training videos beside a drawn world: ``python -m tests.bench.more_training_videos --help``.

Half of a world is test, so a larger world costs more in test than in training videos. This draws only the training
videos of a larger world that ``--world`` does not hold, into the same folder of videos, and writes
an annotation folder in the LVU layout for every count of ``--train``: so many training videos, and the val and test
videos of ``--world``. A video follows from (seed, number), so these are the files of a larger ``pipeline synth``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from stages.miniature.videos import FPS, VideoSpec, render, specs
from stages.miniature.world import _lvu_entry, encode


def main() -> None:
    """Draw what is absent, then write the annotation folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("cache/miniature/world"))
    parser.add_argument("--train", type=int, nargs="+", required=True, help="training videos of each annotation folder")
    asked = parser.parse_args()
    marker = json.loads((asked.world / "world.json").read_text())
    # Three of eight videos of a world are training videos, and there are some at every number.
    training = [spec for spec in specs(max(asked.train) * 8 // 3 + 8, marker["seed"]) if spec.split == "train"]
    started = time.process_time()
    drawn = 0
    for spec in training[: max(asked.train)]:
        drawn += _draw(spec, asked.world / "videos" / f"{spec.video_id}.mp4")
        if drawn and drawn % 500 == 0:
            print(f"{drawn} drawn, {time.process_time() - started:.0f} CPU-s", flush=True)
    for count in asked.train:
        folder = asked.world / f"lvu_train{count}"
        folder.mkdir(exist_ok=True)
        entries = {spec.video_id: _lvu_entry(spec) for spec in training[:count]}
        (folder / "train.json").write_text(json.dumps(entries, indent=1))
        for split in ("val", "test"):
            (folder / f"{split}.json").write_text((asked.world / "lvu" / f"{split}.json").read_text())
        print(f"{folder}: {count} training videos")


def _draw(spec: VideoSpec, path: Path) -> bool:
    """Whether the file had to be drawn."""
    if path.exists():
        return False
    temporary = path.with_suffix(".part")
    temporary.write_bytes(encode(render(spec, [n / FPS for n in range(spec.num_frames)])))
    temporary.replace(path)
    return True


if __name__ == "__main__":
    main()
