"""Small pictures, records and a tokenizer for the data tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.bpe_training import train_clip_bpe
from data_pipelines.records import ImageTextRecord, Region

TEXTS = (
    "a photo of a red kettle on a stove",
    "a glossy red kettle with a wooden handle standing near the blue cup",
    "two dogs and a cat under a wooden table, a blue kettle and a green cup",
)


def picture(width: int = 24, height: int = 18, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise of an 8-bit mode."""
    bands = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    if bands == 1:
        grey = Image.fromarray(values[..., 0])
        return grey.convert("P") if mode == "P" else grey
    raw = {"LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "CMYK"}[mode]
    return Image.frombytes(raw, (width, height), values.tobytes())


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def record(index: int, regions: int = 0, image: bytes | np.ndarray | Path | None = None):
    """A good record with recognisable texts; odd boxes have two negatives."""
    return ImageTextRecord(
        id=f"r{index}",
        image=encoded(picture(seed=index)) if image is None else image,
        short_captions=(f"short {index}", f"other {index}"),
        long_caption=f"a long caption of {index}",
        regions=tuple(
            Region(
                box=(0.1 * j, 0.1, 0.1 * j + 0.3, 0.6),
                phrase=f"phrase {j}",
                long_phrase=f"long phrase {j}",
                negatives=("blue one", "green one") if j % 2 else (),
            )
            for j in range(regions)
        ),
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a small CLIP vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_clip_bpe(TEXTS * 3, 600).save(folder)
    return str(folder)
