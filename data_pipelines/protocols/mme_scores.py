"""MME's scores (arXiv 2306.13394): what counts as yes and no, accuracy, accuracy+, and the sums.

Every picture has two questions. The score of a task is 100 times the share of right answers plus
100 times the share of pictures with both right, at most 200; perception is the sum of ten tasks
(2000), cognition of four (800). As the official `calculation.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
SUFFIX = "Answer the question using a single word or phrase."
_ASKS = "Please answer yes or no."


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Shares 0..1: of right answers, of pictures with both right, of answers that are neither yes
    nor no. `score` is 100 (accuracy + both), 0..200."""

    accuracy: float
    both: float
    other: float

    @property
    def score(self) -> float:
        """100 (accuracy + both)."""
        return 100 * self.accuracy + 100 * self.both


def answer_of(text: str) -> Literal["yes", "no", "other"]:
    """How an answer is read: "yes" or "no" among its first four characters, "yes" first ("not
    sure" is a no)."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_task(rows: Sequence[tuple[str, str]]) -> TaskScore:
    """Score of one task.

    Args:
      rows: (true answer "Yes" or "No", given answer), the two of a picture side by side.

    Raises:
      ValueError: an odd number of rows, none, or a true answer that is neither.
    """
    if not rows or len(rows) % 2:
        raise ValueError(f"MME: expected two questions for each picture, found {len(rows)} rows")
    right, other = [], 0
    for truth, answer in rows:
        if truth.lower() not in ("yes", "no"):
            raise ValueError(f"MME: expected true answers Yes or No, found {truth!r}")
        given = answer_of(answer)
        other += given == "other"
        right.append(given == truth.lower())
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return TaskScore(sum(right) / len(right), sum(both) / len(both), other / len(rows))


def score_tasks(rows: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, TaskScore]:
    """`score_task` of each task."""
    return {task: score_task(found) for task, found in rows.items()}


def ground_truth_key(prompt: str, known: Mapping[str, str]) -> str | None:
    """The question as the ground-truth files write it, for a prompt of LLaVA's question file.

    The suffix that asks for a single word is removed, and the request for yes or no put back where
    it is missing, behind one space or, where the files say so, two.

    Args:
      known: the questions of the picture's ground-truth file.

    Returns:
      A key of `known`, or None.
    """
    question = prompt.replace(SUFFIX, "").strip() if SUFFIX in prompt else prompt
    candidates = [question]
    if _ASKS not in question:
        candidates = [f"{question} {_ASKS}", f"{question}  {_ASKS}"]
    return next((c for c in candidates if c in known), None)
