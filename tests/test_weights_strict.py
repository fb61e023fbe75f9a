"""What an import refuses and what it tolerates, and maps that do not fit."""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmods.weights import (
    Cast,
    Conv2d,
    Drop,
    Entry,
    Fuse,
    Identity,
    Linear,
    Split,
    Tie,
    Transform,
    WeightError,
    WeightMap,
    export_tensors,
    import_params,
    memory_reader,
    report,
)
from jaxmods.weights.lazy import same_bits


def struct(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


# --- dtypes --------------------------------------------------------------------------------------


def test_dtypes_are_kept_or_converted() -> None:
    weight_map = WeightMap((Entry("w", "w", Linear()), Entry("n", "n")))
    half = numbered(2, 3).astype(ml_dtypes.bfloat16)
    reader = memory_reader({"w": half, "n": np.array([3], np.int32)})
    abstract = {"w": struct(3, 2, dtype=np.float32), "n": struct(1, dtype=np.int32)}
    kept, _ = import_params(reader, weight_map, abstract)
    assert kept["w"].dtype == ml_dtypes.bfloat16
    for dtype in ("abstract", np.float32):
        wide, _ = import_params(reader, weight_map, abstract, dtype=dtype)
        assert same_bits(np.asarray(wide["w"]), half.T.astype(np.float32))
        assert wide["n"].dtype == np.int32
        narrow = export_tensors(wide, weight_map, dtype="bfloat16")
        assert same_bits(narrow["w"].all(), half)


def test_mixed_dtypes_in_one_array_need_a_choice() -> None:
    weight_map = WeightMap((Entry("w.{i}", "w"),))
    reader = memory_reader({"w.0": numbered(2), "w.1": numbered(2).astype(np.float16)})
    with pytest.raises(WeightError, match=r"w\.0: float32.*w\.1: float16.*dtype option"):
        import_params(reader, weight_map, {"w": struct(2, 2)})
    params, _ = import_params(reader, weight_map, {"w": struct(2, 2)}, dtype=np.float32)
    assert same_bits(np.asarray(params["w"]), np.stack([numbered(2), numbered(2)]))


def test_64_bit_is_refused_unless_cast() -> None:
    reader = memory_reader({"w": np.array([1.0])})
    with pytest.raises(WeightError, match=r"w: float64 needs 64-bit mode"):
        import_params(reader, WeightMap((Entry("w", "w"),)), {"w": struct(1)})
    table = memory_reader({"w": np.array([2**40])})
    with pytest.raises(WeightError, match=r"w: values do not fit int32"):
        import_params(
            table, WeightMap((Entry("w", "w", Cast("int64", "int32")),)), {"w": struct(1)}
        )


# --- strictness ----------------------------------------------------------------------------------

STRICT = WeightMap(
    (
        Entry("enc.layers.{i}.fc.weight", "enc/fc/kernel", Linear()),
        Entry("proj.weight", "proj/kernel", Linear()),
        Entry("long.weight", "long/kernel", Linear(), optional=True),
        Drop("enc.position_ids", "a constant"),
        Drop("enc.layers.{i}.rotary.*", "computed"),
    )
)
ABSTRACT = {
    "enc": {"fc": {"kernel": struct(3, 4, 5)}},
    "proj": {"kernel": struct(4, 2)},
    "long": {"kernel": struct(4, 2)},
}


def complete() -> dict[str, np.ndarray]:
    tensors = {f"enc.layers.{i}.fc.weight": numbered(5, 4) for i in range(3)}
    return {**tensors, "proj.weight": numbered(2, 4), "long.weight": numbered(2, 4)}


def importing(tensors: dict[str, np.ndarray]) -> Any:
    return import_params(memory_reader(tensors), STRICT, ABSTRACT)


def test_dropped_keys_are_tolerated_and_not_written() -> None:
    extra = {"enc.position_ids": numbered(1, 7), "enc.layers.2.rotary.inv_freq": numbered(2)}
    params, _ = importing({**complete(), **extra})
    assert set(export_tensors(params, STRICT)) == set(complete())


def test_optional_keys_are_zero_and_reported() -> None:
    tensors = complete()
    del tensors["long.weight"]
    params, missing = importing(tensors)
    assert missing == frozenset({"long.weight"})
    assert not np.asarray(params["long"]["kernel"]).any()


def test_missing_extra_and_misshaped_keys_make_one_error() -> None:
    tensors = complete()
    del tensors["enc.layers.1.fc.weight"]
    tensors["proj.weight"] = numbered(3, 4)
    tensors |= {f"enc.layers.{i}.fc.weight": numbered(5, 4) for i in (3, 4)}
    with pytest.raises(WeightError) as caught:
        importing(tensors)
    text = str(caught.value)
    assert "1 missing:\n    enc.layers.1.fc.weight" in text
    assert "enc.layers.{3..4}.fc.weight (2 keys)" in text
    assert "proj.weight: expected [2, 4], found [3, 4]" in text
    assert "to do:" in text


def test_layers_that_are_all_missing_are_one_line() -> None:
    with pytest.raises(WeightError, match=r"enc\.layers\.\{0\.\.2\}\.fc\.weight \(3 keys\)"):
        importing({k: t for k, t in complete().items() if "enc" not in k})


def test_prefixes_are_recognised() -> None:
    with pytest.raises(WeightError, match=r"additional prefix 'model\.'"):
        importing({f"model.{key}": t for key, t in complete().items()})
    with pytest.raises(WeightError, match=r"lack the prefix 'm\.'"):
        import_params(memory_reader(complete()), STRICT.under("m.", ""), ABSTRACT)


def test_long_lists_are_cut_with_their_count() -> None:
    with pytest.raises(WeightError, match=r"20 extra.*\n(.*\n)*.* and 8 more lines"):
        importing({**complete(), **{f"other{c}": numbered(1) for c in "abcdefghijklmnopqrst"}})


def test_tied_copies_must_be_equal() -> None:
    strict = WeightMap((Entry(("shared", "embed"), "w", Tie()),))
    loose = WeightMap((Entry(("shared", "embed"), "w", Tie(require_all=False)),))
    abstract = {"w": struct(2, 3)}
    differing = memory_reader({"shared": numbered(2, 3), "embed": numbered(2, 3) + 1})
    for weight_map in (strict, loose):
        with pytest.raises(WeightError, match=r"tied tensors differ: shared and embed"):
            import_params(differing, weight_map, abstract)
    one = memory_reader({"embed": numbered(2, 3)})
    with pytest.raises(WeightError, match=r"1 missing:\n    shared"):
        import_params(one, strict, abstract)
    params, missing = import_params(one, loose, abstract)
    assert same_bits(np.asarray(params["w"]), numbered(2, 3))
    assert missing == frozenset()
    assert set(export_tensors(params, loose)) == {"shared", "embed"}
    with pytest.raises(WeightError, match="2 missing"):
        import_params(memory_reader({}), loose, abstract)


def test_report_lists_every_key() -> None:
    tensors = complete()
    del tensors["long.weight"], tensors["proj.weight"]
    tensors |= {"enc.position_ids": numbered(7), "stray": numbered(1)}
    tensors["enc.layers.0.fc.weight"] = numbered(4, 5)
    result = report(memory_reader(tensors, "file"), STRICT, ABSTRACT)
    statuses = {row.key: row.status for row in result.rows}
    assert statuses == {
        "enc.layers.0.fc.weight": "shape",
        "enc.layers.1.fc.weight": "ok",
        "enc.layers.2.fc.weight": "ok",
        "proj.weight": "missing",
        "long.weight": "optional",
        "enc.position_ids": "dropped",
        "stray": "extra",
    }
    assert not result.fits
    table = str(result)
    assert "enc/fc/kernel[2]" in table
    assert "[4, 5] (expected [5, 4])" in table
    assert table.splitlines()[-1].startswith("1 shape, 2 ok")


def test_a_stack_of_no_layers_has_no_keys() -> None:
    weight_map = WeightMap((Entry("l.{i}.w", "l", Linear()), Entry("w", "w")))
    abstract = {"l": struct(0, 3, 2), "w": struct(1)}
    params, _ = import_params(memory_reader({"w": numbered(1)}), weight_map, abstract)
    assert params["l"].shape == (0, 3, 2)
    assert set(export_tensors(params, weight_map)) == {"w"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((Entry("a", "a"),), r"parameters without an entry: b"),
        ((Entry("a", "a"), Entry("b", "b"), Entry("c", "b")), r"more than one entry: b"),
        ((Entry("a", "a"), Entry("a", "b")), r"PyTorch keys with more than one entry: a"),
        ((Entry("a", "a"), Entry("b", "b"), Entry("c", "c")), r"without a parameter: Entry\(c"),
        ((Entry("a", "a"), Entry("b", "b"), Drop("a", "")), r"mapped and dropped: a"),
        ((Entry("a", "a"), Entry("b", "b", Conv2d())), r"parameter b: .*4 dimensions"),
        ((Entry("a", "a"), Entry(("b", "c"), "b", Fuse(0))), r"parameter b: .*3.*2 equal parts"),
        ((Entry("a", "a"), Entry("b.{i}.{j}.{k}", "b")), r"expected 3 leading axes"),
        ((Entry("a", "a"), Entry("b", ("b", "x"), Split(0))), r"no parameter x"),
    ],
)
def test_a_map_that_does_not_fit_says_why(entries: tuple[Any, ...], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        WeightMap(entries).bind({"a": struct(2), "b": struct(3, 2)})


@pytest.mark.parametrize(
    ("torch", "jax_path", "transform", "message"),
    [
        ("a", "a_{i}", Identity(), "only in the path"),
        (("a.{i}", "b"), "a", Fuse(0), "same index names"),
        (("a", "b"), "a", Identity(), "makes 2 array"),
        ("a", ("a", "b"), Identity(), "makes 1 array"),
        (("a", "b"), ("a", "b"), Split(0), "expected 1 PyTorch key"),
        (("a", "b"), "a", Fuse(0, (1, 2, 3)), "expected 3 PyTorch keys"),
        ("a.{}", "a", Identity(), "expected an index"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(
    torch: Any, jax_path: Any, transform: Transform, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Entry(torch, jax_path, transform)
