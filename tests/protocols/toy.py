"""A model that understands colours, and pictures made of them: every right answer is known.

The picture is uint8; its feature is the mean of centred RGB. The feature of a text is the sum of
the colours that it names. So a red picture is nearest to "red", and a box to the colour in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLORS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 230),
    "yellow": (235, 225, 40),
    "cyan": (30, 210, 220),
    "magenta": (220, 40, 210),
    "orange": (240, 140, 30),
    "violet": (120, 40, 200),
}
NAMES = tuple(COLORS)


class Words:
    """A tokenizer with a word per id; unknown words are made up as they come."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, 0, 4096

    def __init__(self) -> None:
        self.ids = {name: 3 + n for n, name in enumerate(NAMES)}

    def tokens(self, text: str) -> list[int]:
        """One id per word."""
        words = text.lower().replace(".", " ").replace(",", " ").split()
        return [self.ids.setdefault(w, 3 + len(self.ids)) for w in words]


class Toy:
    """The model; records the shapes it is called with."""

    def __init__(self) -> None:
        self.calls: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
        self.rows: dict[str, int] = {}

    def _saw(self, name: str, *arrays: np.ndarray) -> None:
        self.calls.setdefault(name, set()).add(tuple(a.shape for a in arrays))
        self.rows[name] = self.rows.get(name, 0) + len(arrays[0])

    @staticmethod
    def _center(rgb: np.ndarray) -> np.ndarray:
        return (rgb.astype(np.float32) - 128.0) / 128.0

    def image_features(self, image: np.ndarray) -> np.ndarray:
        self._saw("image_features", image)
        assert image.dtype == np.uint8
        return self._center(image.mean(axis=(1, 2)))

    def text(self, name: str, ids: np.ndarray) -> np.ndarray:
        self._saw(name, ids)
        assert ids.dtype == np.int32
        table = np.zeros((Words.vocab_size, 3), np.float32)
        table[3 : 3 + len(NAMES)] = self._center(np.array(list(COLORS.values())))
        return table[ids].sum(axis=1) + 1e-3

    def dense_features(self, image: np.ndarray) -> np.ndarray:
        self._saw("dense_features", image)
        b, s = image.shape[:2]
        g = 8
        return self._center(image.reshape(b, g, s // g, g, s // g, 3).mean(axis=(2, 4)))

    def box_features(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        self._saw("box_features", image, boxes)
        b, n = boxes.shape[:2]
        side = image.shape[1]
        out = np.zeros((b, n, 3), np.float32)
        for i in range(b):
            for j in range(n):
                x1, y1, x2, y2 = np.clip(np.rint(boxes[i, j] * side).astype(int), 0, side)
                if x2 > x1 and y2 > y1:
                    out[i, j] = 5.0 * self._center(image[i, y1:y2, x1:x2].mean(axis=(0, 1)))
        return out

    def functions(self) -> dict[str, Any]:
        """As a protocol gets them."""
        return {
            "image_features": self.image_features,
            "text_features_short": lambda ids: self.text("text_features_short", ids),
            "text_features_long": lambda ids: self.text("text_features_long", ids),
            "dense_features": self.dense_features,
            "box_features": self.box_features,
        }


def plain(color: str, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    """A picture of one colour, uint8 [h, w, 3]."""
    return np.full((size[1], size[0], 3), COLORS[color], np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture; PNG bytes whatever the name, so that colours stay exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")
    return path


def quarters(colors: tuple[str, str, str, str], side: int = 64) -> np.ndarray:
    """A square picture of four quarters: top left, top right, bottom left, bottom right."""
    out = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    for n, color in enumerate(colors):
        y, x = divmod(n, 2)
        out[y * half : (y + 1) * half, x * half : (x + 1) * half] = COLORS[color]
    return out


QUARTERS = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))
