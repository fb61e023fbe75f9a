"""COCO captions and instances in the published layout.

  <root>/annotations/captions_<split>.json    instances_<split>.json
  <root>/<split>/<12 digits>.jpg

One record per image of the captions file, in its order, with the first five captions in file order
(as FG-CLIP takes them) and one region per instance; crowd annotations are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.boxes import to_canonical
from data_pipelines.records import BadRecordError, ImageTextRecord, Region
from data_pipelines.sources.base import Source, files_digest
from data_pipelines.sources.matching import Listing, check_match, relative_path
from data_pipelines.sources.streamed_json import Element, exact, iter_elements


@dataclasses.dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class _Index:
    """Everything but the pictures. `boxes` holds `(annotation id, category id, x, y, w, h)` rows
    in pixels, sorted by image; `spans[i]` are the rows of image i."""

    images: tuple[_Image, ...]
    captions: dict[int, tuple[str, ...]]
    categories: dict[int, str]
    boxes: np.ndarray
    spans: np.ndarray
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Coco(Source):
    """COCO captions and boxes of one split.

    Attributes:
      root: folder that holds `annotations/` and the split's picture folder.
      split: as "train2017".
      captions: captions per image, the first ones in file order.
      instances: whether to read boxes (the instances file must then exist).
      phrase: region phrase, with `{name}` for the category's name.
      min_match: share of pictures that must be there; the others are quarantined when read.

    `record.extra` holds image_id, width, height and, parallel to the regions, category_ids and
    annotation_ids; `Region.label` is the category's name.
    """

    root: str
    split: str = "train2017"
    captions: int = 5
    instances: bool = True
    phrase: str = "{name}"
    min_match: float = 0.5

    def __post_init__(self) -> None:
        if "{name}" not in self.phrase:
            raise ValueError(f"Coco: expected '{{name}}' in phrase, found {self.phrase!r}")

    @property
    def name(self) -> str:
        return f"coco/{self.split}"

    @property
    def folder(self) -> Path:
        """Where the pictures are."""
        return Path(self.root).expanduser() / self.split

    def expected_files(self) -> tuple[Path, ...]:
        """Annotation files that must exist."""
        kinds = ("captions", "instances") if self.instances else ("captions",)
        annotations = Path(self.root).expanduser() / "annotations"
        return tuple(annotations / f"{kind}_{self.split}.json" for kind in kinds)

    def category_names(self) -> dict[int, str]:
        """Category id to name, in file order; ids are sparse."""
        return dict(self._index.categories)

    @functools.cached_property
    def _index(self) -> _Index:
        files = self.expected_files()
        absent = [str(p) for p in files if not p.is_file()]
        if absent:
            raise DataError(
                f"COCO {self.split}: expected {' and '.join(absent)}; set data.root to the folder "
                "that holds annotations/ and the picture folders"
            )
        images: list[_Image] = []
        captions: dict[int, list[str]] = {}
        for element in iter_elements(files[0], ("images", "annotations")):
            entry = _entry(files[0], element)
            if element.key == "images":
                images.append(_image(entry))
            else:
                mine = captions.setdefault(int(entry["image_id"]), [])
                if len(mine) < self.captions:
                    mine.append(str(entry["caption"]))
        if not images:
            raise DataError(f"{files[0]}: expected an 'images' array, found no image")
        positions = {image.id: i for i, image in enumerate(images)}
        categories, table, owners, counts = self._read_instances(positions)
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], np.arange(len(images) + 1))
        listing = Listing()
        present = [listing.has(self.folder / image.file_name) for image in images]
        check_match(
            sum(present),
            len(images),
            self.min_match,
            path=next((i.file_name for i, p in zip(images, present, strict=True) if not p), ""),
            root=self.folder,
            field="data.root",
        )
        counts.update(
            records=len(images),
            matched=sum(present),
            missing=len(images) - sum(present),
            without_boxes=int((np.diff(bounds) == 0).sum()),
        )
        return _Index(
            tuple(images),
            {k: tuple(v) for k, v in captions.items()},
            categories,
            table[order],
            np.stack([bounds[:-1], bounds[1:]], 1),
            dict(counts),
        )

    def _read_instances(
        self, positions: dict[int, int]
    ) -> tuple[dict[int, str], np.ndarray, np.ndarray, Counter[str]]:
        counts: Counter[str] = Counter()
        categories: dict[int, str] = {}
        rows: list[tuple[float, ...]] = []
        owners: list[int] = []
        if self.instances:
            path = self.expected_files()[1]
            for element in iter_elements(path, ("annotations", "categories")):
                if element.key == "categories":
                    entry = _entry(path, element)
                    categories[int(entry["id"])] = str(entry["name"])
                    continue
                entry = element.value
                if entry.get("iscrowd"):
                    counts["crowd"] += 1
                elif int(entry["image_id"]) not in positions:
                    counts["boxes_of_other_images"] += 1
                else:
                    box = [float(v) for v in entry["bbox"]]
                    rows.append((float(entry["id"]), float(entry["category_id"]), *box[:4]))
                    owners.append(positions[int(entry["image_id"])])
            unknown = {int(r[1]) for r in rows} - set(categories)
            if unknown:
                raise DataError(f"{path}: category ids {sorted(unknown)[:5]} are not in categories")
        table = np.array(rows, np.float64).reshape(-1, 6)
        return categories, table, np.array(owners, np.int64), counts

    def report(self) -> dict[str, int]:
        return dict(self._index.counts)

    def __len__(self) -> int:
        return len(self._index.images)

    def __getitem__(self, index: int) -> ImageTextRecord:
        image = self._index.images[index]
        start, stop = self._index.spans[index]
        rows = self._index.boxes[start:stop]
        regions = []
        for row in rows:
            label = self._index.categories[int(row[1])]
            box = to_canonical(row[2:], "xywh", image.width, image.height)
            regions.append(Region(box, self.phrase.format(name=label), label=label))
        return ImageTextRecord(
            id=str(image.id),
            image=self.folder / relative_path(image.file_name),
            short_captions=self._index.captions.get(image.id, ()),
            regions=tuple(regions),
            extra={
                "image_id": image.id,
                "width": image.width,
                "height": image.height,
                "category_ids": [int(v) for v in rows[:, 1]],
                "annotation_ids": [int(v) for v in rows[:, 0]],
            },
        )

    def record_id(self, index: int) -> str:
        return str(self._index.images[index].id)

    def fingerprint(self) -> str:
        return files_digest(
            [p for p in self.expected_files() if p.is_file()],
            self.split,
            self.captions,
            self.phrase,
        )


def _entry(path: Path, element: Element) -> dict[str, Any]:
    """The element as a dict, read again where it holds text that is not ASCII."""
    value = element.value
    if not isinstance(value, dict):
        raise DataError(f"{path}: byte {element.offset}: expected an object, found {value!r:.40}")
    if all(v.isascii() for v in value.values() if isinstance(v, str)):
        return value
    return exact(path, element)


def _image(entry: dict[str, Any]) -> _Image:
    name = entry.get("file_name")
    if name is None:  # LVIS: the last two parts of coco_url; the split's folder holds the last
        name = str(entry.get("coco_url", "")).rsplit("/", 1)[-1]
    try:
        relative_path(str(name))
    except BadRecordError as e:
        raise DataError(f"COCO image {entry.get('id')}: {e.detail}") from e
    return _Image(int(entry["id"]), str(name), int(entry["width"]), int(entry["height"]))
