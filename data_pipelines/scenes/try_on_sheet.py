"""Contact sheet of the try-on world: `python -m data_pipelines.scenes.try_on_sheet OUT.png`."""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.scenes.try_on import TryOnViews, sample_try_on

_TITLES = ("person", "agnostic", "garment", "reference", "target")
_PAPER, _INK = (252, 252, 252), (40, 42, 48)
_GAP, _LINE = 4, 16
_STEP = 6  # of colour levels in a saved file


def try_on_sheet(
    seed: int = 0, start: int = 0, rows: int = 4, columns: int = 2, height: int = 128
) -> Image.Image:
    """Scenes `(seed, start)` and up, `columns` beside each other, each as five pictures of
    `height` x 3/4 `height` with the garment's phrase underneath."""
    width = height * 3 // 4
    block = len(_TITLES) * (width + _GAP) + 3 * _GAP
    line = height + _LINE + _GAP
    sheet = Image.new("RGB", (columns * block, _LINE + rows * line + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10.5)
    for column in range(columns):
        for n, title in enumerate(_TITLES):
            draw.text((column * block + _GAP + n * (width + _GAP), 2), title, _INK, font)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        scene = sample_try_on(seed, start + number)
        views = TryOnViews(scene, height, width)
        left, top = column * block + _GAP, _LINE + row * line
        for n, title in enumerate(_TITLES):
            pixels = getattr(views, title)
            sheet.paste(Image.fromarray(pixels), (left + n * (width + _GAP), top))
        draw.text((left, top + height + 1), scene.garment.phrase, _INK, font)
    return sheet


def save_try_on_sheet(path: str, seed: int = 0, start: int = 0) -> None:
    """Write the sheet as a PNG; colours are rounded a little, which halves the file."""
    pixels = np.asarray(try_on_sheet(seed, start)).astype(np.int32)
    rounded = np.minimum((pixels + _STEP // 2) // _STEP * _STEP, 255).astype(np.uint8)
    Image.fromarray(rounded).save(path, optimize=True)


def main() -> None:
    """Write a contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.scenes.try_on_sheet",
        description="Write a contact sheet of the try-on world.",
    )
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default 0)")
    parser.add_argument("--start", type=int, default=0, help="first scene (default 0)")
    arguments = parser.parse_args()
    save_try_on_sheet(arguments.out, arguments.seed, arguments.start)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
