"""The training pipeline of conversations about pictures.

Record -> checks -> pictures framed -> template -> tokens, cut at `max_tokens` (before splicing, as
the official code does, so image tokens are not counted by it) -> splicing -> batch:

  image   uint8 [B, M, S, S, 3]  pictures of a row in order; unused places are black
  ids     int32 [B, T]           token ids, 0 where a picture or padding is
  slot    int32 [B, T]           index into the row's M N image tokens, -1 elsewhere
  labels  int32 [B, T]           own id where learnt, else -100 (not shifted)
  valid   bool  [B, T]           False at right padding

T = `max_tokens` + M (N - 1). Without pictures (M = 0) there are no `image` and `slot`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.batch import HostBatch, Pipeline
from data_pipelines.conversation.pictures import Framing, prepare
from data_pipelines.conversation.records import ConversationRecord, check_conversation
from data_pipelines.conversation.splice import IGNORE, IMAGE, Spliced, splice
from data_pipelines.conversation.templates import Llama3, Template
from data_pipelines.conversation.tokenizer import ChatTokenizer, load_chat_tokenizer
from data_pipelines.image_text import clip_processor_config
from data_pipelines.records import BadRecordError
from data_pipelines.sampling import Made, Reading, Recipe, Tolerance, host_batches
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
    """One row: pictures uint8 [m, S, S, 3], the spliced sequence, tokens that were cut off."""

    images: np.ndarray
    row: Spliced
    cut: int


@dataclasses.dataclass(frozen=True)
class ConversationPipeline(Pipeline):
    """Training data of conversations.

    Attributes:
      source: one source of `ConversationRecord`s, or several with weights.
      tokenizer: a Hugging Face folder with `tokenizer.json`, or "scene".
      template: how conversations are written.
      framing: how pictures become squares.
      image_tokens: N, tokens of a picture; 0 for a pipeline of text alone.
      max_images: M, pictures of a row; a record with more is bad ("too_many_images").
      max_tokens: tokens of a row before splicing; the rest is cut and counted ("tokens").
      max_chars: longest message in characters.
      blind: every picture is replaced by grey, for a model that has the texts only.
      tolerance: how many unusable records a run accepts. reading: threads and worker processes.
    """

    source: Source[ConversationRecord] | Mixture
    tokenizer: str = "scene"
    template: Template = dataclasses.field(default_factory=Llama3)
    framing: Framing = dataclasses.field(default_factory=Framing)
    image_tokens: int = 576
    max_images: int = 1
    max_tokens: int = 2048
    max_chars: int = 100_000
    blind: bool = False
    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance)
    reading: Reading = dataclasses.field(default_factory=Reading)

    @property
    def length(self) -> int:
        """T, positions of a row."""
        return self.max_tokens + self.max_images * max(self.image_tokens - 1, 0)

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

    def batches(
        self,
        *,
        global_batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ) -> Iterator[HostBatch]:
        """See `Pipeline.batches`."""
        _ = self.text_tokenizer
        return host_batches(
            Recipe(self.sources, weights_of(self.source), self.make, self.collate),
            global_batch=global_batch,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            start_step=start_step,
            reading=self.reading,
            tolerance=self.tolerance,
        )

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
        ids, labels = encoded.ids[: self.max_tokens], encoded.labels[: self.max_tokens]
        if all(label == IGNORE for label in labels[1:]):
            raise BadRecordError(
                "nothing_to_learn",
                f"no answer within the first max_tokens={self.max_tokens} of {len(encoded.ids)}",
            )
        row = splice(ids, labels, self.image_tokens, self.length)
        return Made(Example(images[: ids.count(IMAGE)], row, len(encoded.ids) - len(ids)))

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Rows to arrays, and how many tokens were cut off."""
        arrays = {
            "ids": np.stack([e.row.ids for e in examples]),
            "labels": np.stack([e.row.labels for e in examples]),
            "valid": np.stack([e.row.valid for e in examples]),
        }
        if self.max_images:
            side = self.framing.size
            image = np.zeros((len(examples), self.max_images, side, side, 3), np.uint8)
            for place, example in zip(image, examples, strict=True):
                place[: len(example.images)] = example.images
            arrays |= {"image": image, "slot": np.stack([e.row.slot for e in examples])}
        cut = sum(e.cut for e in examples)
        return arrays, {"tokens": cut} if cut else {}

    def fingerprint(self) -> str:
        settings = settings_of(self, "source", "tokenizer", "tolerance", "reading")
        words = digest(sorted((n, len(b)) for n, b in self.text_tokenizer.files().items()))
        sources = [s.fingerprint() for s in self.sources]
        return digest(sources, weights_of(self.source), words, repr(settings))

    def describe(self) -> dict[str, Any]:
        """Facts; a source that cannot be opened is described by its problem."""
        facts: dict[str, Any] = {
            "template": type(self.template).__name__,
            "positions": self.length,
            "image_tokens": self.image_tokens,
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
