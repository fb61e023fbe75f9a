"""What protocols over chat models share: prompts in static batches, answers as text.

A model is used through one function that generates:

    sample_<b>(image uint8 [n, M, S, S, 3], ids int32 [n, P], slot int32 [n, P], length int32 [n])
        -> int32 [n, tokens]

or, for a language model without eyes, where `max_images` is 0:

    sample_text(ids int32 [n, P], length int32 [n]) -> int32 [n, tokens]
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data_pipelines.conversation.pictures import Framing, prepare
from data_pipelines.conversation.records import ConversationRecord, Turn, check_image_count
from data_pipelines.conversation.splice import splice
from data_pipelines.conversation.templates import Llama3, Template
from data_pipelines.conversation.tokenizer import ChatTokenizer, load_chat_tokenizer
from data_pipelines.protocols.base import Functions, to_numpy
from data_pipelines.protocols.features import Census
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source


@dataclasses.dataclass(frozen=True)
class ChatReading:
    """How records become prompts; it has to be that of the training.

    Attributes:
      tokenizer: a folder with `tokenizer.json`, or "scene".
      template: chat format.
      framing: of pictures.
      image_tokens: N. max_images: M; 0 for a model of text alone.
      prompt_tokens: tokens of a prompt before splicing; a longer one is left out and counted.
      batch_size: prompts per call. workers: threads that decode pictures.
      blind: show grey instead of the picture: what can be answered without looking.
    """

    tokenizer: str = "scene"
    template: Template = dataclasses.field(default_factory=Llama3)
    framing: Framing = dataclasses.field(default_factory=Framing)
    image_tokens: int = 576
    max_images: int = 1
    prompt_tokens: int = 512
    batch_size: int = 64
    workers: int = 4
    blind: bool = False

    @functools.cached_property
    def text_tokenizer(self) -> ChatTokenizer:
        """The tokenizer, with the tokens of the template."""
        tokenizer = load_chat_tokenizer(self.tokenizer)
        tokenizer.require(self.template.special)
        return tokenizer

    @property
    def positions(self) -> int:
        """P, positions of a prompt."""
        return self.prompt_tokens + self.max_images * max(self.image_tokens - 1, 0)

    def __getstate__(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Answered:
    """A record with the model's answer."""

    index: int
    record: ConversationRecord
    answer: str


def question(record: ConversationRecord) -> tuple[Turn, ...]:
    """The turns up to the last answer, whose given part (`Turn.given`) is asked with them."""
    return record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns


def answers(
    functions: Functions,
    name: str,
    source: Source[ConversationRecord],
    reading: ChatReading,
    census: Census,
    title: str,
    limit: int | None = None,
) -> Iterator[Answered]:
    """Answers to the records of `source` in order; what cannot be asked is counted by reason.

    Args:
      functions: the model's. name: of the function that generates.
      limit: ask the first `limit` records only.
    """
    tokenizer = reading.text_tokenizer
    total = len(source) if limit is None else min(limit, len(source))

    def one(index: int) -> tuple[int, ConversationRecord, list[np.ndarray]] | BadRecordError:
        try:
            record = source[index]
            return index, record, row_of(record, reading)
        except BadRecordError as error:
            return error

    pending: list[tuple[int, ConversationRecord, list[np.ndarray]]] = []

    def ask() -> Iterator[Answered]:
        columns = [np.stack(column) for column in zip(*(row for *_, row in pending), strict=True)]
        tokens = to_numpy(functions[name](*columns))
        for (index, record, _), ids in zip(pending, tokens, strict=True):
            yield Answered(index, record, read_answer(ids, tokenizer, reading.template))
        pending.clear()

    with ThreadPoolExecutor(max(1, reading.workers)) as pool:
        ahead: collections.deque = collections.deque()
        indices = iter(range(total))
        for _ in tqdm(range(total), desc=title, unit="question", leave=False, disable=None):
            while len(ahead) < 2 * reading.batch_size and (at := next(indices, None)) is not None:
                ahead.append((at, pool.submit(one, at)))
            at, future = ahead.popleft()
            outcome = future.result()
            census.counts["records_seen"] += 1
            if isinstance(outcome, BadRecordError):
                where = f"{source.name}:{source.record_id(at)}: {outcome.detail}"
                census.drop("records", outcome.reason, where)
                continue
            pending.append(outcome)
            if len(pending) == reading.batch_size:
                yield from ask()
    if pending:
        yield from ask()


def row_of(record: ConversationRecord, reading: ChatReading) -> list[np.ndarray]:
    """image, ids, slot and length of one prompt; ids and length where there are no pictures.

    Raises:
      BadRecordError: pictures and placeholders that do not fit (image_count, too_many_images), a
        picture that cannot be read, prompt_too_long.
    """
    turns = question(record)
    check_image_count(turns, len(record.images))
    if len(record.images) > reading.max_images:
        raise BadRecordError(
            "too_many_images", f"{len(record.images)} pictures, expected {reading.max_images}"
        )
    side = reading.framing.size
    image = np.zeros((reading.max_images, side, side, 3), np.uint8)
    for place, picture in zip(image, record.images, strict=False):
        place[:] = 127 if reading.blind else prepare(picture, reading.framing)
    last = record.turns[-1]
    encoded = reading.template.encode(
        turns,
        reading.text_tokenizer,
        prompt=True,
        begun=last.text[: last.given] if last.role == "assistant" else "",
    )
    try:
        row = splice(encoded.ids, None, reading.image_tokens, reading.positions, what="prompt")
    except ValueError as error:
        raise BadRecordError("prompt_too_long", str(error)) from error
    length = np.asarray(row.length, np.int32)
    return [image, row.ids, row.slot, length] if reading.max_images else [row.ids, length]


def read_answer(
    ids: Sequence[int] | np.ndarray, tokenizer: ChatTokenizer, template: Template
) -> str:
    """Text of generated ids up to the stop token, without special tokens, stripped."""
    stop = tokenizer.tokens(template.stop)[-1]
    found = [int(token) for token in ids]
    if stop in found:
        found = found[: found.index(stop)]
    return tokenizer.decode(found).strip()
