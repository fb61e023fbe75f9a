"""Several workflows in one conversation (IAA): who answers, and where the picture stands.

The picture belongs to the first message of the user. A turn for the text-only workflow removes it
there, the next multimodal turn puts it back; the whole prompt is encoded again for every turn
(official `iaa/eval/infer_interleave.py`, `infer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from data_pipelines.conversation.records import PLACEHOLDER, Turn

Task = Literal["MM", "G", "Text"]
GROUNDING = "Please provide the bounding box coordinate of the region this sentence describes: "


def grounding_query(expression: str) -> str:
    """The question that IAA was taught for boxes; no full stop is added."""
    return GROUNDING + expression


def ask(history: Sequence[Turn], query: str, task: Task) -> tuple[Turn, ...]:
    """The turns that `task` sees when the user says `query` after `history`.

    The result, with the answer as another turn, is the next history.
    """
    turns = (*history, Turn("user", query))
    first = next(n for n, turn in enumerate(turns) if turn.role == "user")
    text, mark = turns[first].text, f"{PLACEHOLDER}\n"
    if task == "Text":
        text = text.replace(mark, "")
    elif PLACEHOLDER not in text:
        text = mark + text
    return (*turns[:first], Turn("user", text), *turns[first + 1 :])
