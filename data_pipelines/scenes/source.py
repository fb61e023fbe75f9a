"""The scene world as a source of image-text records."""

from __future__ import annotations

import dataclasses

from data_pipelines.records import ImageTextRecord
from data_pipelines.scenes.captions import long_caption, short_caption
from data_pipelines.scenes.graph import sample_scene
from data_pipelines.scenes.regions import regions
from data_pipelines.scenes.render import render
from data_pipelines.scenes.vocabulary import SETTINGS, Language, check_language
from data_pipelines.sources.base import Source, digest

# Raised whenever the same (seed, index) would give another picture or text.
VERSION = 1

# Held-out scenes start here by convention; training ranges stay below.
HELD_OUT = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Scenes(Source):
    """`count` scenes from index `start` on.

    Record `i` is scene `(seed, start + i)`, made when asked for; nothing is stored. Two sources
    with the same seed and ranges that do not meet share no scene: train from 0, hold out from
    `HELD_OUT`.

    Attributes:
      seed: of the world. start: first index. count: number of records.
      image_size: pixels per side.
      language: "en" or "zh", of captions, phrases and labels.
      short_captions: how many different short captions each record carries.
      settings: keys of `vocabulary.SETTINGS` that the scenes take place in; empty for all.
      coloured_labels: regions are labelled with colour and class.
      places: every other phrase of a region says where it is, see `regions`.
    """

    seed: int = 0
    start: int = 0
    count: int = 10_000
    image_size: int = 64
    language: Language = "en"
    short_captions: int = 1
    settings: tuple[str, ...] = ()
    coloured_labels: bool = False
    places: bool = False

    def __post_init__(self) -> None:
        check_language(self.language)
        for field, least in (
            ("seed", 0), ("start", 0), ("count", 1), ("image_size", 16), ("short_captions", 1),
        ):  # fmt: skip
            value = getattr(self, field)
            if value < least:
                raise ValueError(f"Scenes.{field}: expected at least {least}, found {value}")
        if self.places and self.language != "en":
            raise ValueError(
                f'Scenes.places: phrases with places are in English; expected language "en", found '
                f'"{self.language}"'
            )
        unknown = [name for name in self.settings if name not in SETTINGS]
        if unknown:
            raise ValueError(
                f"Scenes.settings: unknown {', '.join(unknown)}; known: {', '.join(SETTINGS)}"
            )

    @property
    def name(self) -> str:
        return f"scenes/{self.seed}/{self.language}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ImageTextRecord:
        """Record `index`, image uint8 `[image_size, image_size, 3]`.

        Raises:
          IndexError: not 0 <= index < count.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"Scenes: expected 0 <= index < {self.count}, found {index}")
        scene = sample_scene(self.seed, self.start + index, self.settings)
        views = render(scene, self.image_size)
        return ImageTextRecord(
            id=self.record_id(index),
            image=views.image,
            short_captions=tuple(
                short_caption(scene, self.language, variant)
                for variant in range(self.short_captions)
            ),
            long_caption=long_caption(scene, self.language),
            regions=regions(scene, views.boxes, self.language, self.coloured_labels, self.places),
        )

    def record_id(self, index: int) -> str:
        """The scene's own index: the same scene has the same id in every range."""
        return str(self.start + index)

    def fingerprint(self) -> str:
        return digest("scenes", VERSION, dataclasses.asdict(self))
