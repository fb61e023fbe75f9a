"""Records at the edge: what is refused, what is left out of a record and counted."""

from __future__ import annotations

import dataclasses
import math

import pytest

from data_pipelines.records import BadRecordError, Region
from data_pipelines.validation import Limits, check_box, check_record, decode_text
from tests.data.conftest import record

GOOD = Region((0.1, 0.1, 0.5, 0.5), "red kettle", "a red kettle", ("blue kettle",))
LONE_SURROGATE = "broken \ud800 escape"


def reason_of(changed, limits: Limits | None = None) -> str:
    with pytest.raises(BadRecordError) as caught:
        check_record(changed, limits or Limits())
    return caught.value.reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty_caption"),
        (" \n\t ", "empty_caption"),
        ("x" * 10_000, "caption_too_long"),
        (LONE_SURROGATE, "invalid_utf8"),
        (7, "malformed_record"),
    ],
)
def test_bad_caption(caption, reason):
    assert reason_of(dataclasses.replace(record(0), short_captions=(caption,))) == reason
    assert reason_of(dataclasses.replace(record(0), long_caption=caption)) == reason


def test_one_bad_caption_of_several_is_left_out_and_counted():
    changed = dataclasses.replace(record(0), short_captions=("", "good", "y" * 9_000))
    checked = check_record(changed)
    assert checked.record.short_captions == ("good",)
    assert checked.repaired == {"empty_caption": 1, "caption_too_long": 1}


def test_caption_limit_is_configuration():
    changed = dataclasses.replace(record(0), long_caption="x" * 10_000)
    assert check_record(changed, Limits(max_caption_chars=10_000)).record is changed


def test_no_caption_at_all():
    bare = dataclasses.replace(record(0), short_captions=(), long_caption=None)
    assert reason_of(bare) == "empty_caption"
    assert check_record(bare, need_caption=False).record is bare


def test_long_caption_stands_in_for_a_missing_short_one():
    only_long = dataclasses.replace(record(0), short_captions=())
    assert check_record(only_long).record.short_captions == (only_long.long_caption,)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((math.nan, 0.1, 0.5, 0.5), "box_nan"),
        ((0.1, 0.1, math.inf, 0.5), "box_nan"),
        ((0.5, 0.1, 0.4, 0.5), "box_inverted"),
        ((0.1, 0.6, 0.4, 0.5), "box_inverted"),
        ((0.1, 0.1, 0.1, 0.5), "box_empty"),
        ((1.2, 0.1, 1.4, 0.5), "box_outside"),
        ((0.1, -0.4, 0.4, -0.1), "box_outside"),
        ((0.1, 0.1, 1.3, 0.5), "box_outside"),
        ((100.0, 50.0, 300.0, 200.0), "box_outside"),
        ((1.0, 0.1, 1.02, 0.5), "box_outside"),
    ],
)
def test_bad_box(box, reason):
    with pytest.raises(BadRecordError) as caught:
        check_box(box)
    assert caught.value.reason == reason
    changed = dataclasses.replace(record(0), regions=(dataclasses.replace(GOOD, box=box), GOOD))
    checked = check_record(changed)
    assert checked.record.regions == (GOOD,)
    assert checked.repaired == {reason: 1}
    assert reason_of(changed, Limits(bad_box="drop_record")) == reason


def test_a_box_slightly_outside_is_clipped_and_counted():
    assert check_box((-0.02, 0.1, 0.5, 1.03)) == ((0.0, 0.1, 0.5, 1.0), True)
    changed = dataclasses.replace(
        record(0), regions=(dataclasses.replace(GOOD, box=(0.1, 0.1, 1.03, 0.5)),)
    )
    checked = check_record(changed)
    assert checked.record.regions[0].box == (0.1, 0.1, 1.0, 0.5)
    assert checked.repaired == {"box_clipped": 1}


def test_rounding_is_not_counted():
    assert check_box((0.1, 0.1, 1.00001, 1.0)) == ((0.1, 0.1, 1.0, 1.0), False)
    assert check_box((0.0, 0.0, 1.0, 1.0)) == ((0.0, 0.0, 1.0, 1.0), False)


def test_bad_phrases():
    changed = dataclasses.replace(
        record(0),
        regions=(
            dataclasses.replace(GOOD, phrase=""),
            dataclasses.replace(GOOD, long_phrase="z" * 6_000),
            dataclasses.replace(GOOD, negatives=("", "blue kettle", LONE_SURROGATE)),
        ),
    )
    checked = check_record(changed)
    assert [r.long_phrase for r in checked.record.regions] == [None, "a red kettle"]
    assert checked.record.regions[1].negatives == ("blue kettle",)
    assert checked.repaired == {
        "region_empty_caption": 1,
        "region_caption_too_long": 1,
        "negative_empty_caption": 1,
        "negative_invalid_utf8": 1,
    }


def test_a_good_record_is_returned_as_it_is():
    good = record(0, regions=3)
    checked = check_record(good)
    assert checked.record is good
    assert checked.repaired == {}


def test_invalid_bytes():
    assert decode_text("é".encode(), "caption") == "é"
    with pytest.raises(BadRecordError, match=r"invalid_utf8: caption: byte 0xff at offset 2"):
        decode_text(b"ab\xff", "caption")
