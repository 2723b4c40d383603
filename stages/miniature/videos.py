"""The videos of the small world: what each shows, where its actors are, and its pictures.

Everything about a video follows from (seed, number): its split, its labels, its pixels. More videos only add to a
world, and an id names its content for good. Labels are balanced within each split and independent of each other.

LVU's seven tasks have their counterpart here: ``relationship`` is how the pair moves, ``scene`` the texture,
``director`` the tint, ``genre`` the weather, ``writer`` the frame of the picture, ``way_speaking`` the speech bubbles,
``year`` the scratches on the film. The fine tasks are what no caption mentions: ``spot`` (the quarter of the picture in
which the pair stays), ``contact``, ``axis`` (how they stand, where the motion has a line) and ``first`` (who glows
first, where one window sees both).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

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

VERSION = 3  # part of every id: a change of the pictures is a change of the ids
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


def is_drawn(video_id: str) -> bool:
    """Whether an id is that of a video of some small world (``VideoSpec.video_id``)."""
    return re.fullmatch(r"w[0-9]+s[0-9]+v[0-9]{5,}", video_id) is not None


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
