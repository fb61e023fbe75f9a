"""One walk over the regions of a source, shared by the box protocols.

A picture is encoded once for all its boxes, in calls of a fixed number of box slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.images import decode_rgb
from data_pipelines.protocols.base import Functions
from data_pipelines.protocols.features import Census, Reading, Rows, in_batches, read, spread
from data_pipelines.protocols.panels import FoundRegion, RegionPicture
from data_pipelines.records import Region
from data_pipelines.sources.base import Source


@dataclasses.dataclass(frozen=True)
class Boxes:
    """What a walk over the regions of a source found.

    Attributes:
      features: float32 [N, P], one row per region, as the model gives them.
      regions: the N regions.
      picture: int [N], index in the source of each region's record.
      pictures: number of distinct records.
    """

    features: npt.NDArray[np.float32]
    regions: tuple[Region, ...]
    picture: npt.NDArray[np.int64]
    pictures: int

    def examples(self, most: int, each: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Up to `most` pictures at even distances through the set: index in the source, and the
        rows of the first `each` of its regions."""
        seen = np.unique(self.picture)
        chosen = seen[spread(len(seen), most)]
        return [(int(i), np.flatnonzero(self.picture == i)[:each]) for i in chosen]


def walk(
    functions: Functions,
    source: Source,
    reading: Reading,
    census: Census,
    title: str,
    why_not: Callable[[Region], str | None],
) -> Boxes:
    """Box features of every region of `source` for which `why_not` gives no reason to leave it out.

    Calls `box_features(image [B, S, S, 3] uint8, boxes [B, N, 4]) -> [B, N, P]` with N =
    `reading.box_slots`; unused slots hold zeros and are thrown away.

    Raises:
      DataError: no region is left.
    """
    kept: list[Region] = []
    picture: list[int] = []
    filled: list[int] = []
    slots = reading.box_slots

    def rows() -> Iterator[Rows]:
        for loaded in read(source, reading, census, title):
            mine = []
            for region in loaded.record.regions:
                reason = why_not(region)
                if reason is None:
                    mine.append(region)
                else:
                    census.drop("regions", reason, f"{loaded.record.id} at {region.box}")
            kept.extend(mine)
            picture.extend([loaded.index] * len(mine))
            for start in range(0, len(mine), slots):
                part = mine[start : start + slots]
                box = np.zeros((slots, 4), np.float32)
                box[: len(part)] = [r.box for r in part]
                filled.append(len(part))
                yield loaded.pixels, box

    outputs = in_batches(functions["box_features"], rows(), reading.batch_size)
    found = [row[: filled[n]] for n, row in enumerate(outputs)]
    census.require("regions", len(kept), source)
    census.counts["regions"] = len(kept)
    return Boxes(
        np.concatenate(found).astype(np.float32),
        tuple(kept),
        np.array(picture, np.int64),
        len(set(picture)),
    )


def picture_of(source: Source, index: int) -> Image.Image:
    """The picture of a record, for a panel."""
    return decode_rgb(source[index].image)


def region_pictures(
    source: Source,
    boxes: Boxes,
    truth: Callable[[int], str],
    predict: Callable[[npt.NDArray[np.int64]], list[tuple[str, float]]],
    *,
    most: int,
    each: int,
) -> list[RegionPicture]:
    """Example pictures with what their boxes are and what they are taken for.

    Args:
      source: where the pictures come from.
      boxes: the regions of the evaluation.
      truth: row of a region -> its true text.
      predict: rows of regions -> best text and score of each.
      most: pictures. each: boxes of a picture.
    """
    items = []
    for index, rows in boxes.examples(most, each):
        found = tuple(
            FoundRegion(boxes.regions[int(row)].box, truth(int(row)), text, score)
            for row, (text, score) in zip(rows, predict(rows), strict=True)
        )
        items.append(RegionPicture(picture_of(source, index), found))
    return items
