"""Zero-shot classification of pictures and of boxes over any source with class names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel
from data_pipelines.protocols.box_features import Boxes, region_pictures, walk
from data_pipelines.protocols.features import (
    Census,
    Rows,
    encode_texts,
    gather,
    in_batches,
    read,
)
from data_pipelines.protocols.panels import region_sheet
from data_pipelines.protocols.prompts import OPENAI_TEMPLATES
from data_pipelines.protocols.source_protocol import SourceProtocol
from data_pipelines.records import Region
from jaxmods import metrics


@dataclasses.dataclass(frozen=True)
class _Classification(SourceProtocol):
    """What picture and box classification share.

    Attributes:
      classes: class names in label order; empty takes the labels of the source, sorted.
      templates: prompts with `{}` for the name; class vector = normalise(mean(normalise)).
      ks: accuracy among the best of these; those not below the number of classes are left out.
    """

    _: dataclasses.KW_ONLY
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = OPENAI_TEMPLATES
    ks: tuple[int, ...] = (1, 5)

    def vectors(
        self, functions: Functions, classes: Sequence[str], census: Census
    ) -> npt.NDArray[np.float32]:
        """Class vectors float32 [C, P]."""
        prompts = [t.replace("{}", name) for name in classes for t in self.templates]
        texts = encode_texts(
            functions["text_features_short"],
            self.text_tokenizer,
            prompts,
            self.context,
            self.text_batch_size,
        )
        census.counts["classes"] = len(classes)
        census.counts["prompts_cut"] = texts.cut
        return metrics.class_vectors(texts.all().reshape(len(classes), len(self.templates), -1))

    def scored(
        self, found: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32], labels: list[int]
    ) -> dict[str, Metric]:
        """Accuracies with chance."""
        ks = tuple(k for k in self.ks if k == 1 or k < len(vectors))
        values = metrics.top_accuracy(metrics.label_ranks(found, vectors, labels), ks)
        chance = metrics.top_chance(len(vectors), ks)
        return {k: Metric(v, chance[k]) for k, v in values.items()}

    def settings(self) -> dict[str, object]:
        """The choices of a classification that the numbers depend on."""
        return {
            "text_function": "text_features_short",
            "templates": len(self.templates),
            "template_1": self.templates[0],
            "class_names": "given" if self.classes else "labels of the source",
            "ranking": "scores (dot products with unit class vectors)",
            "ties": "the lower class index ranks first",
        }


@dataclasses.dataclass(frozen=True)
class SourceClassification(_Classification):
    """Zero-shot classification of whole pictures; the label of a record is `extra["label"]`, an
    index into `classes` or a class name."""

    @property
    def name(self) -> str:
        return f"{self.label}_zero_shot"

    def requires(self) -> tuple[str, ...]:
        return ("image_features", "text_features_short")

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = self.begin(functions)
        given: list[int | str] = []

        def rows() -> Iterator[Rows]:
            for loaded in read(self.source, self.reading(), census, self.name):
                label = loaded.record.extra.get("label")
                if label is None or (isinstance(label, str) and not self._known(label)):
                    reason = "no_label" if label is None else "unknown_label"
                    census.drop("records", reason, f"{loaded.record.id}: {label!r}")
                    continue
                given.append(label)
                yield (loaded.pixels,)

        fn = functions["image_features"]
        found = gather(in_batches(fn, rows(), self.batch_size))
        census.require("labelled pictures", len(given), self.source)
        classes = self.classes or tuple(sorted({str(g) for g in given}))
        place = {name: n for n, name in enumerate(classes)}
        labels = [place[g] if isinstance(g, str) else int(g) for g in given]
        vectors = self.vectors(functions, classes, census)
        scored = self.scored(found, vectors, labels)
        return self.result(start, census, scored, self.settings(), len(given), ())

    def _known(self, label: str) -> bool:
        return not self.classes or label in self.classes


@dataclasses.dataclass(frozen=True)
class SourceBoxClassification(_Classification):
    """Zero-shot classification of boxes; the label of a region is its class name, `Region.label`.

    Box features are taken as they come; their length does not change the ranking.
    """

    @property
    def name(self) -> str:
        return f"{self.label}_box_classes"

    def requires(self) -> tuple[str, ...]:
        return ("box_features", "text_features_short")

    def _why_not(self, region: Region) -> str | None:
        if not region.label:
            return "no_label"
        if self.classes and region.label not in self.classes:
            return "unknown_label"
        return None

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = self.begin(functions)
        boxes = walk(functions, self.source, self.reading(), census, self.name, self._why_not)
        names = [str(r.label) for r in boxes.regions]
        classes = self.classes or tuple(sorted(set(names)))
        place = {name: n for n, name in enumerate(classes)}
        if len(place) != len(classes):
            raise ValueError(
                f"{self.name}: expected distinct class names, found {len(classes) - len(place)} "
                "repeated; boxes name their class, so a repeated name is ambiguous"
            )
        vectors = self.vectors(functions, classes, census)
        scored = self.scored(boxes.features, vectors, [place[n] for n in names])
        pictures = (self._panel(boxes, names, classes, vectors),) if panels else ()
        settings = {**self.settings(), "box_features": "not normalised"}
        return self.result(start, census, scored, settings, boxes.pictures, pictures)

    def _panel(
        self,
        boxes: Boxes,
        names: list[str],
        classes: tuple[str, ...],
        vectors: npt.NDArray[np.float32],
    ) -> Panel:
        def predict(rows: npt.NDArray[np.int64]) -> list[tuple[str, float]]:
            scores = metrics.normalise(boxes.features[rows]) @ vectors.astype(np.float64).T
            best = scores.argmax(axis=1)
            return [(classes[b], float(s[b])) for b, s in zip(best, scores, strict=True)]

        items = region_pictures(
            self.source, boxes, lambda row: names[row], predict, most=self.examples, each=6
        )
        return Panel(
            "Boxes and their best class",
            f"Each box with the best of {len(classes)} classes; the true one stands under it where "
            "it differs. Pictures at even distances through the set, not picked.",
            region_sheet(items),
        )
