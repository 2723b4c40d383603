"""The small world as files: mp4 videos, and annotations in MA-LMM's LVU and MSVD-QA layouts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from stages.miniature.sayings import fine_questions, questions
from stages.miniature.videos import ANNOTATED_FPS, FPS, SPLITS, VERSION, VideoSpec, labels, render, specs

# One thread, one quantiser, nothing decided by lookahead: with x264's default lookahead the same pictures of this size
# gave different files from call to call, even on one thread (PyAV 18.1; up to 15 in 15 calls).
X264 = {
    "threads": "1",
    "preset": "superfast",
    "qp": "18",
    "bf": "0",
    "x264-params": "rc-lookahead=0:mbtree=0:scenecut=0",
}
LVU, QA, QA_FINE = "lvu", "msvd_qa", "msvd_qa_fine"  # annotation folders
MARKER = "world.json"  # written last; without it the folder is not complete


@dataclass(frozen=True)
class WorldSummary:
    """What ``write_world`` left in a folder."""

    root: Path
    videos: int
    frames: int
    questions: int
    written: int  # videos drawn by this call; 0 = the world was already complete

    @property
    def videos_folder(self) -> Path:
        """Folder of mp4 files: ``data.videos``."""
        return self.root / "videos"

    @property
    def lvu_folder(self) -> Path:
        """Annotations in MA-LMM's LVU layout: ``data.annotations`` with any of TASKS and FINE_TASKS."""
        return self.root / LVU

    @property
    def qa_folder(self) -> Path:
        """Coarse questions in MA-LMM's MSVD-QA layout."""
        return self.root / QA

    def __str__(self) -> str:
        done = f"{self.written} drawn now" if self.written else "already complete; nothing to do"
        return f"{self.videos} videos, {self.frames} frames, {self.questions} questions in {self.root} ({done})"


def write_world(
    out: Path,
    *,
    videos: int,
    seed: int,
    workers: int = 1,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> WorldSummary:
    """Draw the world into ``out``: ``videos/*.mp4``, annotations in ``lvu/``, ``msvd_qa/`` and ``msvd_qa_fine/``, and a
    marker at the end. ``progress`` is called with (videos drawn, videos to draw, id).

    Running it again does nothing; a larger ``videos`` draws only the new ones. Raises ValueError when the folder holds
    a world of another seed or version, or when ``videos`` is too small to fill the three splits.
    """
    if videos < len(SPLITS):
        raise ValueError(f"a world needs at least {len(SPLITS)} videos to have train, val and test; got {videos}")
    wanted = specs(videos, seed)
    paths = {spec: out / "videos" / f"{spec.video_id}.mp4" for spec in wanted}
    annotations = _annotations(wanted)
    before = _read_marker(out / MARKER)
    if before and (before["version"], before["seed"]) != (VERSION, seed):
        raise ValueError(
            f"{out} holds a world of version {before['version']}, seed {before['seed']}; this is version {VERSION}, "
            f"seed {seed}. Choose another folder, or delete that one."
        )
    sizes = before.get("bytes", {})
    absent = [spec for spec, path in paths.items() if not path.is_file() or path.stat().st_size != sizes.get(path.stem)]
    if absent or before.get("videos") != videos or not all((out / name).is_file() for name in annotations):
        (out / MARKER).unlink(missing_ok=True)
        jobs = [(spec, paths[spec]) for spec in absent]
        for done, name in enumerate(_draw_files(jobs, workers), 1):
            progress(done, len(jobs), name)
        for name, entries in annotations.items():
            _publish(out / name, json.dumps(entries, indent=1).encode())
        sizes = {path.stem: path.stat().st_size for path in paths.values()}
        marker = {"version": VERSION, "seed": seed, "videos": videos, "bytes": sizes}
        _publish(out / MARKER, json.dumps(marker, indent=1).encode())
    frames = sum(spec.num_frames for spec in wanted)
    asked = sum(len(questions(spec)) for spec in wanted)
    return WorldSummary(out, videos, frames, asked, len(absent))


def _draw_files(jobs: Sequence[tuple[VideoSpec, Path]], workers: int) -> Iterator[str]:
    """Draw them; yields the id of each that is done."""
    if workers < 2 or len(jobs) < 64:
        yield from map(_draw_file, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw_file, jobs, chunksize=16)


def _draw_file(job: tuple[VideoSpec, Path]) -> str:
    spec, path = job
    _publish(path, encode(render(spec, [n / FPS for n in range(spec.num_frames)])))
    return spec.video_id


def encode(frames: UInt8[np.ndarray, "n h w 3"]) -> bytes:
    """An H.264 mp4 at FPS from RGB pictures of one size. Equal pictures give equal bytes."""
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=X264)
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _annotations(wanted: Sequence[VideoSpec]) -> dict[str, dict[str, dict[str, object]]]:
    """File name -> content, in both layouts."""
    files: dict[str, dict[str, dict[str, object]]] = {}
    for split in SPLITS:
        part = [spec for spec in wanted if spec.split == split]
        files[f"{LVU}/{split}.json"] = {spec.video_id: _lvu_entry(spec) for spec in part}
        for folder, ask in ((QA, questions), (QA_FINE, fine_questions)):
            asked = [(spec, *question) for spec in part for question in ask(spec)]
            files[f"{folder}/qa_{split}.json"] = {f"{n:07d}": _qa_entry(f"{n:07d}", *q) for n, q in enumerate(asked)}
    return files


def _lvu_entry(spec: VideoSpec) -> dict[str, object]:
    counts = {"duration": spec.seconds, "num_frames": spec.seconds * ANNOTATED_FPS}
    return {"subset": spec.split, **counts, **labels(spec)}


def _qa_entry(key: str, spec: VideoSpec, kind: str, question: str, answer: str) -> dict[str, object]:
    entry = {"answer": answer, "question": question, "answer_type": kind, "question_id": key, "dataset": "miniature"}
    return {**entry, "video": spec.video_id, "frame_length": spec.seconds * ANNOTATED_FPS}


def _read_marker(path: Path) -> dict[str, Any]:
    """The marker of an earlier run; empty where there is none that can be read."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and {"version", "seed", "videos", "bytes"} <= marker.keys() else {}


def _publish(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
