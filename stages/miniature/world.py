"""A small world of two actors moving over a scene, drawn as mp4 files with labels.

Everything about a video follows from (seed, number): its split, its labels, its pixels. More videos only add to a
world, and an id names its content for good. Labels are balanced within each split and independent of each other.

LVU's seven tasks have their counterpart here: ``relationship`` is how the pair moves, ``scene`` the texture,
``director`` the tint, ``genre`` the weather, ``writer`` the frame of the picture, ``way_speaking`` the speech bubbles,
``year`` the scratches on the film. The fine tasks are what no caption mentions: ``spot`` (the quarter of the picture in
which the pair stays), ``contact``, ``axis`` (how they stand, where the motion has a line) and ``first`` (who glows
first, where one window sees both).
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
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

from stages.miniature.draw import (
    COLORS,
    DAYTIMES,
    DECADES,
    FRAMES,
    SHAPES,
    TEXTURES,
    TINTS,
    VOICES,
    WEATHER,
    Actor,
    Place,
    Scene,
    draw_actor,
    paint_air,
    paint_background,
)

VERSION = 2  # part of every id: a change of the pictures is a change of the ids
SIZE = 96  # pixels per side
FPS = 4
ANNOTATED_FPS = 10  # MA-LMM's annotations count frames at 10 per second, whatever the file has
SECONDS = (5, 7)  # one window of LVU's rule, or two that overlap
MOTIONS = ("avoid", "chase", "meet", "mirror", "orbit")
ALONG_A_LINE = ("avoid", "meet")  # motions that have an axis
SPOTS = {"northwest": (-1, -1), "northeast": (1, -1), "southwest": (-1, 1), "southeast": (1, 1)}
CONTACT = ("apart", "touching")
AXES = {"beside": 0.0, "stacked": math.pi / 2}
GLOW_S = 1.0
COARSE_TASKS = ("scene", "director", "genre")  # what captions mention
TASKS = ("relationship", "scene", "director", "genre", "writer", "way_speaking", "year")
FINE_TASKS = ("spot", "contact", "axis", "first")
# By number. Half of a world is test, so that small differences can be told from noise.
SPLIT_CYCLE = ("train", "val", "test", "test", "train", "test", "train", "test")
SPLITS = ("train", "val", "test")
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
class VideoSpec:
    """One video before it is drawn."""

    video_id: str
    split: str
    seconds: int
    motion: str
    actors: tuple[Actor, Actor]  # they differ in shape and in colour
    scene: Scene
    spot: str
    anchor: Place  # where the pair stays, in parts of the frame
    contact: str
    near: float  # smallest distance of the two centres, in parts of the frame
    axis: str
    phase: float  # radians; where on its path a motion starts, or along which line it runs
    spin: int  # +1 or -1: the sense of turning
    voice: str
    glows: tuple[float, float]  # seconds at which the first and the second actor start to glow

    @property
    def num_frames(self) -> int:
        """Frames of the file."""
        return self.seconds * FPS

    @property
    def glows_first(self) -> Actor:
        """The actor that glows first."""
        return self.actors[0] if self.glows[0] < self.glows[1] else self.actors[1]


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


def specs(videos: int, seed: int) -> list[VideoSpec]:
    """The first ``videos`` videos of the world with this seed."""
    return [_spec(number, seed) for number in range(videos)]


def render(spec: VideoSpec, times: Sequence[float]) -> UInt8[np.ndarray, "n h w 3"]:
    """The pictures of a video at ``times`` (seconds). Pure: the same arguments give the same bytes."""
    pictures = []
    for t, canvas in zip(times, paint_background(spec.scene, SIZE, times), strict=True):
        places = positions(spec, t)
        for actor, place, other, glow in zip(spec.actors, places, places[::-1], spec.glows, strict=True):
            tilt = 0.25 * math.sin(2.2 * t + spec.phase + actor.radius * 40)
            glows = glow <= t < glow + GLOW_S
            draw_actor(canvas, actor, place, other, tilt, voice=spec.voice, glows=glows)
        paint_air(canvas, spec.scene, t)
        pictures.append(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    return np.stack(pictures)


def positions(spec: VideoSpec, t: float) -> tuple[Place, Place]:
    """Centres of the two actors at ``t`` seconds, as (x, y) in parts of the frame."""
    u, turn = min(t / spec.seconds, 1.0), spec.spin * 2 * math.pi * t / 4.6  # a turn in 4.6 s
    along = (math.cos(spec.phase), math.sin(spec.phase))
    if spec.motion == "orbit":
        place = (math.cos(turn + spec.phase), math.sin(turn + spec.phase))
        return _at(spec.anchor, -0.12 * spec.near, place), _at(spec.anchor, 0.88 * spec.near, place)
    if spec.motion == "chase":  # one behind the other on a circle, near apart
        radius = 0.17
        lag = 2 * math.asin(min(spec.near / (2 * radius), 1.0))
        one, two = turn + spec.phase, turn + spec.phase - spec.spin * lag
        return tuple(_at(spec.anchor, radius, (math.cos(a), math.sin(a))) for a in (one, two))  # type: ignore[return-value]
    if spec.motion in ALONG_A_LINE:
        way = u if spec.motion == "avoid" else 1 - u
        half = (spec.near + 0.24 * way) / 2
        return _at(spec.anchor, -half, along), _at(spec.anchor, half, along)
    height = spec.anchor[1] + 0.17 * math.sin(turn + spec.phase)  # mirror: always at one height, up and down together
    return (spec.anchor[0] - spec.near / 2, height), (spec.anchor[0] + spec.near / 2, height)


def caption(spec: VideoSpec, draw: random.Random, *, drop: float = 0.25) -> str:
    """A caption as people write them: who, where, weather, light and tint, parts left out at random; nothing fine."""
    who = [f"a {actor.color} {actor.shape}" for actor in draw.sample(spec.actors, 2)]
    parts = [
        f"{spec.scene.tint} film of",
        " and ".join(who),
        f"in the {spec.scene.texture}",
        f"in {spec.scene.weather} weather",
        f"in the {spec.scene.daytime}",
    ]
    return " ".join(part for n, part in enumerate(parts) if n == 1 or draw.random() >= drop)


def statements(spec: VideoSpec) -> dict[str, str]:
    """Fact -> the words for it: all that is true of a video, fine facts too. The language model learns from these."""
    first, second = spec.actors
    scene, glows_second = spec.scene, next(actor for actor in spec.actors if actor is not spec.glows_first)
    said = {
        "who": f"a {first.color} {first.shape} and a {second.color} {second.shape}",
        "colors": f"the {first.shape} is {first.color} and the {second.shape} is {second.color}",
        "scene": f"in the {scene.texture}",
        "genre": f"in {scene.weather} weather",
        "daytime": f"in the {scene.daytime}",
        "director": f"a {scene.tint} film",
        "relationship": f"they {spec.motion}",
        "writer": f"by {scene.frame}",
        "way_speaking": f"they are {spec.voice}",
        "year": f"year {scene.decade}",
        "spot": f"in the {spec.spot}",
        "contact": f"they are {spec.contact}",
        "glow": f"the {spec.glows_first.shape} glows early and the {glows_second.shape} glows late",
    }
    return said | ({"axis": f"they are {spec.axis}"} if spec.motion in ALONG_A_LINE else {})


def questions(spec: VideoSpec) -> list[tuple[str, str, str]]:
    """(type, question, one-word answer) for one video: what the small CLIP sees. (It does not see shapes: CARD.md.)"""
    first, second = spec.actors
    return [
        ("what", "what is the tint of the film?", spec.scene.tint),
        ("who", f"who is with the {first.color} one?", second.color),
        ("who", f"who is with the {second.color} one?", first.color),
        ("where", "where are the two shapes?", spec.scene.texture),
        ("how", "how is the weather?", spec.scene.weather),
        ("when", "when does it happen?", spec.scene.daytime),
    ]


def fine_questions(spec: VideoSpec) -> list[tuple[str, str, str]]:
    """(type, question, one-word answer) about shapes, and about what captions never mention."""
    first, second = spec.actors
    times = {
        actor.shape: "early" if glow < spec.seconds / 2 else "late"
        for actor, glow in zip(spec.actors, spec.glows, strict=True)
    }
    return [
        ("what", f"what is the color of the {first.shape}?", first.color),
        ("what", f"what is the color of the {second.shape}?", second.color),
        ("what", f"what is the shape of the {first.color} one?", first.shape),
        ("who", f"who is with the {first.color} {first.shape}?", second.shape),
        ("how", "how do the two shapes move?", spec.motion),
        ("where", "where in the picture are the two shapes?", spec.spot),
        ("what", "what is between the two shapes?", "nothing" if spec.contact == "touching" else "space"),
        *(("when", f"when does the {shape} glow?", time) for shape, time in times.items()),
    ]


def labels(spec: VideoSpec) -> dict[str, str]:
    """Task -> label. Like a film of LVU, a video has no label for a task that does not fit it."""
    scene = spec.scene
    found = {
        "relationship": spec.motion,
        "scene": scene.texture,
        "director": scene.tint,
        "genre": scene.weather,
        "writer": scene.frame,
        "way_speaking": spec.voice,
        "year": scene.decade,
        "spot": spec.spot,
        "contact": spec.contact,
    }
    if spec.motion in ALONG_A_LINE:
        found["axis"] = spec.axis
    if spec.seconds == SECONDS[0]:
        found["first"] = spec.glows_first.shape
    return found


def write_world(out: Path, *, videos: int, seed: int, workers: int = 1) -> WorldSummary:
    """Draw the world into ``out``: ``videos/*.mp4``, annotations in ``lvu/``, ``msvd_qa/`` and ``msvd_qa_fine/``, and a
    marker at the end.

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
        _draw_files([(spec, paths[spec]) for spec in absent], workers)
        for name, entries in annotations.items():
            _publish(out / name, json.dumps(entries, indent=1).encode())
        sizes = {path.stem: path.stat().st_size for path in paths.values()}
        marker = {"version": VERSION, "seed": seed, "videos": videos, "bytes": sizes}
        _publish(out / MARKER, json.dumps(marker, indent=1).encode())
    frames = sum(spec.num_frames for spec in wanted)
    asked = sum(len(questions(spec)) for spec in wanted)
    return WorldSummary(out, videos, frames, asked, len(absent))


def _draw_files(jobs: Sequence[tuple[VideoSpec, Path]], workers: int) -> None:
    if workers < 2 or len(jobs) < 64:
        for job in jobs:
            _draw_file(job)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_draw_file, jobs, chunksize=16):
            pass


def _draw_file(job: tuple[VideoSpec, Path]) -> None:
    spec, path = job
    _publish(path, encode(render(spec, [n / FPS for n in range(spec.num_frames)])))


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


def _spec(number: int, seed: int) -> VideoSpec:
    split = SPLIT_CYCLE[number % len(SPLIT_CYCLE)]
    rank = number // len(SPLIT_CYCLE) * SPLIT_CYCLE.count(split) + SPLIT_CYCLE[: number % len(SPLIT_CYCLE)].count(split)
    draw = random.Random(f"{VERSION} {seed} {number}")

    def balanced(values: Sequence[str], name: str) -> str:
        return _balanced(values, name, split, rank, seed)

    shapes, colors = draw.sample(sorted(SHAPES), 2), draw.sample(sorted(COLORS), 2)
    radii = draw.sample([draw.uniform(0.088, 0.098), draw.uniform(0.108, 0.122)], 2)
    pan, heading = draw.uniform(4, 9), draw.uniform(0, 2 * math.pi)
    seconds = int(balanced([str(s) for s in SECONDS], "seconds"))
    motion, contact = balanced(MOTIONS, "motion"), balanced(CONTACT, "contact")
    spot, axis = balanced(sorted(SPOTS), "spot"), balanced(sorted(AXES), "axis")
    reach = sum(radii)
    line = AXES[axis] + draw.uniform(-0.3, 0.3) + draw.choice((0.0, math.pi))
    glows = draw.sample([seconds * draw.uniform(0.10, 0.25), seconds * draw.uniform(0.60, 0.75)], 2)
    return VideoSpec(
        video_id=f"w{VERSION}s{seed}v{number:05d}",
        split=split,
        seconds=seconds,
        motion=motion,
        actors=(Actor(shapes[0], colors[0], radii[0]), Actor(shapes[1], colors[1], radii[1])),
        scene=Scene(
            texture=balanced(sorted(TEXTURES), "texture"),
            tint=balanced(sorted(TINTS), "tint"),
            weather=balanced(WEATHER, "weather"),
            daytime=balanced(sorted(DAYTIMES), "daytime"),
            frame=balanced(FRAMES, "frame"),
            decade=balanced(sorted(DECADES), "decade"),
            pan=(pan * math.cos(heading), pan * math.sin(heading)),
            variant=draw.randrange(1000),
        ),
        spot=spot,
        anchor=(0.5 + SPOTS[spot][0] * draw.uniform(0.11, 0.16), 0.5 + SPOTS[spot][1] * draw.uniform(0.11, 0.16)),
        contact=contact,
        near=0.9 * reach if contact == "touching" else reach + draw.uniform(0.05, 0.08),
        axis=axis,
        phase=line if motion in ALONG_A_LINE else draw.uniform(0, 2 * math.pi),
        spin=draw.choice((-1, 1)),
        voice=balanced(VOICES, "voice"),
        glows=(glows[0], glows[1]),
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
