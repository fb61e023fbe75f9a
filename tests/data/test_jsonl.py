"""Own data: JSON lines with a folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError
from data_pipelines.sources import JsonLines
from data_pipelines.sources.fields import __doc__ as fields_doc
from tests.data.conftest import encoded, picture


def write(folder: Path, lines: list, pictures: int = 3) -> str:
    (folder / "photos").mkdir(exist_ok=True)
    for i in range(pictures):
        (folder / "photos" / f"{i}.jpg").write_bytes(encoded(picture(40, 20, seed=i), "JPEG"))
    text = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
        for line in lines
    )
    (folder / "mine.jsonl").write_bytes(text)
    return str(folder / "mine.jsonl")


def line(i: int, **more) -> dict:
    return {"image": f"photos/{i}.jpg", "captions": f"caption {i}", **more}


def reason_of(source: JsonLines, index: int) -> str:
    with pytest.raises(BadRecordError) as caught:
        source[index]
    return caught.value.reason


def test_every_field(tmp_path):
    region = {
        "box": [4, 2, 20, 10],
        "phrase": "red kettle",
        "long_phrase": "a glossy red kettle",
        "negatives": ["blue kettle"],
        "label": "kettle",
        "score": 0.5,
    }
    full = line(
        0, captions=["one", "两"], long_caption="long", regions=[region], id="mine", topic=3
    )
    source = JsonLines(write(tmp_path, [full, line(1)]), boxes="xyxy")
    record = source[0]
    assert len(source) == 2
    assert (record.id, record.short_captions, record.long_caption) == (
        "mine",
        ("one", "两"),
        "long",
    )
    assert record.image == tmp_path / "photos" / "0.jpg"
    assert record.regions[0].box == (0.1, 0.1, 0.5, 0.5)  # size read from the picture
    assert record.regions[0].negatives == ("blue kettle",)
    assert record.regions[0].score == 0.5
    assert record.extra == {"topic": 3}
    assert source[1].id == "photos/1.jpg"
    assert source[1].short_captions == ("caption 1",)


def test_declared_size_is_used_without_reading_the_picture(tmp_path):
    given = line(0, width=100, height=50, regions=[{"box": [10, 5, 20, 10], "phrase": "x"}])
    source = JsonLines(write(tmp_path, [given]), boxes="xywh")
    (tmp_path / "photos" / "0.jpg").write_bytes(b"x")
    assert source[0].regions[0].box == pytest.approx((0.1, 0.1, 0.3, 0.3))


def test_the_documented_line_is_read(tmp_path):
    start = fields_doc.index('{"image"')
    example = json.loads(fields_doc[start : fields_doc.index("\n\n", start)])
    path = write(tmp_path, [example])
    (tmp_path / "photos" / "0001.jpg").write_bytes(encoded(picture()))
    record = JsonLines(path, boxes="xyxy")[0]
    assert record.short_captions == ("a red kettle on a stove",)
    assert record.regions[0].box == pytest.approx((134 / 640, 86 / 480, 403 / 640, 384 / 480))
    assert record.extra == {}


def test_bad_lines_have_reasons(tmp_path):
    source = JsonLines(
        write(
            tmp_path,
            [
                line(0),
                line(99),
                b"{not json",
                b'{"image": "photos/0.jpg", "captions": "\xff\xfe"}',
                b"[1, 2]",
                {"captions": "no picture"},
                line(0, captions=3),
                line(0, regions=[{"phrase": "no box"}]),
                line(0, regions=[{"box": ["a", 1, 2, 3], "phrase": "x"}]),
                line(0, image="../secrets.jpg"),
            ],
        ),
        min_match=0.1,
    )
    assert source[0].short_captions == ("caption 0",)
    assert not source[1].image.exists()  # missing_file when it is decoded
    assert reason_of(source, 3) == "invalid_utf8"
    assert [reason_of(source, i) for i in (2, 4, 5, 6, 7, 8, 9)] == ["malformed_record"] * 7
    assert source.record_id(2) == "row 3"


def test_wrong_root_is_said_before_training(tmp_path):
    path = write(tmp_path, [line(i) for i in range(12_000)], pictures=1)
    with pytest.raises(DataError) as caught:
        len(JsonLines(path, root=str(tmp_path / "photos"), checked=12_000))
    message = str(caught.value)
    assert "matched 0 of 12,000; first annotation path photos/0.jpg, first file 0.jpg" in message
    assert "Set data.root" in message


def test_wrong_box_convention_is_said_before_training(tmp_path):
    box = {"box": [30, 10, 20, 5], "phrase": "x"}
    path = write(tmp_path, [line(0, regions=[box]) for _ in range(20)])
    with pytest.raises(DataError, match="x2<=x1 in 100% of 20 records; this looks like xywh"):
        len(JsonLines(path, boxes="xyxy"))
    assert len(JsonLines(path, boxes="xywh")) == 20


@pytest.mark.parametrize(
    ("wrong", "right"), [({"captons": "x"}, "captions"), ({"region": []}, "regions")]
)
def test_misspelt_fields(tmp_path, wrong, right):
    path = write(tmp_path, [{"image": "photos/0.jpg", **wrong}])
    with pytest.raises(DataError, match=f"did you mean '{right}'"):
        len(JsonLines(path))


def test_misspelt_region_fields(tmp_path):
    region = {"box": [0.1, 0.1, 0.2, 0.2], "phase": "x"}
    with pytest.raises(DataError, match="did you mean 'phrase'"):
        len(JsonLines(write(tmp_path, [line(0, regions=[region])])))


def test_absent_or_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"no such file; expected JSON lines"):
        len(JsonLines(str(tmp_path / "none.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="found none"):
        len(JsonLines(str(tmp_path / "empty.jsonl")))
