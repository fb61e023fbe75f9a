"""Generic protocols over a source of toy records."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import DataError
from data_pipelines.protocols import (
    RegionRetrieval,
    SourceBoxClassification,
    SourceClassification,
    SourceHardNegatives,
    SourceRetrieval,
)
from data_pipelines.records import BadRecordError, ImageTextRecord, Region
from data_pipelines.sources.base import InMemory
from tests.protocols.toy import NAMES, QUARTERS, Toy, Words, plain, quarters


def captioned() -> list[ImageTextRecord]:
    """One plain picture per colour, two short captions and a long one each."""
    return [
        ImageTextRecord(
            name, plain(name), (f"all {name}", f"a {name} picture"), f"one {name} sheet of paper"
        )
        for name in NAMES
    ]


def regioned() -> list[ImageTextRecord]:
    """Pictures of four coloured quarters, with phrases, labels and negatives."""
    picks = [NAMES[0:4], NAMES[4:8], (*NAMES[2:4], *NAMES[6:8])]
    return [
        ImageTextRecord(
            f"q{n}",
            quarters(tuple(pick)),
            regions=tuple(
                Region(
                    box,
                    f"{color} part",
                    f"the {color} part of it",
                    tuple(f"{other} part" for other in NAMES if other != color)[: 2 + n],
                    color,
                )
                for box, color in zip(QUARTERS, pick, strict=True)
            ),
        )
        for n, pick in enumerate(picks)
    ]


def values(result) -> dict[str, float]:
    return {k: m.value for k, m in result.metrics.items()}


def test_retrieval_short_with_several_captions() -> None:
    toy = Toy()
    protocol = SourceRetrieval(
        InMemory(tuple(captioned())), Words(), 16, 10, batch_size=3, text_batch_size=5
    )
    result = protocol.run(toy.functions(), panels=True)
    assert result.protocol == "source_retrieval_short"
    assert result.records == 8
    assert values(result) == dict.fromkeys(
        ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"), 1.0
    )
    assert result.metrics["t2i_r1"].chance == pytest.approx(1 / 8)
    assert result.metrics["i2t_r1"].chance == pytest.approx(2 / 16)
    assert result.counts["captions"] == 16
    assert result.counts["captions_cut"] == 0
    # Static shapes, the last batch padded.
    assert toy.calls["image_features"] == {((3, 16, 16, 3),)}
    assert toy.calls["text_features_short"] == {((5, 10),)}
    assert "text_features_long" not in toy.calls
    picture = Image.open(io.BytesIO(result.panels[0].png))
    assert picture.format == "PNG"


def test_retrieval_long_uses_the_long_function_and_falls_back() -> None:
    records = captioned()
    records[2] = dataclasses.replace(records[2], long_caption=None)
    toy = Toy()
    protocol = SourceRetrieval(InMemory(tuple(records)), Words(), 16, 6, text="long")
    result = protocol.run(toy.functions())
    assert values(result)["t2i_r1"] == 1.0
    assert result.counts["long_from_short"] == 1
    # "one red sheet of paper" is 5 words and 2 special tokens: one too many.
    assert result.counts["captions_cut"] == 7
    assert set(toy.calls) == {"image_features", "text_features_long"}
    assert result.settings["text_function"] == "text_features_long"
    assert result.settings["context"] == 6


def test_equal_captions_of_two_pictures_are_counted() -> None:
    records = captioned()[:3]
    records.append(dataclasses.replace(records[0], id="again"))
    result = SourceRetrieval(InMemory(tuple(records)), Words(), 16, 10).run(Toy().functions())
    assert result.counts["captions_shared_with_another_picture"] == 4
    assert values(result)["t2i_r1"] < 1.0


@dataclasses.dataclass(frozen=True)
class Damaged(InMemory):
    """A source whose record 1 cannot be read."""

    def __getitem__(self, index: int) -> ImageTextRecord:
        if index == 1:
            raise BadRecordError("missing_file", "no picture at green.jpg")
        return super().__getitem__(index)


def test_bad_records_are_left_out_and_counted() -> None:
    records = captioned()
    records[4] = dataclasses.replace(records[4], image=b"not a picture")
    records[5] = dataclasses.replace(records[5], short_captions=(), long_caption=None)
    source = Damaged(tuple(records))
    result = SourceRetrieval(source, Words(), 16, 10, batch_size=4).run(Toy().functions())
    assert result.records == 5
    assert result.counts["records_seen"] == 8
    assert result.counts["records_dropped_missing_file"] == 1
    assert result.counts["records_dropped_undecodable_image"] == 1
    assert result.counts["records_dropped_empty_caption"] == 1
    assert any("no picture at green.jpg" in note for note in result.notes)
    assert values(result)["i2t_r1"] == 1.0


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    records = [dataclasses.replace(r, image=b"x") for r in captioned()]
    protocol = SourceRetrieval(InMemory(tuple(records)), Words(), 16, 10)
    with pytest.raises(DataError, match="undecodable_image: 8"):
        protocol.run(Toy().functions())


def test_a_missing_function_is_named_before_reading() -> None:
    functions = Toy().functions()
    del functions["text_features_short"]
    protocol = SourceRetrieval(InMemory(tuple(captioned())), Words(), 16, 10)
    with pytest.raises(ValueError, match="missing text_features_short"):
        protocol.run(functions)
    assert protocol.requires() == ("image_features", "text_features_short")


def test_limit_reads_the_first_records_only() -> None:
    toy = Toy()
    protocol = SourceRetrieval(InMemory(tuple(captioned())), Words(), 16, 10, limit=3)
    result = protocol.run(toy.functions())
    assert result.records == 3
    assert result.counts["records_seen"] == 3


def test_regions_find_their_phrases() -> None:
    toy = Toy()
    protocol = RegionRetrieval(
        InMemory(tuple(regioned())), Words(), 64, 10, label="toy", batch_size=2, box_slots=3
    )
    result = protocol.run(toy.functions(), panels=True)
    assert result.protocol == "toy_regions"
    assert result.records == 3
    assert result.counts["regions"] == 12
    assert result.counts["phrases"] == 8
    assert values(result) == dict.fromkeys(
        (
            "region_to_phrase_r1",
            "region_to_phrase_r5",
            "phrase_to_region_r1",
            "phrase_to_region_r5",
        ),
        1.0,
    )
    assert result.metrics["region_to_phrase_r1"].chance == pytest.approx(1 / 8)
    # Four phrases have two boxes, four have one.
    assert result.metrics["phrase_to_region_r1"].chance == pytest.approx((4 * 2 + 4) / 8 / 12)
    # Pictures with more boxes than slots take two rows.
    assert toy.calls["box_features"] == {((2, 64, 64, 3), (2, 3, 4))}
    assert toy.rows["box_features"] == 6
    assert len(result.panels) == 2


def test_regions_long_phrase() -> None:
    protocol = RegionRetrieval(InMemory(tuple(regioned())), Words(), 64, 10, phrase="long")
    result = protocol.run(Toy().functions())
    assert result.protocol == "source_regions_long"
    assert values(result)["region_to_phrase_r1"] == 1.0


def test_without_dense_features_there_is_no_heat_map() -> None:
    functions = Toy().functions()
    del functions["dense_features"]
    protocol = RegionRetrieval(InMemory(tuple(regioned())), Words(), 64, 10)
    assert len(protocol.run(functions, panels=True).panels) == 1


def test_box_classes_from_labels() -> None:
    records = regioned()
    nameless = dataclasses.replace(records[0].regions[0], label=None)
    records[0] = dataclasses.replace(records[0], regions=(nameless, *records[0].regions[1:]))
    protocol = SourceBoxClassification(
        InMemory(tuple(records)), Words(), 64, 10, templates=("a {}", "the {}")
    )
    result = protocol.run(Toy().functions(), panels=True)
    assert values(result) == {"top1": 1.0, "top5": 1.0}
    assert result.metrics["top1"].chance == pytest.approx(1 / 7)
    assert result.counts["classes"] == 7
    assert result.counts["regions_dropped_no_label"] == 1
    assert result.counts["regions"] == 11
    assert len(result.panels) == 1


def test_box_classes_given_and_top5_left_out_where_it_is_trivial() -> None:
    protocol = SourceBoxClassification(
        InMemory(tuple(regioned())), Words(), 64, 10, classes=("red", "green", "blue")
    )
    result = protocol.run(Toy().functions())
    assert set(result.metrics) == {"top1"}
    assert result.counts["regions_dropped_unknown_label"] == 8
    twice = dataclasses.replace(protocol, classes=("red", "red"))
    with pytest.raises(ValueError, match="distinct class names"):
        twice.run(Toy().functions())


def test_picture_classes_by_index_and_by_name() -> None:
    by_index = tuple(ImageTextRecord(n, plain(n), extra={"label": k}) for k, n in enumerate(NAMES))
    by_name = tuple(ImageTextRecord(n, plain(n), extra={"label": n}) for n in NAMES)
    for records in (by_index, by_name):
        protocol = SourceClassification(InMemory(records), Words(), 16, 10, classes=NAMES)
        result = protocol.run(Toy().functions())
        assert values(result) == {"top1": 1.0, "top5": 1.0}
        assert result.settings["templates"] == 80


def test_hard_negatives_are_ragged() -> None:
    records = regioned()
    plain_one = dataclasses.replace(records[0].regions[0], negatives=())
    tied = dataclasses.replace(records[0].regions[1], negatives=("green part", "red part"))
    records[0] = dataclasses.replace(records[0], regions=(plain_one, tied, *records[0].regions[2:]))
    protocol = SourceHardNegatives(InMemory(tuple(records)), Words(), 64, 10, label="toy")
    result = protocol.run(Toy().functions(), panels=True)
    assert values(result) == {"accuracy": 1.0}
    assert result.counts["regions_dropped_no_negatives"] == 1
    assert result.counts["ties_with_the_true_phrase"] == 1
    # 3 rows of 2 negatives, 4 of 3, 4 of 4.
    expected = (3 / 3 + 4 / 4 + 4 / 5) / 11
    assert result.metrics["accuracy"].chance == pytest.approx(expected)
    assert len(result.panels) == 1


def test_a_model_that_prefers_a_negative_is_wrong() -> None:
    records = regioned()
    swapped = tuple(
        dataclasses.replace(r, phrase=r.negatives[0], negatives=(r.phrase,))
        for r in records[0].regions
    )
    records = [dataclasses.replace(records[0], regions=swapped)]
    result = SourceHardNegatives(InMemory(tuple(records)), Words(), 64, 10).run(Toy().functions())
    assert values(result) == {"accuracy": 0.0}


def test_bad_boxes_are_left_out_as_in_training() -> None:
    records = regioned()
    bad = dataclasses.replace(records[0].regions[0], box=(float("nan"), 0.0, 1.0, 1.0))
    records[0] = dataclasses.replace(records[0], regions=(bad, *records[0].regions[1:]))
    result = RegionRetrieval(InMemory(tuple(records)), Words(), 64, 10).run(Toy().functions())
    assert result.counts["repaired_box_nan"] == 1
    assert result.counts["regions"] == 11


def test_features_that_are_not_finite_stop_the_evaluation() -> None:
    functions = Toy().functions()
    functions["image_features"] = lambda image: np.full((len(image), 3), np.nan)
    protocol = SourceRetrieval(InMemory(tuple(captioned())), Words(), 16, 10)
    with pytest.raises(ValueError, match="NaN or infinity"):
        protocol.run(functions)
