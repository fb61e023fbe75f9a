"""The training pipeline of conversations about pictures.

Record -> checks -> pictures framed -> template -> tokens, cut at `max_tokens` (before splicing, as
the official code does, so image tokens are not counted by it) -> splicing -> batch:

  image   uint8 [B, M, S, S, 3]  pictures of a row in order; unused places are black
  ids     int32 [B, T]           token ids, 0 where a picture or padding is
  slot    int32 [B, T]           index into the row's M N image tokens, -1 elsewhere
  labels  int32 [B, T]           own id where learnt, else -100 (not shifted)
  valid   bool  [B, T]           False at right padding
  segments int32 [B, T]          only with `pack` > 1: number of the position's conversation in its
                                 row, from 1 on; 0 at right padding

T = `max_tokens` + M (N - 1). Without pictures (M = 0) there are no `image` and `slot`.

With `pack` = k > 1 a row holds k conversations, one after the other, and M = k `max_images`: row r
of the global stream holds its records k r to k r + k - 1. So the batch at a step is still a
function of recipe, seed and step alone, whatever the texts' lengths and the number of processes,
and every record is read as often as without. The k share `max_tokens`: each has `max_tokens` // k
and what the shorter ones leave (`shares`); what is longer is cut and counted as ever.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from data_pipelines.conversation.pictures import Framing, prepare
from data_pipelines.conversation.records import ConversationRecord, check_conversation
from data_pipelines.conversation.splice import IGNORE, IMAGE, Spliced, splice
from data_pipelines.conversation.templates import Llama3, Template
from data_pipelines.conversation.tokenizer import ChatTokenizer, load_chat_tokenizer
from data_pipelines.image_text import clip_processor_config
from data_pipelines.records import BadRecordError
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


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation: pictures uint8 [m, S, S, 3], ids before splicing and labels, not cut."""

    images: np.ndarray
    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
      images: uint8 [m, S, S, 3], those that have a place. spliced: the arrays.
      segments: int32 [T]. cut: tokens that were cut off.
    """

    images: np.ndarray
    spliced: Spliced
    segments: np.ndarray
    cut: int


def shares(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """How `total` is shared out: nobody gets more than its length, and what some leave goes to the
    others in equal parts. Everybody gets its length or at least `total` // number."""
    found = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    for place, n in enumerate(order):
        found[n] = min(lengths[n], total // (len(order) - place))
        total -= found[n]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class ConversationPipeline(RecordPipeline):
    """Training data of conversations.

    Attributes:
      source: one source of `ConversationRecord`s, or several with weights.
      tokenizer: a Hugging Face folder with `tokenizer.json`, or "scene".
      template: how conversations are written.
      framing: how pictures become squares.
      image_tokens: N, tokens of a picture; 0 for a pipeline of text alone.
      max_images: pictures of a record; one with more is bad ("too_many_images").
      max_tokens: tokens of a row before splicing; the rest is cut and counted ("tokens").
      pack: records of a row, which share its tokens and do not see each other; None: one. A batch
        of n rows takes `pack` n records.
      learn: "answers", or "all" tokens that are not pictures, as in pre-training.
      max_chars: longest message in characters.
      blind: every picture is replaced by grey, for a model that has the texts only.
      tolerance, reading: see `RecordPipeline`.
    """

    source: Source[ConversationRecord] | Mixture
    tokenizer: str = "scene"
    template: Template = dataclasses.field(default_factory=Llama3)
    framing: Framing = dataclasses.field(default_factory=Framing)
    image_tokens: int = 576
    max_images: int = 1
    max_tokens: int = 2048
    pack: int | None = None
    learn: Literal["answers", "all"] = "answers"
    max_chars: int = 100_000
    blind: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.records <= self.max_tokens:
            raise ValueError(
                f"ConversationPipeline.pack: expected 1 to max_tokens={self.max_tokens}, found "
                f"{self.pack}"
            )

    @property
    def records(self) -> int:
        """Records of a row."""
        return 1 if self.pack is None else self.pack

    @property
    def row_images(self) -> int:
        """M, pictures of a row."""
        return self.records * self.max_images

    @property
    def length(self) -> int:
        """T, positions of a row."""
        return self.max_tokens + self.row_images * max(self.image_tokens - 1, 0)

    @property
    def sources(self) -> tuple[Source[ConversationRecord], ...]:
        """The sources, one or several."""
        return sources_of(self.source)

    @functools.cached_property
    def text_tokenizer(self) -> ChatTokenizer:
        """The tokenizer, read at first use, with the tokens that the template needs."""
        tokenizer = load_chat_tokenizer(self.tokenizer)
        tokenizer.require(self.template.special)
        return tokenizer

    def recipe(self) -> Recipe[Example]:
        """See `RecordPipeline.recipe`."""
        _ = self.text_tokenizer
        return Recipe(self.sources, weights_of(self.source), self.make, self.collate)

    def make(self, record: ConversationRecord, rng: np.random.Generator) -> Made[Example]:
        """One record to one example. Raises BadRecordError."""
        del rng
        check_conversation(record, self.max_chars)
        if len(record.images) > self.max_images:
            raise BadRecordError(
                "too_many_images", f"{len(record.images)} pictures, max_images={self.max_images}"
            )
        images = np.zeros((0, self.framing.size, self.framing.size, 3), np.uint8)
        if record.images:
            images = np.stack([prepare(image, self.framing) for image in record.images])
        if self.blind:
            images = np.full_like(images, 127)
        encoded = self.template.encode(record.turns, self.text_tokenizer)
        labels = encoded.labels
        if self.learn == "all":
            labels = tuple(IGNORE if token == IMAGE else token for token in encoded.ids)
        certain = self.max_tokens // self.records
        if all(label == IGNORE for label in labels[1:certain]):
            raise BadRecordError(
                "nothing_to_learn",
                f"no answer within the first {certain} tokens of {len(encoded.ids)} "
                f"(max_tokens={self.max_tokens}, pack={self.records})",
            )
        return Made(Example(images, encoded.ids, labels))

    def row(self, members: Sequence[Example]) -> Row:
        """The row of `pack` conversations."""
        room = shares([len(m.ids) for m in members], self.max_tokens)
        ids: list[int] = []
        labels: list[int] = []
        images, numbers, lengths = [], [], []
        for number, (member, count) in enumerate(zip(members, room, strict=True), start=1):
            kept = member.ids[:count]
            pictures = kept.count(IMAGE)
            ids += kept
            # What stands before the first token of a text is another one's last.
            labels += (IGNORE, *member.labels[1:count])
            images.append(member.images[:pictures])
            numbers.append(number)
            lengths.append(count + pictures * (self.image_tokens - 1))
        segments = np.zeros(self.length, np.int32)
        segments[: sum(lengths)] = np.repeat(numbers, lengths)
        return Row(
            np.concatenate(images),
            splice(ids, labels, self.image_tokens, self.length),
            segments,
            sum(len(m.ids) for m in members) - len(ids),
        )

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """`pack` examples a row to arrays, and how many tokens were cut off."""
        k = self.records
        rows = [self.row(examples[n : n + k]) for n in range(0, len(examples), k)]
        arrays = {
            "ids": np.stack([r.spliced.ids for r in rows]),
            "labels": np.stack([r.spliced.labels for r in rows]),
            "valid": np.stack([r.spliced.valid for r in rows]),
        }
        if k > 1:
            arrays["segments"] = np.stack([r.segments for r in rows])
        if self.max_images:
            side = self.framing.size
            image = np.zeros((len(rows), self.row_images, side, side, 3), np.uint8)
            for place, row in zip(image, rows, strict=True):
                place[: len(row.images)] = row.images
            arrays |= {"image": image, "slot": np.stack([r.spliced.slot for r in rows])}
        cut = sum(r.cut for r in rows)
        return arrays, {"tokens": cut} if cut else {}

    def fingerprint(self) -> str:
        # Rows of one record have the fingerprint that they had before there were others.
        others = ("pack",) if self.records == 1 else ()
        settings = settings_of(self, "source", "tokenizer", "tolerance", "reading", *others)
        words = digest(sorted((n, len(b)) for n, b in self.text_tokenizer.files().items()))
        sources = [s.fingerprint() for s in self.sources]
        return digest(sources, weights_of(self.source), words, repr(settings))

    def describe(self) -> dict[str, Any]:
        """Facts; a source that cannot be opened is described by its problem."""
        facts: dict[str, Any] = {
            "template": type(self.template).__name__,
            "positions": self.length,
            "image_tokens": self.image_tokens,
            "records_per_row": self.records,
            "tokenizer": self.tokenizer,
        }
        try:
            facts["vocab_size"] = self.text_tokenizer.vocab_size
        except (OSError, ValueError, ImportError) as error:
            facts["tokenizer_problem"] = str(error)
        return facts | describe_sources(self.sources)

    def assets(self) -> dict[str, bytes]:
        """Tokenizer and image-processor files for an exported folder."""
        files = self.text_tokenizer.files()
        if self.max_images:
            files["preprocessor_config.json"] = clip_processor_config(self.framing.size)
        return files
