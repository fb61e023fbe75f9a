"""Pictures of a try-on record at the sizes that the model takes.

The official transforms resize to the exact size, bilinear with antialiasing, ignoring the aspect
ratio (`Resize((H, W))`); the crop that follows has nothing left to cut. Pixels stay uint8, the
official `[0, 1] -> (x - 0.5) / 0.5` is the system's first operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal

import numpy as np
from PIL import Image

from data_pipelines.images import ImageLimits, decode_rgb
from data_pipelines.records import ImageLike, TryOnRecord

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Frame:
    """Picture sizes, and how pictures get to them.

    Attributes:
      height, width: H, W of target, subject and garment.
      cond_scale: mask, DensePose picture and reference have int(H // cond_scale) rows and
        int(W // cond_scale) columns.
      resize: "stretch" ignores the aspect ratio (official); "pad" keeps it and fills up, white
        around pictures, black around masks and DensePose pictures.
      alpha: what becomes of transparency: "drop" forgets it, whatever colour is underneath
        (official, PIL's `convert`); "white" puts the picture on white.
      limits: what a usable picture is.
    """

    height: int = 512
    width: int = 384
    cond_scale: float = 1.0
    resize: Literal["stretch", "pad"] = "stretch"
    alpha: Literal["drop", "white"] = "drop"
    limits: ImageLimits = dataclasses.field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or not self.cond_scale > 0:
            raise ValueError(
                f"Frame: expected height, width >= 1 and cond_scale > 0, found {self.height}, "
                f"{self.width}, {self.cond_scale}"
            )
        if min(self.cond_size) < 1:
            raise ValueError(
                f"Frame: cond_scale={self.cond_scale} leaves no pixel of "
                f"{self.height} x {self.width}; lower it"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    @property
    def cond_size(self) -> tuple[int, int]:
        """(h, w)."""
        return int(self.height // self.cond_scale), int(self.width // self.cond_scale)

    def decode(self, image: ImageLike) -> Image.Image:
        """The picture as PIL RGB. Raises BadRecordError."""
        background = _WHITE if self.alpha == "white" else None
        return decode_rgb(image, self.limits, background=background)

    def full(self, picture: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] of a target, subject or garment."""
        return self._fit(picture, self.size, _WHITE)

    def reference(self, picture: Image.Image) -> np.ndarray:
        """uint8 [h, w, 3] of a reference."""
        return self._fit(picture, self.cond_size, _WHITE)

    def map(self, picture: Image.Image) -> np.ndarray:
        """uint8 [h, w, 3] of a mask or a DensePose picture."""
        return self._fit(picture, self.cond_size, _BLACK)

    def _fit(
        self, picture: Image.Image, size: tuple[int, int], fill: tuple[int, int, int]
    ) -> np.ndarray:
        h, w = size
        if self.resize == "stretch":
            return np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR))
        ratio = min(w / picture.width, h / picture.height)
        inner = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
        canvas = Image.new("RGB", (w, h), fill)
        place = ((w - inner[0]) // 2, (h - inner[1]) // 2)
        canvas.paste(picture.resize(inner, Image.Resampling.BILINEAR), place)
        return np.asarray(canvas)


def pictures(
    record: TryOnRecord, frame: Frame, parts: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Every picture that a record has, at its size, nothing drawn: for looking, caching, sampling.

    `parts` names those that are wanted besides the garment; None for all.

    Returns:
      uint8 arrays: "garment"; "target", "person", "agnostic" (the first variant) [H, W, 3];
      "reference" (the first), "mask", "dense" [h, w, 3]; absent where the record has none.

    Raises:
      BadRecordError: a picture that cannot be decoded.
    """
    images: dict[str, ImageLike | None] = {
        "garment": record.garment,
        "target": record.target,
        "person": record.person,
        "agnostic": record.agnostic[0] if record.agnostic else None,
        "reference": record.references[0] if record.references else None,
        "mask": record.mask,
        "dense": record.dense,
    }
    fit = {"reference": frame.reference, "mask": frame.map, "dense": frame.map}
    return {
        name: fit.get(name, frame.full)(frame.decode(image))
        for name, image in images.items()
        if image is not None and (parts is None or name == "garment" or name in parts)
    }
