"""From turns to tokens: chat templates, with the tokens that are learnt marked.

A template writes a conversation as text, cut where pictures stand, with the character ranges that
are supervised. Each piece between pictures is tokenised as a whole (so ids are those of the
official string-based code), and a token is learnt when it overlaps a supervised range.

* `Llama3` (IAA): each answer and its `<|eot_id|>` are learnt (ASSUMPTION: the training code was not
  published); the picture is a reserved token and a line break before the first question.
* `Vicuna` (LMM-Det, LLaVA 1.5): each answer and its `</s>`; `<image>` and a line break.
* `Plain` (LLaVA's pre-training): the caption and its line break; nothing else is said.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from data_pipelines.conversation.records import PLACEHOLDER, Turn
from data_pipelines.conversation.splice import IGNORE, IMAGE
from data_pipelines.conversation.tokenizer import (
    BEGIN,
    END_OF_TURN,
    HEADER_END,
    HEADER_START,
    IMAGE_SLOT,
    ChatTokenizer,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids before splicing (`IMAGE` where a picture stands) and labels (`IGNORE` or the id)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def images(self) -> int:
        """How many pictures have a place."""
        return self.ids.count(IMAGE)


@dataclasses.dataclass
class _Writer:
    """Text as it is written: pieces between pictures, and their supervised ranges."""

    marker: str
    pieces: list[str] = dataclasses.field(default_factory=lambda: [""])
    learnt: list[list[tuple[int, int]]] = dataclasses.field(default_factory=lambda: [[]])

    def add(self, text: str, *, learn: bool = False) -> None:
        start = len(self.pieces[-1])
        self.pieces[-1] += text
        if learn:
            self.learnt[-1].append((start, start + len(text)))

    def answer(self, text: str, given: int, end: str) -> None:
        """An answer and its end; the first `given` characters are not learnt."""
        self.add(text[:given])
        self.add(text[given:] + end, learn=True)

    def add_with_pictures(self, text: str) -> None:
        """A user's text; its placeholders end a piece."""
        first, *rest = text.split(PLACEHOLDER)
        self.add(first)
        for part in rest:
            self.pieces.append("")
            self.learnt.append([])
            self.add(part)

    @property
    def text(self) -> str:
        """Everything, with the marker where pictures stand."""
        return self.marker.join(self.pieces)


@dataclasses.dataclass(frozen=True)
class Template(abc.ABC):
    """How a conversation is written.

    Attributes:
      system: the message before the first turn; "" for none.
    """

    system: str = SYSTEM

    @property
    @abc.abstractmethod
    def special(self) -> tuple[str, ...]:
        """Tokens that the vocabulary must have."""

    @property
    @abc.abstractmethod
    def stop(self) -> str:
        """The token that ends an answer."""

    @property
    @abc.abstractmethod
    def _first(self) -> str:
        """Token whose id stands before everything; "" where the text holds it."""

    @property
    def _before_answer(self) -> str:
        """What stands between a prompt and its answer; it is left to the model where it answers
        from the first word."""
        return ""

    def _whole(self, turns: Sequence[Turn], prompt: bool, begun: str) -> _Writer:
        if begun and not prompt:
            raise ValueError(
                f"{type(self).__name__}: only the answer to a prompt can be begun, found "
                f"begun={begun!r}; set prompt=True"
            )
        written = self._write(turns, prompt=prompt)
        if begun:
            written.add(self._before_answer + begun)
        return written

    @abc.abstractmethod
    def _write(self, turns: Sequence[Turn], *, prompt: bool) -> _Writer:
        """The conversation; with `prompt`, up to where the next answer begins."""

    def text(self, turns: Sequence[Turn], *, prompt: bool = False, begun: str = "") -> str:
        """The conversation as text.

        Args:
          prompt: followed by what an answer begins with. begun: and by words of that answer.
        """
        return self._whole(turns, prompt, begun).text

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: ChatTokenizer,
        *,
        prompt: bool = False,
        begun: str = "",
    ) -> Encoded:
        """The conversation as ids and labels; `prompt` and `begun` as for `text`.

        Raises:
          ValueError: the tokenizer lacks special tokens of this template, or an answer is begun
            without `prompt`.
        """
        tokenizer.require(self.special)
        written = self._whole(turns, prompt, begun)
        ids = [tokenizer.token_id(self._first)] if self._first else []
        labels = [IGNORE] * len(ids)
        for number, (piece, ranges) in enumerate(zip(written.pieces, written.learnt, strict=True)):
            if number:
                ids.append(IMAGE)
                labels.append(IGNORE)
            found = tokenizer.pieces(piece)
            ids += found.ids
            labels += [
                token if any(a < end and start < b for a, b in ranges) else IGNORE
                for token, start, end in zip(found.ids, found.starts, found.ends, strict=True)
            ]
        return Encoded(tuple(ids), tuple(labels))


def _picture_first(text: str) -> str:
    """A question with its one picture before it, on a line of its own (LLaVA's
    `preprocess_multimodal`); texts with several pictures keep their places."""
    if text.count(PLACEHOLDER) != 1:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


@dataclasses.dataclass(frozen=True)
class Llama3(Template):
    """Llama 3's chat: a header for each message, which is trimmed, and an end of turn."""

    @property
    def special(self) -> tuple[str, ...]:
        return (BEGIN, HEADER_START, HEADER_END, END_OF_TURN, IMAGE_SLOT)

    @property
    def stop(self) -> str:
        return END_OF_TURN

    @property
    def _first(self) -> str:
        return ""

    def _write(self, turns: Sequence[Turn], *, prompt: bool) -> _Writer:
        writer = _Writer(IMAGE_SLOT)
        writer.add(BEGIN)
        if self.system:
            writer.add(f"{_header('system')}{self.system.strip()}{END_OF_TURN}")
        for turn in turns:
            writer.add(_header(turn.role))
            if turn.role == "assistant":
                writer.answer(turn.text.strip(), turn.given, END_OF_TURN)
            else:
                text = turn.text
                if not text.startswith(f"{PLACEHOLDER}\n"):  # else as it is, to the last space
                    text = _picture_first(text)
                writer.add_with_pictures(text.strip())
                writer.add(END_OF_TURN)
        if prompt:
            writer.add(_header("assistant"))
        return writer


def _header(role: str) -> str:
    return f"{HEADER_START}{role}{HEADER_END}\n\n"


@dataclasses.dataclass(frozen=True)
class Vicuna(Template):
    """Vicuna 1.1: "USER: question ASSISTANT: answer</s>" on one line."""

    @property
    def special(self) -> tuple[str, ...]:
        return ("<s>", "</s>")

    @property
    def stop(self) -> str:
        return "</s>"

    @property
    def _first(self) -> str:
        return "<s>"

    @property
    def _before_answer(self) -> str:
        return " "

    def _write(self, turns: Sequence[Turn], *, prompt: bool) -> _Writer:
        writer = _Writer(PLACEHOLDER)
        if self.system:
            writer.add(self.system + " ")
        for turn in turns:
            if turn.role == "assistant":
                writer.add("ASSISTANT: ")
                writer.answer(turn.text, turn.given, "</s>")
            else:
                writer.add("USER: ")
                writer.add_with_pictures(_picture_first(turn.text))
                writer.add(" ")
        if prompt:
            writer.add("ASSISTANT:")
        return writer


@dataclasses.dataclass(frozen=True)
class Plain(Template):
    """Pictures, then the answers; what the user says besides is left out.

    Attributes:
      bos: token whose id stands first. end: what ends an answer; generation stops at its token.
    """

    system: str = ""
    bos: str = "<s>"
    end: str = "\n"

    @property
    def special(self) -> tuple[str, ...]:
        return (self.bos,)

    @property
    def stop(self) -> str:
        return self.end

    @property
    def _first(self) -> str:
        return self.bos

    def _write(self, turns: Sequence[Turn], *, prompt: bool) -> _Writer:
        del prompt
        writer = _Writer(PLACEHOLDER)
        for turn in turns:
            if turn.role == "assistant":
                writer.answer(turn.text, turn.given, self.end)
            elif turn.role == "user":
                writer.add_with_pictures(PLACEHOLDER * turn.text.count(PLACEHOLDER))
        return writer
