"""Readers of the published try-on layouts and of own data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError, TryOnRecord
from data_pipelines.tryon import (
    Combined,
    DressCode,
    FashionTryOn,
    IgPair,
    InTheWild,
    TryOnLines,
    TryOnSource,
    VitonHd,
    ViViD,
)
from tests.tryon import layouts


def paths(record: TryOnRecord, root: Path) -> dict[str, str | tuple[str, ...]]:
    """Where the record's pictures are, relative to the root."""

    def relative(value: object) -> str:
        assert isinstance(value, Path)
        return str(value.relative_to(root))

    found: dict[str, str | tuple[str, ...]] = {"garment": relative(record.garment)}
    for name in ("target", "person", "mask", "dense"):
        value = getattr(record, name)
        if value is not None:
            found[name] = relative(value)
    found["agnostic"] = tuple(relative(p) for p in record.agnostic)
    found["references"] = tuple(relative(p) for p in record.references)
    return found


def test_viton_paired(tmp_path: Path) -> None:
    source = VitonHd(str(layouts.viton(tmp_path)))
    assert len(source) == 2
    record = source[0]
    assert paths(record, tmp_path) == {
        "garment": "train/cloth/00006_00.jpg",
        "target": "train/image/00006_00.jpg",
        "person": "train/person/00006_00.jpg",
        "agnostic": ("train/agnostic/00006_00.jpg",),
        "references": ("train/image_ref/00006_00.jpg",),
        "mask": "train/agnostic_mask/00006_00_mask.png",
        "dense": "train/dense/00006_00.png",
    }
    assert (record.id, record.paired, record.category) == ("train/00006_00.jpg", True, "upper")
    assert record.id == source.record_id(0)
    assert source.offers() == {"target", "person", "agnostic", "reference", "mask", "dense"}
    assert source.report() == {
        "records": 2, "checked": 2, "with_target": 2, "with_person": 2, "with_agnostic": 2,
        "with_reference": 2, "with_mask": 2, "with_dense": 2,
    }  # fmt: skip


def test_viton_unpaired_test_split(tmp_path: Path) -> None:
    """Garment and reference are another's, and person/ is left alone as by the official loader."""
    source = VitonHd(str(layouts.viton(tmp_path, "test")), split="test", pairs="unpaired")
    record = source[0]
    found = paths(record, tmp_path)
    assert found["garment"] == "test/cloth/00013_00.jpg"
    assert found["references"] == ("test/image_ref/00013_00.jpg",)
    assert found["target"] == "test/image/00006_00.jpg"
    assert "person" not in found
    assert not record.paired
    assert record.id == "test/00006_00.jpg+00013_00.jpg"
    asked = VitonHd(source.root, split="test", pairs="unpaired", use_person=True)
    assert paths(asked[0], tmp_path)["person"] == "test/person/00006_00.jpg"


def test_viton_as_published(tmp_path: Path) -> None:
    source = VitonHd(str(layouts.viton_archive(tmp_path)), split="test", pairs="unpaired")
    assert paths(source[1], tmp_path) == {
        "garment": "test/cloth/00006_00.jpg",
        "target": "test/image/00013_00.jpg",
        "agnostic": ("test/agnostic-v3.2/00013_00.jpg",),
        "references": (),
        "mask": "test/agnostic-mask/00013_00_mask.png",
        "dense": "test/image-densepose/00013_00.jpg",
    }
    assert source.offers() == {"target", "agnostic", "mask", "dense"}
    assert "image_ref" in source.looked_for("reference")


def test_agnostic_variants(tmp_path: Path) -> None:
    root = layouts.viton(tmp_path)
    source = VitonHd(str(root), refined=0.25)
    record = source[1]
    assert [p.parent.name for p in record.agnostic] == ["agnostic", "agnostic_refined"]
    assert record.agnostic_shares == (0.75, 0.25)
    (root / "train/agnostic_refined/00013_00.jpg").unlink()
    record = VitonHd(str(root), refined=0.25)[1]
    assert [p.parent.name for p in record.agnostic] == ["agnostic"]
    assert record.agnostic_shares == (0.75,)


@pytest.mark.parametrize("columns", [2, 3])
def test_dresscode(tmp_path: Path, columns: int) -> None:
    root = str(layouts.dresscode(tmp_path, columns))
    source = DressCode(root, enhanced=0.25)
    assert [r.category for r in map(source.__getitem__, range(3))] == ["upper", "lower", "dresses"]
    assert paths(source[1], tmp_path) == {
        "garment": "lower_body/images/020714_1.jpg",
        "target": "lower_body/images/020714_0.jpg",
        "person": "lower_body/person/020714_0.jpg",
        "agnostic": (
            "lower_body/agnostic_catvton/020714_6.jpg",
            "lower_body/agnostic_enhanced/020714_6.jpg",
        ),
        "references": ("lower_body/image_ref/020714_0.jpg",),
        "mask": "lower_body/agnostic_masks_catvton/020714_3.png",
        "dense": "lower_body/dense/020714_5.png",
    }
    assert source[1].extra == {"file": "020714_0.jpg", "folder": "lower_body"}
    unpaired = DressCode(root, split="test", pairs="unpaired", categories=("dresses",))
    assert len(unpaired) == 1
    found = paths(unpaired[0], tmp_path)
    assert found["garment"] == "dresses/images/050002_1.jpg"
    assert found["references"] == ("dresses/image_ref/050002_0.jpg",)
    assert found["agnostic"] == ("dresses/agnostic_catvton/050001_6.jpg",)
    assert unpaired.name == "dresscode/test/unpaired/dresses"
    assert len(DressCode(root, split="test")) == 3


def test_fashiontryon(tmp_path: Path) -> None:
    root = str(layouts.fashiontryon(tmp_path))
    found = paths(FashionTryOn(root)[0], tmp_path)
    assert found["garment"] == "train/cloth/11111.jpg"
    assert found["references"] == ("train/image_ref/11111_a.jpg",)
    other = paths(FashionTryOn(root, pairs="unpaired")[0], tmp_path)
    assert other["target"] == "train/images/11111_a.jpg"
    assert other["garment"] == "train/cloth/22222.jpg"
    assert other["references"] == ("train/image_ref/22222_b.jpg",)  # of the garment


def test_vivid_and_igpair(tmp_path: Path) -> None:
    root = str(layouts.by_category(tmp_path))
    assert paths(ViViD(root)[1], tmp_path)["references"] == ("upper_body/image_ref/00034_1.jpg",)
    other = ViViD(root, pairs="unpaired")[0]
    assert paths(other, tmp_path)["references"] == ("upper_body/image_ref/00034_1.jpg",)
    assert IgPair(root, pairs="unpaired")[0].references == ()
    assert len(IgPair(root)) == 4
    skipped = IgPair(root, skip=3)
    assert len(skipped) == 1
    assert skipped[0].category == "lower"


def test_in_the_wild(tmp_path: Path) -> None:
    layouts.write(tmp_path, ("cloth/b.png", "cloth/a.jpg", "person/a.jpg", "image_ref/b.png"))
    source = InTheWild(str(tmp_path))
    assert paths(source[0], tmp_path) == {
        "garment": "cloth/a.jpg", "person": "person/a.jpg", "agnostic": (), "references": (),
    }  # fmt: skip
    assert paths(source[1], tmp_path)["references"] == ("image_ref/b.png",)
    assert source.offers() == {"person", "reference"}


def test_combined(tmp_path: Path) -> None:
    source = Combined(str(layouts.combined(tmp_path)))
    assert len(source) == 2 + 3 + 2 + 4 + 4
    records = [source[i] for i in range(len(source))]
    assert [r.id for r in records] == [source.record_id(i) for i in range(len(source))]
    assert len({r.id for r in records}) == len(records)
    shares = {r.id.split("/")[0]: r.agnostic_shares for r in records}
    assert shares == {
        "viton": (0.5, 0.5), "dresscode": (0.75, 0.25), "fashiontryon": (0.6, 0.4), "vivid": (),
        "igpair": (),
    }  # fmt: skip
    assert source.offers() == {"target", "person", "agnostic", "reference"}
    assert source.report()["viton_records"] == 2
    two = Combined(str(tmp_path), sets=("vivid", "viton"))
    assert len(two) == 6
    assert two.record_id(4) == "viton/train/00006_00.jpg"
    with pytest.raises(IndexError, match="found 6"):
        two[6]


def test_combined_names_what_is_missing(tmp_path: Path) -> None:
    layouts.viton(tmp_path / "viton")
    with pytest.raises(DataError, match=r"missing DressCode, .*IGPair_processed.*data.source.sets"):
        len(Combined(str(tmp_path)))
    assert len(Combined(str(tmp_path), sets=("viton",))) == 2


@pytest.mark.parametrize("make", [VitonHd, DressCode, FashionTryOn, ViViD, IgPair, InTheWild])
def test_missing_root_is_named(make: type, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*data\.source\.root"):
        len(make(str(tmp_path / "nowhere")))


def test_missing_lists_and_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train/image.*data\.source\.root"):
        len(VitonHd(str(tmp_path)))
    with pytest.raises(DataError, match=r"train_pairs\.txt or .*train_pairs\.txt"):
        len(VitonHd(str(tmp_path), pairs="unpaired"))
    with pytest.raises(DataError, match=r"train_pairs\.txt \(3 columns\) or .* \(2 columns\)"):
        len(DressCode(str(tmp_path)))
    with pytest.raises(DataError, match=r"pairs\.txt"):
        len(ViViD(str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000001_0.jpg", r"train_pairs\.txt:1: expected 3 columns .*found 1: '000001_0.jpg'"),
        ("a_0.jpg b_1.jpg 3", r"category 0 \(upper\), 1 \(lower\) or 2 \(dresses\), found '3'"),
        ("../a_0.jpg b_1.jpg 0", r"train_pairs\.txt:1: .*'\.\.' is refused"),
        ("a_9.jpg b_1.jpg 0", r"ending in '_0.jpg' .*found 'a_9.jpg'"),
        ("a_0.jpg b_0.jpg 0", r"ending in '_1.jpg' .*found 'b_0.jpg'"),
    ],
)
def test_damaged_pair_lists(tmp_path: Path, line: str, message: str) -> None:
    root = layouts.dresscode(tmp_path)
    (root / "train_pairs.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        len(DressCode(str(root)))


def test_pairs_of_another_set(tmp_path: Path) -> None:
    """A list whose pictures are not there stops at once; a few missing ones are bad records."""
    root = layouts.viton(tmp_path)
    pairs = root / "train/train_pairs.txt"
    pairs.write_text("90001_00.jpg 00006_00.jpg\n90002_00.jpg 00006_00.jpg\n")
    source = VitonHd(str(root), pairs="unpaired")
    with pytest.raises(DataError, match=r"matched 0 of 2; .*train/image/90001_00.jpg"):
        len(source)
    pairs.write_text("00006_00.jpg 00013_00.jpg\n00013_00.jpg 99999_00.jpg\n")
    source = VitonHd(str(root), pairs="unpaired")
    assert len(source) == 2
    with pytest.raises(BadRecordError, match=r"missing_file: .*cloth/99999_00.jpg"):
        source[1]


def test_sources_are_descriptions(tmp_path: Path) -> None:
    root = str(layouts.viton(tmp_path))
    sources: list[TryOnSource] = [VitonHd(root), VitonHd(root, refined=0.5), VitonHd(root)]
    assert sources[0] == sources[2]
    assert len({s.fingerprint() for s in sources}) == 2
    again = pickle.loads(pickle.dumps(sources[0]))
    assert again[0] == sources[0][0]
    # Constructing touches no file.
    assert VitonHd("/no/such/folder").name == "viton-hd/train"


def test_lines(tmp_path: Path) -> None:
    rows = [
        {"garment": "g/1.png", "target": "t/1.png", "person": "p/1.png", "agnostic": "a/1.png",
         "references": ["r/1.png", "r/2.png"], "mask": "m/mask1.png", "category": "upper",
         "prompt": "a red shirt", "shop": 7},
        {"id": "two", "garment": "g/2.png", "agnostic": ["a/2.png", "a/3.png"], "paired": False},
    ]  # fmt: skip
    source = TryOnLines(layouts.lines(tmp_path, rows))
    first, second = source[0], source[1]
    assert paths(first, tmp_path) == {
        "garment": "g/1.png", "target": "t/1.png", "person": "p/1.png", "mask": "m/mask1.png",
        "agnostic": ("a/1.png",), "references": ("r/1.png", "r/2.png"),
    }  # fmt: skip
    assert (first.id, first.prompt, first.extra) == ("1", "a red shirt", {"shop": 7})
    assert (second.id, second.paired, second.target) == ("two", False, None)
    assert source.offers() == {"target", "person", "agnostic", "reference", "mask"}
    assert "'references' of" in source.looked_for("reference")


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"target": "t.png"}, "malformed_record", "picture path in 'garment'"),
        ({"garment": "../g.png"}, "malformed_record", "'..' is refused"),
        ({"garment": "g.png", "category": "hat"}, "malformed_record", "one of upper, lower"),
        ({"garment": "g.png", "paired": "no"}, "malformed_record", "true or false"),
        ({"garment": "g.png", "agnostic": 3}, "malformed_record", "expected a list"),
        ({"garment": 5}, "malformed_record", "expected text, found int"),
    ],
)
def test_bad_lines(tmp_path: Path, row: dict, reason: str, message: str) -> None:
    layouts.write(tmp_path, ("g.png",))
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"garment": "g.png"}) + "\n" + json.dumps(row) + "\n")
    source = TryOnLines(str(path))
    assert source[0].garment == tmp_path / "g.png"
    with pytest.raises(BadRecordError, match=message) as error:
        source[1]
    assert error.value.reason == reason


def test_misspelt_fields_and_missing_files(tmp_path: Path) -> None:
    layouts.write(tmp_path, ("g.png",))
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"garment": "g.png", "reference": "r.png"}) + "\n")
    with pytest.raises(DataError, match="did you mean 'references'"):
        len(TryOnLines(str(path)))
    path.write_text(json.dumps({"garment": "elsewhere/g.png"}) + "\n")
    with pytest.raises(DataError, match=r"matched 0 of 1; first annotation path elsewhere/g\.png"):
        len(TryOnLines(str(path)))
    with pytest.raises(DataError, match="no such file"):
        len(TryOnLines(str(tmp_path / "none.jsonl")))
