"""The scene graph: what is where, decided before anything is drawn or said.

A scene is a ground plane that ends at a horizon, with three to six objects standing on it (or
floating above it). Everything else -- pixels, boxes, captions, negatives, layers -- is derived from
this graph. Coordinates are fractions of the image, x to the right, y down. Numbers are rounded to
four decimals and come from IEEE-exact operations, so the graph is equal on every machine.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.vocabulary import COLOURS, OBJECTS, SETTINGS, SIZES, TEXTURES

Box: TypeAlias = tuple[float, float, float, float]
Relation: TypeAlias = Literal["left", "right", "above", "below", "front", "behind"]

HORIZONS = (0.34, 0.40, 0.46, 0.52)
FAR = 10.0  # depth of the horizon, in the units of `ground_depth`

# Fewer and the captions say too little; more and small images become unreadable.
MIN_OBJECTS, MAX_OBJECTS = 3, 6
_RADIUS = {"small": (0.100, 0.118), "large": (0.170, 0.200)}
_MAX_HIDDEN = 0.42  # of an object's box, by the boxes of nearer objects
_MIN_GAP = 0.022  # between the ground contacts of two objects: depth order is never in doubt
_TRIES = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Extent of a class around its centre, in units of the object's radius, and how it is posed."""

    half_width: float
    below: float
    above: float
    floats: bool = False
    tilts: bool = False


GEOMETRY: dict[str, Geometry] = {
    "ball": Geometry(0.90, 0.90, 0.90, tilts=True),
    "cube": Geometry(0.80, 0.86, 0.86),
    "cone": Geometry(0.80, 0.92, 0.98),
    "pyramid": Geometry(0.92, 0.80, 0.90),
    "cylinder": Geometry(0.64, 0.92, 0.92),
    "ring": Geometry(0.96, 0.96, 0.96, tilts=True),
    "star": Geometry(0.96, 0.84, 1.00, tilts=True),
    "heart": Geometry(0.96, 0.86, 0.86, tilts=True),
    "cross": Geometry(0.86, 0.86, 0.86, tilts=True),
    "moon": Geometry(0.78, 0.96, 0.96, floats=True, tilts=True),
    "kite": Geometry(0.72, 0.98, 0.98, floats=True, tilts=True),
    "tree": Geometry(0.74, 0.98, 0.96),
    "house": Geometry(0.90, 0.88, 0.92),
    "mushroom": Geometry(0.86, 0.92, 0.86),
    "fish": Geometry(1.00, 0.54, 0.60, tilts=True),
    "bottle": Geometry(0.44, 1.00, 1.00),
    "mug": Geometry(0.80, 0.78, 0.78),
    "balloon": Geometry(0.74, 1.00, 0.98, floats=True),
    "boat": Geometry(0.94, 0.84, 0.98),
    "bell": Geometry(0.74, 0.92, 0.96),
    "flower": Geometry(0.64, 0.98, 0.98),
    "umbrella": Geometry(0.94, 0.96, 0.92),
}


@dataclasses.dataclass(frozen=True, slots=True)
class SceneObject:
    """One object.

    Attributes:
      kind, colour, texture, size: keys of the tables in `vocabulary`.
      x: horizontal centre. ground: y of the point on the ground under it (nearer is larger).
      lift: height above the ground. radius: half of its nominal height or width.
      tilt: rotation in the image plane, as (cos, sin). turn: -1..1, rotation about the vertical.
      depth: distance from the viewer (1 at the lower image edge, `FAR` at the horizon).
      relief: how far its surface bulges towards the viewer, in depth units.
    """

    kind: str
    colour: str
    texture: str
    size: str
    x: float
    ground: float
    lift: float
    radius: float
    tilt: tuple[float, float]
    turn: float
    depth: float
    relief: float

    @property
    def y(self) -> float:
        """Vertical centre."""
        return self.ground - self.lift - self.radius * GEOMETRY[self.kind].below

    @property
    def box(self) -> Box:
        """Nominal box of the whole object (hidden parts included), not clipped to the image."""
        return _nominal_box(self.kind, self.x, self.ground - self.lift, self.radius)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A scene; `objects` are ordered from far to near, which is the order of painting.

    Attributes:
      setting: key of `vocabulary.SETTINGS`. horizon: y of the horizon, one of `HORIZONS`.
      light: -1..1, horizontal direction the light comes from (negative: left).
      pan: 0..1, shifts the background sideways. tint: 0..1, varies its colours.
    """

    seed: int
    index: int
    setting: str
    horizon: float
    light: float
    pan: float
    tint: float
    objects: tuple[SceneObject, ...]


def ground_depth(y: float, horizon: float) -> float:
    """Depth of the ground at image height `y`: 1 at the lower edge, `FAR` at the horizon."""
    return 1.0 / (1.0 / FAR + (1.0 - 1.0 / FAR) * (y - horizon) / (1.0 - horizon))


def relation(a: SceneObject, b: SceneObject) -> Relation | None:
    """How `a` lies relative to `b`, as a viewer would say; None when nothing is clear.

    Side by side comes from box centres, above and below from boxes without vertical overlap,
    front and behind from the ground contacts of objects that overlap horizontally.
    """
    ax1, ay1, ax2, ay2 = a.box
    bx1, by1, bx2, by2 = b.box
    shared = min(ax2, bx2) - max(ax1, bx1)
    if shared <= 0.25 * min(ax2 - ax1, bx2 - bx1):
        if abs(a.x - b.x) < 0.12:
            return None
        return "left" if a.x < b.x else "right"
    if ay2 <= by1 + 0.01 and a.lift > 0:
        return "above"
    if by2 <= ay1 + 0.01 and b.lift > 0:
        return "below"
    if abs(a.ground - b.ground) > 0.035:
        return "front" if a.ground > b.ground else "behind"
    return None


def sample_scene(
    seed: int,
    index: int,
    settings: tuple[str, ...] = (),
    objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS),
) -> Scene:
    """The scene with this seed and index. Pure: no state, any order, equal on every machine.

    Args:
      settings: keys of `vocabulary.SETTINGS` to draw the setting from; empty for all.
      objects: fewest and most objects; now and then there is no room for as many as were drawn.

    Raises:
      ValueError: seed or index is negative.
    """
    draws = Draws(seed, index)
    setting = draws.choice(settings or tuple(SETTINGS))
    horizon = draws.choice(HORIZONS)
    light = round(draws.uniform(0.35, 1.0) * (1 if draws.chance(0.5) else -1), 4)
    pan, tint = round(draws.uniform(), 4), round(draws.uniform(), 4)
    wanted = objects[0] + draws.below(objects[1] - objects[0] + 1)
    placed: list[_Placed] = []
    for _ in range(4 * MAX_OBJECTS):
        if len(placed) == wanted:
            break
        candidate = _place(draws, placed, horizon)
        if candidate is not None:
            placed.append(candidate)
    placed.sort(key=lambda p: p.ground)
    depths = [round(ground_depth(p.ground, horizon), 4) for p in placed]
    made = []
    for i, p in enumerate(placed):
        # The bulge stays behind the next nearer object: painter's order and depth agree.
        gap = depths[i] - (depths[i + 1] if i + 1 < len(depths) else 0.8 * depths[i])
        relief = round(min(0.8 * gap, p.radius * depths[i]), 4)
        made.append(
            SceneObject(
                *p.identity, p.x, p.ground, p.lift, p.radius, p.tilt, p.turn, depths[i], relief
            )
        )
    return Scene(seed, index, setting, horizon, light, pan, tint, tuple(made))


@dataclasses.dataclass(slots=True)
class _Placed:
    identity: tuple[str, str, str, str]
    x: float
    ground: float
    lift: float
    radius: float
    tilt: tuple[float, float]
    turn: float
    box: Box
    hidden: float = 0.0


_KINDS, _COLOURS = tuple(OBJECTS), tuple(COLOURS)
_TEXTURES, _SIZES = tuple(TEXTURES), tuple(SIZES)


def _place(draws: Draws, placed: list[_Placed], horizon: float) -> _Placed | None:
    """One more object at a place where nothing gets hidden too much, or None."""
    identity = (
        draws.choice(_KINDS),
        draws.choice(_COLOURS),
        # Every third object is plain, the others share the patterned and special materials.
        "plain" if draws.chance(0.3) else draws.choice(_TEXTURES[1:]),
        draws.choice(_SIZES),
    )
    if any(p.identity == identity for p in placed):
        return None
    kind, _, _, size = identity
    geometry = GEOMETRY[kind]
    radius = round(draws.uniform(*_RADIUS[size]), 4)
    slope = draws.uniform(-0.22, 0.22) if geometry.tilts else 0.0
    norm = (1.0 + slope * slope) ** 0.5
    tilt = (round(1.0 / norm, 4), round(slope / norm, 4))
    turn = round(draws.uniform(-1.0, 1.0), 4)
    half, height = radius * geometry.half_width, radius * (geometry.below + geometry.above)
    # Half of the objects are tried beside another first, so that occlusion is common.
    beside = draws.choice(placed).x if placed and draws.chance(0.5) else None
    left, right = half + 0.01, 0.99 - half
    for attempt in range(_TRIES):
        if beside is not None and attempt < _TRIES // 3:
            x = min(max(beside + draws.uniform(-2.2, 2.2) * half, left), right)
        else:
            x = draws.uniform(left, right)
        x = round(x, 4)
        ground = round(draws.uniform(horizon + 0.12, 0.96), 4)
        room = ground - height - 0.02
        if room < 0.0 or any(abs(p.ground - ground) < _MIN_GAP for p in placed):
            continue
        lift = 0.0
        if geometry.floats:
            lift = round(min(room, draws.uniform(0.12, 0.34)), 4)
        box = _nominal_box(kind, x, ground - lift, radius)
        covers = [
            (p, _overlap(box, p.box) / _area(p.box if p.ground < ground else box)) for p in placed
        ]
        hidden = sum(cover for p, cover in covers if p.ground > ground)
        if hidden <= _MAX_HIDDEN and all(
            p.hidden + cover <= _MAX_HIDDEN for p, cover in covers if p.ground < ground
        ):
            for p, cover in covers:
                if p.ground < ground:
                    p.hidden += cover
            return _Placed(identity, x, ground, lift, radius, tilt, turn, box, hidden)
    return None


def _nominal_box(kind: str, x: float, bottom: float, radius: float) -> Box:
    g = GEOMETRY[kind]
    return (
        x - radius * g.half_width,
        bottom - radius * (g.below + g.above),
        x + radius * g.half_width,
        bottom,
    )


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
