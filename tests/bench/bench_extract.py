"""Extraction against a bare loop of the encoder on frames already in memory.

    python -m tests.bench.bench_extract [--frames 24] [--repeat 3]

Real mp4s are drawn and decoded, real shards are written. CLIP is open_clip's ViT-B-32 with random weights, the teacher
a DiT of the same width (8 blocks, 12 × 64) behind a VAE of a quarter of the released one's width; all in one thread.
The bare loop encodes resized pictures that lie in memory and throws the result away, so that everything else is the
pipeline's own. Both sides run in one process, in turns; medians.

``extract_vs_bare_*`` is the ratio of CPU seconds of the encoding thread: what is reached where the other threads and
the decoder process find a free core. ``wall_*`` is the ratio on the clock, which on a machine with other jobs says
little; ``beside_*`` is the CPU time of everything beside the encoding thread as a share of the encoder's: below 1, one
more core hides it. ``cpu_*`` is bare CPU over all CPU: the bound where there is a single core only.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch

from pipeline import presets
from pipeline.overrides import apply
from stages.config import PipelineConfig
from stages.data.frames import open_source
from stages.extract.run import Job, calibration_frames, extract, worker
from stages.types import FrozenEncoder
from tests.extract.conftest import BUILDERS

VIDEOS, HEIGHT, WIDTH, FPS = 4, 360, 640, 10
DIT = {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 8, "sample_size": 32, "patch_size": 2}
DIT |= {"num_embeds_ada_norm": 1000, "in_channels": 4, "out_channels": 8}
VAE = {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def draw_videos(folder: Path, frames: int) -> None:
    """Moving texture with noise at 360p: as hard to decode as camera pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(VIDEOS):
        with av.open(str(folder / f"v{number}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for t in range(frames):
                moved = np.roll(picture, (3 * t, 5 * t), (0, 1)).astype(np.int16) + rng.integers(-8, 9, picture.shape)
                frame = av.VideoFrame.from_ndarray(moved.clip(0, 255).astype(np.uint8), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))


def make_config(folder: Path) -> PipelineConfig:
    """Both encoders at the width of ViT-B/32, with random weights."""
    for part, document in (("transformer", DIT), ("vae", VAE)):
        (folder / "dit" / part).mkdir(parents=True)
        (folder / "dit" / part / "config.json").write_text(json.dumps(document))
    sets = ["data.name=clips", f"data.videos={folder / 'videos'}", "data.annotations=", f"data.fps={FPS}"]
    sets += ["clip.model=ViT-B-32", "clip.weights=seed:0", "clip.layer=11", "clip.dtype=float16"]
    sets += [f"teacher.model={folder / 'dit'}", "teacher.weights=seed:0", "teacher.layers=8"]
    return apply(presets.miniature(), [*sets, "extract.batch_size=8", "extract.shard_frames=48"])


def clocks() -> dict[str, float]:
    """Seconds so far: on the clock, CPU of this thread, of all threads, and of child processes that were reaped."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall": time.perf_counter(),
        "thread": time.thread_time(),
        "process": time.process_time(),
        "children": children.ru_utime + children.ru_stime,
    }


def timed(work: Callable[[], object]) -> dict[str, float]:
    """What ``work`` took by each clock."""
    before = clocks()
    work()
    return {name: after - before[name] for name, after in clocks().items()}


def bare_loop(encoders: list[FrozenEncoder], pictures: list[list[torch.Tensor]]) -> None:
    """The encoders on pictures in memory, batch by batch as the extraction has them."""
    for batch in pictures:
        for encoder, picture in zip(encoders, batch, strict=True):
            encoder.encode(picture)


def compare(config: PipelineConfig, names: tuple[str, ...], frames: int, repeat: int, folder: Path) -> dict[str, float]:
    """Medians of the ratios for one command."""
    wanted = {f"v{n}": np.arange(frames) for n in range(VIDEOS)}
    # With the calibration that ``extract`` adds, or it would find other tools than these and load all weights again.
    calibration = calibration_frames(wanted)
    job = Job(config, tuple(BUILDERS[n] for n in names), folder / "store", "cpu", calibration=calibration)
    _, encoders, _ = worker(job)
    source = open_source(config.data)
    pictures = [
        [encoder.view(batch) for encoder in encoders]
        for video, index in wanted.items()
        for batch in source.frames(video, index, batch_size=config.extract.batch_size)
    ]
    source.close()
    bare_loop(list(encoders), pictures[:1])
    ratios: dict[str, list[float]] = {"extract_vs_bare": [], "wall": [], "beside": [], "cpu": []}
    for turn in range(repeat):
        job = replace(job, cache=folder / f"store-{'-'.join(names)}-{turn}")
        worker.cache_clear()
        _, encoders, _ = worker(job)  # loading weights is no part of either side
        bare = timed(lambda: bare_loop(list(encoders), pictures))  # noqa: B023 - called here
        ours = timed(lambda: extract(job, wanted))  # noqa: B023
        everything = ours["process"] + ours["children"]
        ratios["extract_vs_bare"].append(bare["thread"] / ours["thread"])
        ratios["wall"].append(bare["wall"] / ours["wall"])
        ratios["beside"].append((everything - ours["thread"]) / bare["thread"])
        ratios["cpu"].append(bare["process"] / everything)
    return {
        f"{key}_{'both' if len(names) == 2 else names[0]}": round(statistics.median(v), 4) for key, v in ratios.items()
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24, help="of each of the four videos")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("clip", "teacher", "both"), help="one of the three comparisons")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_videos(folder / "videos", options.frames)
        config = make_config(folder)
        for which in ("clip", "teacher", "both"):
            if options.only in (None, which):
                names = ("clip", "teacher") if which == "both" else (which,)
                part = compare(config, names, options.frames, options.repeat, folder)
                print(part, flush=True)
                result |= part
    print(json.dumps(result))


if __name__ == "__main__":
    main()
