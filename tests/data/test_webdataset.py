"""Webdataset shards as img2dataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError
from data_pipelines.sources import WebDataset
from tests.data.conftest import encoded, picture

JPEG = encoded(picture(), "JPEG")


def shard(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def sidecar(**fields) -> bytes:
    return json.dumps({"url": "x", "status": "success", **fields}).encode()


@pytest.fixture
def pattern(tmp_path):
    region = {"box": [0.1, 0.2, 0.3, 0.4], "phrase": "kettle", "negatives": ["cup"]}
    shard(
        tmp_path / "00017.tar",
        [
            ("000170042.jpg", JPEG),
            ("000170042.txt", "a kettle, grüß".encode()),
            ("000170042.json", sidecar(caption="not this", long_caption="long", regions=[region])),
            ("000170044.webp", encoded(picture(), "WEBP")),
            ("000170044.json", sidecar(caption="from json", key="000170044")),
            ("000170045.txt", b"no picture"),
        ],
    )
    shard(
        tmp_path / "00018.tar",
        [
            ("a/000180001.txt", b"first"),
            ("a/000180001.jpg", JPEG),
            ("b/000180001.jpg", JPEG),
            ("b/000180001.txt", b"bad \xff text"),
            ("b/000180001.cls", b"3"),
            ("b/000180002.jpg", JPEG),
            ("b/000180002.jpg", b"again"),
        ],
    )
    return str(tmp_path / "*.tar")


def test_samples(pattern):
    source = WebDataset(pattern)
    assert len(source) == 6
    first = source[0]
    assert first.id == "00017/000170042"
    assert first.image == JPEG
    assert first.short_captions == ("a kettle, grüß",)
    assert first.long_caption == "long"
    assert first.regions[0].negatives == ("cup",)
    assert first.extra["status"] == "success"
    assert source[1].short_captions == ("from json",)
    assert source[3].id == "00018/a/000180001"
    assert source[5].short_captions == ()
    assert source[5].image == JPEG
    assert source.report() == {"records": 6, "missing": 1, "other_members": 1, "duplicate": 1}


def test_bad_samples(pattern):
    source = WebDataset(pattern)
    with pytest.raises(BadRecordError, match="missing_file"):
        source[2]
    with pytest.raises(BadRecordError, match="invalid_utf8"):
        source[4]
    assert source.record_id(4) == "00018/b/000180001"


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../b.jpg", "a\\..\\b.jpg"])
def test_names_that_leave_the_archive(tmp_path, name):
    path = shard(tmp_path / "evil.tar", [("good.jpg", JPEG), (name, JPEG)])
    with pytest.raises(DataError, match="refused"):
        len(WebDataset(path))


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="no plain file"):
        len(WebDataset(str(tmp_path / "link.tar")))


def test_compressed_or_broken_shards(tmp_path):
    packed = shard(tmp_path / "a.tar", [("a.jpg", JPEG)], "w:gz")
    with pytest.raises(DataError, match="not an uncompressed tar"):
        len(WebDataset(packed))
    with pytest.raises(DataError, match="no tar file at"):
        len(WebDataset(str(tmp_path / "none-*.tar")))


def test_index_is_kept(pattern, tmp_path, monkeypatch):
    ids = [WebDataset(pattern, index_dir=str(tmp_path / "i")).record_id(i) for i in range(6)]
    monkeypatch.setattr(WebDataset, "_build", lambda self: pytest.fail("index was not used"))
    again = WebDataset(pattern, index_dir=str(tmp_path / "i"))
    assert [again.record_id(i) for i in range(6)] == ids
    assert again[0].image == JPEG
