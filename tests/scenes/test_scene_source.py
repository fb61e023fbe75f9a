"""`Scenes` as a source of records, and the contact sheet."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.scenes import HELD_OUT, Scenes, long_caption, sample_scene, short_caption
from data_pipelines.sources.base import Source


def test_records_are_complete() -> None:
    source = Scenes(seed=2, start=10, count=20, image_size=48, short_captions=2)
    assert isinstance(source, Source)
    assert len(source) == 20
    record = source[3]
    scene = sample_scene(2, 13)
    assert isinstance(record.image, np.ndarray)
    assert record.image.shape == (48, 48, 3)
    assert record.image.dtype == np.uint8
    assert record.short_captions == (short_caption(scene), short_caption(scene, "en", 1))
    assert record.long_caption == long_caption(scene)
    assert len(record.regions) == len(scene.objects)
    for region in record.regions:
        x1, y1, x2, y2 = region.box
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
        assert len(region.negatives) == 10


def test_chinese_records() -> None:
    record = Scenes(language="zh", image_size=32)[0]
    assert record.long_caption == long_caption(sample_scene(0, 0), "zh")
    assert record.regions[0].phrase.startswith("一")


def test_order_and_pickling_do_not_matter() -> None:
    source = Scenes(count=30, image_size=32)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    backwards = {i: again[i] for i in reversed(range(5))}
    for i in range(5):
        np.testing.assert_array_equal(source[i].image, backwards[i].image)
        assert source[i].regions == backwards[i].regions


def test_a_new_process_makes_the_same_record() -> None:
    code = (
        "import hashlib; from data_pipelines.scenes import Scenes; r = Scenes(image_size=40)[77];"
        "print(hashlib.sha256(r.image.tobytes() + repr(r.regions).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    outs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
        ).stdout
        for _ in range(2)
    ]
    assert outs[0] == outs[1]


def test_ids_are_unique_and_belong_to_the_scene() -> None:
    train, held = Scenes(count=50, image_size=32), Scenes(start=HELD_OUT, count=50, image_size=32)
    ids = [source.record_id(i) for source in (train, held) for i in range(50)]
    assert len(set(ids)) == 100
    assert train[7].id == train.record_id(7)
    assert Scenes(start=5, image_size=32)[2].id == train[7].id


def test_ranges_that_do_not_meet_share_nothing() -> None:
    train, held = Scenes(count=300), Scenes(start=HELD_OUT, count=300)
    captions = [{long_caption(sample_scene(s.seed, s.start + i)) for i in range(300)}
                for s in (train, held)]  # fmt: skip
    assert not captions[0] & captions[1]


def test_fingerprint_follows_every_field() -> None:
    base = Scenes()
    assert base.fingerprint() == Scenes().fingerprint()
    changes = {"seed": 1, "start": 1, "count": 9, "image_size": 32, "language": "zh",
               "short_captions": 2, "settings": ("table",), "coloured_labels": True,
               "places": True}  # fmt: skip
    assert set(changes) == {f.name for f in dataclasses.fields(Scenes)}
    prints = {dataclasses.replace(base, **{k: v}).fingerprint() for k, v in changes.items()}
    assert len(prints | {base.fingerprint()}) == len(changes) + 1


@pytest.mark.parametrize("index", [-1, 10, 11])
def test_outside_index_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"expected 0 <= index < 10, found {index}"):
        Scenes(count=10)[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language": "fr"}, "language: expected one of en, zh, found 'fr'"),
        ({"settings": ("moon",)}, "Scenes.settings: unknown moon; known: table"),
        ({"count": 0}, "Scenes.count: expected at least 1, found 0"),
        ({"start": -1}, "Scenes.start: expected at least 0, found -1"),
        ({"places": True, "language": "zh"}, 'Scenes.places: .*expected language "en", found "zh"'),
        ({"image_size": 4}, "Scenes.image_size: expected at least 16, found 4"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**change)


def test_contact_sheet_command(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    subprocess.run(
        [sys.executable, "-m", "data_pipelines.scenes", "--sheet", str(out)],
        check=True,
        cwd=Path(__file__).parents[2],
        capture_output=True,
    )
    with Image.open(out) as sheet:
        assert sheet.width > 900
        assert sheet.height > 700
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
    assert out.stat().st_size < 400_000
