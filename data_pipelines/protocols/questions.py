"""Short questions with one right answer, by kind of question (scene world, or own data)."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from typing import Any

from data_pipelines.conversation.records import PLACEHOLDER, ConversationRecord
from data_pipelines.protocols.answers import Answered, ChatReading, answers, question
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel, Protocol
from data_pipelines.protocols.chat_sheet import Asked, chat_sheet
from data_pipelines.protocols.features import Census, need
from data_pipelines.sources.base import Source


@dataclasses.dataclass(frozen=True)
class Questions(Protocol):
    """Share of questions whose answer is the recorded one, without regard to case and full stops.
    Of both, what follows the last colon counts: "red C2, blue F4: red" says "red".

    "chance" of a kind is the share of its most frequent answer in the same set.

    Attributes:
      source: records whose last turn is the answer; `extra["kind"]` groups them. Where
        `extra["seen"]` holds every answer that is true of something in the picture, "seen/<kind>"
        is the share of answers among them (chance: of the best single answer), and the settings
        have what guessing among them would give: the accuracy of a model that sees what is there,
        but not which thing has it.
      reading: how they are asked.
      function: the model's function that answers.
      label: first part of the protocol's name.
      limit: ask the first `limit` records. examples: pictures of the panel.
    """

    source: Source[ConversationRecord]
    reading: ChatReading
    function: str = "sample_mm"
    label: str = "scenes"
    limit: int | None = None
    examples: int = 12

    @property
    def name(self) -> str:
        return f"{self.label}_questions" + ("_blind" if self.reading.blind else "")

    def requires(self) -> tuple[str, ...]:
        return (self.function,)

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = time.perf_counter(), Census()
        need(functions, self.requires(), self.name)
        right: dict[str, list[bool]] = defaultdict(list)
        truths: dict[str, Counter[str]] = defaultdict(Counter)
        seen: dict[str, list[tuple[str, frozenset[str]]]] = defaultdict(list)
        shown: list[Answered] = []
        for found in answers(
            functions, self.function, self.source, self.reading, census, self.name, self.limit
        ):
            truth = found.record.turns[-1].text
            kind = str(found.record.extra.get("kind", "question"))
            right[kind].append(_plain(found.answer) == _plain(truth))
            truths[kind][_plain(truth)] += 1
            if there := found.record.extra.get("seen"):
                seen[kind].append((_plain(found.answer), frozenset(map(_plain, there))))
            if panels and len(shown) < self.examples:
                shown.append(found)
        asked = sum(map(len, right.values()))
        census.require("questions", asked, self.source)
        chance = {k: max(c.values()) / c.total() for k, c in truths.items()}
        metrics = {
            "accuracy": Metric(
                sum(map(sum, right.values())) / asked,
                sum(chance[k] * len(r) for k, r in right.items()) / asked,
            )
        }
        for kind in sorted(right) if len(right) > 1 else ():
            metrics[f"accuracy/{kind}"] = Metric(sum(right[kind]) / len(right[kind]), chance[kind])
        for kind, pairs in sorted(seen.items()):
            single = Counter(value for _, there in pairs for value in there)
            metrics[f"seen/{kind}"] = Metric(
                sum(answer in there for answer, there in pairs) / len(pairs),
                max(single.values()) / len(pairs),
            )
        pictures = (self._panel(shown),) if shown else ()
        return EvalResult(
            self.name,
            metrics,
            {
                **settings(self.source, self.reading, self.limit),
                "right": "what follows the last colon equals that of the recorded answer, without "
                "case and final full stop",
                "chance": "the most frequent answer of each kind of question",
                "guessing among what is seen": {
                    kind: sum(1 / len(there) for _, there in pairs) / len(pairs)
                    for kind, pairs in sorted(seen.items())
                },
            },
            asked,
            time.perf_counter() - start,
            pictures,
            dict(census.counts),
            tuple(f"{name}, first: {e}" for name, e in census.examples.items()),
        )

    def _panel(self, shown: list[Answered]) -> Panel:
        items = [
            Asked(
                found.record.images[0] if found.record.images else None,
                question(found.record)[-1].text.replace(PLACEHOLDER, "").strip(),
                found.answer,
                found.record.turns[-1].text,
            )
            for found in shown
        ]
        return Panel(
            "Questions and answers",
            "The first questions of the set, not picked; a wrong answer is followed by the right "
            "one.",
            chat_sheet(items),
        )


def settings(
    source: Source[ConversationRecord], reading: ChatReading, limit: int | None
) -> dict[str, Any]:
    """What the numbers of every protocol over chat models depend on."""
    return {
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "template": type(reading.template).__name__,
        "picture": f"{reading.framing.size} px, {reading.framing.mode}",
        "blind": reading.blind,
        "decoding": "greedy",
        "limit": limit,
    }


def _plain(text: str) -> str:
    return text.rpartition(":")[2].strip().lower().rstrip(".")
