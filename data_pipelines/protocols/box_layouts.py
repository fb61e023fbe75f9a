"""Readers of published box evaluation sets, exactly as they lie on disk: COCO, LVIS, FG-OVD.

Boxes are `[x, y, width, height]` in pixels in all of them. Nothing is left out or mended: crowd
boxes, boxes that pass the border and boxes without area take part, as in the official scripts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from data_pipelines.batch import DataError
from data_pipelines.boxes import to_canonical
from data_pipelines.protocols.layouts import Listed, below, expect, read_json
from data_pipelines.records import ImageTextRecord, Region

FgOvdSubset = Literal["hard", "medium", "easy", "trivial"]
FGOVD_FILES: dict[str, str] = {
    "hard": "h_attributes_llava.jsonl",
    "medium": "m_attributes_llava.jsonl",
    "easy": "e_attributes_llava.jsonl",
    "trivial": "shuffle_negatives_llava.jsonl",
}


def instance_regions(content: dict[str, Any], names: dict[int, str]) -> dict[int, list[Region]]:
    """Boxes of a COCO-schema file: image id -> regions in file order, phrase and label the class
    name.

    Args:
      content: with "images" (id, width, height) and "annotations" (image_id, category_id, bbox).
      names: category id -> class name.
    """
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    found: dict[int, list[Region]] = {}
    for entry in content["annotations"]:
        name = names[entry["category_id"]]
        box = to_canonical(entry["bbox"], "xywh", *sizes[entry["image_id"]])
        found.setdefault(entry["image_id"], []).append(Region(box, name, label=name))
    return found


@dataclasses.dataclass(frozen=True)
class CocoInstances(Listed):
    """COCO boxes: `annotations/instances_<split>.json` and `<split>/*.jpg` (datasets section 4).

    Class names in the order of `categories`; category ids are sparse (1..90).
    """

    split: str = "val2017"

    @property
    def name(self) -> str:
        return f"coco/{self.split}"

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """The annotation file."""
        path = Path(self.root) / "annotations" / f"instances_{self.split}.json"
        found: dict[str, Any] = read_json(path, "COCO instances")
        return found

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Category id -> class name, in label order."""
        return {c["id"]: c["name"] for c in self.content["categories"]}

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        regions = instance_regions(self.content, self.names)
        folder = self.pictures(self.split)
        return tuple(
            ImageTextRecord(
                str(image["id"]),
                below(folder, image["file_name"]),
                regions=tuple(regions.get(image["id"], ())),
            )
            for image in sorted(self.content["images"], key=lambda i: i["id"])
        )


@dataclasses.dataclass(frozen=True)
class LvisInstances(Listed):
    """LVIS v1 boxes: `lvis_v1_<split>.json` under `root`; pictures in COCO's folders under `images`
    (default: `root`), found by the last two parts of `coco_url` (datasets section 5).

    Class names have blanks for underscores; label = category id - 1.

    Attributes:
      split: of the file name.
      folders: "val2017" takes only pictures that lie in `val2017/`, as the official script with
        its default folder does; "all" takes those in `train2017/` as well. ASSUMPTION: the
        published numbers are of the former. `report()` says how many of the listed pictures that
        leaves.
    """

    split: str = "val"
    folders: Literal["val2017", "all"] = "val2017"

    @property
    def name(self) -> str:
        return f"lvis/{self.split}"

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """The annotation file."""
        path = Path(self.root) / f"lvis_v1_{self.split}.json"
        found: dict[str, Any] = read_json(path, "LVIS instances")
        return found

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Category id -> class name, in label order."""
        names = {c["id"]: c["name"].replace("_", " ") for c in self.content["categories"]}
        if sorted(names) != list(range(1, len(names) + 1)):
            raise DataError(
                f"{self.name}: expected category ids 1..{len(names)}, found {min(names)}.."
                f"{max(names)}; this is not the LVIS v1 file"
            )
        return dict(sorted(names.items()))

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        regions = instance_regions(self.content, self.names)
        base = self.pictures(".")
        found = []
        for image in sorted(self.content["images"], key=lambda i: i["id"]):
            folder, file = PurePosixPath(image["coco_url"]).parts[-2:]
            path = base / "val2017" / file
            if self.folders == "all" and not path.exists():
                path = base / folder / file
            if path.exists():
                boxes = tuple(regions.get(image["id"], ()))
                found.append(ImageTextRecord(str(image["id"]), path, regions=boxes))
        return tuple(found)

    def report(self) -> dict[str, int]:
        listed = len(self.content["images"])
        return {"records": len(self), "listed": listed, "not_in_folder": listed - len(self)}


@dataclasses.dataclass(frozen=True)
class FgOvd(Listed):
    """FG-OVD in the flattened form of FG-CLIP: one JSON object a line with `img_path`, `bbox`,
    `pos_expression` [1], `neg_expression` [2..10] (datasets section 8.5).

    One record per picture with one region per line of the file; `images` is the folder that
    `val2017/` and `train2017/` lie in (default: `root`).
    """

    subset: FgOvdSubset = "hard"

    @property
    def name(self) -> str:
        return f"fgovd/{self.subset}"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        if self.subset not in FGOVD_FILES:
            raise DataError(f"FG-OVD: expected one of {list(FGOVD_FILES)}, found {self.subset!r}")
        path = expect(Path(self.root) / FGOVD_FILES[self.subset], "FG-OVD")
        grouped: dict[str, list[Region]] = {}
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                (phrase,) = row["pos_expression"]
                box = to_canonical(row["bbox"], "xywh", row["width"], row["height"])
                region = Region(box, phrase, negatives=tuple(row["neg_expression"]))
            except (KeyError, TypeError, ValueError) as e:
                raise DataError(
                    f"{path}, line {n}: not an FG-OVD row ({e!r}); fetch it again"
                ) from e
            grouped.setdefault(row["img_path"], []).append(region)
        folder = self.pictures(".")
        return tuple(
            ImageTextRecord(name, below(folder, name), regions=tuple(regions))
            for name, regions in grouped.items()
        )
