"""The pipeline: pure in (recipe, seed, step), the same for any number of processes, honest."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from data_pipelines import sampling
from data_pipelines.batch import DataError, HostBatch
from data_pipelines.image_text import ImageTextPipeline, RandomCrop, crop_regions
from data_pipelines.records import BadRecordError, ImageTextRecord, Region
from data_pipelines.sampling import Reading, Tolerance, draw_order
from data_pipelines.sources import InMemory, Mixture
from data_pipelines.sources.base import Source
from tests.data.conftest import encoded, picture, record

DAMAGE = {
    "undecodable_image": b"not a picture",
    "truncated_image": encoded(picture(64, 64))[:3000],
    "image_too_small": encoded(picture(1, 1)),
}


def damaged_records(count: int, every: int) -> tuple[ImageTextRecord, ...]:
    """`count` records of which each `every`-th is damaged, in turn in one of three ways."""
    kinds = itertools.cycle(DAMAGE.values())
    return tuple(
        record(i, i % 6, image=next(kinds) if i % every == every // 2 else None)
        for i in range(count)
    )


@pytest.fixture(scope="module")
def pipeline(tokenizer_folder) -> ImageTextPipeline:
    return ImageTextPipeline(
        source=InMemory(damaged_records(60, 20)),
        tokenizer=tokenizer_folder,
        image_size=16,
        context_short=16,
        context_long=24,
        negatives=2,
        hard_pack_images=2,
        hard_pack_slots=3,
    )


def take(pipeline: ImageTextPipeline, count: int, batch: int = 12, **options) -> list[HostBatch]:
    batches = pipeline.batches(**{"global_batch": batch, "seed": 3, **options})
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(a: HostBatch, b: HostBatch) -> None:
    assert a.info == b.info
    assert a.arrays.keys() == b.arrays.keys()
    for name, value in a.arrays.items():
        assert np.array_equal(value, b.arrays[name]), name


def test_a_batch_is_a_function_of_the_step(pipeline):
    run = take(pipeline, 8)
    for step in (0, 3, 7):
        assert_same(take(pipeline, 1, start_step=step)[0], run[step])
    assert run[0].info.record_ids != run[1].info.record_ids


def test_another_seed_is_another_order(pipeline):
    assert take(pipeline, 1)[0].info.record_ids != take(pipeline, 1, seed=4)[0].info.record_ids


@pytest.mark.parametrize("processes", [2, 3])
def test_order_does_not_depend_on_processes(pipeline, processes):
    whole = take(pipeline, 3)
    parts = [take(pipeline, 3, process_index=i, process_count=processes) for i in range(processes)]
    for step, batch in enumerate(whole):
        for name, value in batch.arrays.items():
            joined = np.concatenate([p[step].arrays[name] for p in parts])
            assert np.array_equal(joined, value), name
        ids = [i for p in parts for i in p[step].info.record_ids]
        assert tuple(ids) == batch.info.record_ids


@pytest.mark.slow
def test_worker_processes_change_nothing(pipeline):
    with_workers = dataclasses.replace(pipeline, reading=Reading(threads=1, workers=2))
    for a, b in zip(take(pipeline, 5), take(with_workers, 5), strict=True):
        assert_same(a, b)


def test_every_good_record_once_per_epoch_and_every_bad_one_reported(pipeline):
    batches = take(pipeline, 10)  # two epochs of 60
    bad = {r.id for r in pipeline.source.records if r.image in DAMAGE.values()}
    assert len(bad) == 3
    for epoch in (batches[:5], batches[5:]):
        seen = Counter(i.split(":")[1] for b in epoch for i in b.info.record_ids)
        assert set(seen) == {r.id for r in pipeline.source.records} - bad
        assert sum(seen.values()) == 60
        reported = [q for b in epoch for q in b.info.quarantined]
        assert {q.record_id for q in reported} == bad
        assert {q.reason for q in reported} == set(DAMAGE)
        assert all(q.source == "memory" and q.detail for q in reported)
        assert sum(b.info.seen for b in epoch) == 60 + len(reported)


def test_five_percent_damage_is_survived_and_counted_exactly(tokenizer_folder):
    records = damaged_records(300, 20)
    texts = {
        7: {"short_captions": ("",)},
        8: {"long_caption": "x" * 10_000},
        9: {"short_captions": ("bad \ud800",)},
    }
    records = tuple(
        dataclasses.replace(r, **texts[i]) if i in texts else r for i, r in enumerate(records)
    )
    pipeline = ImageTextPipeline(
        source=InMemory(records), tokenizer=tokenizer_folder, image_size=8, hard_pack_slots=0
    )
    batches = take(pipeline, 30, batch=10)
    found = {(q.record_id, q.reason) for b in batches for q in b.info.quarantined}
    expected = {
        (r.id, reason) for r in records for reason, image in DAMAGE.items() if r.image == image
    }
    expected |= {("r7", "empty_caption"), ("r8", "caption_too_long"), ("r9", "invalid_utf8")}
    assert found == expected
    assert len(found) == 18


def test_too_much_damage_stops_with_reasons(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=InMemory(damaged_records(200, 5)), tokenizer=tokenizer_folder, image_size=8
    )
    with pytest.raises(DataError) as caught:
        take(pipeline, 50)
    message = str(caught.value)
    assert "more than max_bad_fraction=0.1 allows" in message
    assert all(reason in message for reason in DAMAGE)
    assert "memory:r" in message
    tolerant = dataclasses.replace(pipeline, tolerance=Tolerance(max_bad_fraction=0.5))
    assert len(take(tolerant, 50)) == 50


def test_few_records_are_not_judged(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=InMemory(damaged_records(40, 4)), tokenizer=tokenizer_folder, image_size=8
    )
    assert len(take(pipeline, 4)) == 4  # 48 slots: below min_seen


def test_nothing_usable(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=InMemory((record(0, image=b"x"),)), tokenizer=tokenizer_folder, image_size=8
    )
    with pytest.raises(DataError, match=r"200 draws in a row were bad records \(200 undecodable"):
        take(pipeline, 1)


def test_empty_source(tokenizer_folder):
    pipeline = ImageTextPipeline(source=InMemory(()), tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match="no records"):
        pipeline.batches(global_batch=2, seed=0)


@pytest.mark.parametrize(
    ("batch", "processes", "message"),
    [(10, 4, "multiple of the number of processes"), (6, 2, "multiple of hard_pack_images=2")],
)
def test_batches_that_cannot_be_split(pipeline, batch, processes, message):
    with pytest.raises(ValueError, match=message):
        pipeline.batches(global_batch=batch, seed=0, process_count=processes)


@dataclasses.dataclass(frozen=True)
class Numbered(Source):
    """Records without pictures, for orders only; every third raises."""

    count: int = 9
    label: str = "numbered"

    @property
    def name(self) -> str:
        return self.label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ImageTextRecord:
        if index % 3 == 0:
            raise BadRecordError("malformed_record", "not this one")
        return record(index)

    def record_id(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return str(self.count)


def test_a_record_that_cannot_be_read_has_its_sources_name_for_it(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=Numbered(),
        tokenizer=tokenizer_folder,
        image_size=8,
        tolerance=Tolerance(max_bad_fraction=1),
    )
    bad = {q.record_id for b in take(pipeline, 3) for q in b.info.quarantined}
    assert bad == {"number 0", "number 3", "number 6"}


@pytest.mark.parametrize("table", [0, 1000], ids=["grain", "table"])
def test_each_epoch_is_another_permutation(table, monkeypatch):
    monkeypatch.setattr(sampling, "TABLE_SHUFFLE", table)
    order = draw_order([700], None, seed=1)
    epochs = [[order[q][1] for q in range(e * 700, e * 700 + 700)] for e in range(3)]
    assert all(sorted(e) == list(range(700)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(700))
    again = draw_order([700], None, seed=1)
    assert [again[q][1] for q in range(700, 1400)] == epochs[1]


def test_mixture_keeps_its_proportions():
    order = draw_order([10, 1000], (3.0, 1.0), seed=0)
    picks = [order[q] for q in range(400)]
    assert [s for s, _ in picks].count(0) == 300
    small = [i for s, i in picks if s == 0]
    assert all(sorted(small[k : k + 10]) == list(range(10)) for k in range(0, 300, 10))
    assert len({i for s, i in picks if s == 1}) == 100
    by_length = draw_order([10, 30], None, seed=0)
    assert [by_length[q][0] for q in range(40)].count(0) == 10


def test_mixture_refills_from_the_same_source(tokenizer_folder):
    sources = (InMemory(damaged_records(40, 8), "a"), InMemory(damaged_records(40, 50), "b"))
    pipeline = ImageTextPipeline(
        source=Mixture(sources, (1.0, 3.0)), tokenizer=tokenizer_folder, image_size=8
    )
    ids = [i for b in take(pipeline, 10) for i in b.info.record_ids]
    assert sum(i.startswith("a:") for i in ids) == 30
    assert sum(i.startswith("b:") for i in ids) == 90


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_mixture_weights_are_checked(weights):
    with pytest.raises(ValueError, match="one positive weight per source"):
        Mixture((InMemory(()), InMemory(())), weights)


def test_random_choices_use_every_caption_and_phrase(pipeline):
    tokens = pipeline.text_tokenizer
    batches = take(pipeline, 40)
    slots = [
        (i.split(":r")[1], b.arrays["text_short"][n], b.arrays["box_text"][n, 0], bool(m))
        for b in batches
        for n, (i, m) in enumerate(zip(b.info.record_ids, b.arrays["box_mask"][:, 0], strict=True))
    ]
    number = next(i for i, *_ in slots if int(i) % 6)
    shorts = {tuple(s) for i, s, _, _ in slots if i == number}
    expected = tokens.encode_batch([f"a photo of short {number}", f"a photo of other {number}"], 16)
    assert shorts == {tuple(row) for row in expected}
    phrases = {tuple(p) for i, _, p, mask in slots if i == number and mask}
    assert phrases == {tuple(r) for r in tokens.encode_batch(["phrase 0", "long phrase 0"], 16)}


def test_fixed_choices(pipeline):
    fixed = dataclasses.replace(
        pipeline, short_caption="first", region_phrase="long", short_prefix=""
    )
    batch = take(fixed, 1)[0]
    tokens = pipeline.text_tokenizer
    for n, name in enumerate(batch.info.record_ids):
        number = name.split(":r")[1]
        expected = tokens.encode_batch([f"short {number}"], 16)[0]
        assert np.array_equal(batch.arrays["text_short"][n], expected)
        if batch.arrays["box_mask"][n, 0]:
            expected = tokens.encode_batch(["long phrase 0"], 16)[0]
            assert np.array_equal(batch.arrays["box_text"][n, 0], expected)


def test_random_box_choice_reaches_every_box(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=InMemory((record(0, 6),)),
        tokenizer=tokenizer_folder,
        image_size=8,
        max_boxes=2,
        box_choice="random",
        hard_pack_slots=0,
    )
    lefts = {
        tuple(round(float(v), 1) for v in row[:, 0])
        for b in take(pipeline, 10)
        for row in b.arrays["box"]
    }
    assert len(lefts) == 15  # every pair of six
    assert all(a < b for a, b in lefts)


def test_random_crop_moves_boxes_and_counts_lost_ones(tokenizer_folder):
    pipeline = ImageTextPipeline(
        source=InMemory(tuple(record(i, 5) for i in range(10))),
        tokenizer=tokenizer_folder,
        image_size=8,
        augment=RandomCrop(min_area=0.3),
    )
    batches = take(pipeline, 10)
    boxes = np.concatenate([b.arrays["box"][b.arrays["box_mask"]] for b in batches])
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert len(np.unique(boxes[:, 0])) > 20
    assert sum(b.info.cut.get("boxes_cropped", 0) for b in batches) > 0
    for i in range(50):
        x1, y1, x2, y2 = RandomCrop(0.3).window(np.random.default_rng(i))
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
        assert (x2 - x1) * (y2 - y1) > 0.2


def test_crop_regions_by_hand():
    regions = (
        Region((0.5, 0.5, 1.0, 1.0), "whole"),
        Region((0.25, 0.5, 0.75, 0.75), "half"),
        Region((0.0, 0.0, 0.6, 0.6), "corner"),
        Region((0.0, 0.0, 0.4, 0.4), "gone"),
    )
    moved, dropped = crop_regions(
        dataclasses.replace(record(0), regions=regions), (0.5, 0.5, 1.0, 1.0), 0.5
    )
    assert [r.phrase for r in moved.regions] == ["whole", "half"]
    assert [r.box for r in moved.regions] == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5)]
    assert dropped == 2


def test_keeping_the_aspect_moves_boxes(tokenizer_folder):
    wide = dataclasses.replace(
        record(0, image=encoded(picture(40, 20))),
        regions=(Region((0.25, 0.0, 0.75, 1.0), "centre"), Region((0.0, 0.0, 0.2, 1.0), "left")),
    )
    pipeline = ImageTextPipeline(
        source=InMemory((wide,)), tokenizer=tokenizer_folder, image_size=10, resize="shortest"
    )
    batch = take(pipeline, 1)[0]
    assert np.allclose(batch.arrays["box"][:, 0], (0, 0, 1, 1))
    assert batch.arrays["box_mask"].sum(1).tolist() == [1] * 12
    assert batch.info.cut["boxes_cropped"] == 12
    with pytest.raises(ValueError, match="augment needs"):
        dataclasses.replace(pipeline, augment=RandomCrop())


def test_repairs_travel_with_the_batch(tokenizer_folder):
    region = Region((0.1, 0.1, 1.03, 0.5), "clipped")
    records = (dataclasses.replace(record(0), regions=(region,)),)
    pipeline = ImageTextPipeline(source=InMemory(records), tokenizer=tokenizer_folder, image_size=8)
    assert take(pipeline, 1, batch=4)[0].info.repaired == {"box_clipped": 4}


def test_fingerprint_is_of_what_is_read(pipeline):
    mark = pipeline.fingerprint()
    assert pickle.loads(pickle.dumps(pipeline)).fingerprint() == mark
    same = dataclasses.replace(
        pipeline, reading=Reading(threads=1), tolerance=Tolerance(max_bad_fraction=0.2)
    )
    assert same.fingerprint() == mark
    for change in (
        {"image_size": 8},
        {"short_prefix": ""},
        {"source": InMemory(damaged_records(61, 20))},
    ):
        assert dataclasses.replace(pipeline, **change).fingerprint() != mark


def test_describe_and_assets(pipeline):
    assert pipeline.describe()["source memory"] == {"records": 60}
    assets = pipeline.assets()
    assert {"vocab.json", "merges.txt", "preprocessor_config.json"} <= set(assets)


def test_describe_names_what_is_missing():
    facts = ImageTextPipeline(source=InMemory(()), tokenizer="no/such/folder").describe()
    assert "no CLIP tokenizer in no/such/folder" in facts["tokenizer_problem"]
