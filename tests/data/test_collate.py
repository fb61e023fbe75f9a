"""The layout of a batch: packing of hard boxes, masks, and what is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipelines.collate import Choices, Layout, collate, encode_example
from data_pipelines.records import Region
from tests.data.conftest import record

LAYOUT = Layout(
    context_short=12,
    context_long=20,
    max_boxes=3,
    negatives=2,
    pack_images=2,
    pack_slots=3,
    short_prefix="",
)
IMAGE = np.zeros((4, 4, 3), np.uint8)


class Characters:
    """One token per character."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, 0, 300

    def tokens(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def text(value: str, length: int = 12) -> list[int]:
    ids = [*[1, *map(ord, value)][: length - 1], 2]
    return ids + [0] * (length - len(ids))


def example(index: int, given: tuple[Region, ...] = (), layout: Layout = LAYOUT, **choices):
    changed = dataclasses.replace(
        record(index), regions=given, short_captions=("cat", "dog"), long_caption=None
    )
    return encode_example(changed, IMAGE, Choices(**choices), layout, Characters())


def region(phrase: str, *negatives: str, long: str | None = None) -> Region:
    return Region((0.1, 0.2, 0.3, 0.4), phrase, long, negatives)


def test_texts_and_masked_slots():
    layout = dataclasses.replace(LAYOUT, short_prefix="a ", pack_images=1)
    arrays, cut = collate([example(0, layout=layout, caption=1)], layout, Characters())
    assert arrays["text_short"][0].tolist() == text("a dog")
    assert arrays["text_long"][0].tolist() == text("dog", 20)  # no long caption: the short one
    assert not arrays["box_mask"].any()
    assert not arrays["box"].any()
    assert all(row == text("") for row in arrays["box_text"][0].tolist())
    assert all(row == text("") for row in arrays["hard_text"].reshape(-1, 12).tolist())
    assert cut == {}


def test_shapes_and_dtypes():
    arrays, _ = collate([example(i) for i in range(4)], LAYOUT, Characters())
    assert {k: (v.dtype.name, v.shape) for k, v in arrays.items()} == {
        "image": ("uint8", (4, 4, 4, 3)),
        "text_short": ("int32", (4, 12)),
        "text_long": ("int32", (4, 20)),
        "box": ("float32", (4, 3, 4)),
        "box_text": ("int32", (4, 3, 12)),
        "box_mask": ("bool", (4, 3)),
        "hard_box": ("float32", (2, 3, 4)),
        "hard_image": ("int32", (2, 3)),
        "hard_text": ("int32", (2, 3, 3, 12)),
        "hard_text_mask": ("bool", (2, 3, 3)),
        "hard_mask": ("bool", (2, 3)),
    }


def test_long_phrases_are_for_box_texts_only():
    regions = (region("p", "n", long="L"), region("q", long="M"), region("r"))
    made = example(0, regions, long_phrase=(True, False, True))
    arrays, _ = collate([made, example(1)], LAYOUT, Characters())
    assert arrays["box_text"][0].tolist() == [text("L"), text("q"), text("r")]
    assert arrays["hard_text"][0, 0, 0].tolist() == text("p")


def test_hard_boxes_are_packed_to_the_front_of_their_group():
    first = example(0, (region("a"), region("b", "B")))
    second = example(1, (region("c", "C", "D"), region("d", "E")))
    arrays, cut = collate([first, second, example(2), second], LAYOUT, Characters())
    assert arrays["hard_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert arrays["hard_image"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert arrays["hard_text_mask"][0].tolist() == [
        [True, True, False],
        [True, True, True],
        [True, True, False],
    ]
    positives = arrays["hard_text"][0, :, 0].tolist()
    assert positives == [text("b"), text("c"), text("d")]
    assert arrays["hard_text"][0, 1].tolist() == [text("c"), text("C"), text("D")]
    assert arrays["hard_text"][0, 0, 2].tolist() == text("")
    assert cut == {}


def test_everything_cut_is_counted():
    many = tuple(region(f"p{i}", "x", "y", "z") for i in range(5))
    wordy = dataclasses.replace(many[0], phrase="0123456789abc")
    made = [example(0, (wordy, *many[1:])), example(1, many)]
    arrays, cut = collate(made, LAYOUT, Characters())
    assert arrays["box_mask"].all()
    assert cut == {
        "boxes": 4,  # 2 records x (5 - 3)
        "negatives": 6,  # 6 kept boxes x (3 - 2)
        "region_tokens": 3,
        "hard_tokens": 3,
        "hard_boxes": 3,  # 6 in the group, 3 slots
    }


def test_chosen_regions_fill_the_slots_in_order():
    many = tuple(region(f"p{i}") for i in range(5))
    arrays, cut = collate([example(0, many, regions=(1, 4)), example(1)], LAYOUT, Characters())
    assert arrays["box_text"][0, :2].tolist() == [text("p1"), text("p4")]
    assert arrays["box_mask"][0].tolist() == [True, True, False]
    assert cut["boxes"] == 3


def test_slots_that_a_recipe_does_not_want_are_empty_and_nothing_counts_as_cut():
    layout = dataclasses.replace(LAYOUT, max_boxes=0, pack_slots=0, pack_images=1)
    arrays, cut = collate([example(0, (region("p", "n"),), layout)], layout, Characters())
    assert arrays["box_text"].shape == (1, 0, 12)
    assert not any(name.startswith("hard") for name in arrays)
    assert cut == {}


def test_a_broken_group():
    with pytest.raises(ValueError, match="multiple of pack_images=2"):
        collate([example(0)], LAYOUT, Characters())


def test_float_pixels_stay_float():
    made = dataclasses.replace(example(0), image=IMAGE.astype(np.float32))
    arrays, _ = collate([made, made], LAYOUT, Characters())
    assert arrays["image"].dtype == np.float32
