"""A small world of two shapes moving over a scene, drawn as mp4 files with labels.

Everything about a video follows from (seed, number): its split, its labels, its pixels. More videos only add to a
world, and an id names its content for good. Motion is the ``relationship`` of the two actors, texture the ``scene``,
tint the ``director``; the labels are balanced within each split and independent of each other.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from stages.miniature.draw import (
    COLORS,
    SHAPES,
    TEXTURES,
    TINTS,
    Actor,
    Place,
    Scene,
    apply_tint,
    draw_actor,
    paint_scene,
)

VERSION = 1  # part of every id: a change of the pictures is a change of the ids
SIZE = 96  # pixels per side
FPS = 10
MOTIONS = ("chase", "orbit", "meet", "avoid", "mirror")
SPLIT_CYCLE = ("train", "train", "val", "train", "test", "train")  # by number: 2/3, 1/6, 1/6 of any world
SPLITS = ("train", "val", "test")
# One thread, one quantiser, nothing decided by lookahead: with x264's default lookahead the same pictures of this size
# gave different files from call to call, even on one thread (PyAV 18.1; up to 15 in 15 calls).
X264 = {
    "threads": "1",
    "preset": "fast",
    "qp": "18",
    "bf": "0",
    "x264-params": "rc-lookahead=0:mbtree=0:scenecut=0",
}
LVU, QA = "lvu", "msvd_qa"  # annotation folders
MARKER = "world.json"  # written last; without it the folder is not complete


@dataclass(frozen=True)
class VideoSpec:
    """One video before it is drawn."""

    video_id: str
    split: str
    seconds: int
    motion: str
    actors: tuple[Actor, Actor]  # they differ in shape and in colour
    scene: Scene
    phase: float  # radians; where on its path a motion starts, or along which line it runs
    spin: int  # +1 or -1: the sense of turning

    @property
    def num_frames(self) -> int:
        """Frames at FPS."""
        return self.seconds * FPS


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
        """Annotations in MA-LMM's LVU layout: ``data.annotations`` with tasks relationship, scene, director."""
        return self.root / LVU

    @property
    def qa_folder(self) -> Path:
        """Annotations in MA-LMM's MSVD-QA layout."""
        return self.root / QA

    def __str__(self) -> str:
        done = f"{self.written} drawn now" if self.written else "already complete; nothing to do"
        return f"{self.videos} videos, {self.frames} frames, {self.questions} questions in {self.root} ({done})"


def specs(videos: int, seed: int) -> list[VideoSpec]:
    """The first ``videos`` videos of the world with this seed."""
    return [_spec(number, seed) for number in range(videos)]


def render(spec: VideoSpec, t: float) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a video at ``t`` seconds. Pure: the same arguments give the same bytes."""
    canvas = paint_scene(spec.scene, SIZE, t)
    places = positions(spec, t)
    for actor, place, other in zip(spec.actors, places, places[::-1], strict=True):
        draw_actor(canvas, actor, place, other, tilt=0.25 * math.sin(2.2 * t + spec.phase + actor.radius * 40))
    apply_tint(canvas, spec.scene.tint)
    picture: UInt8[np.ndarray, "h w 3"] = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return picture


def positions(spec: VideoSpec, t: float) -> tuple[Place, Place]:
    """Centres of the two actors at ``t`` seconds, as (x, y) in parts of the frame."""
    u, turn = t / spec.seconds, 2 * math.pi * spec.spin
    along = (math.cos(spec.phase), math.sin(spec.phase))
    across = (-along[1], along[0])
    if spec.motion == "chase":
        return _loop(turn * 0.9 * u + spec.phase), _loop(turn * (0.9 * u - 0.16) + spec.phase)
    if spec.motion == "orbit":
        centre = _at((0.5, 0.5), 0.07, (math.cos(3 * u), math.sin(3 * u)))
        angle = turn * 1.4 * u + spec.phase
        return centre, _at(centre, 0.29, (math.cos(angle), math.sin(angle)))
    if spec.motion == "meet":
        gap = 0.12 + 0.25 * (1 - min(u / 0.7, 1)) ** 1.5
        centre = _at((0.5, 0.5), 0.02 * math.sin(9 * u), across)
        return _at(centre, -gap, along), _at(centre, gap, along)
    if spec.motion == "avoid":
        dodge = 0.08 + 0.26 * math.exp(-(((u - 0.5) / 0.28) ** 2))
        return _at((0.5, 0.5), 0.74 * (u - 0.5), along), _at((0.5, 0.5), dodge * spec.spin, across)
    side, height = 0.24 + 0.1 * math.sin(turn * u + spec.phase), 0.5 + 0.26 * math.sin(turn * 0.8 * u + 2 * spec.phase)
    return (0.5 - side, height), (0.5 + side, height)


def questions(spec: VideoSpec) -> list[tuple[str, str, str]]:
    """(type, question, one-word answer) for one video."""
    first, second = spec.actors
    return [
        ("how", "how do the two shapes move?", spec.motion),
        ("where", "where are the two shapes?", spec.scene.texture),
        ("what", f"what is the color of the {first.shape}?", first.color),
        ("what", f"what is the color of the {second.shape}?", second.color),
        ("what", f"what is the shape of the {first.color} one?", first.shape),
        ("who", f"who is with the {first.color} {first.shape}?", second.shape),
    ]


def write_world(out: Path, *, videos: int, seed: int) -> WorldSummary:
    """Draw the world into ``out``: ``videos/*.mp4``, ``lvu/`` and ``msvd_qa/`` annotations, and a marker at the end.

    Running it again does nothing; a larger ``videos`` draws only the new ones. Raises ValueError when the folder holds
    a world of another seed or version, or when ``videos`` is too small to fill the three splits.
    """
    if videos < len(SPLIT_CYCLE):
        raise ValueError(f"a world needs at least {len(SPLIT_CYCLE)} videos to have train, val and test; got {videos}")
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
        for spec in absent:
            _publish(paths[spec], encode(np.stack([render(spec, n / FPS) for n in range(spec.num_frames)])))
        for name, entries in annotations.items():
            _publish(out / name, json.dumps(entries, indent=1).encode())
        sizes = {path.stem: path.stat().st_size for path in paths.values()}
        marker = {"version": VERSION, "seed": seed, "videos": videos, "bytes": sizes}
        _publish(out / MARKER, json.dumps(marker, indent=1).encode())
    frames = sum(spec.num_frames for spec in wanted)
    asked = sum(len(questions(spec)) for spec in wanted)
    return WorldSummary(out, videos, frames, asked, len(absent))


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


def _at(origin: Place, length: float, direction: Place) -> Place:
    return origin[0] + length * direction[0], origin[1] + length * direction[1]


def _loop(angle: float) -> Place:
    """A point of the closed path of a chase."""
    return 0.5 + 0.31 * math.cos(angle), 0.5 + 0.27 * math.sin(angle) + 0.05 * math.sin(2 * angle)


def _spec(number: int, seed: int) -> VideoSpec:
    split = SPLIT_CYCLE[number % len(SPLIT_CYCLE)]
    rank = number // len(SPLIT_CYCLE) * SPLIT_CYCLE.count(split) + SPLIT_CYCLE[: number % len(SPLIT_CYCLE)].count(split)
    draw = random.Random(f"{VERSION} {seed} {number}")
    shapes, colors = draw.sample(sorted(SHAPES), 2), draw.sample(sorted(COLORS), 2)
    small, large = draw.uniform(0.095, 0.115), draw.uniform(0.125, 0.15)
    radii = draw.sample([small, large], 2)
    pan, heading = draw.uniform(4, 9), draw.uniform(0, 2 * math.pi)
    return VideoSpec(
        video_id=f"w{VERSION}s{seed}v{number:03d}",
        split=split,
        seconds=draw.randint(4, 6),
        motion=_balanced(MOTIONS, "motion", split, rank, seed),
        actors=(Actor(shapes[0], colors[0], radii[0]), Actor(shapes[1], colors[1], radii[1])),
        scene=Scene(
            texture=_balanced(sorted(TEXTURES), "texture", split, rank, seed),
            tint=_balanced(sorted(TINTS), "tint", split, rank, seed),
            pan=(pan * math.cos(heading), pan * math.sin(heading)),
            variant=draw.randrange(1000),
        ),
        phase=draw.uniform(0, 2 * math.pi),
        spin=draw.choice((-1, 1)),
    )


def _balanced(values: Sequence[str], name: str, split: str, rank: int, seed: int) -> str:
    """The label of the ``rank``-th video of a split: each run of len(values) videos has every value once."""
    block, place = divmod(rank, len(values))
    order = list(values)
    random.Random(f"{VERSION} {seed} {name} {split} {block}").shuffle(order)
    return order[place]


def _annotations(wanted: Sequence[VideoSpec]) -> dict[str, dict[str, dict[str, object]]]:
    """File name -> content, in both layouts."""
    files: dict[str, dict[str, dict[str, object]]] = {}
    for split in SPLITS:
        part = [spec for spec in wanted if spec.split == split]
        files[f"{LVU}/{split}.json"] = {spec.video_id: _lvu_entry(spec) for spec in part}
        asked = [(spec, *question) for spec in part for question in questions(spec)]
        files[f"{QA}/qa_{split}.json"] = {f"{n:07d}": _qa_entry(f"{n:07d}", *item) for n, item in enumerate(asked)}
    return files


def _lvu_entry(spec: VideoSpec) -> dict[str, object]:
    labels = {"relationship": spec.motion, "scene": spec.scene.texture, "director": spec.scene.tint}
    return {"subset": spec.split, "duration": spec.seconds, "num_frames": spec.num_frames, **labels}


def _qa_entry(key: str, spec: VideoSpec, kind: str, question: str, answer: str) -> dict[str, object]:
    entry = {"answer": answer, "question": question, "answer_type": kind, "question_id": key, "dataset": "miniature"}
    return {**entry, "video": spec.video_id, "frame_length": spec.num_frames}


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
