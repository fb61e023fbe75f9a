"""COCO captions and instances in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.images import decode_rgb
from data_pipelines.sources import Coco
from data_pipelines.validation import check_record
from tests.data.conftest import encoded, picture


def write_coco(root: Path, split: str = "val2017") -> Path:
    """Four images: plain, grey with a crowd, without annotation, and one whose file is gone."""
    images = [
        {"id": 139, "file_name": "000000000139.jpg", "width": 40, "height": 20},
        {"id": 7, "file_name": "000000000007.jpg", "width": 30, "height": 30},
        {"id": 500, "file_name": "000000000500.jpg", "width": 20, "height": 40},
        {"id": 501, "file_name": "000000000501.jpg", "width": 20, "height": 40},
    ]
    captions = [
        {"id": n, "image_id": i, "caption": f"caption {k} of {i} \n"}
        for n, (i, k) in enumerate((i, k) for k in range(6) for i in (7, 139, 500, 501))
    ]
    captions[1]["caption"] = "un café – été"
    categories = [
        {"id": 64, "name": "potted plant", "supercategory": "furniture"},
        {"id": 1, "name": "person", "supercategory": "person"},
    ]
    rle = {"counts": [3, 5], "size": [30, 30]}
    annotations = [
        _box(11, 7, 1, [3, 6, 9, 12]),
        {**_box(12, 7, 1, [0, 0, 30, 30]), "iscrowd": 1, "segmentation": rle},
        _box(13, 139, 64, [4, 2, 16, 8]),
        _box(14, 7, 64, [15, 15, 15.3, 15]),
        _box(15, 139, 1, [0, 0, 40, 20]),
        _box(16, 999, 1, [0, 0, 4, 2]),
    ]
    (root / "annotations").mkdir(parents=True)
    (root / split).mkdir()
    for image in images[:3]:
        mode = "L" if image["id"] == 7 else "RGB"
        data = encoded(picture(image["width"], image["height"], mode), "JPEG")
        (root / split / image["file_name"]).write_bytes(data)
    for kind, rows in (("captions", captions), ("instances", annotations)):
        document = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": rows}
        if kind == "instances":
            document["categories"] = categories
        path = root / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    return root


def _box(number: int, image: int, category: int, bbox: list[float]) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": 1.0,
        "iscrowd": 0,
        "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
    }


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path / "coco")


def test_records(root):
    source = Coco(str(root), "val2017")
    assert [source[i].id for i in range(len(source))] == ["139", "7", "500", "501"]
    first = source[0]
    assert first.short_captions == (
        "un café – été",
        *(f"caption {k} of 139 \n" for k in range(1, 5)),
    )
    assert [r.label for r in first.regions] == ["potted plant", "person"]
    assert first.regions[0].box == pytest.approx((0.1, 0.1, 0.5, 0.5))
    assert first.extra == {
        "image_id": 139,
        "width": 40,
        "height": 20,
        "category_ids": [64, 1],
        "annotation_ids": [13, 15],
    }
    assert source.name == "coco/val2017"


def test_counts(root):
    assert Coco(str(root), "val2017").report() == {
        "records": 4,
        "matched": 3,
        "missing": 1,
        "crowd": 1,
        "boxes_of_other_images": 1,
        "without_boxes": 2,
    }


def test_box_slightly_past_the_border_is_clipped_later(root):
    checked = check_record(Coco(str(root), "val2017")[1])
    assert checked.record.regions[1].box[2] == 1.0
    assert checked.repaired == {"box_clipped": 1}


def test_grey_picture_and_image_without_boxes(root):
    source = Coco(str(root), "val2017")
    pixels = np.asarray(decode_rgb(source[1].image))
    assert pixels.shape == (30, 30, 3)
    assert source[2].regions == ()


def test_phrase_template(root):
    record = Coco(str(root), "val2017", phrase="a photo of a {name}.")[0]
    assert record.regions[0].phrase == "a photo of a potted plant."
    assert record.regions[0].label == "potted plant"
    with pytest.raises(ValueError, match="name"):
        Coco(str(root), phrase="thing")


def test_captions_only(root):
    (root / "annotations" / "instances_val2017.json").unlink()
    source = Coco(str(root), "val2017", instances=False, captions=2)
    assert source[0].regions == ()
    assert len(source[0].short_captions) == 2
    with pytest.raises(DataError, match="instances_val2017"):
        len(Coco(str(root), "val2017"))


def test_pictures_in_another_place(root):
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(DataError, match="matched 0 of 4; first annotation path 000000000139"):
        len(Coco(str(root), "val2017"))


def test_category_names(root):
    assert Coco(str(root), "val2017").category_names() == {64: "potted plant", 1: "person"}


def test_lvis_names_come_from_the_url(root):
    path = root / "annotations" / "captions_val2017.json"
    document = json.loads(path.read_text("utf-8"))
    for image in document["images"]:
        image["coco_url"] = f"somewhere/train2017/{image.pop('file_name')}"
    path.write_text(json.dumps(document))
    assert Coco(str(root), "val2017")[0].image == root / "val2017" / "000000000139.jpg"


COCO_MINI = Path(__file__).parents[3] / "shared" / "data" / "coco_mini"


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_photographs_where_present(split, tmp_path):
    """The real subset where it lies beside the checkout; the synthetic folder elsewhere."""
    real = COCO_MINI.is_dir()
    root = COCO_MINI if real else write_coco(tmp_path / "coco", split)
    source = Coco(str(root), split)
    usable = [i for i in range(len(source)) if source[i].image.is_file()]
    assert len(usable) == ({"train2017": 80, "val2017": 79}[split] if real else 3)
    assert all(len(source[i].short_captions) == 5 for i in usable)
    boxes = sum(len(check_record(source[i]).record.regions) for i in usable)
    crowd = source.report()["crowd"]
    assert boxes + crowd == ({"train2017": 739, "val2017": 624}[split] if real else 5)
