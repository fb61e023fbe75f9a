"""FineHARD in its published layout, both kinds of picture paths, and its irregularities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError
from data_pipelines.sources import FineHard, streamed_json
from data_pipelines.sources.finehard import picture_path
from tests.data.conftest import encoded, picture

NEGATIVES = {str(i): f"negative {i}" for i in (3, 1, 2, 0, 4, 5, 6, 7, 8, 9)}


def entry(part: int, folder: int, key: int, boxes: int = 1, prefix: str = "", **more) -> dict:
    path = f"{prefix}coyo_image_{part}/{folder:05d}/{folder:05d}{key:04d}.jpg"
    info = [
        {
            "bbox": [0.1, 0.2, 0.3 + 0.05 * i, 0.4, *([0.7] if i % 2 == 0 else [])],
            "short_expr": f"short {i}",
            "long_expr": f"long {i}",
            "flag_short_neg": int(i % 2 == 0),
            **({"short_expr_negs": NEGATIVES} if i % 2 == 0 else {}),
        }
        for i in range(boxes)
    ]
    return {
        "f_path": path,
        "short_caption": f"short caption {key}",
        "caption": f"A long caption of {key} – “quoted”",
        "bbox_info": info,
        **more,
    }


OFFICIAL, EARLY = "grit-20m/data-12m/", "/mnt/disk7/someone/grit-12m/"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two parts, two folders each, three pictures per folder; one picture is gone."""
    files: dict[str, list] = {"2025_a_results_h1.json": [], "2025_b_results_h2.json": []}
    for n, (part, folder) in enumerate(((0, 1), (0, 2), (20, 1), (20, 17))):
        for key in range(3):
            item = entry(part, folder, key, boxes=(0, 1, 6)[key], prefix=(OFFICIAL, EARLY, "")[key])
            files[sorted(files)[n // 2]].append(item)
            if (part, folder, key) == (20, 17, 2):
                continue
            path = tmp_path / picture_path(item["f_path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(30, 20), "JPEG"))
    del files["2025_a_results_h1.json"][0]["bbox_info"]
    (tmp_path / "jsonfiles").mkdir()
    for name, items in files.items():
        text = json.dumps(items, ensure_ascii=False)
        (tmp_path / "jsonfiles" / name).write_text(text, "utf-8")
    return tmp_path


def test_both_path_layouts_match(root):
    source = FineHard(str(root))
    assert source.report() == {
        "records": 11,
        "annotations": 12,
        "matched": 11,
        "missing": 1,
        "duplicate": 0,
    }
    records = [source[i] for i in range(len(source))]
    assert all(r.image.is_file() for r in records)
    assert records[2].id == "coyo_image_0/00001/000010002.jpg"
    assert records[4].long_caption == "A long caption of 1 – “quoted”"


def test_regions(root):
    record = FineHard(str(root))[2]
    assert len(record.regions) == 6
    assert [r.score for r in record.regions] == [0.7, None] * 3
    assert record.regions[1].negatives == ()
    assert record.regions[0].negatives == tuple(NEGATIVES.values())
    assert record.regions[0].box == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert record.regions[0].long_phrase == "long 0"
    assert FineHard(str(root))[0].regions == ()


@pytest.mark.parametrize("window", [100, 1 << 22])
def test_offsets_hold_at_any_window(root, window, monkeypatch):
    monkeypatch.setattr(streamed_json, "_WINDOW", window)
    source = FineHard(str(root))
    assert [source[i].short_captions[0][-1] for i in range(11)] == list("01201201201")


@pytest.mark.parametrize(
    "path",
    [
        "grit-20m/data-12m/coyo_image_3/00017/000170042.jpg",
        "/data/oss/grit-20m/data-12m/coyo_image_3/00017/000170042.jpg",
        "data\\grit-12m\\coyo_image_3\\00017\\000170042.jpg",
        "coyo_image_3/00017/000170042.jpg",
    ],
)
def test_stale_folders_are_dropped(path):
    assert picture_path(path) == "coyo_image_3/00017/000170042.jpg"


def test_paths_without_the_usual_folder():
    assert picture_path("grit-20m/data-12m/a/b.jpg") == "a/b.jpg"
    with pytest.raises(BadRecordError, match=r"'\.\.' is refused"):
        picture_path("coyo_image_3/../../etc/passwd")


def test_nothing_matches(root):
    with pytest.raises(DataError) as caught:
        len(FineHard(str(root), images="jsonfiles"))
    assert "matched 0 of 12; first annotation path coyo_image_0/00001/000010000.jpg" in str(
        caught.value
    )


def test_min_match(root):
    assert len(FineHard(str(root), min_match=0.9)) == 11
    with pytest.raises(DataError, match="matched 11 of 12"):
        len(FineHard(str(root), min_match=0.95))


def test_list_and_single_file(root):
    names = sorted(p.name for p in (root / "jsonfiles").iterdir())
    (root / "list.txt").write_text(f"jsonfiles/{names[1]}\n\n")
    assert FineHard(str(root), annotations="list.txt").report()["annotations"] == 6
    assert len(FineHard(str(root), annotations=f"jsonfiles/{names[0]}")) == 6
    for bad in ("nothing", "list2.txt"):
        with pytest.raises(DataError, match="expected a folder of"):
            len(FineHard(str(root), annotations=bad))


def test_malformed_entries_are_told_one_by_one(root):
    good = entry(0, 1, 0)
    items = [
        good,
        {"caption": "no path"},
        7,
        {**good, "bbox_info": [{"bbox": [0.1, 0.2]}]},
        {**good, "bbox_info": "none"},
        {**good, "f_path": "coyo_image_0/../x.jpg"},
    ]
    (root / "odd.json").write_text(json.dumps(items))
    source = FineHard(str(root), annotations="odd.json")
    assert len(source) == 6
    for i in range(1, 6):
        with pytest.raises(BadRecordError, match="malformed_record"):
            source[i]
    assert source.record_id(2).startswith("odd.json@")


def test_duplicates_are_counted(root):
    (root / "twice.json").write_text(json.dumps([entry(0, 1, 0)] * 3))
    assert FineHard(str(root), annotations="twice.json").report()["duplicate"] == 2


def test_index_is_kept_and_rebuilt(root, monkeypatch):
    source = FineHard(str(root), index_dir=str(root / "index"))
    first = [source[i].id for i in range(len(source))]
    (saved,) = (root / "index").iterdir()
    monkeypatch.setattr(FineHard, "_build", lambda self: pytest.fail("index was not used"))
    again = FineHard(str(root), index_dir=str(root / "index"))
    assert [again[i].id for i in range(len(again))] == first
    monkeypatch.undo()
    saved.write_bytes(saved.read_bytes()[:100])
    damaged = FineHard(str(root), index_dir=str(root / "index"))
    assert [damaged[i].id for i in range(len(damaged))] == first
