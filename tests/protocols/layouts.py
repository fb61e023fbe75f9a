"""Writers of tiny evaluation sets with exactly the published file and folder names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.protocols.toy import COLORS, NAMES, QUARTERS, plain, quarters, save

SIZES = ((40, 30), (30, 40), (36, 36))


def write_json(path: Path, value: Any, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(v) for v in value) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")


def coco_captions(root: Path) -> None:
    """COCO val2017 captions: file order is not id order, five to seven captions, stray blanks, one
    picture that is listed but missing."""
    ids = {name: 139 + 10 * n for n, name in enumerate(NAMES)}
    images, annotations = [], []
    for n, (name, number) in enumerate(ids.items()):
        width, height = SIZES[n % 3]
        file = f"{number:012d}.jpg"
        save(root / "val2017" / file, plain(name, (width, height)))
        images.append({"id": number, "file_name": file, "width": width, "height": height})
    images.append({"id": 7, "file_name": f"{7:012d}.jpg", "width": 9, "height": 9})
    annotations.append({"id": 1, "image_id": 7, "caption": "a missing picture"})
    for k in range(7):
        for n, (name, number) in enumerate(ids.items()):
            if k < 5 + n % 3:
                # From the sixth on a caption is wrong: it must not be read.
                color = name if k < 5 else NAMES[n - 1]
                text = f"A {color} picture, number {k}.\n"
                annotations.append({"id": 100 * k + n, "image_id": number, "caption": text})
    content = {"info": {}, "licenses": [], "images": images[::-1], "annotations": annotations}
    write_json(root / "annotations" / "captions_val2017.json", content)


def coco_instances(root: Path) -> None:
    """COCO val2017 boxes: sparse category ids, a crowd, a box past the border, one without area,
    a picture without annotation."""
    categories = [
        {"id": 5 * n + 1, "name": name, "supercategory": "color"} for n, name in enumerate(NAMES)
    ]
    number = {c["name"]: c["id"] for c in categories}
    images, annotations = [], []
    for n, pick in enumerate((NAMES[0:4], NAMES[4:8])):
        save(root / "val2017" / f"{n + 1:012d}.jpg", quarters(pick))
        images.append({"id": n + 1, "file_name": f"{n + 1:012d}.jpg", "width": 64, "height": 64})
        for k, (color, box) in enumerate(zip(pick, QUARTERS, strict=True)):
            annotation = {
                "id": 10 * n + k,
                "image_id": n + 1,
                "category_id": number[color],
                "bbox": [box[0] * 64, box[1] * 64, 32.0, 32.0],
                "area": 1024.0,
                "iscrowd": 0,
                "segmentation": [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]],
            }
            if k == 1:
                annotation["bbox"][2] = 32.4
            if k == 3:
                annotation |= {"iscrowd": 1, "segmentation": {"counts": [4096], "size": [64, 64]}}
            annotations.append(annotation)
    annotations.append(
        {"id": 99, "image_id": 1, "category_id": 1, "bbox": [3.0, 3.0, 0.0, 5.0], "iscrowd": 0}
    )
    save(root / "val2017" / f"{3:012d}.jpg", plain("red"))
    images.append({"id": 3, "file_name": f"{3:012d}.jpg", "width": 40, "height": 30})
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "instances_val2017.json", content)


def lvis(root: Path) -> None:
    """LVIS v1 val: no file_name, coco_url into both folders, underscores and parentheses."""
    names = [f"{c}_thing_(toy)" for c in NAMES]
    categories = [
        {"id": n + 1, "name": name, "synset": f"{name}.n.01", "frequency": "f", "synonyms": [name]}
        for n, name in enumerate(names)
    ]
    images, annotations = [], []
    for n, folder in enumerate(("val2017", "train2017")):
        pick = NAMES[4 * n : 4 * n + 4]
        file = f"{100 + n:012d}.jpg"
        save(root / folder / file, quarters(pick))
        images.append(
            {
                "id": 100 + n,
                "width": 64,
                "height": 64,
                "coco_url": f"http://images.cocodataset.org/{folder}/{file}",
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
        )
        for k, box in enumerate(QUARTERS):
            annotations.append(
                {
                    "id": 10 * n + k,
                    "image_id": 100 + n,
                    "category_id": 4 * n + k + 1,
                    "bbox": [box[0] * 64, box[1] * 64, 32.0, 32.0],
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
    write_json(root / "lvis_v1_val.json", content)


def fgovd(root: Path) -> None:
    """FG-OVD as FG-CLIP ships it: two files' worth of rows over pictures of both COCO folders, with
    2 to 10 negatives, several rows per picture."""
    rows: list[dict[str, Any]] = []
    for n, folder in enumerate(("val2017", "train2017")):
        pick = NAMES[4 * n : 4 * n + 4]
        name = f"{folder}/{500 + n:012d}.jpg"
        save(root / name, quarters(pick))
        for k, (color, box) in enumerate(zip(pick, QUARTERS, strict=True)):
            others = [f"A {c} part . ." for c in NAMES if c != color]
            rows.append(
                {
                    "img_path": name,
                    "bbox": [box[0] * 64, box[1] * 64, 32.0, 32.0],
                    "pos_expression": [f"A {color} part . ."],
                    "neg_expression": others[: 2 + k],
                    "category_id": k,
                    "neg_category_ids": list(range(2 + k)),
                    "width": 64,
                    "height": 64,
                    "image_id": 500 + n,
                    "sent_id": len(rows),
                    "test_type": "1_attributes",
                }
            )
    # Interleave the pictures: grouping must not depend on neighbours.
    rows = rows[0::2] + rows[1::2]
    for file in (
        "h_attributes_llava.jsonl",
        "m_attributes_llava.jsonl",
        "e_attributes_llava.jsonl",
        "shuffle_negatives_llava.jsonl",
    ):
        write_json(root / file, rows, lines=True)


def flickr30k(root: Path) -> None:
    rows = []
    for n, name in enumerate(NAMES):
        image = f"flickr30k-images/{1007129816 + n}.jpg"
        save(root / image, plain(name, SIZES[n % 3]))
        rows.append({"image": image, "caption": [f"A {name} thing {k}." for k in range(5)]})
    write_json(root / "flickr30k_test.json", rows)


def sharegpt4v(root: Path) -> None:
    """The big array: pictures by base name in one folder, a line end in a caption."""
    rows = []
    for n, name in enumerate(NAMES):
        save(root / "sam" / "images" / f"sa_{n}.jpg", plain(name, SIZES[n % 3]))
        rows.append(
            {
                "id": str(n),
                "image": f"sam/images/sa_{n}.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe [this] {picture}, please."},
                    {"from": "gpt", "value": f'The "sheet" is {name}.\nNothing ] else.'},
                ],
            }
        )
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def dci(root: Path) -> None:
    for n, name in enumerate(NAMES):
        image = f"sa_{1545038 + n}.jpg"
        save(root / "photos" / image, plain(name, SIZES[n % 3]))
        write_json(
            root / "annotations" / f"{n:03d}_entry.json",
            {
                "image": image,
                "short_caption": "A sheet.",
                "extra_caption": f"All of it is {name}.",
                "mask_keys": ["0"],
                "mask_data": {"0": {"idx": 0, "label": "sheet", "mask_quality": 0, "parent": -1}},
            },
        )
    write_json(root / "splits.json", {"train": [], "valid": [], "test": []})


def urban1k(root: Path) -> None:
    """Numbered files; only the first line of a text is the caption; 10 comes after 9."""
    for n, name in enumerate(NAMES):
        number = n + 4
        save(root / "image" / f"{number}.jpg", plain(name, SIZES[n % 3]))
        path = root / "caption" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"A {name} street.\nA second line about red.\n", encoding="utf-8")


def imagenet(root: Path, wnids: bool) -> dict[str, int]:
    """Class folders by wnid under `val/`, or by number; returns folder -> label. The class file
    has made-up wnids and names, in the published form."""
    lines = [f"n{2 * n + 1000:08d} thing{n}" for n in range(1000)]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    labels = {lines[n][:9]: n for n in (0, 1, 10, 22)}
    if not wnids:
        labels = {str(n): n for n in (0, 1, 2, 10)}
    for n, folder in enumerate(labels):
        base = root / "val" / folder if wnids else root / folder
        name = f"ILSVRC2012_val_{n:08d}.JPEG" if wnids else f"{n:040x}.jpeg"
        save(base / name, plain(NAMES[n]))
        grey = np.full((20, 20), 90, np.uint8)
        if n == 0:
            save(base / f"grey_{name}", grey)
    return labels


assert set(COLORS) == set(NAMES)
