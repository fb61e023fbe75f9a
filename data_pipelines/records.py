"""Typed records: what a source yields, whatever files it came from.

One canonical form for each fact, so that nothing downstream asks which dataset it is looking at:
boxes are float `(x1, y1, x2, y2)` as fractions 0..1 of the image, origin top left; texts are
Unicode; images stay encoded (or arrays) until a transform decodes them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

# Encoded bytes, an HWC uint8 array, or a path to a file that is read when the record is decoded.
ImageLike: TypeAlias = bytes | np.ndarray | Path


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """One box with its phrases.

    Attributes:
      box: `(x1, y1, x2, y2)`, fractions 0..1 of the image.
      phrase: short description ("red kettle").
      long_phrase: longer description; None when the source has one text only.
      negatives: hard negatives of `phrase` (same object, an attribute changed); may be empty.
      label: class name, where the source has classes.
      score: detector confidence 0..1, where the source has one.
    """

    box: tuple[float, float, float, float]
    phrase: str
    long_phrase: str | None = None
    negatives: tuple[str, ...] = ()
    label: str | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ImageTextRecord:
    """An image with captions and, optionally, regions.

    Attributes:
      id: unique within the source, stable between runs; it appears in logs and quarantine.
      image: see `ImageLike`.
      short_captions: one or more short captions.
      long_caption: a paragraph; None when the source has none (the short caption is used).
      regions: boxes with phrases, in file order.
      extra: what a particular evaluation needs besides (category ids, sizes); never required.
    """

    id: str
    image: ImageLike
    short_captions: tuple[str, ...] = ()
    long_caption: str | None = None
    regions: tuple[Region, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


GarmentCategory: TypeAlias = Literal["upper", "lower", "dresses"]


@dataclasses.dataclass(frozen=True, slots=True)
class TryOnRecord:
    """A person, a garment, and the person wearing it.

    Attributes:
      id: unique within the source, stable between runs; results are written under this name.
      garment: the flat garment.
      target: the person wearing the garment; where `paired` is False the person's own photo, in
        other clothes than `garment`. None for own pictures without a ground truth.
      person: the same person in other clothes (a generated picture in the published data).
      agnostic: the target with the garment region masked; one picture or variants of it.
      agnostic_shares: how often training draws each variant; empty for equally often.
      references: other people wearing the garment; none, one or several views.
      mask: the masked region, white on black. dense: DensePose picture of the target.
      category: kind of garment, where the source has kinds.
      paired: whether `target` wears `garment`.
      prompt: text of the record; the published recipes use one constant prompt instead.
      extra: what a particular evaluation needs besides; never required.
    """

    id: str
    garment: ImageLike
    target: ImageLike | None = None
    person: ImageLike | None = None
    agnostic: tuple[ImageLike, ...] = ()
    agnostic_shares: tuple[float, ...] = ()
    references: tuple[ImageLike, ...] = ()
    mask: ImageLike | None = None
    dense: ImageLike | None = None
    category: GarmentCategory | None = None
    paired: bool = True
    prompt: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class BadRecordError(ValueError):
    """A record that cannot be used. `reason` is a short stable slug, counted per run.

    Known reasons: missing_file, truncated_image, undecodable_image, image_too_small,
    image_too_large, invalid_utf8, empty_caption, caption_too_long, box_nan, box_inverted,
    box_empty, box_outside, malformed_record; of try-on records also missing_target,
    missing_person, missing_agnostic, misaligned_pictures, mask_not_binary, mask_empty.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
