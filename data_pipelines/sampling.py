"""Which record goes where, and the machinery that reads it: grain, made restartable by a number.

The example in slot `q = step * global_batch + position` is a pure function of (recipe, seed, q):

* every source has its own endless sequence of global permutations, one per epoch;
* a mixture interleaves those sequences in fixed proportion;
* a slot whose record turns out bad is refilled by further draws from the same source, taken from a
  random stream of that slot alone. The sequence itself does not move, so an epoch still visits
  every good record once (the replacements are seen once more), and nothing needs to be remembered
  between steps;
* random choices about the example come from a stream of that slot as well.

A process reads positions `[p * B / P, (p + 1) * B / P)` of each global batch, so the global batch
is the same for any number of processes.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from absl import flags

from data_pipelines.batch import BatchInfo, DataError, HostBatch, Pipeline, Quarantined
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source

# Draws for one slot before the run stops; with every tenth record bad this never happens.
MAX_DRAWS = 200

# Sources up to this long are shuffled by a table of the epoch.
TABLE_SHUFFLE = 1 << 14

E = TypeVar("E")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How examples are read. No setting changes what is read.

    Attributes:
      threads: reader threads per process; each makes a whole batch. prefetch: batches ahead.
      workers: additional worker processes (0: threads only). Worth it when Python itself is the
        limit; each worker opens the sources again.
    """

    threads: int = 4
    prefetch: int = 4
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How many bad records a run accepts.

    Attributes:
      max_bad_fraction: bad records per record looked at, above which the run stops.
      min_seen: records to look at before judging.
    """

    max_bad_fraction: float = 0.1
    min_seen: int = 100


@dataclasses.dataclass(frozen=True)
class Made(Generic[E]):
    """An example and what happened to it (see `BatchInfo.cut`, `BatchInfo.repaired`)."""

    example: E
    repaired: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe(Generic[E]):
    """What the sampler needs of a pipeline.

    Attributes:
      sources: read from. weights: shares, None in proportion to length.
      make: record and random stream to example; raises BadRecordError.
      step_stream: `make` takes a third argument, a random stream of the step: the same draws for
        every slot of a global batch, whatever process reads it.
      collate: examples of this process's batch to arrays, and what was cut.
    All of them must be picklable where worker processes are used.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    make: Callable[..., Made[E]]
    collate: Callable[[Sequence[E]], tuple[dict[str, np.ndarray], dict[str, int]]]
    step_stream: bool = False


def draw_order(
    lengths: Sequence[int], weights: Sequence[float] | None, seed: int
) -> grain.MapDataset:
    """An endless sequence: `[q] -> (source index, record index)`.

    Raises:
      DataError: a source is empty.
    """
    empty = [i for i, n in enumerate(lengths) if n == 0]
    if empty or not lengths:
        raise DataError(f"nothing to read: source {empty} of {len(lengths)} has no records")
    streams = [
        _shuffled(n, stream_key("shuffle", seed, s) % 2**32)
        .repeat()
        .map(functools.partial(_with_source, s))
        for s, n in enumerate(lengths)
    ]
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, [float(w) for w in weights or lengths])


def _shuffled(length: int, seed: int) -> grain.MapDataset:
    """Indices 0..length-1 in an order that differs from epoch to epoch.

    Grain's shuffle computes each index by itself and needs no memory, but walks a cipher of a fixed
    size until it lands inside: 10 ms an index for ten records. Short sources get a table instead.
    """
    indices = grain.MapDataset.range(length)
    if length > TABLE_SHUFFLE:
        return indices.shuffle(seed=seed)
    return indices.map_with_index(functools.partial(_from_table, length, seed))


def _from_table(length: int, seed: int, index: int, _: int) -> int:
    epoch, position = divmod(index, length)
    return int(_table(length, seed, epoch)[position])


@functools.lru_cache(maxsize=64)
def _table(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=(seed, epoch))).permutation(length)


def stream_key(name: str, seed: int, index: int) -> int:
    """64-bit key of a named random stream."""
    data = f"{name}/{seed}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def slot_generator(name: str, seed: int, slot: int) -> np.random.Generator:
    """The random stream `name` of slot `slot`."""
    return np.random.Generator(np.random.Philox(key=(stream_key(name, seed, 0), slot)))


@dataclasses.dataclass(frozen=True)
class RecordPipeline(Pipeline):
    """A pipeline whose examples are made of records, one by one; see the module's description.

    Attributes:
      tolerance: how many unusable records a run accepts. reading: threads and worker processes.
    """

    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance, kw_only=True)
    reading: Reading = dataclasses.field(default_factory=Reading, kw_only=True)

    @abc.abstractmethod
    def recipe(self) -> Recipe[Any]:
        """What is read and what is made of it. Whatever else has to be opened (a tokenizer) is
        opened here, so that its errors belong to the call of `batches`.

        Raises:
          DataError: the sources lack what is needed.
        """

    @property
    def records(self) -> int:
        """Records of a row of the batch."""
        return 1

    def check_batch(self, global_batch: int, process_count: int) -> None:
        """Raise ValueError unless each process can make its share of the rows, which is whole."""

    def batches(
        self,
        *,
        global_batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ) -> Iterator[HostBatch]:
        """See `Pipeline.batches`. Of the info of a batch, `record_ids` has `records` ids per row.

        Raises:
          ValueError: the batch cannot be split over the processes, or fails `check_batch`.
          DataError: a source cannot be opened or is empty; while iterating, more bad records than
            `tolerance` allows.
        """
        if global_batch % process_count or not 0 <= process_index < process_count:
            raise ValueError(
                f"batch of {global_batch} rows over {process_count} processes (this is "
                f"{process_index}): expected a batch size that is a multiple of the number of "
                "processes"
            )
        self.check_batch(global_batch, process_count)
        slots = _Slots(
            self.recipe(),
            seed,
            self.records * global_batch,
            process_index,
            process_count,
            start_step,
        )
        _ = slots.order  # open the sources now: errors belong to the call, not to the first batch
        options = grain.ReadOptions(
            num_threads=self.reading.threads, prefetch_buffer_size=self.reading.prefetch
        )
        data = (
            grain.MapDataset.source(slots)
            .batch(self.records * global_batch // process_count, batch_fn=slots.batch)
            .to_iter_dataset(options)
        )
        if self.reading.workers:
            if not flags.FLAGS.is_parsed():  # grain reads its flags, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self.reading.workers)
            data = data.mp_prefetch(workers)
        return _iterate(data, self.tolerance)


def _iterate(data: grain.IterDataset, tolerance: Tolerance) -> Iterator[HostBatch]:
    watch = BadRecordWatch(tolerance)
    batches = iter(data)
    try:
        for arrays, info in batches:
            watch.add(info)
            yield HostBatch(arrays=arrays, info=info)
    finally:
        batches.close()


class BadRecordWatch:
    """Adds up what batches report and stops above the tolerance."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, Quarantined] = {}

    def add(self, info: BatchInfo) -> None:
        """Count a batch. Raises DataError above the tolerance, with reasons and examples."""
        self.seen += info.seen
        for bad in info.quarantined:
            self.reasons[bad.reason] += 1
            self._examples.setdefault(bad.reason, bad)
        count = sum(self.reasons.values())
        limit = self._tolerance.max_bad_fraction
        if self.seen >= self._tolerance.min_seen and count > limit * self.seen:
            lines = [
                f"  {n:>7,} {reason}, as {e.source}:{e.record_id}: {e.detail}"
                for reason, n in self.reasons.most_common()
                for e in (self._examples[reason],)
            ]
            raise DataError(
                f"{count:,} of {self.seen:,} records looked at are bad ({count / self.seen:.1%}), "
                f"more than max_bad_fraction={limit:g} allows:\n"
                + "\n".join(lines)
                + "\nRepair the data, or raise data.tolerance.max_bad_fraction if this is expected."
            )


@dataclasses.dataclass(frozen=True)
class _Slot:
    example: Any
    record_id: str
    quarantined: tuple[Quarantined, ...]
    repaired: dict[str, int]


class _Slots:
    """This process's slots in order, as a random-access source for grain."""

    def __init__(
        self,
        recipe: Recipe[Any],
        seed: int,
        global_batch: int,
        process_index: int,
        process_count: int,
        start_step: int,
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self._global_batch = global_batch
        self._local = global_batch // process_count
        self._offset = process_index * self._local
        self._start_step = start_step

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("order", "_lengths")}

    @functools.cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(len(s) for s in self._recipe.sources)

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        return draw_order(self._lengths, self._recipe.weights, self._seed)

    def __len__(self) -> int:
        return 2**62 // self._local * self._local  # endless; whole batches

    def __getitem__(self, index: int) -> _Slot:
        step, position = divmod(int(index), self._local)
        step += self._start_step
        slot = step * self._global_batch + self._offset + position
        source_index, record_index = self.order[slot]
        source = self._recipe.sources[source_index]
        refill: np.random.Generator | None = None
        bad: list[Quarantined] = []
        while len(bad) < MAX_DRAWS:
            record_id = None
            try:
                record = source[record_index]
                record_id = record.id
                streams = [slot_generator("example", self._seed, slot)]
                if self._recipe.step_stream:
                    streams.append(slot_generator("step", self._seed, step))
                made = self._recipe.make(record, *streams)
            except BadRecordError as e:
                known = source.record_id(record_index) if record_id is None else record_id
                bad.append(Quarantined(source.name, known, e.reason, e.detail))
                if refill is None:
                    refill = slot_generator("refill", self._seed, slot)
                record_index = int(refill.integers(self._lengths[source_index]))
                continue
            return _Slot(made.example, f"{source.name}:{record_id}", tuple(bad), made.repaired)
        reasons = Counter(b.reason for b in bad).most_common()
        raise DataError(
            f"{source.name}: {MAX_DRAWS} draws in a row were bad records "
            f"({', '.join(f'{n} {r}' for r, n in reasons)}); the last one was {bad[-1].record_id}: "
            f"{bad[-1].detail}. Run `jaxmods data inspect` to see what is wrong."
        )

    def batch(self, slots: Sequence[_Slot]) -> tuple[dict[str, np.ndarray], BatchInfo]:
        """Collate slots and tell their story."""
        arrays, cut = self._recipe.collate([s.example for s in slots])
        repaired: Counter[str] = Counter()
        for slot in slots:
            repaired.update(slot.repaired)
        quarantined = tuple(q for s in slots for q in s.quarantined)
        info = BatchInfo(
            record_ids=tuple(s.record_id for s in slots),
            quarantined=quarantined,
            cut=cut,
            seen=len(slots) + len(quarantined),
            repaired=dict(repaired),
        )
        return arrays, info


def _with_source(source_index: int, record_index: int) -> tuple[int, int]:
    return source_index, int(record_index)
