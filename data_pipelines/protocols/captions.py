"""Image-text retrieval over any source of records with captions."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.images import decode_rgb
from data_pipelines.protocols import features
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel
from data_pipelines.protocols.features import Census, Rows
from data_pipelines.protocols.panels import Retrieved, retrieval_grid
from data_pipelines.protocols.source_protocol import SourceProtocol
from data_pipelines.records import ImageTextRecord
from jaxmods import metrics

TEXT_FUNCTION = {"short": "text_features_short", "long": "text_features_long"}


@dataclasses.dataclass(frozen=True)
class SourceRetrieval(SourceProtocol):
    """Pictures against their captions, both directions (counting: `jaxmods.metrics.retrieval`).

    Attributes:
      text: "short" takes every short caption of a record, "long" its long one (the first short one
        where there is none, counted as "long_from_short").
      prompt: put before every caption; the published protocols have none.
      ks: recall at these.
    """

    _: dataclasses.KW_ONLY
    text: Literal["short", "long"] = "short"
    prompt: str = ""
    ks: tuple[int, ...] = (1, 5, 10)

    @property
    def name(self) -> str:
        return f"{self.label}_retrieval_{self.text}"

    def requires(self) -> tuple[str, ...]:
        return ("image_features", TEXT_FUNCTION[self.text])

    def _captions(self, record: ImageTextRecord, census: Census) -> tuple[str, ...]:
        if self.text == "short":
            return record.short_captions
        if record.long_caption is not None:
            return (record.long_caption,)
        census.counts["long_from_short"] += len(record.short_captions[:1])
        return record.short_captions[:1]

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = self.begin(functions)
        captions: list[str] = []
        owner: list[int] = []
        used: list[int] = []

        def rows() -> Iterator[Rows]:
            for loaded in features.read(self.source, self.reading(), census, self.name):
                texts = self._captions(loaded.record, census)
                if not texts:
                    census.drop("records", "empty_caption", loaded.record.id)
                    continue
                captions.extend(texts)
                owner.extend([len(used)] * len(texts))
                used.append(loaded.index)
                yield (loaded.pixels,)

        batch = self.batch_size
        image = features.gather(features.in_batches(functions["image_features"], rows(), batch))
        census.require("pictures with captions", len(used), self.source)
        texts = features.encode_texts(
            functions[TEXT_FUNCTION[self.text]],
            self.text_tokenizer,
            [self.prompt + c for c in captions],
            self.context,
            self.text_batch_size,
        )
        text_image = np.array(owner)
        values = metrics.retrieval_recalls(image, texts.all(), text_image, ks=self.ks)
        chance = metrics.retrieval_chance(len(used), text_image, ks=self.ks)
        census.counts["captions"] = len(captions)
        census.counts["captions_cut"] = texts.cut
        census.counts["captions_shared_with_another_picture"] = _shared(captions, owner)
        found: tuple[Panel, ...] = ()
        if panels:
            found = (self._grid(image, texts.all(), text_image, captions, used),)
        settings = {
            "text": self.text,
            "text_function": TEXT_FUNCTION[self.text],
            "prompt": self.prompt or "none",
            "candidates": "every picture and caption of the source",
            "ties": "of equal scores the later index ranks first",
        }
        recalls = {k: Metric(v, chance[k]) for k, v in values.items()}
        return self.result(start, census, recalls, settings, len(used), found)

    def _grid(
        self,
        image: npt.NDArray[np.float32],
        text: npt.NDArray[np.float32],
        text_image: npt.NDArray[np.int64],
        captions: list[str],
        used: list[int],
    ) -> Panel:
        first = np.unique(text_image, return_index=True)[1]
        queries = first[features.spread(len(used), self.examples)]
        own = text_image[queries]
        ranks = metrics.best_ranks(text[queries], own, image, np.arange(len(image)))
        scores = metrics.normalise(text[queries]) @ metrics.normalise(image).T

        def picture(row: int) -> Image.Image:
            return decode_rgb(self.source[used[row]].image)

        rows = []
        for q, mine, rank, row in zip(queries, own, ranks, scores, strict=True):
            # Ascending and stable, read from the end: the order that the ranks count in.
            best = np.argsort(row.astype(np.float32), kind="stable")[::-1][:5]
            rows.append(
                Retrieved(
                    captions[q],
                    tuple(picture(int(i)) for i in best),
                    tuple(float(row[i]) for i in best),
                    picture(int(mine)),
                    int(rank),
                    len(image),
                )
            )
        return Panel(
            "Captions and the pictures they find",
            f"{len(rows)} captions at even distances through the set, not picked. The right "
            "picture is framed in green; where it is not among the five, it stands at the end.",
            retrieval_grid(rows),
        )


def _shared(captions: list[str], owner: list[int]) -> int:
    """Captions whose exact text another picture has as well: no model can tell those apart."""
    owners: dict[str, set[int]] = collections.defaultdict(set)
    for text, row in zip(captions, owner, strict=True):
        owners[text].add(row)
    return sum(len(owners[text]) > 1 for text in captions)
