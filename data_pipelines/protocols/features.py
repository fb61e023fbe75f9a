"""From records to features: reading, static batches, texts once each, and an honest count.

A record that cannot be read is left out and counted by reason; every other record is counted
exactly once, because the last batch is padded and the padding thrown away.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_pipelines.batch import DataError
from data_pipelines.images import ImageLimits, decode_rgb, resize_square
from data_pipelines.protocols.base import Functions, to_numpy
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import Source
from data_pipelines.tokenizers import Tokenizer, encode
from data_pipelines.validation import Limits, check_record

Rows = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How an evaluation reads its records and forms its batches.

    Attributes:
      image_size: side S of the square picture the model takes.
      batch_size: pictures per call, static.
      box_slots: boxes per picture and call, static; pictures with more take several rows.
      limit: read the first `limit` records only; None reads all.
      workers: threads that decode pictures ahead of the model.
      limits: validation of records; None takes texts and boxes as the files have them, which is
        what the official scripts do.
    """

    image_size: int
    batch_size: int
    box_slots: int
    limit: int | None
    workers: int
    limits: Limits | None


@dataclasses.dataclass
class Census:
    """What was read and what was left out, by reason, with the first example of each."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, what: str, reason: str, example: str) -> None:
        """Count one `what` ("records", "regions") left out."""
        name = f"{what}_dropped_{reason}"
        self.counts[name] += 1
        self.examples.setdefault(name, example)

    def require(self, what: str, used: int, source: Source) -> None:
        """Raise DataError when nothing is left to evaluate, with the reasons."""
        if used:
            return
        why = "; ".join(
            f"{name}: {n} (first: {self.examples.get(name, '-')})"
            for name, n in self.counts.most_common()
        )
        raise DataError(
            f"{source.name}: expected {what} to evaluate, found none in {len(source)} records"
            + (f" ({why})" if why else "")
            + "; check the root folder and what the source holds"
        )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A record with its picture as the model takes it, uint8 [S, S, 3], and the parts of it that
    validation left out."""

    index: int
    record: ImageTextRecord
    pixels: np.ndarray
    repaired: dict[str, int]


def read(source: Source, how: Reading, census: Census, title: str) -> Iterator[Loaded]:
    """Usable records of `source` in order, decoded ahead in threads; the rest is counted."""
    total = len(source) if how.limit is None else min(how.limit, len(source))

    def one(index: int) -> Loaded | BadRecordError:
        try:
            record, repaired = source[index], {}
            if how.limits is not None:
                checked = check_record(record, how.limits, need_caption=False)
                record, repaired = checked.record, checked.repaired
            limits = ImageLimits() if how.limits is None else how.limits.image
            picture = decode_rgb(record.image, limits)
            return Loaded(index, record, resize_square(picture, how.image_size), repaired)
        except BadRecordError as e:
            return e

    with ThreadPoolExecutor(max(1, how.workers)) as pool:
        waiting: collections.deque[tuple[int, Future[Loaded | BadRecordError]]]
        waiting = collections.deque()
        indices = iter(range(total))
        try:
            # disable=None: a bar on a terminal, nothing in a log file.
            for _ in tqdm(range(total), desc=title, unit="picture", leave=False, disable=None):
                for index in itertools.islice(indices, 2 * how.batch_size - len(waiting)):
                    waiting.append((index, pool.submit(one, index)))
                at, future = waiting.popleft()
                outcome = future.result()
                census.counts["records_seen"] += 1
                if isinstance(outcome, BadRecordError):
                    where = f"{source.name}:{source.record_id(at)}: {outcome.detail}"
                    census.drop("records", outcome.reason, where)
                    continue
                for reason, n in outcome.repaired.items():
                    census.counts[f"repaired_{reason}"] += n
                yield outcome
        finally:
            for _, future in waiting:
                future.cancel()


def in_batches(
    fn: Callable[..., Any], rows: Iterable[Rows], batch_size: int
) -> Iterator[np.ndarray]:
    """`fn` over rows stacked to batches of exactly `batch_size`; yields one result per row.

    The last batch is padded with copies of its last row. The next batch is handed to the device
    before the results of the one before are fetched, so decoding, computing and copying overlap.
    """
    stream = iter(rows)
    pending: tuple[Any, int] | None = None
    while chunk := list(itertools.islice(stream, batch_size)):
        real = len(chunk)
        chunk += [chunk[-1]] * (batch_size - real)
        result = fn(*(np.stack(column) for column in zip(*chunk, strict=True)))
        if pending is not None:
            yield from to_numpy(pending[0])[: pending[1]]
        pending = (result, real)
    if pending is not None:
        yield from to_numpy(pending[0])[: pending[1]]


def gather(outputs: Iterable[np.ndarray]) -> npt.NDArray[np.float32]:
    """Row results as one float32 array (rows first)."""
    rows = [np.asarray(o, np.float32) for o in outputs]
    return np.stack(rows) if rows else np.zeros((0, 1), np.float32)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Features of distinct texts.

    Attributes:
      values: the distinct texts, in order of first appearance.
      features: float32 [U, P], as the model gives them.
      index: int [T], row of each text asked for.
      cut: how many of the texts asked for were longer than the model reads.
    """

    values: tuple[str, ...]
    features: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]
    cut: int

    def all(self) -> npt.NDArray[np.float32]:
        """float32 [T, P], one row per text asked for."""
        return self.features[self.index]


def encode_texts(
    fn: Callable[..., Any],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int,
    batch_size: int,
) -> Texts:
    """Features of `texts`; a text that appears several times is computed once, so equal texts have
    equal features to the last bit."""
    place: dict[str, int] = {}
    index = np.array([place.setdefault(t, len(place)) for t in texts], np.int64)
    values = tuple(place)
    cut = np.zeros(len(values), np.int64)

    def rows() -> Iterator[Rows]:
        for n, text in enumerate(values):
            ids, cut[n] = encode(tokenizer, text, context)
            yield (ids,)

    features = gather(in_batches(fn, rows(), batch_size))
    return Texts(values, features, index, int((cut[index] > 0).sum()))


def need(functions: Functions, names: Sequence[str], protocol: str) -> None:
    """Raise ValueError when the model does not offer what the protocol calls."""
    missing = [n for n in names if n not in functions]
    if missing:
        raise ValueError(
            f"{protocol}: expected the functions {', '.join(names)}, found "
            f"{', '.join(sorted(functions)) or 'none'}; missing {', '.join(missing)}"
        )


def spread(count: int, most: int) -> list[int]:
    """At most `most` positions at even distances in 0..count-1: examples that nobody picked."""
    take = min(count, most)
    return [int((2 * k + 1) * count / (2 * take)) for k in range(take)]
