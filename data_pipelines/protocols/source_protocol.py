"""What the protocols over any source share: fields, settings, and how their results are put
together."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

from data_pipelines.image_text import load_tokenizer
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel, Protocol
from data_pipelines.protocols.features import Census, Reading, need
from data_pipelines.sources.base import Source
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.validation import Limits


@dataclasses.dataclass(frozen=True)
class SourceProtocol(Protocol):
    """A protocol over records of any source.

    Attributes:
      source: the records.
      tokenizer: "scene", a folder of a CLIP tokenizer, or a tokenizer.
      image_size: side S of the square picture that the model takes.
      context: text length in tokens.
      label: first part of the protocol's name ("scenes", "coco_mini").
      limit: read the first `limit` records only; None reads all.
      examples: pictures (or rows) per panel.
      batch_size: pictures per call, static.
      text_batch_size: texts per call, static.
      box_slots: boxes per picture and call, static; a picture with more takes several rows.
      workers: threads that decode pictures ahead of the model.
      limits: validation of records, as in training; None takes texts and boxes as the files have
        them, as the official scripts do.
    """

    source: Source
    tokenizer: str | Tokenizer
    image_size: int
    context: int
    _: dataclasses.KW_ONLY
    label: str = "source"
    limit: int | None = None
    examples: int = 6
    batch_size: int = 64
    text_batch_size: int = 256
    box_slots: int = 16
    workers: int = 4
    limits: Limits | None = dataclasses.field(default_factory=Limits)

    @functools.cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, read at first use."""
        if isinstance(self.tokenizer, str):
            return load_tokenizer(self.tokenizer)
        return self.tokenizer

    def reading(self) -> Reading:
        """How records are read and batched."""
        return Reading(
            self.image_size,
            self.batch_size,
            self.box_slots,
            self.limit,
            self.workers,
            self.limits,
        )

    def begin(self, functions: Functions) -> tuple[float, Census]:
        """Start of the clock and empty counts, after everything that can be wrong before reading.

        Raises:
          ValueError: a function that the model does not offer.
          FileNotFoundError: no tokenizer.
        """
        start = time.perf_counter()
        need(functions, self.requires(), self.name)
        _ = self.text_tokenizer
        return start, Census()

    def result(
        self,
        start: float,
        census: Census,
        metrics: dict[str, Metric],
        settings: Mapping[str, Any],
        records: int,
        panels: tuple[Panel, ...],
    ) -> EvalResult:
        """The result, with the settings that every protocol has; `start` is of `perf_counter`."""
        common = {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "image_size": self.image_size,
            "resize": "square, bicubic, aspect ratio ignored",
            "context": self.context,
            "limit": self.limit,
        }
        return EvalResult(
            protocol=self.name,
            metrics=metrics,
            settings={**common, **settings},
            records=records,
            seconds=time.perf_counter() - start,
            panels=panels,
            counts=dict(census.counts),
            notes=tuple(f"{name}, first: {e}" for name, e in census.examples.items()),
        )
