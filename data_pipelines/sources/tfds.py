"""TFDS datasets prepared as ArrayRecord, through `data_source` (extra `data`; no TensorFlow)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.boxes import BoxConvention
from data_pipelines.images import image_size
from data_pipelines.records import BadRecordError, ImageTextRecord, Region
from data_pipelines.sources.base import Source, digest
from data_pipelines.sources.fields import canonical_box, strings
from data_pipelines.validation import decode_text


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """One split of a prepared TFDS dataset.

    Feature paths are written with slashes, as "objects/bbox" for `{"objects": {"bbox": ...}}`; an
    empty path means that the dataset has none. Pictures stay encoded, so they are decoded and
    checked like those of every other source.

    Attributes:
      dataset: name with optional config and version, as "coco_captions:1.1.0".
      split: as "train" or "train[:1000]".
      data_dir: where the prepared dataset lies; "" is the TFDS default.
      image, captions, boxes, labels: feature paths of the picture, one or several captions, a box
        list, and integer classes parallel to it (named by the dataset's own class names).
      convention: of the boxes; TFDS builders store `ymin, xmin, ymax, xmax` fractions.
      phrase: region phrase, with `{name}` for the class name.
    """

    dataset: str
    split: str = "train"
    data_dir: str = ""
    image: str = "image"
    captions: str = "captions/text"
    boxes: str = ""
    labels: str = ""
    convention: BoxConvention = "yxyx_norm"
    phrase: str = "{name}"

    @property
    def name(self) -> str:
        return f"tfds/{self.dataset}/{self.split}"

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The data source and the builder's features."""
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise DataError(
                'reading TFDS needs tensorflow-datasets: pip install "jaxmods[data]"'
            ) from e
        folder = self.data_dir or None
        try:
            builder = tfds.builder(self.dataset, data_dir=folder)
            skip = _nested(self.image, tfds.decode.SkipDecoding())
            rows = builder.as_data_source(split=self.split, decoders=skip)
        except Exception as e:  # TFDS raises many kinds; each means that this cannot be read
            said = str(e).strip().split("\n", 1)[0]
            raise DataError(
                f"{self.name}: cannot open under {folder or 'the default data_dir'}: {said} "
                "Prepare it first: tfds build --file_format=array_record"
            ) from e
        return rows, builder.info.features

    @functools.cached_property
    def _class_names(self) -> list[str]:
        if not self.labels:
            return []
        feature = _follow_feature(self._opened[1], self.labels)
        names = getattr(feature, "names", None)
        if not names:
            raise DataError(
                f"{self.name}: {self.labels!r} has no class names; set data.source.labels to a "
                "ClassLabel feature or leave it empty"
            )
        return list(names)

    def __len__(self) -> int:
        return len(self._opened[0])

    def __getitem__(self, index: int) -> ImageTextRecord:
        row = self._opened[0][index]
        image = _follow(row, self.image)
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            image = image.item()  # a scalar array of bytes
        if not isinstance(image, bytes | np.ndarray):
            raise BadRecordError(
                "missing_file", f"row {index}: expected a picture in {self.image!r}"
            )
        return ImageTextRecord(
            id=str(index),
            image=image,
            short_captions=_texts(_follow(row, self.captions), self.captions),
            regions=self._regions(row, image),
        )

    def _regions(self, row: Mapping[str, Any], image: bytes | np.ndarray) -> tuple[Region, ...]:
        if not self.boxes:
            return ()
        boxes = np.asarray(_follow(row, self.boxes), np.float64).reshape(-1, 4)
        size = image_size(image) if self.convention in ("xyxy", "xywh") else (1, 1)
        labels: list[str | None] = [None] * len(boxes)
        if self.labels:
            ids = np.asarray(_follow(row, self.labels)).reshape(-1)
            names = self._class_names
            labels = [names[int(i)] for i in ids]
        regions = []
        for box, label in zip(boxes, labels, strict=True):
            x1, y1, x2, y2 = canonical_box(box.tolist(), self.convention, size)
            phrase = self.phrase.format(name=label) if label is not None else ""
            regions.append(Region((x1, y1, x2, y2), phrase, label=label))
        return tuple(regions)

    def fingerprint(self) -> str:
        return digest(dataclasses.astuple(self), len(self))


def _follow(row: Any, path: str) -> Any:
    """The value at a feature path. Raises DataError naming the path."""
    if not path:
        return None
    value = row
    for step in path.split("/"):
        if not isinstance(value, Mapping) or step not in value:
            raise DataError(
                f"TFDS feature {path!r}: no {step!r} in {sorted(value) if value else value}"
            )
        value = value[step]
    return value


def _follow_feature(features: Any, path: str) -> Any:
    for step in path.split("/"):
        features = getattr(features, "feature", features)  # through Sequence
        features = features[step]
    return getattr(features, "feature", features)


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        value = decode_text(value, what)
    return strings(value, what)


def _nested(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition("/")
    return {first: _nested(rest, value) if rest else value}
