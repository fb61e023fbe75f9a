"""The pipeline of captioned pictures with described regions (FG-CLIP and other dual encoders).

Record -> checks -> picture decoded, cropped where asked, resized -> random choices -> tokens ->
batch in the layout of `data_pipelines.collate`. What the official code does is the default: square
resize without keeping the aspect ratio, no augmentation, "a photo of " before short captions, the
first N boxes, short or long phrase at random.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipelines.boxes import Box
from data_pipelines.collate import Choices, Example, Layout, collate, encode_example
from data_pipelines.images import (
    CLIP_MEAN,
    CLIP_STD,
    decode_rgb,
    resize_shortest,
    resize_square,
)
from data_pipelines.records import ImageTextRecord
from data_pipelines.sampling import Made, Recipe, RecordPipeline
from data_pipelines.sources.base import (
    Mixture,
    Source,
    describe_sources,
    digest,
    settings_of,
    sources_of,
    weights_of,
)
from data_pipelines.tokenizers import ClipTokenizer
from data_pipelines.validation import Limits, check_record

PACKAGE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Random resized crop; boxes move with it. No flip: captions say left and right.

    Attributes:
      min_area: smallest share of the picture that is kept; the share is uniform up to 1.
      max_ratio: the crop's aspect ratio relative to the picture's lies in [1/max_ratio, max_ratio].
      min_visible: a box of which less than this share is left is dropped ("boxes_cropped").
    """

    min_area: float = 0.5
    max_ratio: float = 4 / 3
    min_visible: float = 0.5

    def window(self, rng: np.random.Generator) -> Box:
        """A random window as fractions `(x1, y1, x2, y2)`."""
        area = rng.uniform(self.min_area, 1.0)
        stretch = np.exp(rng.uniform(-np.log(self.max_ratio), np.log(self.max_ratio)) / 2)
        w, h = min(1.0, np.sqrt(area) * stretch), min(1.0, np.sqrt(area) / stretch)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        return float(x), float(y), float(x + w), float(y + h)


@dataclasses.dataclass(frozen=True)
class ImageTextPipeline(RecordPipeline):
    """Training data of captioned pictures with regions.

    Attributes:
      source: one source, or several with weights.
      tokenizer: a Hugging Face folder with CLIP's vocab.json and merges.txt (or tokenizer.json);
        "scene" is the small tokenizer of the scene world that comes with this package.
      image_size: S. context_short, context_long: text lengths Ls, Ll.
      context_region: length of box and hard texts where it differs from Ls; phrases are short.
      max_boxes: N, 0 for training on captions alone. negatives: M.
      hard_pack_images, hard_pack_slots: g and K; K = 0 for batches without hard_* arrays.
      short_prefix: put before short captions (spec section 5; training only).
      short_caption: which of several short captions, drawn anew each epoch or always the first.
      region_phrase: box text; "random" draws between short and long phrase per box.
      box_choice: which regions fill the slots when there are more than N: the first in file order
        (official) or a random subset in file order.
      resize: "square" ignores the aspect ratio (official); "shortest" keeps it and crops the
        centre, moving the boxes along.
      augment: optional random crop (with "square" only); None is official.
      fast_jpeg: decode JPEG at reduced scale where the picture is at least twice too large. Pixels
        then differ slightly from the official path.
      limits, tolerance: what a usable record is, and how many others a run accepts.
      reading: threads and worker processes.
    """

    source: Source | Mixture
    tokenizer: str = "scene"
    image_size: int = 224
    context_short: int = 77
    context_long: int = 248
    max_boxes: int = 4
    negatives: int = 10
    hard_pack_images: int = 1
    hard_pack_slots: int = 4
    context_region: int | None = None
    short_prefix: str = "a photo of "
    short_caption: Literal["random", "first"] = "random"
    region_phrase: Literal["random", "short", "long"] = "random"
    box_choice: Literal["first", "random"] = "first"
    resize: Literal["square", "shortest"] = "square"
    augment: RandomCrop | None = None
    fast_jpeg: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.resize == "shortest" and self.augment is not None:
            raise ValueError(
                'ImageTextPipeline: augment needs resize="square"; a random crop and the centre '
                "crop exclude each other"
            )

    @property
    def layout(self) -> Layout:
        """Static sizes of the batch."""
        return Layout(
            context_short=self.context_short,
            context_region=self.context_region,
            context_long=self.context_long,
            max_boxes=self.max_boxes,
            negatives=self.negatives,
            pack_images=self.hard_pack_images,
            pack_slots=self.hard_pack_slots,
            short_prefix=self.short_prefix,
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, one or several."""
        return sources_of(self.source)

    @functools.cached_property
    def text_tokenizer(self) -> ClipTokenizer:
        """The tokenizer, read at first use."""
        return load_tokenizer(self.tokenizer)

    def recipe(self) -> Recipe[Example]:
        """See `RecordPipeline.recipe`. Pixels are uint8; the training step normalises them."""
        _ = self.text_tokenizer
        return Recipe(self.sources, weights_of(self.source), self.make, self.collate)

    def check_batch(self, global_batch: int, process_count: int) -> None:
        """Hard boxes are packed by groups of pictures."""
        local = global_batch // process_count
        if self.hard_pack_slots and local % self.hard_pack_images:
            raise ValueError(
                f"batch of {global_batch} over {process_count} processes is {local} each: expected "
                f"a multiple of hard_pack_images={self.hard_pack_images}"
            )

    def make(self, record: ImageTextRecord, rng: np.random.Generator) -> Made[Example]:
        """One record to one example. Raises BadRecordError."""
        checked = check_record(record, self.limits)
        record = checked.record
        window = self.augment.window(rng) if self.augment is not None else None
        pixels, window = self.pixels(record, window)
        cropped = 0
        if window is not None:
            min_visible = self.augment.min_visible if self.augment is not None else 0.5
            record, cropped = crop_regions(record, window, min_visible)
        example = encode_example(
            record, pixels, self._choose(record, rng), self.layout, self.text_tokenizer
        )
        if cropped:
            example = dataclasses.replace(example, cut={**example.cut, "boxes_cropped": cropped})
        return Made(example, checked.repaired)

    def pixels(
        self, record: ImageTextRecord, window: Box | None = None
    ) -> tuple[np.ndarray, Box | None]:
        """uint8 [S, S, 3] of a record, and the window of the picture that they show (None: all).

        Raises BadRecordError.
        """
        draft = 2 * self.image_size if self.fast_jpeg else None
        picture = decode_rgb(record.image, self.limits.image, draft)
        if self.resize == "square":
            return resize_square(picture, self.image_size, window), window
        return resize_shortest(picture, self.image_size)

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Examples to arrays; see `data_pipelines.collate`."""
        return collate(examples, self.layout, self.text_tokenizer)

    def fingerprint(self) -> str:
        settings = settings_of(self, "source", "tokenizer", "tolerance", "reading")
        weights = weights_of(self.source)
        words = digest(sorted((n, len(b)) for n, b in self.text_tokenizer.files().items()))
        return digest([s.fingerprint() for s in self.sources], weights, words, repr(settings))

    def describe(self) -> dict[str, Any]:
        """Facts; a source that cannot be opened is described by its problem."""
        facts: dict[str, Any] = {
            "image_size": self.image_size,
            "context": [self.context_short, self.context_long],
            "boxes": self.max_boxes,
            "negatives": self.negatives,
            "tokenizer": self.tokenizer,
        }
        try:
            facts["vocab_size"] = self.text_tokenizer.vocab_size
        except (OSError, ValueError) as e:
            facts["tokenizer_problem"] = str(e)
        return facts | describe_sources(self.sources)

    def assets(self) -> dict[str, bytes]:
        """Tokenizer and image-processor files for an exported folder."""
        return {
            **self.text_tokenizer.files(),
            "preprocessor_config.json": clip_processor_config(self.image_size),
        }

    def _choose(self, record: ImageTextRecord, rng: np.random.Generator) -> Choices:
        captions = len(record.short_captions)
        caption = int(rng.integers(captions)) if self.short_caption == "random" else 0
        total = len(record.regions)
        count = min(total, self.max_boxes)
        if self.box_choice == "random" and total > count:
            regions = tuple(int(i) for i in np.sort(rng.permutation(total)[:count]))
        else:
            regions = tuple(range(count))
        if self.region_phrase == "random":
            long_phrase = tuple(bool(v) for v in rng.integers(2, size=count))
        else:
            long_phrase = (self.region_phrase == "long",) * count
        return Choices(caption, regions, long_phrase)


def load_tokenizer(folder: str) -> ClipTokenizer:
    """The tokenizer in `folder`, or the packaged one for "scene".

    Raises FileNotFoundError naming the folder and the files expected in it.
    """
    path = PACKAGE / "tokenizer_scene" if folder == "scene" else Path(folder).expanduser()
    return ClipTokenizer.from_folder(path)


def crop_regions(
    record: ImageTextRecord, window: Box, min_visible: float
) -> tuple[ImageTextRecord, int]:
    """The record with its boxes in coordinates of `window`, and how many boxes were dropped.

    Boxes are clipped to the window; one of which less than `min_visible` is left is dropped.
    """
    x0, y0, x1, y1 = window
    kept = []
    for region in record.regions:
        a, b, c, d = region.box
        u, v, s, t = max(a, x0), max(b, y0), min(c, x1), min(d, y1)
        area = max(s - u, 0.0) * max(t - v, 0.0)
        if area <= 0 or area < min_visible * (c - a) * (d - b):
            continue
        w, h = x1 - x0, y1 - y0
        box = ((u - x0) / w, (v - y0) / h, (s - x0) / w, (t - y0) / h)
        kept.append(dataclasses.replace(region, box=box))
    dropped = len(record.regions) - len(kept)
    return dataclasses.replace(record, regions=tuple(kept)), dropped


def clip_processor_config(image_size: int) -> bytes:
    """`preprocessor_config.json` of a CLIPImageProcessor at `image_size`."""
    side = {"height": image_size, "width": image_size}
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(v), 8) for v in CLIP_MEAN],
        "image_std": [round(float(v), 8) for v in CLIP_STD],
    }
    return json.dumps(config, indent=2).encode()
