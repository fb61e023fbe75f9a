"""Talking to a model about a picture (IAA): questions, boxes, text alone, and conversations.

    jaxmods sample iaa/tiny --out said --image photo.jpg --prompt "What is this?"
    jaxmods sample iaa/tiny --out found --input image=photo.jpg "expression=the red ball"
    jaxmods sample iaa/tiny --chat --image photo.jpg

With a picture, a prompt goes to the general workflow and an expression to grounding, whose boxes
are drawn onto the picture; without one, the language model answers alone. In a conversation, a line
that begins with "/ground " or "/text " chooses the workflow of that turn; otherwise it is the
general one where a picture is there. The picture belongs to the first message, and every turn reads
the whole prompt again, as the official program does.

Functions of the system, for a workflow w (P, T: positions of a prompt, with and without pictures;
C = positions for prompt and answer):

    sample_w(image [n, M, S, S, 3], ids [n, P], slot [n, P], length [n]) -> int32 [n, N]
    prefill_w(the same) -> (logits [n, V], four caches)
    decode_w(token [n], four caches, length [n]) -> (logits [n, V], four caches)

and without pictures sample_text(ids [n, T], length [n]), prefill_text, and decode_text with two
caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.boxes import Box
from data_pipelines.conversation.pictures import unframe_box
from data_pipelines.conversation.records import PLACEHOLDER, ConversationRecord, Turn
from data_pipelines.conversation.splice import splice
from data_pipelines.conversation.workflows import GROUNDING, Task, ask, grounding_query
from data_pipelines.images import decode_rgb
from data_pipelines.protocols.answers import ChatReading, question, read_answer, row_of
from data_pipelines.protocols.base import Functions, to_numpy
from data_pipelines.protocols.chat_sheet import Asked, chat_sheet
from data_pipelines.protocols.referring import pieces
from data_pipelines.records import ImageLike
from data_pipelines.samplers.base import Call, Conversation, Input, Made, Request, Sampler
from data_pipelines.sources.base import Source

IMAGE, PROMPT, EXPRESSION = "image", "prompt", "expression"
_COMMANDS: dict[str, Task] = {"/ground ": "G", "/text ": "Text"}
_BOX = (230, 30, 30)


@dataclasses.dataclass(frozen=True)
class ChatSampler(Sampler):
    """See the module's description.

    Attributes:
      reading: how prompts are made, as in training.
      source: records that are asked when nothing is given; None for none.
      workflows: function suffix of each workflow that the model has; a model of one branch may
        answer both kinds of question with it.
      new_tokens: longest answer of a conversation's turn.
    """

    reading: ChatReading
    source: Source[ConversationRecord] | None = None
    workflows: tuple[tuple[Task, str], ...] = (("MM", "mm"), ("G", "g"), ("Text", "text"))
    new_tokens: int = 128

    def inputs(self) -> tuple[Input, ...]:
        return (
            Input(IMAGE, "picture", "what is asked about", required=False),
            Input(PROMPT, "text", "a question, or anything said to the model", required=False),
            Input(EXPRESSION, "text", "what to find in the picture, as a phrase", required=False),
        )

    def requires(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f"sample_{suffix}" for _, suffix in self.workflows))

    def suffix(self, task: Task) -> str:
        """Function suffix of a workflow. Raises ValueError for one that the model lacks."""
        found = dict(self.workflows).get(task)
        if found is None:
            raise ValueError(
                f"workflow {task}: expected one of {', '.join(t for t, _ in self.workflows)}"
            )
        return found

    def check(self) -> None:
        """Raises ValueError for a tokenizer that does not fit the template."""
        _ = self.reading.text_tokenizer

    def count(self) -> int:
        return 0 if self.source is None else len(self.source)

    def example(self, index: int, seed: int) -> Request:
        assert self.source is not None  # `count` is 0 without
        record = self.source[index]
        return Request(record.id, index, seed, record=record)

    def call(self, request: Request) -> Call:
        record, task = self._asked(request)
        suffix = self.suffix(task)
        if task == "Text":
            return Call(f"sample_{suffix}", self._text_row(question(record)), (record, task))
        return Call(f"sample_{suffix}", tuple(row_of(record, self.reading)), (record, task))

    def finish(self, request: Request, call: Call, output: Any) -> Made:
        record, task = call.kept
        answer = read_answer(output, self.reading.text_tokenizer, self.reading.template)
        said = question(record)[-1].text.replace(PLACEHOLDER, "").strip()
        facts: dict[str, Any] = {"workflow": task, "question": said, "answer": answer}
        truth = record.turns[-1].text if record.turns[-1].role == "assistant" else answer
        picture, shown = None, record.images[0] if record.images else None
        boxes: tuple[Box, ...] = ()
        if task == "G" and shown is not None:
            size = decode_rgb(shown).size
            found = [unframe_box(box, *size) for box in pieces(answer)]
            facts["boxes"] = [[round(v, 2) for v in box] for box in found]
            picture = draw_boxes(shown, found)
            w, h = size
            boxes = tuple((a / w, b / h, c / w, d / h) for a, b, c, d in found)
        item = Asked(shown, said.removeprefix(GROUNDING), answer, truth, found=boxes)
        return Made(facts, picture, item=item)

    def sheet(self, made: Any) -> bytes | None:
        items = [m.item for m in made if m.item is not None]
        return chat_sheet(items) if items else None

    def conversation(self, functions: Functions) -> Conversation | None:
        return Chat(self, functions)

    def _asked(self, request: Request) -> tuple[ConversationRecord, Task]:
        """What is asked, and of which workflow."""
        if isinstance(request.record, ConversationRecord):
            task = cast(Task, request.record.extra.get("task", "MM"))
            return request.record, task
        image = cast(ImageLike | None, request.one(IMAGE))
        prompt, phrase = request.one(PROMPT), request.one(EXPRESSION)
        if (prompt is None) == (phrase is None):
            raise ValueError(f"expected either {PROMPT} or {EXPRESSION}, found both or neither")
        if phrase is not None and image is None:
            raise ValueError(f"{EXPRESSION}: expected a picture ({IMAGE}=FILE) to find it in")
        chosen: Task = "Text" if image is None else "MM" if phrase is None else "G"
        text = str(prompt) if phrase is None else grounding_query(str(phrase))
        turns = ask((), text, chosen)
        return ConversationRecord(request.name, turns, () if image is None else (image,)), chosen

    def _text_row(self, turns: tuple[Turn, ...]) -> tuple[np.ndarray, ...]:
        """ids and length of a prompt without pictures. Raises ValueError: it is too long."""
        reading = self.reading
        encoded = reading.template.encode(turns, reading.text_tokenizer, prompt=True)
        row = splice(encoded.ids, None, 0, reading.prompt_tokens, what="prompt")
        return row.ids, np.asarray(row.length, np.int32)


class Chat(Conversation):
    """A conversation whose turns may go to different workflows."""

    commands = tuple(command.strip() for command in _COMMANDS)

    def __init__(self, sampler: ChatSampler, functions: Functions) -> None:
        self._sampler, self._functions = sampler, functions
        self._history: tuple[Turn, ...] = ()
        self._image: Path | None = None

    def say(self, message: str, inputs: Mapping[str, tuple[Path, ...]]) -> Iterator[str]:
        image, task = self._attach(inputs), None
        for command, chosen in _COMMANDS.items():
            if message.startswith(command):
                message, task = message.removeprefix(command).strip(), chosen
        if not message.strip():
            raise ValueError("expected something said, found an empty message")
        if task is None:
            task = "Text" if image is None else "MM"
        if task == "G":
            if image is None:
                raise ValueError("/ground: expected a picture; attach one first")
            message = grounding_query(message)
        turns = ask(self._history, message, task)
        answer = ""
        for piece in self._pieces(turns, task, image):
            answer += piece
            yield piece
        self._image = image
        self._history = (*turns, Turn("assistant", answer.strip()))

    def _attach(self, inputs: Mapping[str, tuple[Path, ...]]) -> Path | None:
        found = [p for n, paths in inputs.items() if n == IMAGE for p in paths]
        if len(found) + (self._image is not None) > 1:
            raise ValueError(
                "expected one picture in a conversation, found another; begin a new one for it"
            )
        return found[0] if found else self._image

    def _pieces(self, turns: tuple[Turn, ...], task: Task, image: Path | None) -> Iterator[str]:
        sampler, functions = self._sampler, self._functions
        reading, suffix = sampler.reading, sampler.suffix(task)
        if task == "Text":
            row = list(sampler._text_row(turns))
        else:
            record = ConversationRecord("chat", turns, () if image is None else (image,))
            row = row_of(record, reading)
        length = int(row[-1])
        logits, *caches = functions[f"prefill_{suffix}"](*(a[None] for a in row))
        tokenizer = reading.text_tokenizer
        stop = tokenizer.tokens(reading.template.stop)[-1]
        said, shown = [], ""
        for number in range(sampler.new_tokens):
            token = int(to_numpy(logits)[0].argmax())
            if token == stop:
                break
            said.append(token)
            text = tokenizer.decode(said)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
            if number + 1 < sampler.new_tokens:
                at = np.asarray([length + number], np.int32)
                logits, *caches = functions[f"decode_{suffix}"](
                    np.asarray([token], np.int32), *caches, at
                )

        if rest := tokenizer.decode(said)[len(shown) :]:
            yield rest


def draw_boxes(image: ImageLike, boxes: list[Box]) -> np.ndarray:
    """The picture, uint8 [H, W, 3], with boxes (x1, y1, x2, y2 in pixels) drawn onto it."""
    picture: Image.Image = decode_rgb(image).copy()
    draw, thick = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 200))
    for x1, y1, x2, y2 in boxes:
        left, right, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        draw.rectangle((left, top, right, bottom), outline=_BOX, width=thick)
    return np.asarray(picture)
