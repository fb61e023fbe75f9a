"""IAA on the host: pictures, prompts of several workflows, scores of REC and MME."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from data_pipelines.conversation.pictures import Framing, prepare
from data_pipelines.conversation.records import PLACEHOLDER, Turn
from data_pipelines.conversation.templates import Llama3
from data_pipelines.conversation.tokenizer import IMAGE_SLOT
from data_pipelines.conversation.workflows import ask
from data_pipelines.images import normalise
from data_pipelines.protocols.mme_scores import COGNITION, PERCEPTION, answer_of, score_tasks
from data_pipelines.protocols.referring_boxes import hits
from tests.parity.registry import Case, Kind, Tolerance, assert_close

PICTURES = Kind("iaa", "pictures", lambda case: any(n.endswith(".uint8") for n in case.shapes))
PROMPTS = Kind("iaa", "prompts", lambda case: "interleave" in content(case))
REC = Kind("iaa", "rec", lambda case: "precision" in content(case))
MME = Kind("iaa", "mme", lambda case: "score_per_task" in content(case))


def content(case: Case) -> dict[str, Any]:
    """Fields of all JSON files of a case but `meta.json`."""
    found: dict[str, Any] = {}
    for name in sorted(case.files - {"meta.json"}):
        if name.endswith(".json"):
            loaded = json.loads((case.folder / name).read_text("utf-8"))
            found |= loaded if isinstance(loaded, dict) else {}
    return found


@PICTURES.check
def framed_and_normalised(case: Case) -> None:
    """`pad` and centre crop at the case's size, `pad` at the size of the sub-sampled output."""
    # We resize with Pillow, for which the case states its own, tight tolerance.
    stated = re.search(r"([\d.e-]+) with Pillow", str(case.meta["tolerance"]))
    tolerance = Tolerance(float(stated.group(1))) if stated else case.tolerance()
    size = case.meta["size"]
    for name in sorted(n for n in case.shapes if n.endswith(".uint8")):
        stem, image = name.removesuffix(".uint8"), case.io[name]
        for mode, theirs in (("pad", "pad"), ("crop", "nopad")):
            ours = normalise(prepare(image, Framing(size, mode)))
            assert_close(
                f"{stem}.{theirs}",
                ours.transpose(2, 0, 1),
                case.io[f"{stem}.{theirs}"],
                tolerance,
            )
        large = normalise(prepare(image, Framing(336))).transpose(2, 0, 1)
        assert_close(
            f"{stem}.pad336", large[:, 4::12, 5::12], case.io[f"{stem}.pad336_sub"], tolerance
        )


def _text(turns: tuple[Turn, ...]) -> str:
    return Llama3().text(turns, prompt=True)


@PROMPTS.check
def interleaved_workflows(case: Case) -> None:
    """Prompts and messages of one conversation whose turns go to different workflows."""
    history: tuple[Turn, ...] = ()
    for turn in content(case)["interleave"]:
        history = ask(history, turn["query"], turn["task_type"])
        prompt = _text(history)
        assert prompt == turn["prompt"]
        assert (IMAGE_SLOT in prompt) == turn["has_image"]
        places = [prompt.index(IMAGE_SLOT)] if IMAGE_SLOT in prompt else []
        assert places == turn["image_slot_positions"]
        messages = [(t.role, t.text.replace(PLACEHOLDER, IMAGE_SLOT)) for t in history]
        assert messages == [(m["role"], m["content"]) for m in turn["messages"][1:]]
        assert turn["messages"][0] == {"role": "system", "content": Llama3().system}
        history = (*history, Turn("assistant", turn["answer"]))


@PROMPTS.check
def single_workflow(case: Case) -> None:
    """Prompts of conversations that stay with one workflow."""
    history: tuple[Turn, ...] = ()
    for turn in content(case)["single"]:
        number = turn["round"]
        history = history if number else ()
        history = ask(history, f"Question {number}?", turn["task_type"])
        assert _text(history) == turn["prompt"]
        assert (IMAGE_SLOT in turn["prompt"]) == turn["has_image"]
        history = (*history, Turn("assistant", f"Answer {number}."))


@REC.check
def boxes_are_hit(case: Case) -> None:
    """Every hit flag, and their share."""
    fields = content(case)
    flags = [
        int(hits(row["text"], row["bbox"], row["width"], row["height"])) for row in fields["cases"]
    ]
    assert flags == [row["hit"] for row in fields["cases"]]
    assert sum(flags) == fields["tp"]
    assert_close("precision", np.mean(flags), np.float64(fields["precision"]), Tolerance(1e-12))


@MME.check
def scores_of_tasks(case: Case) -> None:
    """Score of each task and the two totals."""
    fields = content(case)
    order = fields["row_fields"]
    rows = {
        task: [(row[order.index("gt")], row[order.index("pred")]) for row in rows]
        for task, rows in fields["rows_per_task"].items()
    }
    scores = score_tasks(rows)
    for task, expected in fields["score_per_task"].items():
        assert_close(task, scores[task].score, expected, case.tolerance())
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        total = sum(scores[task].score for task in tasks)
        assert_close(name, total, fields[f"total_{name}"], case.tolerance())


@MME.check
def answers_are_read(case: Case) -> None:
    """What counts as yes, no, or neither."""
    for text, expected in content(case)["parse_examples"].items():
        assert answer_of(text) == expected, text
