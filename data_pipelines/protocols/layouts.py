"""Readers of published evaluation sets, exactly as they lie on disk: retrieval and ImageNet.

Each is a `Source`: a frozen description, opened at the first `len()`. Texts and boxes come as the
files have them; a picture that is not there is counted when it is read. Layouts are described in
docs/evaluation.md.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.batch import DataError
from data_pipelines.protocols.prompts import imagenet_classes
from data_pipelines.records import ImageTextRecord
from data_pipelines.sources.base import Source, digest

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class Listed(Source):
    """A source whose index of records fits in memory (pictures stay on disk).

    Attributes:
      root: folder of the data set.
      images: folder of the pictures where it is not the published place under `root`.
    """

    root: str
    images: str | None = None

    @abc.abstractmethod
    def read_index(self) -> tuple[ImageTextRecord, ...]:
        """All records, pictures as paths. Raises DataError when the layout is not there."""

    @functools.cached_property
    def records(self) -> tuple[ImageTextRecord, ...]:
        """The index, read once."""
        found = self.read_index()
        if not found:
            raise DataError(f"{self.name}: expected records under {self.root}, found none")
        return found

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageTextRecord:
        return self.records[index]

    def record_id(self, index: int) -> str:
        return self.records[index].id

    def fingerprint(self) -> str:
        return digest(self.name, [r.id for r in self.records])

    def pictures(self, default: str) -> Path:
        """Folder of the pictures: `images`, or `default` under `root`."""
        return Path(self.images) if self.images is not None else Path(self.root) / default


def expect(path: Path, what: str) -> Path:
    """`path`, or DataError saying what was looked for and what lies there instead."""
    if path.exists():
        return path
    parent = path.parent
    there = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else None
    found = "an empty folder" if there == [] else ", ".join(there or ()) or "no such folder"
    raise DataError(f"{what}: expected {path}, found {found} in {parent}; set root to its folder")


def read_json(path: Path, what: str) -> Any:
    """A JSON file. Raises DataError when it is missing or damaged."""
    try:
        return json.loads(expect(path, what).read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{what}: {path} is not valid JSON: {e}; fetch it again") from e


def first_rows(path: Path, count: int, what: str, block: int = 1 << 20) -> list[Any]:
    """The first `count` elements of a JSON array, without reading the rest of the file.

    Raises:
      DataError: the file is missing, is not an array, or ends within an element.
    """
    decoder = json.JSONDecoder()
    rows: list[Any] = []
    with expect(path, what).open(encoding="utf-8") as file:
        text = file.read(block).lstrip()
        if not text.startswith("["):
            raise DataError(f"{what}: expected a JSON array in {path}, found {text[:20]!r}")
        text = text[1:]
        while len(rows) < count:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                break
            try:
                row, end = decoder.raw_decode(text)
            except ValueError as e:
                more = file.read(block)
                if not more:
                    raise DataError(
                        f"{what}: {path} ends within row {len(rows)}; fetch it again"
                    ) from e
                text += more
                continue
            rows.append(row)
            text = text[end:]
    return rows


def below(root: Path, name: str) -> Path:
    """`root / name` for a relative name from a file; refuses absolute names and `..`."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"expected a path below {root}, found {name!r}")
    return root / pure


@dataclasses.dataclass(frozen=True)
class CocoCaptions(Listed):
    """COCO captions: `annotations/captions_<split>.json` and `<split>/*.jpg` (datasets section 4).

    Pictures in the order of their ids, the first `captions` captions of each in file order, as the
    official script takes them.
    """

    split: str = "val2017"
    captions: int = 5

    @property
    def name(self) -> str:
        return f"coco/{self.split}"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        path = Path(self.root) / "annotations" / f"captions_{self.split}.json"
        content = read_json(path, "COCO captions")
        texts: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
        folder = self.pictures(self.split)
        return tuple(
            ImageTextRecord(
                str(image["id"]),
                below(folder, image["file_name"]),
                tuple(texts.get(image["id"], ())[: self.captions]),
            )
            for image in sorted(content["images"], key=lambda i: i["id"])
        )


@dataclasses.dataclass(frozen=True)
class Flickr30k(Listed):
    """Flickr30k test: `flickr30k_test.json`, rows `{"image", "caption": [5 str]}`; `images` is the
    folder that `flickr30k-images/` lies in (datasets section 8)."""

    captions: int = 5

    @property
    def name(self) -> str:
        return "flickr30k/test"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        rows = read_json(Path(self.root) / "flickr30k_test.json", "Flickr30k test")
        folder = self.pictures(".")
        return tuple(
            ImageTextRecord(
                PurePosixPath(row["image"]).stem,
                below(folder, row["image"]),
                tuple(row["caption"][: self.captions]),
            )
            for row in rows
        )


@dataclasses.dataclass(frozen=True)
class ShareGpt4v(Listed):
    """ShareGPT4V-1k: the first 1,000 rows of `share-captioner_coco_lcs_sam_1246k_1107.json`; the
    caption is `conversations[1].value`, the picture the base name in one folder (`sam/images`)."""

    rows: int = 1000

    @property
    def name(self) -> str:
        return "sharegpt4v/1k"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        path = Path(self.root) / "share-captioner_coco_lcs_sam_1246k_1107.json"
        folder = self.pictures("sam/images")
        found = []
        for n, row in enumerate(first_rows(path, self.rows, "ShareGPT4V captions")):
            file = PurePosixPath(row["image"]).name
            caption = row["conversations"][1]["value"]
            found.append(ImageTextRecord(f"{n}:{file}", folder / file, long_caption=caption))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Dci(Listed):
    """DCI: every `annotations/*.json` (sorted by name), text `extra_caption`, picture `image`;
    pictures are SA-1B files in one folder (`images`; default `photos`) (datasets section 8.1)."""

    @property
    def name(self) -> str:
        return "dci"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        folder = expect(Path(self.root) / "annotations", "DCI annotations")
        pictures = self.pictures("photos")
        found = []
        for path in sorted(folder.glob("*.json")):
            entry = read_json(path, "DCI entry")
            found.append(
                ImageTextRecord(
                    path.stem,
                    below(pictures, entry["image"]),
                    long_caption=entry["extra_caption"],
                )
            )
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Urban1k(Listed):
    """Urban1k: `image/<n>.jpg` with `caption/<n>.txt`, whose first line is the caption."""

    @property
    def name(self) -> str:
        return "urban1k"

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        folder = expect(Path(self.root) / "caption", "Urban1k captions")
        pictures = self.pictures("image")
        files = sorted(folder.glob("*.txt"), key=lambda p: (len(p.stem), p.stem))
        return tuple(
            ImageTextRecord(
                path.stem,
                pictures / f"{path.stem}.jpg",
                long_caption=path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r"),
            )
            for path in files
        )


@dataclasses.dataclass(frozen=True)
class ImageNet(Listed):
    """ImageNet folders: `val/<wnid>/*.JPEG` (or the class folders directly under `root`), and
    ImageNet-V2 `<0..999>/*.jpeg` (datasets section 10).

    The label, `extra["label"]`, is the position of the wnid among the sorted wnids, or the number
    that names the folder; never the position in a listing of the folders.

    Attributes:
      classes: file of the class names (`prompts.imagenet_classes`).
    """

    classes: str = ""
    label: str = "imagenet/val"

    @property
    def name(self) -> str:
        return self.label

    def read_index(self) -> tuple[ImageTextRecord, ...]:
        root = expect(Path(self.root), self.label)
        folder = root / "val" if (root / "val").is_dir() else root
        number = {wnid: n for n, (wnid, _) in enumerate(imagenet_classes(self.classes))}
        number |= {str(n): n for n in range(len(number))}
        classes = sorted(
            (number[p.name], p) for p in folder.iterdir() if p.is_dir() and p.name in number
        )
        if not classes:
            raise DataError(
                f"{self.label}: expected class folders named by wnid (n01440764) or number (0..999)"
                f" in {folder}, found {[p.name for p in sorted(folder.iterdir())[:5]]}"
            )
        return tuple(
            ImageTextRecord(f"{path.parent.name}/{path.name}", path, extra={"label": label})
            for label, sub in classes
            for path in _pictures(sub)
        )


def _pictures(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
