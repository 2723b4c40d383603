"""Pictures for the miniature world: panning scenes and anti-aliased actors, in NumPy.

A canvas is a float32 array [h, w, 3] of RGB in 0..1 (half the time of float64). Places are (x, y) in parts of the
frame; a ``Field`` is one number per pixel. Shapes are drawn from signed distances in pixels (negative inside), which
gives smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Canvas = Float[np.ndarray, "h w 3"]
Field = Float[np.ndarray, "h w"]
Place = tuple[float, float]

COLORS = {
    "red": (0.90, 0.16, 0.17),
    "orange": (0.99, 0.55, 0.10),
    "yellow": (0.98, 0.87, 0.20),
    "blue": (0.15, 0.36, 0.92),
    "purple": (0.58, 0.22, 0.78),
    "white": (0.97, 0.97, 0.97),
}
TINTS = {  # colours that are also first names, as LVU's directors are
    "amber": (1.10, 0.97, 0.74),
    "azure": (0.82, 0.96, 1.12),
    "jade": (0.88, 1.06, 0.86),
    "ruby": (1.13, 0.80, 0.86),
}


@dataclass(frozen=True)
class Actor:
    """A shape that moves. ``radius`` is in parts of the frame."""

    shape: str
    color: str
    radius: float


WEATHER = ("clear", "rain", "fog")
DAYTIMES = {"morning": -1.0, "noon": 0.0, "evening": 1.0}  # from which side the light comes
FRAMES = ("anna", "boris", "clara")  # of the picture: none, bars above and below, bars at the sides
DECADES = {"0": 5, "1": 2, "2": 0}  # scratches on the film
VOICES = ("silent", "talking", "shouting")


@dataclass(frozen=True)
class Scene:
    """What is around the actors. ``pan`` is in pixels per second; ``variant`` moves the pattern and its details."""

    texture: str
    tint: str
    weather: str
    daytime: str
    frame: str
    decade: str
    pan: tuple[float, float]
    variant: int


def paint_background(scene: Scene, size: int, times: Sequence[float]) -> list[Canvas]:
    """The scene at each of ``times`` (seconds), without weather and light.

    The view moves by whole pixels over one pattern that is painted once: a video costs about three pictures.
    """
    moves = [(round(scene.pan[0] * t), round(scene.pan[1] * t)) for t in times]
    left, top = (min(move[axis] for move in moves) for axis in (0, 1))
    right, bottom = (max(move[axis] for move in moves) for axis in (0, 1))
    y, x = np.mgrid[top : bottom + size, left : right + size].astype(np.float32)
    pattern = TEXTURES[scene.texture](x + 37 * scene.variant, y + 23 * scene.variant, scene.variant)
    return [pattern[dy - top : dy - top + size, dx - left : dx - left + size].copy() for dx, dy in moves]


def paint_air(canvas: Canvas, scene: Scene, t: float) -> None:
    """Weather, light, tint, scratches and frame over the whole picture, in place."""
    size = canvas.shape[0]
    if scene.weather == "fog":
        _blend(canvas, (0.80, 0.82, 0.84), np.full((size, size), 0.36, np.float32))
    elif scene.weather == "rain":
        y, x = np.mgrid[0:size, 0:size].astype(np.float32)
        _blend(canvas, (0.26, 0.31, 0.40), np.full((size, size), 0.26, np.float32))  # clouds take the light
        drops = _dots(2.4 * (x + 0.35 * y), 0.55 * y - 60 * t, scene.variant, cell=12, low=1.8, high=3.2, share=0.55)
        _blend(canvas, (0.88, 0.93, 1.0), 0.65 * drops)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    corner = axis[:, None] ** 2 + axis[None, :] ** 2
    side = 1 + 0.28 * DAYTIMES[scene.daytime] * axis[None, :]
    canvas *= _shaded(TINTS[scene.tint], (1 - 0.13 * corner) * side)
    lines = np.arange(DECADES[scene.decade], dtype=np.float32)[:, None]
    for column in (_hash01(lines, np.full_like(lines, round(8 * t)), scene.variant) * size).astype(int).ravel():
        canvas[:, column] += (1 - canvas[:, column]) * 0.5
    bar = round(0.06 * size)
    if scene.frame == "boris":
        canvas[:bar] = canvas[-bar:] = 0.02
    elif scene.frame == "clara":
        canvas[:, :bar] = canvas[:, -bar:] = 0.02


def draw_actor(
    canvas: Canvas, actor: Actor, place: Place, look_at: Place, tilt: float, *, voice: str, glows: bool
) -> None:
    """Draw one actor, in place: glow, shadow, outline, body with a soft light, speech, eyes towards ``look_at``."""
    size = canvas.shape[0]
    radius = actor.radius * size
    reach = 1.25 * radius + 9  # a star's tip, and what is beside it
    top, left = (max(math.floor(place[axis] * size - reach), 0) for axis in (1, 0))
    canvas = canvas[top : math.ceil(place[1] * size + reach), left : math.ceil(place[0] * size + reach)]  # a view
    y, x = np.mgrid[0 : canvas.shape[0], 0 : canvas.shape[1]].astype(np.float32)
    x, y = x + left + 0.5 - place[0] * size, y + top + 0.5 - place[1] * size
    color = np.array(COLORS[actor.color], dtype=np.float32)
    distance = SHAPES[actor.shape]
    if glows:
        _blend(canvas, (1.0, 1.0, 0.75), 0.95 * _inside(np.hypot(x, y) - radius - 5.5, softness=3.0))
    _blend(canvas, (0.0, 0.0, 0.0), 0.38 * _inside(distance(*_turned(x - 1.5, y - 3, tilt), radius), softness=5.0))
    if voice != "silent":
        bx, by = x - 0.75 * radius, y + 1.15 * radius
        bubble = np.hypot(bx, by) - 3.6 if voice == "talking" else _star(bx, by, 4.2)
        _blend(canvas, (1.0, 1.0, 1.0) if voice == "talking" else (1.0, 0.85, 0.1), _inside(bubble))
    body = distance(*_turned(x, y, tilt), radius)
    _blend(canvas, 0.22 * color, _inside(body - 1.2))
    light = 1.06 - 0.22 * np.clip((x + 2 * y) / (2 * radius), -1, 1)
    _blend(canvas, _shaded(COLORS[actor.color], light), _inside(body))
    dx, dy = look_at[0] - place[0], look_at[1] - place[1]
    glance = 0.09 * radius / max(math.hypot(dx, dy), 1e-6)
    for side in (-0.30, 0.30):
        ex, ey = x - side * radius, y + 0.05 * radius
        _blend(canvas, (1.0, 1.0, 1.0), _inside(np.hypot(ex, ey) - 0.23 * radius))
        _blend(canvas, (0.05, 0.05, 0.05), _inside(np.hypot(ex - glance * dx, ey - glance * dy) - 0.13 * radius))


def _circle(x: Field, y: Field, radius: float) -> Field:
    distance: Field = np.hypot(x, y) - radius
    return distance


def _square(x: Field, y: Field, radius: float) -> Field:
    half, corner = 0.86 * radius, 0.2 * radius
    qx, qy = np.abs(x) - half + corner, np.abs(y) - half + corner
    distance: Field = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
    return distance


def _triangle(x: Field, y: Field, radius: float) -> Field:
    corner = 0.15 * radius
    inner = 0.62 * radius - corner
    y = y - 0.14 * radius
    sides = [x * math.sin(a) + y * math.cos(a) - inner for a in (0.0, 2 * math.pi / 3, -2 * math.pi / 3)]
    distance: Field = np.maximum.reduce(sides) - corner
    return distance


def _star(x: Field, y: Field, radius: float) -> Field:
    outer, inner, half = 1.22 * radius, 0.66 * radius, math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # 0 at a tip, pi/5 at a notch
    px, py = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    edge_x, edge_y = inner * math.cos(half) - outer, inner * math.sin(half)
    distance: Field = ((px - outer) * edge_y - py * edge_x) / math.hypot(edge_x, edge_y)
    return distance


def _forest(x: Field, y: Field, variant: int) -> Canvas:
    leaves = _waves(x, y, variant, 17.0)
    canvas = _mix((0.11, 0.29, 0.17), (0.36, 0.56, 0.27), 0.5 + 0.5 * leaves)
    trunk = np.cos(2 * math.pi * (x + 3 * np.sin(y / 19)) / 32)
    _blend(canvas, (0.25, 0.17, 0.11), 0.85 * _ramp(trunk, 0.72, 0.86))
    return canvas


def _ocean(x: Field, y: Field, variant: int) -> Canvas:
    swell = np.sin(2 * math.pi * (y + 3.2 * np.sin(x / 11) + 2 * np.sin(x / 29 + variant)) / 17)
    canvas = _mix((0.05, 0.30, 0.45), (0.20, 0.58, 0.68), 0.5 + 0.5 * swell)
    _blend(canvas, (0.80, 0.93, 0.93), 0.7 * _ramp(swell + 0.25 * _waves(x, y, variant, 9.0), 0.93, 1.08))
    return canvas


def _desert(x: Field, y: Field, variant: int) -> Canvas:
    dune = ((y + 0.35 * x + 5 * np.sin(x / 23 + variant)) / 30) % 1.0
    canvas = _mix((0.93, 0.80, 0.56), (0.70, 0.50, 0.31), dune**1.4 * (1 - _ramp(dune, 0.93, 1.0)))
    canvas += 0.03 * np.sin(2 * math.pi * (y - 0.2 * x + 2 * np.sin(x / 9)) / 5)[..., None]
    return canvas


def _city(x: Field, y: Field, variant: int) -> Canvas:
    block, cell_x, cell_y = np.floor(x / 33), np.floor(x / 11), np.floor(y / 13)
    canvas = _mix((0.24, 0.26, 0.33), (0.42, 0.42, 0.49), _hash01(block, 0 * block, variant))
    in_x, in_y = np.abs(x % 11 - 5.5), np.abs(y % 13 - 6.5)
    pane = np.clip(3.6 - in_x, 0, 1) * np.clip(4.6 - in_y, 0, 1)
    lit = _hash01(cell_x, cell_y, variant) > 0.62
    _blend(canvas, (0.15, 0.17, 0.23), 0.8 * pane)
    _blend(canvas, (0.99, 0.86, 0.52), 0.9 * pane * lit)
    return canvas


def _snow(x: Field, y: Field, variant: int) -> Canvas:
    canvas = _mix((0.66, 0.75, 0.85), (0.84, 0.89, 0.94), 0.5 + 0.5 * _waves(x, y, variant, 27.0))
    _blend(canvas, (1.0, 1.0, 1.0), 0.95 * _dots(x, y, variant, cell=12, low=1.2, high=2.6, share=0.75))
    return canvas


def _night(x: Field, y: Field, variant: int) -> Canvas:
    glow = _ramp(np.sin(2 * math.pi * (y + 7 * np.sin(x / 21 + variant)) / 80), 0.1, 1.0)
    canvas = _mix((0.06, 0.06, 0.18), (0.16, 0.32, 0.38), glow)
    _blend(canvas, (1.0, 0.97, 0.85), _dots(x, y, variant, cell=13, low=0.5, high=1.3, share=0.6))
    return canvas


SHAPES: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
TEXTURES: dict[str, Callable[[Field, Field, int], Canvas]] = {
    "forest": _forest,
    "ocean": _ocean,
    "desert": _desert,
    "city": _city,
    "snow": _snow,
    "night": _night,
}


def _blend(canvas: Canvas, color: Float[np.ndarray, "*pixels 3"] | tuple[float, float, float], cover: Field) -> None:
    """Lay a colour over the canvas, in place."""
    height, width, _ = canvas.shape
    # Rows of width · 3: numpy is slow where its inner loop is the three channels. The canvas is seen, not copied.
    paint = np.asarray(color, dtype=np.float32)
    paint = paint.reshape(height, -1) if paint.ndim == 3 else np.tile(paint, width)
    flat = canvas.reshape(height, -1)
    flat += (paint - flat) * np.repeat(cover, 3, axis=1)


def _shaded(color: tuple[float, float, float], light: Field) -> Canvas:
    """The colour, lighter or darker from place to place."""
    height, width = light.shape
    shaded: Canvas = np.tile(np.array(color, dtype=np.float32), width) * np.repeat(light, 3, axis=1)
    return shaded.reshape(height, width, 3)


def _inside(distance: Field, softness: float = 1.0) -> Field:
    """1 inside, 0 outside, with an edge ``softness`` pixels wide."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _turned(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def _mix(dark: tuple[float, float, float], light: tuple[float, float, float], amount: Field) -> Canvas:
    a, b = np.array(dark, dtype=np.float32), np.array(light, dtype=np.float32)
    mixed: Canvas = a + (b - a) * amount[..., None]
    return mixed


def _ramp(value: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, smooth between."""
    u = np.clip((value - low) / (high - low), 0, 1)
    return u * u * (3 - 2 * u)


def _waves(x: Field, y: Field, variant: int, scale: float) -> Field:
    """A soft irregular field in -1..1 with features about ``scale`` pixels apart."""
    total = np.zeros_like(x)
    for i in range(4):
        angle = 0.7 + 1.9 * i + 0.8 * variant
        total += np.sin(
            2 * math.pi * (math.cos(angle) * x + math.sin(angle) * y) / (scale * (0.8 + 0.27 * i)) + 2.4 * i
        )
    return total / 4


def _hash01(ix: Field, iy: Field, variant: int) -> Field:
    """A fixed pseudo-random number in 0..1 for every integer cell."""
    a, b = ix.astype(np.int64), iy.astype(np.int64)
    h = (a * 374_761_393 + b * 668_265_263 + variant * 974_711_237) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1_274_126_177) & 0xFFFFFFFF
    number: Field = ((h ^ (h >> 16)) & 0xFFFF).astype(np.float32) / 65536
    return number


def _dots(x: Field, y: Field, variant: int, *, cell: int, low: float, high: float, share: float) -> Field:
    """Round dots with radii low..high in a ``share`` of the cells of a grid."""
    ix, iy = np.floor(x / cell), np.floor(y / cell)
    radius = low + (high - low) * _hash01(ix, iy, variant)
    room = cell / 2 - high
    cx = cell / 2 + room * (2 * _hash01(ix, iy, variant + 101) - 1)
    cy = cell / 2 + room * (2 * _hash01(ix, iy, variant + 202) - 1)
    there = _hash01(ix, iy, variant + 303) < share
    return _inside(np.hypot(x - ix * cell - cx, y - iy * cell - cy) - radius) * there
