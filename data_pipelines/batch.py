"""What a pipeline hands to the loop, and the interface of a pipeline.

The batch at step `i` is a pure function of (recipe, seed, i): a resumed run needs nothing but the
step, and the order of records does not depend on how many processes read them. Everything that
happened while a batch was made (records left out and why, what truncation cut) travels with the
batch, so counters are exact after a resume and survive worker processes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One record that was left out: where it came from and why."""

    source: str
    record_id: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """The story of one host batch.

    Attributes:
      record_ids: id of the record in each slot, in order (`source:id`).
      quarantined: records met while filling the batch that could not be used.
      cut: what static shapes cut off, by name ("boxes", "hard_boxes", "short_tokens", ...).
      seen: records looked at, usable or not.
      repaired: parts of usable records that were dropped or mended, by reason ("box_outside": that
        box was left out, "box_clipped": it was clipped to the image, "empty_caption": one of
        several captions was left out, ...).
    """

    record_ids: tuple[str, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    cut: dict[str, int] = dataclasses.field(default_factory=dict)
    seen: int = 0
    repaired: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """Arrays for this process (its share of the global batch), with their story."""

    arrays: dict[str, np.ndarray]
    info: BatchInfo


class DataError(RuntimeError):
    """The data as a whole cannot be used (too many bad records, nothing matched, empty source)."""


@dataclasses.dataclass(frozen=True)
class Pipeline(abc.ABC):
    """Training data of a recipe: a frozen description that can be opened anywhere."""

    @abc.abstractmethod
    def batches(
        self,
        *,
        global_batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ) -> Iterator[HostBatch]:
        """Endless iterator of this process's batches, beginning with that of `start_step`.

        Raises:
          DataError: nothing to read, or more bad records than the pipeline allows.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Short hash of what is read and how (sizes and names, not contents): hosts and resumed
        runs compare it."""

    def constants(self) -> dict[str, np.ndarray]:
        """Arrays that come from the data but live among the parameters, by path ("graph/hashes").

        A fresh run puts them in place of what `System.init` made there (shapes must agree); a
        resumed or imported run keeps those of the checkpoint. Label them "frozen".
        """
        return {}

    def describe(self) -> dict[str, Any]:
        """Facts for `jaxmods describe`: source, number of records, texts, sizes."""
        return {}

    def assets(self) -> dict[str, bytes]:
        """Files that belong beside exported weights (tokenizer, processor), by name."""
        return {}
