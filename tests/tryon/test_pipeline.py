"""Batches for virtual try-on: arrays, draws, order, restart, and records that cannot be used."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.batch import DataError, HostBatch
from data_pipelines.records import BadRecordError, TryOnRecord
from data_pipelines.sampling import Reading, Tolerance
from data_pipelines.scenes.try_on import TryOnScenes
from data_pipelines.sources.base import InMemory, Mixture
from data_pipelines.tryon import Combined, TryOnPipeline, TryOnRecords, VitonHd
from data_pipelines.tryon.draws import Conditions, Probabilities, draw_conditions, pick
from data_pipelines.tryon.transforms import Frame, pictures
from data_pipelines.tryon.validation import TryOnLimits
from tests.tryon import layouts

ALL = Conditions(True, True, True, True)
SMALL: Mapping[str, Any] = {"height": 32, "width": 32, "cond_scale": 2}
ONE_THREAD = Reading(threads=1, prefetch=1)


def flat(level: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """A grey picture, (rows, columns)."""
    return np.full((*size, 3), level, np.uint8)


def half_white(size: tuple[int, int] = (32, 32)) -> np.ndarray:
    mask = flat(0, size)
    mask[: size[0] // 2] = 255
    return mask


def record(**changes: Any) -> TryOnRecord:
    """A complete record whose pictures are told apart by their grey."""
    whole = TryOnRecord(
        id="r",
        garment=flat(10),
        target=flat(20),
        person=flat(30),
        agnostic=(flat(40), flat(50)),
        references=(flat(60), flat(70)),
        mask=half_white(),
        dense=flat(80),
    )
    return dataclasses.replace(whole, **changes)


def pipeline(*records: TryOnRecord, **options: Any) -> TryOnPipeline:
    source = TryOnRecords(records or (record(),))
    return TryOnPipeline(source, **{**SMALL, "reading": ONE_THREAD, **options})


def first(data: TryOnPipeline, count: int, **options: Any) -> list[HostBatch]:
    batches = data.batches(**{"global_batch": 4, "seed": 0, **options})
    return list(itertools.islice(batches, count))


EVERYTHING: Mapping[str, Any] = {"mask_prob": 1.0, "dense_prob": 1.0, "reference_prob": 1.0}


def test_arrays_of_a_batch() -> None:
    data = pipeline(**EVERYTHING, person_prob=1.0)
    arrays = first(data, 1)[0].arrays
    full, small = (4, 32, 32, 3), (4, 16, 16, 3)
    assert {n: (a.shape, a.dtype.name) for n, a in arrays.items()} == {
        "target": (full, "uint8"),
        "subject": (full, "uint8"),
        "garment": (full, "uint8"),
        "mask": (small, "uint8"),
        "use_mask": ((4,), "bool"),
        "dense": (small, "uint8"),
        "use_dense": ((4,), "bool"),
        "reference": (small, "uint8"),
        "use_reference": ((4,), "bool"),
    }
    assert all(arrays[f"use_{n}"].all() for n in ("mask", "dense", "reference"))
    levels = {
        n: sorted({int(v) for v in arrays[n][:, 0, 0, 0]}) for n in arrays if arrays[n].ndim > 1
    }
    assert levels["target"] == [20]
    assert levels["subject"] == [30]
    assert levels["garment"] == [10]
    assert levels["mask"] == [255]
    assert levels["dense"] == [80]
    assert set(levels["reference"]) <= {60, 70}


def test_only_what_can_be_drawn_is_in_a_batch() -> None:
    arrays = first(pipeline(reference_prob=0.0), 1)[0].arrays
    assert set(arrays) == {"target", "subject", "garment"}
    arrays = first(pipeline(reference_prob=0.1), 1)[0].arrays
    assert set(arrays) == {"target", "subject", "garment", "reference", "use_reference"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=4, max_size=4),
)
def test_a_condition_is_included_below_its_probability(u: list[float], p: list[float]) -> None:
    found = dataclasses.astuple(draw_conditions(u, Probabilities(*p)))
    assert found == tuple(x < y for x, y in zip(u, p, strict=True))


def test_draws_of_a_step_are_shared_and_as_likely_as_asked() -> None:
    data = pipeline(person_prob=0.25, reference_prob=0.75)
    batches = first(data, 300)
    person = np.stack([b.arrays["subject"][:, 0, 0, 0] == 30 for b in batches])
    reference = np.stack([b.arrays["use_reference"] for b in batches])
    for drawn in (person, reference):
        assert (drawn == drawn[:, :1]).all()  # one draw for the whole step
    # 300 coin flips: within four standard deviations
    assert abs(person[:, 0].mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 300)
    assert abs(reference[:, 0].mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / 300)
    # and not one deciding the other
    assert 0 < (person[:, 0] & reference[:, 0]).sum() < person[:, 0].sum()
    for batch in batches:
        there = batch.arrays["use_reference"]
        assert (batch.arrays["reference"][~there] == 0).all()


def test_draws_of_a_record() -> None:
    batches = first(pipeline(draws="record"), 50)
    person = np.stack([b.arrays["subject"][:, 0, 0, 0] == 30 for b in batches])
    assert (person != person[:, :1]).any()
    assert abs(person.mean() - 0.5) < 4 * np.sqrt(0.25 / 200)


def test_variants_and_views_are_drawn_per_record() -> None:
    data = pipeline(record(agnostic_shares=(0.9, 0.1)), person_prob=0.0, reference_prob=1.0)
    batches = first(data, 100)
    refined = np.concatenate([b.arrays["subject"][:, 0, 0, 0] == 50 for b in batches])
    views = np.concatenate([b.arrays["reference"][:, 0, 0, 0] == 70 for b in batches])
    assert abs(refined.mean() - 0.1) < 4 * np.sqrt(0.09 / 400)
    assert abs(views.mean() - 0.5) < 4 * np.sqrt(0.25 / 400)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 2**32))
def test_a_variant_without_share_is_never_drawn(shares: list[float], seed: int) -> None:
    if sum(shares) <= 0:
        shares = [1.0]
    index = pick(len(shares), shares, np.random.default_rng(seed))
    assert shares[index] > 0


def scenes(**options: Any) -> TryOnPipeline:
    source = TryOnScenes(count=37, height=32, width=32)
    return TryOnPipeline(source, **{**SMALL, "mask_prob": 0.5, "reading": ONE_THREAD, **options})


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name])


def test_restart_from_any_step() -> None:
    data = scenes()
    straight = first(data, 8)
    for step in (0, 3, 7):
        again = first(data, 1, start_step=step)[0]
        same(again.arrays, straight[step].arrays)
        assert again.info == straight[step].info
    assert first(data, 1, seed=1)[0].info.record_ids != straight[0].info.record_ids


def test_any_number_of_processes_and_threads() -> None:
    whole = first(scenes(), 4)
    parts = [first(scenes(), 4, process_index=i, process_count=2) for i in range(2)]
    many = first(dataclasses.replace(scenes(), reading=Reading(threads=4, prefetch=4)), 4)
    for step in range(4):
        halves = [parts[i][step].arrays for i in range(2)]
        joined = {n: np.concatenate([h[n] for h in halves]) for n in halves[0]}
        same(joined, whole[step].arrays)
        same(many[step].arrays, whole[step].arrays)


def test_an_epoch_visits_every_record_once() -> None:
    ids = [i for b in first(scenes(), 37, global_batch=1) for i in b.info.record_ids]
    assert sorted(ids) == sorted(f"try-on-scenes/0:{i}" for i in range(37))


def test_folders_to_batches(tmp_path: Path) -> None:
    """Every array shows the file that the layout says."""
    source = Combined(str(layouts.combined(tmp_path)))
    data = TryOnPipeline(source, **SMALL, reference_prob=1.0, person_prob=1.0, reading=ONE_THREAD)
    for batch in first(data, 5, global_batch=3):
        for row, name in enumerate(batch.info.record_ids):
            index = next(i for i in range(len(source)) if name.endswith(source.record_id(i)))
            expected = source[index]
            for key, path in (
                ("target", expected.target),
                ("subject", expected.person),
                ("garment", expected.garment),
                ("reference", expected.references[0]),
            ):
                assert isinstance(path, Path)
                place = path.relative_to(tmp_path).parts
                colour = layouts.colour_of("/".join(place[1:]))
                assert tuple(batch.arrays[key][row, 0, 0]) == colour, (name, key)


def test_resized_as_pillow_does() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (45, 62, 3), dtype=np.uint8)
    frame = Frame(32, 48, 2)
    found = pictures(record(target=noise, references=(noise,)), frame)
    expected = Image.fromarray(noise).resize((48, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found["target"], np.asarray(expected))
    expected = Image.fromarray(noise).resize((24, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found["reference"], np.asarray(expected))
    assert set(pictures(record(), frame, ("reference",))) == {"garment", "reference"}


def test_padding_keeps_the_aspect_ratio() -> None:
    frame = Frame(32, 32, 2, resize="pad")
    found = pictures(record(garment=flat(10, (32, 16)), mask=flat(255, (16, 32))), frame)
    garment = found["garment"][..., 0]
    assert (garment[:, 8:24] == 10).all()
    assert (garment[:, :8] == 255).all()  # white beside a picture
    mask = found["mask"][..., 0]
    assert (mask[4:12] == 255).all()
    assert (mask[:4] == 0).all()  # black beside a mask


def test_transparency() -> None:
    """Dropped as by the official loaders, or put on white."""
    cutout = np.zeros((32, 32, 4), np.uint8)
    cutout[8:24, 8:24] = (200, 10, 10, 255)
    png = io.BytesIO()
    Image.fromarray(cutout).save(png, "PNG")
    palette = io.BytesIO()
    Image.fromarray(cutout[..., 0]).save(palette, "PNG", transparency=0)
    for image in (cutout, png.getvalue()):
        dropped = pictures(record(garment=image), Frame(32, 32))["garment"]
        assert tuple(dropped[0, 0]) == (0, 0, 0)
        white = pictures(record(garment=image), Frame(32, 32, alpha="white"))["garment"]
        assert tuple(white[0, 0]) == (255, 255, 255)
        assert tuple(white[16, 16]) == (200, 10, 10)
    grey = pictures(record(garment=palette.getvalue()), Frame(32, 32, alpha="white"))["garment"]
    assert tuple(grey[0, 0]) == (255, 255, 255)
    one_channel = pictures(record(garment=flat(7)[..., 0]), Frame(32, 32))["garment"]
    assert tuple(one_channel[3, 3]) == (7, 7, 7)


@pytest.mark.parametrize(
    ("changes", "drawn", "reason"),
    [
        ({"target": None}, ALL, "missing_target"),
        ({"person": None}, ALL, "missing_person"),
        ({"agnostic": ()}, Conditions(False, False, False, False), "missing_agnostic"),
        ({"agnostic_shares": (1.0,)}, ALL, "malformed_record"),
        ({"agnostic_shares": (-1.0, 2.0)}, ALL, "malformed_record"),
        ({"mask": half_white((32, 40))}, ALL, "misaligned_pictures"),
        ({"dense": flat(80, (40, 32))}, ALL, "misaligned_pictures"),
        (
            {"agnostic": (flat(40, (32, 48)),)},
            Conditions(False, False, False, False),
            "misaligned_pictures",
        ),
        ({"mask": flat(128)}, ALL, "mask_not_binary"),
        ({"mask": flat(0)}, ALL, "mask_empty"),
        (
            {"mask": np.broadcast_to(np.array([255, 0, 0], np.uint8), (32, 32, 3))},
            ALL,
            "mask_not_binary",
        ),
        ({"garment": Path("no/such.png")}, ALL, "missing_file"),
        ({"garment": b"no picture"}, ALL, "undecodable_image"),
        ({"garment": np.zeros((4, 4, 3), np.float32)}, ALL, "malformed_record"),
    ],
)
def test_bad_records(changes: dict[str, Any], drawn: Conditions, reason: str) -> None:
    data = pipeline(**EVERYTHING)
    with pytest.raises(BadRecordError) as error:
        data.example(record(**changes), drawn, np.random.default_rng(0))
    assert error.value.reason == reason


def test_a_mask_is_looked_at_only_where_it_is_used() -> None:
    data = pipeline(**EVERYTHING)
    unused = Conditions(True, False, True, True)
    made = data.example(record(mask=flat(128)), unused, np.random.default_rng(0))
    assert not made.example["use_mask"]
    loose = pipeline(**EVERYTHING, checks=TryOnLimits(None, None))
    made = loose.example(record(mask=flat(128, (9, 9))), ALL, np.random.default_rng(0))
    assert made.example["use_mask"]


def test_bad_records_are_quarantined_and_replaced() -> None:
    bad = record(id="bad", garment=b"no picture")
    good = [record(id=f"good{i}") for i in range(9)]
    data = pipeline(bad, *good, tolerance=Tolerance(0.5))
    batches = first(data, 10, global_batch=2)
    reasons = [(q.record_id, q.reason) for b in batches for q in b.info.quarantined]
    assert ("bad", "undecodable_image") in reasons
    assert {i for b in batches for i in b.info.record_ids} == {f"memory:good{i}" for i in range(9)}
    strict = pipeline(bad, bad, tolerance=Tolerance(0.1, min_seen=1))
    with pytest.raises(DataError, match="draws in a row were bad"):
        first(strict, 1)


def test_optional_pictures_that_some_records_lack() -> None:
    data = pipeline(record(id="a"), record(id="b", references=()), reference_prob=1.0)
    for batch in first(data, 4):
        there = np.array([i.endswith("a") for i in batch.info.record_ids])
        np.testing.assert_array_equal(batch.arrays["use_reference"], there)
        assert batch.info.repaired == (
            {"no_reference": int((~there).sum())} if not there.all() else {}
        )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"target": None}, {}, "'target', found none"),
        ({"person": None}, {}, r"data\.person_prob=0\.5 .*'person'.*person_from_target=True"),
        ({"agnostic": ()}, {}, r"data\.person_prob=0\.5 .*'agnostic'.*data\.person_prob=1"),
        ({"references": ()}, {}, r"data\.reference_prob=0\.5 .*set data\.reference_prob=0"),
        ({"mask": None}, {"mask_prob": 0.5}, r"data\.mask_prob=0\.5 needs"),
        ({"dense": None}, {"dense_prob": 1.0}, r"data\.dense_prob=1 needs"),
    ],
)
def test_what_no_record_has(changes: dict, options: dict, message: str) -> None:
    data = pipeline(record(**changes), **options)
    with pytest.raises(DataError, match=message):
        data.batches(global_batch=4, seed=0)


def test_missing_condition_folder_is_named(tmp_path: Path) -> None:
    root = layouts.viton_archive(tmp_path)
    source = VitonHd(str(root), split="test", pairs="unpaired")
    with pytest.raises(DataError, match=r"'person', found none; looked for in nowhere"):
        TryOnPipeline(source, **SMALL).batches(global_batch=2, seed=0)
    data = TryOnPipeline(source, **SMALL, person_prob=0.0)
    with pytest.raises(DataError, match=r"looked for in .*test/image_ref\. Add them, or set"):
        data.batches(global_batch=2, seed=0)
    assert first(dataclasses.replace(data, reference_prob=0.0), 1, global_batch=2)


def test_the_target_as_person_only_where_asked_for() -> None:
    data = pipeline(record(person=None), person_prob=1.0, person_from_target=True)
    batch = first(data, 1)[0]
    np.testing.assert_array_equal(batch.arrays["subject"], batch.arrays["target"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, r"picture size 100x32 .*multiples of 16; for example data\.height=96"),
        ({"cond_scale": 4}, r"condition size 8x8 .*for example data\.height=64 data\.width=64"),
        (
            {"reference_prob": 1.5},
            r"data\.reference_prob: expected a probability 0\.\.1, found 1\.5",
        ),
        ({"cond_scale": 0}, "cond_scale > 0"),
        ({"source": InMemory(())}, "expected sources of try-on records"),
    ],
)
def test_settings_that_cannot_be(options: dict, message: str) -> None:
    source = options.pop("source", TryOnScenes(count=3))
    with pytest.raises(ValueError, match=message):
        TryOnPipeline(source, **{**SMALL, **options})


def test_condition_scale_may_be_written_as_a_fraction() -> None:
    assert Frame(512, 384, 2.0).cond_size == Frame(512, 384, 2).cond_size == (256, 192)
    assert Frame(96, 48, 1.5).cond_size == (64, 32)


def test_mixture_fingerprint_and_facts() -> None:
    a, b = TryOnScenes(seed=1, count=5), TryOnScenes(seed=2, count=5)
    mixed = TryOnPipeline(Mixture((a, b), (3, 1)), 64, 48, 1)
    assert len(mixed.sources) == 2
    batch = first(mixed, 2, global_batch=8)
    names = [i.split(":")[0] for x in batch for i in x.info.record_ids]
    assert names.count("try-on-scenes/1") == 12
    other = dataclasses.replace(mixed, person_prob=0.4)
    assert mixed.fingerprint() != other.fingerprint()
    assert mixed.fingerprint() == dataclasses.replace(mixed, reading=ONE_THREAD).fingerprint()
    facts = mixed.describe()
    assert facts["pictures"] == [64, 48]
    assert facts["source try-on-scenes/1"] == {"records": 5}
    broken = TryOnPipeline(VitonHd("/no/such"), 64, 48, 1).describe()
    assert "set data.source.root" in broken["source viton-hd/train"]["problem"]
