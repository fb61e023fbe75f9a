"""`jaxmods data inspect` on try-on data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.inspect import inspect_pipeline
from data_pipelines.scenes.try_on import TryOnScenes
from data_pipelines.tryon import TryOnPipeline, TryOnRecords, VitonHd
from tests.tryon import layouts


def test_records_are_drawn_and_counted(tmp_path: Path) -> None:
    scenes = TryOnScenes(count=5)
    good = [scenes[i] for i in range(4)]
    records = (
        *good,
        dataclasses.replace(good[0], id="bad", agnostic=(b"no picture",)),
        dataclasses.replace(good[1], id="alone", references=()),
    )
    data = TryOnPipeline(TryOnRecords(records), 64, 48, 1)
    facts = inspect_pipeline(data, tmp_path / "out", samples=3)
    found = facts["sources"]["memory"]
    assert (found["looked_at"], found["usable"]) == (6, 5)
    assert found["damaged"]["undecodable_image"]["records"] == 1
    assert found["damaged"]["undecodable_image"]["first"].startswith("bad: ")
    assert found["lacking"] == {"no_reference": 1}
    assert [Path(f).stat().st_size > 1000 for f in facts["files"]] == [True, True]
    assert "no_reference" in Path(facts["files"][1]).read_text("utf-8")


def test_only_what_can_be_drawn_has_to_be_usable(tmp_path: Path) -> None:
    """Without agnostic photos in training, damaged ones do not matter."""
    record = dataclasses.replace(TryOnScenes(count=1)[0], agnostic=(b"no picture",))
    data = TryOnPipeline(TryOnRecords((record,)), 64, 48, 1, person_prob=1.0)
    assert inspect_pipeline(data, tmp_path)["sources"]["memory"]["usable"] == 1
    with pytest.raises(DataError, match="no usable record among 1"):
        inspect_pipeline(dataclasses.replace(data, person_prob=0.0), tmp_path)


def test_folders(tmp_path: Path) -> None:
    source = VitonHd(str(layouts.viton(tmp_path / "data")))
    facts = inspect_pipeline(TryOnPipeline(source, 32, 32, 2, mask_prob=0.5), tmp_path / "out")
    found = facts["sources"]["viton-hd/train"]
    assert found["with_mask"] == found["usable"] == 2
