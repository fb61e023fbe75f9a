"""Large JSON element by element, with byte offsets."""

from __future__ import annotations

import json

import pytest

from data_pipelines.batch import DataError
from data_pipelines.sources import streamed_json
from data_pipelines.sources.streamed_json import exact, iter_elements, line_rows

ITEMS = [
    {"a": "plain", "n": 1.5e3, "deep": [[1, 2], {"x": "]}{["}]},
    {"a": 'quote " and \\ and \u2028', "n": -0},
    {"a": "中文 é 😀"},
    12345,
    "text",
    None,
    [],
    {},
]


@pytest.fixture(params=[8, 64, 1 << 22], ids=["window8", "window64", "whole"])
def window(request, monkeypatch):
    """Windows smaller than an element, so that every boundary is met."""
    monkeypatch.setattr(streamed_json, "_WINDOW", request.param)


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_top_level_array(tmp_path, indent, ascii_only):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ITEMS, indent=indent, ensure_ascii=ascii_only), "utf-8")
    found = list(iter_elements(path))
    assert [exact(path, e) for e in found] == ITEMS
    assert {e.key for e in found} == {""}


@pytest.mark.usefixtures("window")
def test_arrays_of_an_object(tmp_path):
    path = tmp_path / "a.json"
    document = {"info": {"year": 2017}, "images": ITEMS, "empty": [], "n": 7, "other": [1, 22, 333]}
    path.write_text(json.dumps(document), "utf-8")
    every = [(e.key, exact(path, e)) for e in iter_elements(path)]
    assert every == [("images", i) for i in ITEMS] + [("other", i) for i in (1, 22, 333)]
    some = [exact(path, e) for e in iter_elements(path, ["other"])]
    assert some == [1, 22, 333]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("7", "expected '\\['"),
        ('[{"a": 1}', "expected ',', found ''"),
        ('[{"a": 1} {"a": 2}]', "byte 10: expected ','"),
        ('[{"a": }]', "byte 1: not JSON"),
        ('[{"a": "never ends', "not JSON"),
    ],
)
def test_broken_documents_name_the_byte(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(iter_elements(path))


def test_line_rows(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n\n{"b": "\xc3\xa9"}\r\n')
    (tmp_path / "b").write_bytes(b'{"c": 3}')
    rows = line_rows([tmp_path / "a", tmp_path / "b"])
    assert [json.loads(rows.read(i)) for i in range(len(rows))] == [{"a": 1}, {"b": "é"}, {"c": 3}]
