"""Looking at data: the sheet, the page and the counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.batch import DataError
from data_pipelines.image_text import ImageTextPipeline
from data_pipelines.inspect import inspect_pipeline
from data_pipelines.sources import InMemory, Mixture
from tests.data.conftest import encoded, picture, record


@pytest.fixture
def pipeline(tokenizer_folder):
    records = [record(i, i % 6) for i in range(12)]
    records[3] = dataclasses.replace(records[3], image=b"broken")
    records[4] = dataclasses.replace(records[4], image=records[5].image, long_caption="x " * 200)
    records[6] = dataclasses.replace(records[6], short_captions=("short 7",))
    return ImageTextPipeline(
        source=InMemory(tuple(records)),
        tokenizer=tokenizer_folder,
        image_size=20,
        max_boxes=2,
        context_long=100,
    )


def test_counts(pipeline, tmp_path):
    facts = inspect_pipeline(pipeline, tmp_path, samples=5)
    found = facts["sources"]["memory"]
    assert found["records"] == found["looked_at"] == 12
    assert found["usable"] == 11
    assert found["damaged"]["undecodable_image"]["records"] == 1
    assert found["damaged"]["undecodable_image"]["first"].startswith("r3: ")
    assert found["duplicates"] == {"pictures": 1, "short_captions": 1}
    assert found["boxes"]["records_by_boxes"] == {"0": 2, "1": 2, "2": 2, ">2": 5}
    assert found["boxes"]["total"] == 27
    assert found["boxes"]["over_the_slots"] == 2 + 3 + 1 + 2 + 3  # boxes 3, 4, 5 twice, less r3
    assert found["pictures"]["smaller_than_input"] == 11
    assert found["captions"]["long"]["texts_cut"] == 1
    assert found["captions"]["long"]["tokens_cut"] == 202 - 100
    assert found["captions"]["long"]["tokens"]["max"] == 202
    json.dumps(facts)


def test_files_stand_alone(pipeline, tmp_path):
    facts = inspect_pipeline(pipeline, tmp_path / "new" / "folder", samples=5)
    sheet, page = facts["files"]
    with Image.open(sheet) as image:
        assert image.size[0] > 1000
        assert len(image.getcolors(1 << 24)) > 500
    text = Path(page).read_text("utf-8")
    assert "data:image/png;base64," in text
    assert "undecodable_image" in text
    assert "http" not in text.replace("http-equiv", "")


def test_several_sources(pipeline, tmp_path):
    more = InMemory((record(0), record(1)), "more")
    both = dataclasses.replace(pipeline, source=Mixture((pipeline.source, more)))
    facts = inspect_pipeline(both, tmp_path, samples=4)
    assert set(facts["sources"]) == {"memory", "more"}


def test_nothing_usable(pipeline, tmp_path):
    hopeless = dataclasses.replace(pipeline, source=InMemory((record(0, image=b"x"),)))
    with pytest.raises(DataError, match="no usable record among 1"):
        inspect_pipeline(hopeless, tmp_path)


def test_only_a_spread_is_read(pipeline, tmp_path):
    source = InMemory(tuple(record(i, image=encoded(picture())) for i in range(100)))
    facts = inspect_pipeline(dataclasses.replace(pipeline, source=source), tmp_path, scan=10)
    assert facts["sources"]["memory"]["looked_at"] == 10
    assert facts["sources"]["memory"]["records"] == 100
