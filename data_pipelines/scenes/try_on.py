"""The try-on world: figures wearing garments, with everything known about them.

`sample_try_on(seed, index)` decides who wears what where; `TryOnViews` has the pictures: the person
in the garment (what a model has to make), the same person in another garment, the agnostic photo,
the flat garment, and somebody else in it. `TryOnScenes` is the source of records.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from data_pipelines.records import GarmentCategory, TryOnRecord
from data_pipelines.scenes.backgrounds import background
from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.figures import CHEST, Covered, Figure, Posed, draw_figure, laid_flat
from data_pipelines.scenes.garments import CATEGORIES, CLASSES, Garment, cloth, draw_garment
from data_pipelines.scenes.graph import HORIZONS, Scene
from data_pipelines.scenes.surfaces import Array, Rgb, unit
from data_pipelines.scenes.vocabulary import SETTINGS
from data_pipelines.sources.base import digest
from data_pipelines.tryon.source import Part, TryOnSource

# Raised whenever the same (seed, index) would give another picture.
VERSION = 1

_STREAM = 200  # of the draws, apart from those of other scenes
_GREY = 128  # of the masked region
_PAPER = (0.70, 0.84)  # brightness behind flat garments


@dataclasses.dataclass(frozen=True, slots=True)
class TryOnScene:
    """Who wears what where.

    Attributes:
      figure, place: the person and what is behind them. model, model_place: of the reference.
      garment: what is tried on. other: what the person wears in the person photo; of the same
        category and of another class.
      paper: brightness behind the flat garment.
    """

    seed: int
    index: int
    figure: Figure
    place: Scene
    model: Figure
    model_place: Scene
    garment: Garment
    other: Garment
    paper: float


def sample_try_on(
    seed: int, index: int, categories: Sequence[GarmentCategory] = CATEGORIES
) -> TryOnScene:
    """The scene of `(seed, index)`; classes and categories are equally likely.

    Raises:
      ValueError: seed or index is negative.
    """
    draws = Draws(seed, index, _STREAM)
    category = draws.choice(categories)
    label = draws.below(len(CLASSES))
    other = (label + 1 + draws.below(len(CLASSES) - 1)) % len(CLASSES)
    garment, worn = draw_garment(draws, category, label), draw_garment(draws, category, other)
    figure, model = draw_figure(draws), draw_figure(draws)
    here, there = draws.shuffled(tuple(SETTINGS))[:2]
    place, model_place = _place(draws, here), _place(draws, there)
    paper = round(draws.uniform(*_PAPER), 4)
    return TryOnScene(seed, index, figure, place, model, model_place, garment, worn, paper)


def _place(draws: Draws, setting: str) -> Scene:
    light = round(draws.uniform(-1.0, 1.0), 4)
    pan, tint = round(draws.uniform(), 4), round(draws.uniform(), 4)
    return Scene(0, 0, setting, draws.choice(HORIZONS), light, pan, tint, ())


class TryOnViews:
    """Lazily computed pictures of one scene at H x W, uint8 [H, W, 3] unless said otherwise.

    Arrays are shared: do not write to them.
    """

    def __init__(self, scene: TryOnScene, height: int, width: int) -> None:
        self.scene, self.height, self.width = scene, height, width
        self._posed = self._stand(scene.figure)

    def _stand(self, figure: Figure) -> Posed:
        return Posed(figure, self.height, self.width, 0.5 + 0.48 * figure.size)

    def _dress(self, posed: Posed, place: Scene, garment: Garment) -> _Dressed:
        size = max(self.height, self.width)
        left, top = (size - self.width) // 2, size - self.height
        behind = background(place, size)[:, top:, left : left + self.width]
        return _Dressed(posed, garment, behind.copy(), place.light)

    @functools.cached_property
    def _target(self) -> _Dressed:
        return self._dress(self._posed, self.scene.place, self.scene.garment)

    @functools.cached_property
    def target(self) -> Array:
        """The person wearing the garment."""
        return _to_bytes(self._target.canvas)

    @functools.cached_property
    def region(self) -> Array:
        """bool [H, W]: where the target shows the garment (at least half of the pixel)."""
        return self._target.region >= 0.5

    @functools.cached_property
    def person(self) -> Array:
        """The same person, pose and place, in the other garment."""
        return _to_bytes(self._dress(self._posed, self.scene.place, self.scene.other).canvas)

    @functools.cached_property
    def mask(self) -> Array:
        """0 or 255, three equal channels: everything that depends on which garment of the category
        is worn. Outside it target and person are equal."""
        category = self.scene.garment.category
        hidden = np.zeros((self.height, self.width), bool)
        for shape in self._posed.hiding_shapes(category):
            c = self._posed.cover(shape)
            hidden[c.rows, c.columns] |= c.alpha > 0
        for c in _on_top(self._posed, category):
            hidden[c.rows, c.columns] &= c.alpha < 1
        return np.repeat(np.where(hidden, np.uint8(255), np.uint8(0))[..., None], 3, axis=2)

    @functools.cached_property
    def agnostic(self) -> Array:
        """The target with the masked region grey."""
        return np.where(self.mask > 0, np.uint8(_GREY), self.target)

    @functools.cached_property
    def reference(self) -> Array:
        """Somebody else, elsewhere, wearing the garment."""
        posed = self._stand(self.scene.model)
        return _to_bytes(self._dress(posed, self.scene.model_place, self.scene.garment).canvas)

    @functools.cached_property
    def garment(self) -> Array:
        """The garment laid flat on paper."""
        garment, paper = self.scene.garment, self.scene.paper
        posed = laid_flat(garment, self.height, self.width)
        canvas = np.full((3, self.height, self.width), paper, np.float32)
        below, sleeves = posed.worn(garment)
        x, y = posed.grid
        colour = cloth(garment, x - CHEST[0], y - CHEST[1], posed.px)
        colour = unit(colour * (1.0 - 0.2 * np.abs(x)))
        canvas += (colour - canvas) * np.maximum(below, sleeves)
        return _to_bytes(canvas)


class _Dressed:
    """A figure in a garment before a background: the picture, and where the garment shows."""

    def __init__(self, posed: Posed, garment: Garment, canvas: Array, light: float) -> None:
        self.canvas = canvas  # float32 [3, H, W], painted on
        self.region = np.zeros(canvas.shape[1:], np.float32)
        figure, category = posed.figure, garment.category
        x, y = posed.grid
        # Light from one side; folds in the cloth.
        shade = 0.96 + np.minimum(np.maximum(x * (0.9 * light), -0.10), 0.08)
        below, sleeves = posed.worn(garment)
        fold = 0.96 + 0.04 * np.sin(34.0 * y + 21.0 * x + 9.0 * garment.period)
        colour = unit(cloth(garment, x - CHEST[0], y - CHEST[1], posed.px) * (shade * fold))

        def paint(parts: Sequence[Covered], rgb: Rgb) -> None:
            plain = np.array(rgb, np.float32)[:, None, None]
            for c in parts:
                lit = np.minimum(plain * shade[c.rows, c.columns], 1.0)
                window = canvas[:, c.rows, c.columns]
                window += (lit - window) * c.alpha
                self.region[c.rows, c.columns] *= 1.0 - c.alpha

        def wear(coverage: Array) -> None:
            np.add(canvas, (colour - canvas) * coverage, out=canvas)
            np.add(self.region, (1.0 - self.region) * coverage, out=self.region)

        _shadow(canvas, posed)
        paint(posed.body("legs"), figure.skin)
        paint(posed.body("feet"), figure.shoes)
        paint(posed.body("torso"), figure.skin)
        if category == "lower":
            wear(below)
            paint(posed.body("basic_torso"), figure.basics)
            paint(posed.body("arms"), figure.skin)
            paint(posed.body("basic_sleeves"), figure.basics)
        else:
            if category == "upper":
                paint(posed.body("basic_legs"), figure.basics)
            wear(below)
            paint(posed.body("arms"), figure.skin)
            wear(sleeves)
        paint(posed.body("hands"), figure.skin)
        neck, hair, face, fringe, eyes = posed.head
        paint(hair, figure.hair)
        paint(neck, figure.skin)
        paint(face, figure.skin)
        paint(fringe, figure.hair)
        paint(eyes, (0.10, 0.10, 0.12))


def _shadow(canvas: Array, posed: Posed) -> None:
    """A soft dark ellipse on the ground under the feet."""
    x, y = posed.grid
    square = (x * (1.0 / 0.17)) ** 2 + ((y - 0.968) * (1.0 / 0.022)) ** 2
    fall = np.maximum(1.0 - 0.5 * square, 0.0)
    canvas *= 1.0 - 0.45 * fall * fall


def _on_top(posed: Posed, category: GarmentCategory) -> list[Covered]:
    """What is painted over any garment of the category."""
    arms = (
        (*posed.body("arms"), *posed.body("basic_sleeves"), *posed.body("basic_torso"))
        if category == "lower"
        else ()
    )
    return [*arms, *posed.body("hands"), *(c for parts in posed.head for c in parts)]


def _to_bytes(planes: Array) -> Array:
    """float32 [3, H, W] 0..1 to uint8 [H, W, 3]."""
    return np.ascontiguousarray((planes * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


@dataclasses.dataclass(frozen=True)
class TryOnScenes(TryOnSource):
    """`count` try-on scenes from index `start` on, made when asked for.

    Record `i` is scene `(seed, start + i)`. Its `extra` holds "label" (index into
    `garments.CLASSES`), "region" (bool [H, W], where the garment shows when worn), "truth" (the
    person wearing the garment, whatever the pairing), and the names that results are written under.

    Attributes:
      seed: of the world. start: first index. count: number of records; train from 0, hold out from
        `source.HELD_OUT`.
      height, width: of the pictures.
      categories: kinds of garments.
      pairs: "paired": the target wears the garment. "unpaired": the target is the person in other
        clothes, as in the unpaired lists of real sets, and the agnostic photo is made from it.
    """

    seed: int = 0
    start: int = 0
    count: int = 10_000
    height: int = 64
    width: int = 48
    categories: tuple[GarmentCategory, ...] = CATEGORIES
    pairs: Literal["paired", "unpaired"] = "paired"

    def __post_init__(self) -> None:
        for field, least in (
            ("seed", 0), ("start", 0), ("count", 1), ("height", 32), ("width", 24),
        ):  # fmt: skip
            value = getattr(self, field)
            if value < least:
                raise ValueError(f"TryOnScenes.{field}: expected at least {least}, found {value}")
        if not 0.6 <= self.width / self.height <= 1.5:
            raise ValueError(
                f"TryOnScenes: expected a width of 0.6 to 1.5 heights, found {self.height} x "
                f"{self.width}; arms would not fit"
            )
        if not self.categories:
            raise ValueError(f"TryOnScenes.categories: expected some of {', '.join(CATEGORIES)}")

    @property
    def name(self) -> str:
        return f"try-on-scenes/{self.seed}{'/unpaired' if self.pairs == 'unpaired' else ''}"

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> TryOnScene:
        """The scene of record `index`. Raises IndexError."""
        if not 0 <= index < self.count:
            raise IndexError(f"TryOnScenes: expected 0 <= index < {self.count}, found {index}")
        return sample_try_on(self.seed, self.start + index, self.categories)

    def __getitem__(self, index: int) -> TryOnRecord:
        """Record `index`, pictures as arrays. Raises IndexError."""
        scene = self.scene(index)
        views = TryOnViews(scene, self.height, self.width)
        paired = self.pairs == "paired"
        target = views.target if paired else views.person
        agnostic = views.agnostic if paired else np.where(views.mask > 0, np.uint8(_GREY), target)
        return TryOnRecord(
            id=self.record_id(index),
            garment=views.garment,
            target=target,
            person=views.person,
            agnostic=(agnostic,),
            references=(views.reference,),
            mask=views.mask,
            category=scene.garment.category,
            paired=paired,
            prompt=scene.garment.phrase,
            extra={
                "label": scene.garment.label,
                "region": views.region,
                "truth": views.target,
                "file": f"{self.start + index:08d}.png",
                "folder": scene.garment.category,
            },
        )

    def record_id(self, index: int) -> str:
        """The scene's own index."""
        return str(self.start + index)

    def offers(self) -> frozenset[Part]:
        return frozenset(("target", "person", "agnostic", "reference", "mask"))

    def looked_for(self, part: Part) -> str:
        return f"the try-on world, which makes no {part} pictures"

    def fingerprint(self) -> str:
        return digest("try-on-scenes", VERSION, dataclasses.asdict(self))
