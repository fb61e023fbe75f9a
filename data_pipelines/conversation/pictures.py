"""Pictures for CLIP towers of language models (LLaVA's `image_aspect_ratio`), and their boxes.

`pad` puts a picture in the centre of a square of CLIP's mean colour; `crop` (LLaVA without the
setting) resizes the shorter edge and cuts the centre out.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image

from data_pipelines.boxes import Box
from data_pipelines.images import ImageLimits, decode_rgb, resize_shortest
from data_pipelines.records import ImageLike

MEAN_COLOUR = (122, 116, 104)  # int(255 * CLIP's mean)


@dataclasses.dataclass(frozen=True)
class Framing:
    """How a picture becomes a square.

    Attributes:
      size: side in pixels.
      mode: "pad" or "crop".
      limits: what a usable picture is.
    """

    size: int = 336
    mode: Literal["pad", "crop"] = "pad"
    limits: ImageLimits = dataclasses.field(default_factory=ImageLimits)


def prepare(image: ImageLike, framing: Framing) -> np.ndarray:
    """uint8 [size, size, 3]; the model normalises it.

    Raises:
      BadRecordError: see `decode_rgb`.
    """
    picture = decode_rgb(image, framing.limits)
    return resize_shortest(padded(picture) if framing.mode == "pad" else picture, framing.size)[0]


def padded(picture: Image.Image) -> Image.Image:
    """The picture in the centre of a square (offset (longer - shorter) // 2) of the mean colour."""
    w, h = picture.size
    if w == h:
        return picture
    side = max(w, h)
    canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
    canvas.paste(picture, _border(w, h))
    return canvas


def frame_box(box: Box, width: int, height: int) -> Box:
    """Pixels `(x1, y1, x2, y2)` to fractions of the padded square's side."""
    big, (left, top) = max(width, height), _border(width, height)
    x1, y1, x2, y2 = box
    return ((x1 + left) / big, (y1 + top) / big, (x2 + left) / big, (y2 + top) / big)


def unframe_box(box: Box, width: int, height: int) -> Box:
    """The inverse of `frame_box`: fractions of the padded square to pixels."""
    big, (left, top) = max(width, height), _border(width, height)
    x1, y1, x2, y2 = box
    return (x1 * big - left, y1 * big - top, x2 * big - left, y2 * big - top)


def _border(width: int, height: int) -> tuple[int, int]:
    """Pixels left of and above the picture in its square."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2
