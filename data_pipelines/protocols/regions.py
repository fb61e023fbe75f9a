"""Region-phrase retrieval over any source of records with regions, and heat maps of phrases."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_pipelines.images import resize_square
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel
from data_pipelines.protocols.box_features import Boxes, picture_of, region_pictures, walk
from data_pipelines.protocols.features import (
    Rows,
    Texts,
    encode_texts,
    in_batches,
)
from data_pipelines.protocols.panels import HeatPicture, heat_sheet, region_sheet, similarity_map
from data_pipelines.protocols.source_protocol import SourceProtocol
from data_pipelines.records import Region
from jaxmods import metrics


@dataclasses.dataclass(frozen=True)
class RegionRetrieval(SourceProtocol):
    """Boxes against phrases, both directions, over all regions of the source.

    A box looks for its phrase among the distinct phrases; a phrase looks for any box that has it.
    Box features come from `box_features`, phrases from `text_features_short`; both are normalised.

    Attributes:
      phrase: "short" or "long" phrase of a region (the short one where there is no long one).
      ks: recall at these.
    """

    _: dataclasses.KW_ONLY
    phrase: Literal["short", "long"] = "short"
    ks: tuple[int, ...] = (1, 5)

    @property
    def name(self) -> str:
        return f"{self.label}_regions" + ("_long" if self.phrase == "long" else "")

    def requires(self) -> tuple[str, ...]:
        return ("box_features", "text_features_short")

    def _text(self, region: Region) -> str:
        long = region.long_phrase if self.phrase == "long" else None
        return region.phrase if long is None else long

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = self.begin(functions)
        boxes = walk(
            functions,
            self.source,
            self.reading(),
            census,
            self.name,
            lambda r: None if self._text(r).strip() else "empty_phrase",
        )
        texts = encode_texts(
            functions["text_features_short"],
            self.text_tokenizer,
            [self._text(r) for r in boxes.regions],
            self.context,
            self.text_batch_size,
        )
        groups = np.arange(len(texts.values))
        to_phrase = metrics.best_ranks(boxes.features, texts.index, texts.features, groups)
        to_region = metrics.best_ranks(texts.features, groups, boxes.features, texts.index)
        same = np.bincount(texts.index)
        found: dict[str, Metric] = {}
        for k in self.ks:
            found[f"region_to_phrase_r{k}"] = Metric(
                metrics.recall_at(to_phrase, k),
                metrics.recall_chance(np.ones(len(boxes.regions), int), len(texts.values), k),
            )
            found[f"phrase_to_region_r{k}"] = Metric(
                metrics.recall_at(to_region, k),
                metrics.recall_chance(same, len(boxes.regions), k),
            )
        census.counts["phrases"] = len(texts.values)
        census.counts["phrases_cut"] = texts.cut
        pictures: tuple[Panel, ...] = ()
        if panels:
            pictures = (self._regions(boxes, texts),)
            if "dense_features" in functions:
                pictures += (self._heat(functions, boxes, texts),)
        settings = {
            "phrase": self.phrase,
            "text_function": "text_features_short",
            "prompt": "none",
            "candidates": "distinct phrases of the source; all its boxes",
            "ties": "of equal scores the later index ranks first",
        }
        return self.result(start, census, found, settings, boxes.pictures, pictures)

    def _regions(self, boxes: Boxes, texts: Texts) -> Panel:
        phrases = metrics.normalise(texts.features)

        def predict(rows: npt.NDArray[np.int64]) -> list[tuple[str, float]]:
            scores = metrics.normalise(boxes.features[rows]) @ phrases.T
            best = scores.argmax(axis=1)
            return [(texts.values[b], float(s[b])) for b, s in zip(best, scores, strict=True)]

        items = region_pictures(
            self.source,
            boxes,
            lambda row: self._text(boxes.regions[row]),
            predict,
            most=self.examples,
            each=5,
        )
        return Panel(
            "Regions and the phrase that fits them best",
            f"Each box with the best of all {len(texts.values):,} phrases; the true one stands "
            "under it where it differs. Pictures at even distances through the set, not picked.",
            region_sheet(items),
        )

    def _heat(self, functions: Functions, boxes: Boxes, texts: Texts) -> Panel:
        chosen = boxes.examples(max(1, self.examples // 2), 3)
        shown = [picture_of(self.source, index) for index, _ in chosen]

        def rows() -> list[Rows]:
            return [(resize_square(p, self.image_size),) for p in shown]

        dense = in_batches(functions["dense_features"], rows(), self.batch_size)
        items = []
        for picture, (_, regions), cells in zip(shown, chosen, dense, strict=True):
            vectors = texts.features[texts.index[regions]]
            items.append(
                HeatPicture(
                    picture,
                    tuple(self._text(boxes.regions[r]) for r in regions),
                    tuple(similarity_map(cells, v) for v in vectors),
                    tuple(boxes.regions[r].box for r in regions),
                )
            )
        return Panel(
            "Where a phrase is in the picture",
            "Cosine of dense features and phrase, dark blue low to white high, each map from its "
            "own minimum to its maximum; the white frame is the true box.",
            heat_sheet(items),
        )
