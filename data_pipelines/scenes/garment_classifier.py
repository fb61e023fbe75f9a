"""Which garment is it? Colour and pattern of a region of a picture, in closed form.

Colour: chroma (`garments.hue_vector`) is linear and white mixed in only shortens it, so the angle
of the region's mean chroma is the angle of the fabric, whatever share of white its pattern has; the
nearest of the eight fabrics is taken. Pattern: chroma along that angle, over the brightness, says
for each pixel how much of the second colour it is; from that map come its share and how much it
changes between neighbours along a row and along a column:

  few pixels of the second colour              plain
  changes along columns only                   striped (bands lie across)
  changes along rows only                      pinstriped
  changes both ways, about half second colour  checked
  changes both ways, less of it                dotted

Nothing is fitted. Its accuracy on true pictures is measured by the tests
(`tests/tryon/test_scenes.py`) and stands in `docs/scenes.md`.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.scenes.garments import CLASSES, FABRICS, PATTERNS, SECOND, Pattern, hue_vector

NOTHING = -1  # no colour to speak of, or no region
MIN_PIXELS = 12

_MIN_CHROMA = 0.10  # mean, below which a region is grey
_PLAIN = 0.17  # share of the second colour up to which a garment is plain
_ONE_WAY = 1.9  # ratio of changes from which they go one way
_HALF = 0.40  # share of the second colour that parts squares from dots


def classify(picture: np.ndarray, region: np.ndarray) -> int:
    """Class of the garment seen in a region.

    Args:
      picture: uint8 [H, W, 3], or float in 0..1.
      region: bool [H, W].

    Returns:
      Index into `garments.CLASSES`; `NOTHING` where the region is grey or has fewer than
      `MIN_PIXELS` pixels.
    """
    if int(region.sum()) < MIN_PIXELS:
        return NOTHING
    rgb = picture.astype(np.float32)
    if picture.dtype == np.uint8:
        rgb /= 255.0
    chroma = hue_vector(rgb)
    mean = chroma[region].mean(0)
    length = float(np.hypot(*mean))
    if length < _MIN_CHROMA:
        return NOTHING
    fabrics = np.stack([hue_vector(np.array(c)) for c in FABRICS.values()])
    fabrics /= np.linalg.norm(fabrics, axis=1, keepdims=True)
    colour = int(np.argmax(fabrics @ (mean / length)))
    second = _second_share(rgb, chroma, tuple(FABRICS)[colour])
    return CLASSES.index((tuple(FABRICS)[colour], _pattern(second, region)))


def _second_share(rgb: np.ndarray, chroma: np.ndarray, colour: str) -> np.ndarray:
    """Share 0..1 of the second colour, [H, W], from chroma over brightness."""

    def saturation(pixels: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return (vectors @ direction) / np.maximum(pixels.sum(-1), 0.05)

    base, white = np.array(FABRICS[colour], np.float32), np.array(SECOND, np.float32)
    direction = hue_vector(base)
    direction /= np.linalg.norm(direction)
    # Brightness and chroma are both linear in the share, so their ratio can be solved for it.
    measured = saturation(rgb, chroma)
    chroma_base, chroma_white = hue_vector(base) @ direction, hue_vector(white) @ direction
    top = measured * base.sum() - chroma_base
    bottom = (chroma_white - chroma_base) - measured * (white.sum() - base.sum())
    return np.clip(top / np.minimum(bottom, -1e-3), 0.0, 1.0)


def _pattern(second: np.ndarray, region: np.ndarray) -> Pattern:
    share = float(second[region].mean())
    if share < _PLAIN:
        return "plain"
    across = region[:, 1:] & region[:, :-1]
    along = region[1:] & region[:-1]
    by_row = float(np.abs(np.diff(second, axis=1))[across].mean()) if across.any() else 0.0
    by_column = float(np.abs(np.diff(second, axis=0))[along].mean()) if along.any() else 0.0
    if by_column > _ONE_WAY * by_row:
        return "striped"
    if by_row > _ONE_WAY * by_column:
        return "pinstriped"
    return "checked" if share > _HALF else "dotted"


def chance() -> float:
    """Accuracy of guessing."""
    return 1.0 / len(CLASSES)


__all__ = ["CLASSES", "MIN_PIXELS", "NOTHING", "PATTERNS", "chance", "classify"]
