"""A conversation about pictures, whatever file it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from data_pipelines.records import BadRecordError, ImageLike
from data_pipelines.validation import text_problem

Role: TypeAlias = Literal["system", "user", "assistant"]

# Where a picture stands in a turn's text.
PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Attributes:
      text: a user's holds `PLACEHOLDER` where a picture stands.
      given: leading characters of an answer that are read like a question, not learnt.

    Raises:
      ValueError: more is given than there is, or of a text that templates would trim first.
    """

    role: Role
    text: str
    given: int = 0

    def __post_init__(self) -> None:
        if self.given and (not 0 < self.given <= len(self.text) or self.text[0].isspace()):
            raise ValueError(
                f"Turn.given: expected 0 to {len(self.text)} characters of a text that does not "
                f"begin with a space, found {self.given} of {self.text[:40]!r}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ConversationRecord:
    """Turns and the pictures that they speak of.

    Attributes:
      id: unique within the source, stable between runs.
      turns: without the system message (that is the template's), a user first.
      images: one per placeholder, in order; empty for text alone.
      extra: what an evaluation needs besides (boxes, kinds of question); never required.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageLike, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def placeholders(turns: Sequence[Turn]) -> int:
    """How many pictures the turns speak of."""
    return sum(turn.text.count(PLACEHOLDER) for turn in turns if turn.role == "user")


def check_conversation(record: ConversationRecord, max_chars: int) -> None:
    """Whether a record can be trained on.

    Raises:
      BadRecordError: malformed_record (no turns, roles that do not alternate from the user on, no
        answer), image_count (more or fewer pictures than placeholders), empty_text, text_too_long,
        invalid_utf8.
    """
    turns = record.turns
    if not turns:
        raise BadRecordError("malformed_record", "the conversation has no turns")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise BadRecordError(
                "malformed_record", f"turn {number + 1}: expected {expected}, found {turn.role}"
            )
        bare = turn.text.replace(PLACEHOLDER, "").strip()
        if not bare and PLACEHOLDER in turn.text:
            continue  # a picture alone
        problem = text_problem(turn.text, max_chars)
        if problem:
            reason = {"empty_caption": "empty_text", "caption_too_long": "text_too_long"}
            raise BadRecordError(
                reason.get(problem, problem),
                f"turn {number + 1} ({turn.role}) has {len(turn.text):,} characters",
            )
    if len(turns) < 2:
        raise BadRecordError("malformed_record", "the conversation has no answer")
    check_image_count(turns, len(record.images))


def check_image_count(turns: Sequence[Turn], images: int) -> None:
    """Raise BadRecordError("image_count") unless there is one picture per placeholder."""
    found = placeholders(turns)
    if found != images:
        raise BadRecordError(
            "image_count",
            f"expected one picture for each {PLACEHOLDER}, found {images} picture(s) and {found} "
            f"placeholder(s); {'add placeholders' if images > found else 'add the pictures'}",
        )


ROLES: tuple[Role, ...] = get_args(Role)
