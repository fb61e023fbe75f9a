"""Try-on evaluation: what is given to a model, what is scored, and against what."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import DataError
from data_pipelines.protocols import IncomparableError, TryOn, TryOnFolders
from data_pipelines.protocols.picture_scores import (
    KID,
    Networks,
    encoded,
    through_file,
    to_bytes,
    to_height,
)
from data_pipelines.protocols.try_on_folders import picture_id
from data_pipelines.protocols.try_on_published import published
from data_pipelines.records import TryOnRecord
from data_pipelines.scenes.try_on import TryOnScenes
from data_pipelines.tryon import TryOnRecords, VitonHd
from data_pipelines.tryon.transforms import Frame
from jaxmods.metrics.ssim import ssim
from tests.tryon import layouts

SCENES = TryOnScenes(seed=1, count=21)
FRAME = Frame(64, 48, 1)


class MeanColours(Networks):
    """In place of the Inception network: the mean colour of each quarter, and of LPIPS."""

    def check(self, scores, where) -> None:
        del scores, where

    @property
    def inception(self):
        def features(x: np.ndarray) -> np.ndarray:
            assert x.shape[1:] == (299, 299, 3)
            return (
                x[:, :298, :298].reshape(len(x), 2, 149, 2, 149, 3).mean((2, 4)).reshape(len(x), -1)
            )

        return features

    @property
    def lpips(self):
        return lambda a, b: np.abs(a - b).mean((1, 2, 3))


FAKE = MeanColours(("there",), "there")


def protocol(**options: Any) -> TryOn:
    return TryOn(options.pop("source", SCENES), FRAME, **{"batch_size": 4, **options})


class Model:
    """Stands for a system: remembers what it was given."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.calls: list[tuple[np.ndarray, ...]] = []

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        self.calls.append(arrays)
        return self.answer(*arrays)


def by_garment(name: str) -> dict[bytes, np.ndarray]:
    """A picture of each scene by its flat garment."""
    records = [SCENES[i] for i in range(len(SCENES))]
    return {
        r.garment.tobytes(): r.extra["truth"] if name == "truth" else getattr(r, name)
        for r in records
    }


def knows_the_truth(subject: np.ndarray, garment: np.ndarray, key: np.ndarray) -> np.ndarray:
    del subject, key
    truth = by_garment("truth")
    # as a system gives it: a little above the level, so that truncation comes out even
    return np.stack([truth[g.tobytes()] for g in garment]) / np.float32(255) + np.float32(1e-4)


def test_the_truth_is_perfect() -> None:
    result = protocol(encoding="png", networks=FAKE).run({"sample": knows_the_truth})
    m = {k: v.value for k, v in result.metrics.items()}
    assert m["garment_accuracy"] == m["colour_accuracy"] == m["pattern_accuracy"] == 1
    assert m["classifier_on_truth"] == 1
    assert m["ssim"] == pytest.approx(1)
    assert m["lpips"] == 0
    assert m["fid"] == pytest.approx(0, abs=1e-6)
    # KID is unbiased: on equal sets it is not exactly 0, but small against that of other pictures
    other = protocol(encoding="png", networks=FAKE).run({"sample": lambda s, g, k: g})
    assert abs(m[KID]) < 0.1 * other.metrics[KID].value
    assert result.records == 21
    assert result.metrics["garment_accuracy"].chance == 1 / 40
    assert {k for k in m if k.startswith("fid_")} == {"fid_upper", "fid_lower", "fid_dresses"}
    assert result.counts == {"records_seen": 21}


def test_jpeg_files_are_scored_as_files() -> None:
    """The official results are JPEG: even the truth does not reach 1."""
    result = protocol().run({"sample": knows_the_truth})
    records = [SCENES[i] for i in range(len(SCENES))]
    truth = np.stack([r.target for r in records])
    written = np.stack([through_file(p, "jpeg") for p in truth])
    expected = ssim(written / 255, truth / 255).mean()
    assert result.metrics["ssim"].value == pytest.approx(expected)
    assert 0.8 < expected < 1
    assert result.metrics["garment_accuracy"].value == 1  # classified before they are written


def test_giving_back_the_subject_is_wrong() -> None:
    """The person photo shows another garment, the agnostic one none."""
    person = protocol().run({"sample": lambda s, g, k: s})
    assert person.metrics["garment_accuracy"].value == 0
    agnostic = protocol(subject="agnostic").run({"sample": lambda s, g, k: s})
    for name in ("garment_accuracy", "colour_accuracy", "pattern_accuracy"):
        assert agnostic.metrics[name].value == 0
    assert person.metrics["ssim"].value < 1
    assert (person.protocol, agnostic.protocol) == ("try_on_person", "try_on_agnostic")


def test_what_the_model_is_given() -> None:
    model = Model(lambda s, g, r, k: s)
    data = protocol(subject="agnostic", reference=True, multiple=1)
    data = dataclasses.replace(data, frame=Frame(64, 48, 1.5))
    data.run({"sample_reference": model})
    assert len(model.calls) == 6  # 21 in batches of 4, the last one padded
    subject, garment, reference, key = model.calls[0]
    first = SCENES[0]
    np.testing.assert_array_equal(subject[0], first.agnostic[0])
    np.testing.assert_array_equal(garment[0], first.garment)
    assert reference.shape == (4, 42, 32, 3)
    assert key.dtype == np.uint32
    np.testing.assert_array_equal(key, [[42, 0], [42, 1], [42, 2], [42, 3]])
    np.testing.assert_array_equal(model.calls[-1][3], [[42, 20]] * 4)


def test_batch_size_changes_nothing() -> None:
    def noisy(subject: np.ndarray, garment: np.ndarray, key: np.ndarray) -> np.ndarray:
        del garment
        noise = [
            np.random.default_rng(k).integers(0, 40, s.shape)
            for k, s in zip(key, subject, strict=True)
        ]
        return (subject // 2 + np.stack(noise)).astype(np.uint8)

    results = [protocol(batch_size=n, networks=FAKE).run({"sample": noisy}) for n in (2, 21)]
    for name, metric in results[0].metrics.items():
        assert metric.value == pytest.approx(results[1].metrics[name].value, rel=1e-9), name


def test_unpaired_records() -> None:
    """The persons' own photos are what the distributions are compared with."""
    unpaired = dataclasses.replace(SCENES, pairs="unpaired")
    result = protocol(source=unpaired, encoding="png", networks=FAKE).run(
        {"sample": lambda s, g, k: s}
    )
    names = set(result.metrics)
    assert {"fid", KID} <= names
    assert not {"ssim", "lpips"} & names
    assert result.metrics["fid"].value == pytest.approx(0, abs=1e-6)
    assert result.metrics["garment_accuracy"].value == 0
    assert result.settings["paired"] is False
    with pytest.raises(ValueError, match=r"ssim compares a picture with its truth.*unpaired"):
        protocol(source=unpaired, scores=("ssim",)).run({"sample": lambda s, g, k: s})
    mixed = TryOnRecords((SCENES[0], unpaired[1]))
    with pytest.raises(ValueError, match="found both"):
        protocol(source=mixed).run({"sample": lambda s, g, k: s})


def test_panel_and_files(tmp_path: Path) -> None:
    data = protocol(save=str(tmp_path), limit=5, examples=2, label="world")
    result = data.run({"sample": lambda s, g, k: g}, panels=True)
    assert result.records == 5
    (panel,) = result.panels
    assert panel.png is not None
    assert np.asarray(Image.open(io.BytesIO(panel.png))).std() > 10
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg"))
    record = SCENES[0]
    assert f"world_person/{record.category}/00000000.jpg" in files
    assert len(files) == 5
    found = np.asarray(Image.open(tmp_path / f"world_person/{record.category}/00000000.jpg"))
    np.testing.assert_array_equal(found, through_file(record.garment, "jpeg"))


def test_truth_at_another_size(tmp_path: Path) -> None:
    """A set of larger pictures: Lanczos to the generated height, then a JPEG file."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 72, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[::8, ::8]).resize((72, 96)))
    record = TryOnRecord(id="1", garment=smooth, target=smooth, person=smooth)
    source = TryOnRecords((record, dataclasses.replace(record, id="2")))
    expected = np.asarray(Image.fromarray(smooth).resize((48, 64), Image.Resampling.LANCZOS))

    def answer(subject: np.ndarray, garment: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.stack([expected] * len(subject))

    result = protocol(source=source).run({"sample": answer})
    assert result.metrics["ssim"].value == pytest.approx(1)  # both went through the same file
    wide = dataclasses.replace(record, target=smooth[:, :50], person=smooth[:, :50])
    result = protocol(source=TryOnRecords((wide,))).run({"sample": answer})
    assert result.counts["truth_stretched"] == 1
    assert any("stretched" in note for note in result.notes)


def test_records_that_lack_what_the_mode_needs(tmp_path: Path) -> None:
    whole = SCENES[0]
    source = TryOnRecords((dataclasses.replace(whole, person=None), SCENES[1]))
    result = protocol(source=source).run({"sample": lambda s, g, k: s})
    assert result.records == 1
    assert result.counts["records_dropped_missing_person"] == 1
    shown = Model(lambda s, g, k: s)
    result = protocol(source=source, person_from_target=True).run({"sample": shown})
    np.testing.assert_array_equal(shown.calls[0][0][0], whole.target)
    assert result.counts["subject_is_target"] == 1
    assert any("target photo itself" in note for note in result.notes)
    root = layouts.viton_archive(tmp_path)
    viton = VitonHd(str(root), split="test")
    data = TryOn(viton, Frame(32, 32), subject="agnostic", reference=True)
    with pytest.raises(DataError, match=r"records_dropped_missing_reference: 2.*test/image_ref"):
        data.run({"sample_reference": lambda s, g, r, k: s})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scores": ("fid",)}, ValueError, r"try_on_person: fid needs pytorch-fid's"),
        ({"scores": ("lpips",)}, ValueError, r"lpips needs torchvision's squeezenet1_1"),
        ({"scores": ("psnr",)}, ValueError, "unknown psnr; known: ssim, lpips, fid, kid"),
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more"),
        ({"published": (("fid", 1.0),), "limit": 3}, IncomparableError, "first 3 records"),
        ({"published": (("fid", 1.0),), "encoding": "png"}, IncomparableError, "JPEG files"),
        ({"frame": Frame(60, 48)}, ValueError, r"size 60x48 .*multiples of 16"),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    options: dict, error: type[Exception], message: str
) -> None:
    data = dataclasses.replace(protocol(source=VitonHd("/no/such/folder")), **options)
    with pytest.raises(error, match=message):
        data.check()


def test_what_a_model_may_not_return() -> None:
    with pytest.raises(
        ValueError, match=r"shape \[4, 64, 48, 3\] from 'sample', found \[4, 32, 48"
    ):
        protocol().run({"sample": lambda s, g, k: s[:, ::2]})
    with pytest.raises(ValueError, match="NaN or infinity"):
        protocol().run({"sample": lambda s, g, k: s * np.float32(np.nan)})
    with pytest.raises(ValueError, match="sample_reference"):
        protocol(reference=True).run({"sample": lambda s, g, k: s})


def test_published_figures() -> None:
    assert dict(published("viton-hd", "person", True, False)) == {"fid": 8.32, KID: 0.78}
    paired = dict(published("dresscode", "agnostic", False, True))
    assert (paired["ssim"], paired["fid_lower"], paired[f"{KID}_dresses"]) == (0.912, 7.60, 1.30)
    data = protocol(published=(("ssim", 0.87),), encoding="jpeg")
    result = data.run({"sample": knows_the_truth})
    assert result.metrics["ssim"].published == 0.87
    assert not any("not comparable" in n for n in result.notes)
    broken = TryOnRecords((SCENES[0], dataclasses.replace(SCENES[1], garment=b"")))
    result = dataclasses.replace(data, source=broken).run({"sample": lambda s, g, k: s})
    assert any("not comparable with the published number: 1 of 2" in n for n in result.notes)


def test_bytes_are_truncated() -> None:
    values = np.array([0.0, 0.999 / 255, 1.0 / 255, 254.9 / 255, 1.0, 1.5, -0.5], np.float32)
    assert to_bytes(values).tolist() == [0, 0, 1, 254, 255, 255, 0]
    same = np.array([7], np.uint8)
    assert to_bytes(same) is same
    assert to_height(Image.new("RGB", (101, 64)), 32).size == (50, 32)  # int(50.5)


def write(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for name, pixels in pictures.items():
        kind = "png" if name.endswith("png") else "jpeg"
        (folder / name).write_bytes(encoded(pixels, kind))


def test_folders(tmp_path: Path) -> None:
    records = [SCENES[i] for i in range(4)]
    write(tmp_path / "truth", {f"{i:05d}_00.png": r.target for i, r in enumerate(records)})
    write(tmp_path / "made/sub", {f"x{i:05d}_00.png": r.target for i, r in enumerate(records[:3])})
    write(tmp_path / "more", {"99999_00.png": records[0].target})
    (tmp_path / "more/99999_00.png").rename(tmp_path / "made/99999_00.png")
    data = TryOnFolders(
        str(tmp_path / "truth"), str(tmp_path / "made"), networks=FAKE, batch_size=2
    )
    result = data.run({})
    assert result.records == 3
    assert result.metrics["ssim"].value == pytest.approx(1)
    assert result.metrics["lpips"].value == 0
    assert {"fid", KID} <= set(result.metrics)
    assert result.counts["generated_without_truth"] == 1
    assert picture_id(Path("a/model_00034_00_x.jpg")) == "00034_00"
    with pytest.raises(DataError, match="with a digit"):
        picture_id(Path("photo.jpg"))
    with pytest.raises(DataError, match="none"):
        dataclasses.replace(data, truth=str(tmp_path / "nothing")).run({})
    write(tmp_path / "others", {"55555_00.png": records[0].target})
    with pytest.raises(DataError, match="of one id in both folders"):
        dataclasses.replace(data, truth=str(tmp_path / "others")).run({})


def test_larger_truth_in_folders(tmp_path: Path) -> None:
    """Truth of another height is resized and, being JPEG, written once more."""
    large = np.asarray(Image.fromarray(SCENES[3].target).resize((96, 128)))
    write(tmp_path / "truth", {"00001_00.jpg": large, "00002_00.jpg": large})
    seen = Image.open(tmp_path / "truth/00001_00.jpg").resize((48, 64), Image.Resampling.LANCZOS)
    made = through_file(np.asarray(seen), "jpeg")
    write(tmp_path / "made", {"00001_00.png": made, "00002_00.png": made})
    result = TryOnFolders(str(tmp_path / "truth"), str(tmp_path / "made")).run({})
    assert result.metrics["ssim"].value == pytest.approx(1)
    assert result.settings["truth_resized"]
    assert set(result.metrics) == {"ssim"}
