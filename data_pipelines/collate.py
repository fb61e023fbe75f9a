"""From records to the arrays of a region-captioned image batch: pure functions, no randomness.

Everything that training draws at random (which caption, which boxes, short or long phrase) comes in
as `Choices`, so the layout can be compared with recorded batches of the official collator.

Legend: B images, N boxes per image, Ls/Ll text lengths, S image side, g images per pack group,
K hard slots per pack group, M negatives.

  image           uint8   [B, S, S, 3]
  text_short      int32   [B, Ls]            text_long int32 [B, Ll]
  box             float32 [B, N, 4]          fractions x1 y1 x2 y2; zeros where masked
  box_text        int32   [B, N, Ls]         the tokenised empty text where masked
  box_mask        bool    [B, N]
  hard_box        float32 [B/g, K, 4]        hard boxes of g consecutive images, front-packed
  hard_image      int32   [B/g, K]           which of the g images
  hard_text       int32   [B/g, K, 1+M, Ls]  the positive, then its negatives
  hard_text_mask  bool    [B/g, K, 1+M]      which of the texts exist
  hard_mask       bool    [B/g, K]

With K = 0 there are no hard_* arrays; with N = 0 the box arrays are empty.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_pipelines.boxes import Box
from data_pipelines.records import ImageTextRecord
from data_pipelines.tokenizers import Tokenizer, encode, encode_rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of a batch; see the module's legend.

    Attributes:
      context_short, context_long: Ls and Ll. max_boxes: N. negatives: M.
      context_region: length of box and hard texts; None for Ls.
      pack_images: g; the batch of every process must be a multiple of it.
      pack_slots: K. short_prefix: put before the short caption (not before phrases).
    """

    context_short: int = 77
    context_long: int = 248
    max_boxes: int = 4
    negatives: int = 10
    pack_images: int = 1
    pack_slots: int = 4
    context_region: int | None = None
    short_prefix: str = "a photo of "

    @property
    def region_length(self) -> int:
        """Length of box and hard texts."""
        return self.context_region or self.context_short


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is chosen for one example.

    Attributes:
      caption: index into the record's short captions.
      regions: indices of the regions that fill the box slots, in slot order; None takes the first
        `max_boxes`.
      long_phrase: for each filled slot, whether its box text is the long phrase (the short one is
        used where a region has no long one); missing entries mean short. Hard texts always start
        with the short phrase.
    """

    caption: int = 0
    regions: tuple[int, ...] | None = None
    long_phrase: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class HardBox:
    """One box with hard negatives: int32 texts [1 + n, Ls], the positive first, n <= M."""

    box: Box
    texts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded example, before packing: arrays as in the legend without the B dimension."""

    image: np.ndarray
    text_short: np.ndarray
    text_long: np.ndarray
    boxes: tuple[Box, ...]
    box_text: np.ndarray
    hard: tuple[HardBox, ...]
    cut: dict[str, int]


def encode_example(
    record: ImageTextRecord,
    image: np.ndarray,
    choices: Choices,
    layout: Layout,
    tokenizer: Tokenizer,
) -> Example:
    """Tokenise one record.

    `image` is [S, S, 3]; uint8, or float32 when it is already normalised. The long text is the
    long caption, or the chosen short caption (without prefix) where the record has none. `cut`
    counts "boxes", "negatives" and the tokens cut from texts ("short_tokens", "long_tokens",
    "region_tokens", "hard_tokens").
    """
    cut: Counter[str] = Counter()

    def rows(values: Sequence[str], length: int, what: str) -> np.ndarray:
        ids, lost = encode_rows(tokenizer, values, length)
        if lost:
            cut[what] += lost
        return ids

    short = record.short_captions[choices.caption] if record.short_captions else ""
    long = record.long_caption if record.long_caption is not None else short
    picked = choices.regions
    if picked is None:
        picked = tuple(range(min(len(record.regions), layout.max_boxes)))
    if layout.max_boxes and len(record.regions) > len(picked):  # N = 0: boxes are not wanted
        cut["boxes"] += len(record.regions) - len(picked)
    wants_long = choices.long_phrase + (False,) * (len(picked) - len(choices.long_phrase))
    box_texts, hard = [], []
    for index, use_long in zip(picked, wants_long, strict=True):
        region = record.regions[index]
        phrase = region.long_phrase if use_long and region.long_phrase is not None else None
        box_texts.append(region.phrase if phrase is None else phrase)
        if not region.negatives or not layout.pack_slots:
            continue
        if len(region.negatives) > layout.negatives:
            cut["negatives"] += len(region.negatives) - layout.negatives
        texts = (region.phrase, *region.negatives[: layout.negatives])
        hard.append(HardBox(region.box, rows(texts, layout.region_length, "hard_tokens")))
    return Example(
        image=image,
        text_short=rows((layout.short_prefix + short,), layout.context_short, "short_tokens")[0],
        text_long=rows((long,), layout.context_long, "long_tokens")[0],
        boxes=tuple(record.regions[i].box for i in picked),
        box_text=rows(box_texts, layout.region_length, "region_tokens"),
        hard=tuple(hard),
        cut=dict(cut),
    )


def collate(
    examples: Sequence[Example], layout: Layout, tokenizer: Tokenizer
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Pack examples into the arrays of the legend; also what was cut ("hard_boxes" included).

    Raises:
      ValueError: the number of examples is no multiple of `pack_images`.
    """
    cut: Counter[str] = Counter()
    for example in examples:
        cut.update(example.cut)
    arrays = {
        "image": np.stack([e.image for e in examples]),
        "text_short": np.stack([e.text_short for e in examples]),
        "text_long": np.stack([e.text_long for e in examples]),
    }
    empty, _ = encode(tokenizer, "", layout.region_length)
    arrays.update(_box_arrays(examples, layout, empty))
    if layout.pack_slots:
        arrays.update(_hard_arrays(examples, layout, empty, cut))
    return arrays, dict(cut)


def _box_arrays(
    examples: Sequence[Example], layout: Layout, empty: np.ndarray
) -> dict[str, np.ndarray]:
    b, n = len(examples), layout.max_boxes
    box = np.zeros((b, n, 4), np.float32)
    text = np.tile(empty, (b, n, 1))
    mask = np.zeros((b, n), bool)
    for i, example in enumerate(examples):
        count = len(example.boxes)
        if count:
            box[i, :count] = example.boxes
            text[i, :count] = example.box_text
            mask[i, :count] = True
    return {"box": box, "box_text": text, "box_mask": mask}


def _hard_arrays(
    examples: Sequence[Example], layout: Layout, empty: np.ndarray, cut: Counter[str]
) -> dict[str, np.ndarray]:
    g, k, texts = layout.pack_images, layout.pack_slots, 1 + layout.negatives
    groups, rest = divmod(len(examples), g)
    if rest:
        raise ValueError(
            f"collate: expected a multiple of pack_images={g} examples, found {len(examples)}; "
            "choose a batch size that every process's share of is a multiple of it"
        )
    box = np.zeros((groups, k, 4), np.float32)
    image = np.zeros((groups, k), np.int32)
    text = np.tile(empty, (groups, k, texts, 1))
    text_mask = np.zeros((groups, k, texts), bool)
    mask = np.zeros((groups, k), bool)
    for group in range(groups):
        members = examples[group * g : (group + 1) * g]
        found = [(i, hard) for i, member in enumerate(members) for hard in member.hard]
        if len(found) > k:
            cut["hard_boxes"] += len(found) - k
        for slot, (i, hard) in enumerate(found[:k]):
            box[group, slot] = hard.box
            image[group, slot] = i
            text[group, slot, : len(hard.texts)] = hard.texts
            text_mask[group, slot, : len(hard.texts)] = True
            mask[group, slot] = True
    return {
        "hard_box": box,
        "hard_image": image,
        "hard_text": text,
        "hard_text_mask": text_mask,
        "hard_mask": mask,
    }
