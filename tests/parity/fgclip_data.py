"""FG-CLIP: tokens, pixels and whole batches of the official preprocessing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.collate import Choices, Layout, collate, encode_example
from data_pipelines.images import decode_rgb, normalise, resize_shortest, resize_square
from data_pipelines.sources.finehard import finehard_record
from data_pipelines.tokenizers import ClipTokenizer
from tests.parity.registry import Case, Kind, assert_close

PREPROCESS = Kind(
    "fgclip", "preprocess", lambda case: any(re.match(r"out\.pixel_values", n) for n in case.shapes)
)
TOKENIZER = Kind("fgclip", "tokenizer", lambda case: bool({"vocab.json"} & case.files))
DATA = Kind(
    "fgclip", "data", lambda case: "records" in case.meta and "out.box_infos" in case.shapes
)


def _images(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """`(number, uint8 [H, W, 3])` of the case's pictures, in order."""
    names = [m for n in case.io if (m := re.fullmatch(r"in\.image(\d+)", n))]
    assert names, f"{case.id}: no in.image*"
    for m in sorted(names, key=lambda m: int(m.group(1))):
        yield m.group(1), case.io[m.group(0)]


@PREPROCESS.check
def square_resize(case: Case) -> None:
    """Bytes after the square resize, exactly."""
    size = case.meta["config"]["size"]
    found = 0
    for number, image in _images(case):
        expected = case.io.get(f"mid.image{number}_resized")
        if expected is not None:
            found += 1
            ours = resize_square(decode_rgb(image), size)
            assert_close(f"image{number}_resized", ours, expected, case.tolerance("resized"))
    assert found == sum(n.startswith("mid.") for n in case.io)


@PREPROCESS.check
def pixel_values(case: Case) -> None:
    """Normalised pixels of the square path, and of the path that keeps the aspect ratio."""
    size, tolerance = case.meta["config"]["size"], case.tolerance("pixel_values")
    compared = 0
    for number, image in _images(case):
        picture = decode_rgb(image)
        paths = {
            f"out.pixel_values{number}": resize_square(picture, size),
            f"out.pixel_values{number}_aspect_kept": resize_shortest(picture, size)[0],
        }
        for name, pixels in paths.items():
            if name in case.io:
                compared += 1
                ours = normalise(pixels).transpose(2, 0, 1)
                assert_close(name, ours, case.io[name], tolerance)
    assert compared == sum(n.startswith("out.") for n in case.io)


@TOKENIZER.check
def token_ids(case: Case) -> None:
    """Ids of every recorded length, and the special ids."""
    tokenizer = ClipTokenizer.from_folder(case.folder)
    special = case.meta.get("special", {})
    assert tokenizer.bos_id == special.get("bos", tokenizer.bos_id)
    assert tokenizer.eos_id == special.get("eos", tokenizer.eos_id)
    outputs = {n: m for n in case.io if (m := re.fullmatch(r"out\.ids_(\d+)", n))}
    assert len(outputs) == len(case.io)
    for name, match in outputs.items():
        ours = tokenizer.encode_batch(case.meta["texts"], int(match.group(1)))
        assert_close(name, ours, case.io[name], case.tolerance("ids"))


class _ToyTokenizer:
    """The character tokenizer that `data` cases define in their meta.json."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.bos_id, self.eos_id, self.pad_id = spec["bos"], spec["eos"], spec["pad"]
        self.vocab_size = max(spec["bos"], spec["eos"], spec["pad"]) + 1
        self._offset = spec["offset"]
        self._modulus = spec.get("modulus", 90)

    def tokens(self, text: str) -> list[int]:
        return [self._offset + ord(c) % self._modulus for c in text]


def _official_batch(case: Case) -> tuple[dict[str, np.ndarray], Layout]:
    """The case's records through our collation, with the recorded choices."""
    io, records = case.io, case.meta["records"]
    slots = io["out.box_infos"].shape[0] // len(records)
    hard = int(io["out.hard_nums"].sum())
    layout = Layout(
        context_short=io["out.text_short"].shape[1],
        context_long=io["out.text_long"].shape[1],
        max_boxes=slots,
        negatives=io["out.hard_texts"].shape[0] // max(hard, 1) - 1 if hard else 10,
        pack_images=1,
        pack_slots=slots,
    )
    tokenizer = _ToyTokenizer(case.meta["toy_tokenizer"])
    choices = iter(case.meta["region_choice"])
    examples = []
    for entry, (number, image) in zip(records, _images(case), strict=True):
        record = finehard_record(entry, f"image{number}", image)
        pixels = normalise(resize_square(decode_rgb(image), case.meta["config"]["image_size"]))
        kept = min(slots, len(record.regions))
        chosen = Choices(long_phrase=tuple(bool(next(choices)) for _ in range(kept)))
        examples.append(encode_example(record, pixels, chosen, layout, tokenizer))
    assert next(choices, None) is None, f"{case.id}: more region choices than boxes"
    return collate(examples, layout, tokenizer)[0], layout


@DATA.check
def pixels(case: Case) -> None:
    """The image tensor."""
    batch, _ = _official_batch(case)
    ours = batch["image"].transpose(0, 3, 1, 2)
    assert_close("image", ours, case.io["out.image"], case.tolerance("pixels"))


@DATA.check
def captions(case: Case) -> None:
    """Short and long caption ids."""
    batch, _ = _official_batch(case)
    for name in ("text_short", "text_long"):
        assert_close(name, batch[name], case.io[f"out.{name}"], case.tolerance("ids"))


@DATA.check
def boxes(case: Case) -> None:
    """Boxes, their counts and texts, masked slots included."""
    batch, layout = _official_batch(case)
    flat_text = batch["box_text"].reshape(-1, layout.context_short)
    assert_close("box_texts", flat_text, case.io["out.box_texts"], case.tolerance("ids"))
    flat_box = batch["box"].reshape(-1, 4)
    assert_close("box_infos", flat_box, case.io["out.box_infos"], case.tolerance("boxes"))
    counts = batch["box_mask"].sum(1)
    assert_close("box_nums", counts, case.io["out.box_nums"], case.tolerance("ids"))


@DATA.check
def hard_negatives(case: Case) -> None:
    """Hard boxes packed to the front of each image, their counts, and their texts in order."""
    batch, _ = _official_batch(case)
    flat_box = batch["hard_box"].reshape(-1, 4)
    assert_close("hard_infos", flat_box, case.io["out.hard_infos"], case.tolerance("boxes"))
    counts = batch["hard_mask"].sum(1)
    assert_close("hard_nums", counts, case.io["out.hard_nums"], case.tolerance("ids"))
    texts = batch["hard_text"][batch["hard_text_mask"]]
    assert_close("hard_texts", texts, case.io["out.hard_texts"], case.tolerance("ids"))
    assert not batch["hard_image"].any()
