"""Fine-grained hard negatives over any source of regions that have altered phrases."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel
from data_pipelines.protocols.box_features import Boxes, picture_of, walk
from data_pipelines.protocols.features import encode_texts, spread
from data_pipelines.protocols.panels import HardRow, hard_negative_table
from data_pipelines.protocols.source_protocol import SourceProtocol
from data_pipelines.records import Region
from jaxmods import metrics

# Rows scored at once: 1024 rows of 11 texts of 768 numbers are 70 MB in float64.
_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class SourceHardNegatives(SourceProtocol):
    """Is a box closest to its own phrase among the altered ones? Counting rule:
    `jaxmods.metrics.hard_negatives`. Regions without negatives are left out and counted.
    """

    @property
    def name(self) -> str:
        return f"{self.label}_hard_negatives"

    def requires(self) -> tuple[str, ...]:
        return ("box_features", "text_features_short")

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = self.begin(functions)
        boxes = walk(functions, self.source, self.reading(), census, self.name, _why_not)
        rows = [(r.phrase, *r.negatives) for r in boxes.regions]
        texts = encode_texts(
            functions["text_features_short"],
            self.text_tokenizer,
            [t for row in rows for t in row],
            self.context,
            self.text_batch_size,
        )
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        index = np.zeros(mask.shape, np.int64)
        index[mask] = texts.index
        scores = np.concatenate(
            [
                metrics.hard_negative_scores(
                    boxes.features[at : at + _ROWS],
                    texts.features[index[at : at + _ROWS]],
                    mask[at : at + _ROWS],
                )
                for at in range(0, len(rows), _ROWS)
            ]
        )
        correct = metrics.hard_negative_correct(scores)
        census.counts["texts"] = int(lengths.sum())
        census.counts["texts_cut"] = texts.cut
        tied = mask[:, 1:] & (scores[:, 1:] == scores[:, :1])
        census.counts["ties_with_the_true_phrase"] = int(tied.any(axis=1).sum())
        accuracy = Metric(float(correct.mean()), metrics.hard_negative_chance(mask))
        settings = {
            "text_function": "text_features_short",
            "prompt": "none",
            "negatives": f"{int(lengths.min()) - 1} to {int(lengths.max()) - 1}",
            "ties": "with the true phrase count as right",
            "box_features": "not normalised",
        }
        pictures = (self._table(boxes, rows, scores, correct),) if panels else ()
        return self.result(
            start, census, {"accuracy": accuracy}, settings, boxes.pictures, pictures
        )

    def _table(
        self,
        boxes: Boxes,
        rows: list[tuple[str, ...]],
        scores: npt.NDArray[np.float32],
        correct: npt.NDArray[np.bool_],
    ) -> Panel:
        shown = []
        for n in spread(len(rows), self.examples):
            length = float(np.linalg.norm(boxes.features[n])) or 1.0
            shown.append(
                HardRow(
                    picture_of(self.source, int(boxes.picture[n])),
                    boxes.regions[n].box,
                    rows[n],
                    tuple(float(s) / length for s in scores[n, : len(rows[n])]),
                )
            )
        return Panel(
            "A region, its phrase and altered ones",
            f"Phrases in the order of their cosine with the box; the true one is green. "
            f"{int(correct.sum()):,} of {len(rows):,} regions prefer theirs. Examples at even "
            "distances through the set, not picked.",
            hard_negative_table(shown),
        )


def _why_not(region: Region) -> str | None:
    return None if region.negatives else "no_negatives"
