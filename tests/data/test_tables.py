"""ArrayRecord, parquet and TFDS sources."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.batch import DataError
from data_pipelines.images import decode_rgb
from data_pipelines.records import BadRecordError, ImageTextRecord, Region
from data_pipelines.sources import ArrayRecords, InMemory, Parquet, Tfds, write_array_record
from data_pipelines.sources.record_codec import decode_record, encode_record
from tests.data.conftest import encoded, picture, record

PNG = encoded(picture())


def test_codec_round_trip():
    region = Region((0.1, 0.2, 0.3, 0.4), "p", "long p", ("n", "米"), "label", 0.5)
    full = ImageTextRecord("id é", PNG, ("a", "b"), "long", (region,), {"k": [1, 2.5, None, "x"]})
    assert decode_record(encode_record(full)) == full
    bare = ImageTextRecord("1", PNG)
    assert decode_record(encode_record(bare)) == bare


def test_codec_keeps_arrays_and_reads_paths(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    again = decode_record(encode_record(ImageTextRecord("1", pixels)))
    assert np.array_equal(again.image, pixels)
    (tmp_path / "a.png").write_bytes(PNG)
    assert decode_record(encode_record(ImageTextRecord("1", tmp_path / "a.png"))).image == PNG
    numbers = {"ids": np.arange(3), "n": np.int64(4)}
    again = decode_record(encode_record(ImageTextRecord("1", PNG, extra=numbers)))
    assert again.extra == {"ids": [0, 1, 2], "n": 4}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ImageTextRecord("1", PNG, ("\ud800",)), "invalid_utf8"),
        (ImageTextRecord("1", PNG, extra={"f": print}), "malformed_record"),
        (ImageTextRecord("1", np.zeros((2, 2, 3))), "malformed_record"),
    ],
)
def test_codec_refuses(bad, reason):
    with pytest.raises(BadRecordError, match=reason):
        encode_record(bad)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1v\x02", b"\x80", b"\x05"])
def test_codec_on_damaged_bytes(data):
    with pytest.raises(BadRecordError, match="malformed_record"):
        decode_record(data)


@pytest.mark.parametrize("shards", [1, 3])
def test_any_source_can_be_built_into_array_record(tmp_path, shards):
    records = [record(i, i % 4) for i in range(10)]
    records[4] = dataclasses.replace(records[4], image=b"broken")
    records[6] = dataclasses.replace(records[6], short_captions=("",))
    seen = []
    report = write_array_record(
        InMemory(tuple(records), "mine"),
        tmp_path / "built",
        shards=shards,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.written == 8
    assert report.left_out == {"undecodable_image": 1, "empty_caption": 1}
    assert {q.record_id for q in report.examples} == {"r4", "r6"}
    assert seen == [(i + 1, 10) for i in range(10)]
    source = ArrayRecords(str(tmp_path / "built"))
    good = [r for i, r in enumerate(records) if i not in (4, 6)]
    assert [source[i] for i in range(len(source))] == good
    assert pickle.loads(pickle.dumps(source))[7] == good[7]
    assert source.name == "built"
    assert len(source.files) == shards
    about = json.loads((tmp_path / "built" / "about.json").read_text("utf-8"))
    assert about["records"] == 8
    assert about["left_out"] == report.left_out
    assert not list((tmp_path / "built").glob("*.partial"))


def test_nothing_is_overwritten(tmp_path):
    write_array_record(InMemory((record(0),)), tmp_path)
    with pytest.raises(DataError, match="already holds"):
        write_array_record(InMemory((record(0),)), tmp_path)


def test_nothing_usable_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="none of 1 records can be used"):
        write_array_record(InMemory((record(0, image=b"x"),)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_array_record_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no ArrayRecord file"):
        len(ArrayRecords(str(tmp_path)))
    (tmp_path / "a.array_record").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot open as ArrayRecord"):
        len(ArrayRecords(str(tmp_path)))


def test_parquet(tmp_path):
    regions = [[{"box": [0.1, 0.2, 0.3, 0.4], "phrase": "kettle", "negatives": ["cup"]}], [], None]
    for part in range(2):
        table = pa.table(
            {
                "jpg": [{"bytes": PNG, "path": None}, {"bytes": None, "path": "x"}, None],
                "TEXT": [f"caption {part}", "b", "c"],
                "long_caption": ["long", None, None],
                "regions": regions,
                "similarity": [0.1, 0.2, 0.3],
            }
        )
        pq.write_table(table, tmp_path / f"part-{part}.parquet", row_group_size=2)
    source = Parquet(str(tmp_path / "*.parquet"), columns=(("image", "jpg"), ("captions", "TEXT")))
    assert len(source) == 6
    first = source[3]
    assert (first.id, first.image, first.short_captions) == ("3", PNG, ("caption 1",))
    assert first.long_caption == "long"
    assert first.regions[0].negatives == ("cup",)
    assert source[0].short_captions == ("caption 0",)
    for index in (1, 2):
        with pytest.raises(BadRecordError, match="missing_file"):
            source[index]
    with pytest.raises(DataError, match="expected a picture column 'image'"):
        len(Parquet(str(tmp_path / "*.parquet")))


def test_parquet_with_plain_bytes_and_bad_text(tmp_path):
    raw = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [PNG, PNG], "caption": raw}), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"))
    assert source[0].short_captions == ("ok",)
    with pytest.raises(BadRecordError, match="invalid_utf8"):
        source[1]


def test_parquet_row_groups_are_read_once(tmp_path, monkeypatch):
    table = pa.table({"image": [PNG] * 40, "caption": [str(i) for i in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    source = Parquet(str(tmp_path / "a.parquet"), cached_groups=4)
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, g, **k: (reads.append(g), original(self, g, **k))[1],
    )
    order = np.random.default_rng(0).permutation(40)
    assert [source[int(i)].short_captions[0] for i in order] == [str(i) for i in order]
    assert sorted(reads) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A small dataset, prepared by TFDS itself as ArrayRecord."""
    import tensorflow_datasets as tfds

    class ToyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # defined here, as in a notebook: nothing beside the code to look up

        def _info(self):
            features = tfds.features
            box = {
                "bbox": features.BBoxFeature(),
                "label": features.ClassLabel(names=["cup", "dog"]),
            }
            return self.dataset_info_from_configs(
                features=features.FeaturesDict(
                    {
                        "image": features.Image(encoding_format="png"),
                        "captions": features.Sequence({"text": features.Text()}),
                        "title": features.Text(),
                        "objects": features.Sequence(box),
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            box = {"bbox": tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=0.9), "label": 1}
            for i in range(4):
                yield (
                    i,
                    {
                        "image": io.BytesIO(PNG),
                        "captions": [{"text": f"two dogs {i}"}, {"text": "a café"}],
                        "title": b"bad \xff" if i == 3 else f"title {i}",
                        "objects": [box] * i,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    builder = ToyCaptions(data_dir=str(folder), file_format="array_record")
    no_cloud = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=no_cloud)
    return str(folder)


@pytest.fixture
def tfds(tfds_folder):
    return Tfds("toy_captions:1.0.0", "train", tfds_folder, boxes="objects/bbox")


def test_tfds(tfds):
    labelled = dataclasses.replace(tfds, labels="objects/label", phrase="a {name}")
    assert len(labelled) == 4
    records = sorted((labelled[i] for i in range(4)), key=lambda r: len(r.regions))
    assert [r.short_captions for r in records] == [(f"two dogs {i}", "a café") for i in range(4)]
    assert [len(r.regions) for r in records] == [0, 1, 2, 3]
    region = records[3].regions[2]
    assert region.box == pytest.approx((0.2, 0.1, 0.9, 0.5))
    assert (region.label, region.phrase) == ("dog", "a dog")
    assert records[0].image.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(decode_rgb(records[0].image)), np.asarray(decode_rgb(PNG)))
    assert "tensorflow" not in sys.modules


def test_tfds_without_class_names_and_with_a_single_text(tfds):
    titled = dataclasses.replace(tfds, captions="title")
    outcomes = []
    for i in range(4):
        try:
            outcomes.append(titled[i].short_captions)
        except BadRecordError as e:
            outcomes.append(e.reason)
    assert sorted(map(str, outcomes)) == sorted(
        map(str, [*((f"title {i}",) for i in range(3)), "invalid_utf8"])
    )
    assert {r.label for i in range(4) for r in tfds[i].regions} == {None}


def test_tfds_problems(tfds, monkeypatch):
    with pytest.raises(DataError, match="no 'sentence' in"):
        dataclasses.replace(tfds, captions="captions/sentence")[0]
    with pytest.raises(DataError, match="has no class names"):
        dataclasses.replace(tfds, labels="objects/bbox")[0]
    with pytest.raises(DataError, match=r"cannot open.*tfds build --file_format=array_record"):
        len(dataclasses.replace(tfds, dataset="other"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install \"jaxmods\[data\]\""):
        len(dataclasses.replace(tfds))
