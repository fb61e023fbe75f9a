"""The published folder layouts at tiny size: every picture a flat colour of its own.

A picture's colour is a function of its path, so a test can tell which file a record points to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = ("upper_body", "lower_body", "dresses")


def colour_of(path: str) -> tuple[int, int, int]:
    """Colour of the file at a relative path."""
    digest = hashlib.blake2b(path.encode(), digest_size=3).digest()
    return digest[0], digest[1], digest[2]


def write(root: Path, paths: Iterable[str], size: tuple[int, int] = (24, 32)) -> None:
    """Flat pictures (lossless whatever their suffix); masks are half white."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", size, colour_of(path))
        if "mask" in path:
            half = np.zeros((size[1], size[0]), np.uint8)
            half[size[1] // 2 :] = 255
            picture = Image.fromarray(half)
        picture.save(file, "PNG")


def viton(root: Path, split: str = "train", names: tuple[str, ...] = ("00006_00", "00013_00")):
    """RefTON's processed tree; the pair list lies in the split's folder."""
    parts = ("image", "cloth", "person", "image_ref", "agnostic", "agnostic_refined")
    write(root, (f"{split}/{part}/{name}.jpg" for part in parts for name in names))
    write(root, (f"{split}/agnostic_mask/{name}_mask.png" for name in names))
    write(root, (f"{split}/dense/{name}.png" for name in names))
    pairs = zip(names, (*names[1:], names[0]), strict=True)
    lines = [f"{person}.jpg {cloth}.jpg" for person, cloth in pairs]
    (root / split / f"{split}_pairs.txt").write_text("\n".join(lines) + "\n\n")
    return root


def viton_archive(root: Path):
    """The archive as published: other folder names, the list at the root, no generated pictures."""
    for name in ("00006_00", "00013_00"):
        parts = ("image", "cloth", "agnostic-v3.2", "image-densepose")
        write(root, (f"test/{part}/{name}.jpg" for part in parts))
        write(root, (f"test/agnostic-mask/{name}_mask.png",))
    (root / "test_pairs.txt").write_text("00006_00.jpg 00013_00.jpg\n00013_00.jpg 00006_00.jpg\n")
    return root


def dresscode(root: Path, columns: int = 3):
    """One pair per category; lists at the root (3 columns) or in the categories (2)."""
    rows = {0: ("000001", "000002"), 1: ("020714", "020715"), 2: ("050001", "050002")}
    lists: dict[Path, list[str]] = {}
    for number, (first, second) in rows.items():
        folder = FOLDERS[number]
        for n in (first, second):
            names = (f"images/{n}_0.jpg", f"images/{n}_1.jpg", f"image_ref/{n}_0.jpg",
                     f"person/{n}_0.jpg", f"agnostic_catvton/{n}_6.jpg",
                     f"agnostic_enhanced/{n}_6.jpg", f"agnostic_masks_catvton/{n}_3.png",
                     f"dense/{n}_5.png")  # fmt: skip
            write(root, (f"{folder}/{name}" for name in names))
        third = f" {number}" if columns == 3 else ""
        where = root if columns == 3 else root / folder
        for name, garment in (("train_pairs", first), ("test_pairs_unpaired", second)):
            line = f"{first}_0.jpg {garment}_1.jpg{third}"
            lists.setdefault(where / f"{name}.txt", []).append(line)
        lists.setdefault(where / "test_pairs_paired.txt", []).append(
            f"{second}_0.jpg {second}_1.jpg{third}"
        )
    for path, lines in lists.items():
        path.write_text("\n".join(lines) + "\n")
    return root


def fashiontryon(root: Path, split: str = "train"):
    """Garments are named by the first five characters of a photo's name."""
    names = ("11111_a.jpg", "22222_b.jpg")
    parts = ("images", "person", "image_ref", "agnostic", "agnostic_enhanced")
    write(root, (f"{split}/{part}/{name}" for part in parts for name in names))
    write(root, (f"{split}/cloth/{name[:5]}.jpg" for name in names))
    (root / split / "unpairs.txt").write_text(f"{names[0]} {names[1]}\n")
    return root


def by_category(root: Path, extra: tuple[str, ...] = ()):
    """ViViD and IGPair: three columns, a folder per category."""
    for folder in FOLDERS[:2]:
        for n in ("00012", "00034"):
            parts = ("images", "image_ref", "person", "agnostic", *extra)
            write(root, (f"{folder}/{part}/{n}_1.jpg" for part in parts))
            write(root, (f"{folder}/cloth/{n}.jpg",))
    paired = [f"{n}_1.jpg {n}.jpg {c}" for c in (0, 1) for n in ("00012", "00034")]
    (root / "pairs.txt").write_text("\n".join(paired) + "\n")
    (root / "unpairs.txt").write_text("00012_1.jpg 00034.jpg 0\n")
    return root


def combined(root: Path):
    """All five sets."""
    viton(root / "viton")
    dresscode(root / "DressCode")
    fashiontryon(root / "FashionTryOn_processed")
    by_category(root / "vivid_processed")
    by_category(root / "IGPair_processed", ("agnostic_mask",))
    return root


def lines(root: Path, rows: list[dict]) -> str:
    """A JSON-lines file with its pictures."""
    for row in rows:
        for key in ("garment", "target", "person", "mask"):
            if isinstance(row.get(key), str):
                write(root, (row[key],))
        for key in ("agnostic", "references"):
            value = row.get(key, ())
            write(root, (value,) if isinstance(value, str) else value)
    path = root / "tryon.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
