"""`jaxmods data inspect` on conversations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.conversation import (
    ConversationPipeline,
    ConversationRecord,
    Framing,
    Llama3,
    Turn,
)
from data_pipelines.conversation.scenes import SceneDialogues, SceneTexts
from data_pipelines.inspect import inspect_pipeline
from data_pipelines.sources.base import InMemory, Mixture

PICTURE = np.full((20, 30, 3), 200, np.uint8)


def record(name: str, asked: str, said: str, **changes: object) -> ConversationRecord:
    turns = (Turn("user", f"<image>\n{asked}"), Turn("assistant", said))
    plain = ConversationRecord(name, turns, (PICTURE,), {"task": "G"})
    return dataclasses.replace(plain, **changes)


def pipeline(source: object, **changes: object) -> ConversationPipeline:
    plain = ConversationPipeline(
        source, template=Llama3(system=""), framing=Framing(16), image_tokens=4, max_tokens=60
    )
    return dataclasses.replace(plain, **changes)


def test_conversations_are_shown_and_counted(tmp_path: Path) -> None:
    box = record("box", "Where is it? <&>", "[0.10, 0.20, 0.50, 0.60]")
    records = (
        box,
        record("long", "What?", "red and blue " * 30),
        record("bad", "What?", "red", images=(b"no picture",)),
        record("none", "What?", "red", images=()),
        record("two", "What?", "red", images=()),
    )
    facts = inspect_pipeline(pipeline(InMemory(records)), tmp_path / "out", samples=3)
    found = facts["sources"]["memory"]
    assert (found["looked_at"], found["usable"]) == (5, 2)
    assert {k: v["records"] for k, v in found["damaged"].items()} == {
        "undecodable_image": 1,
        "image_count": 2,
    }
    assert found["damaged"]["image_count"]["first"].startswith("none: expected one picture")
    assert (found["tasks"], found["pictures"]) == ({"G": 2}, {"1": 2})
    assert found["records_cut"] == 1
    assert found["tokens_cut"] == found["tokens"]["max"] - 60
    assert sum(found["lengths"].values()) == 2
    text = Path(facts["files"][0]).read_text("utf-8")
    assert "<mark>[0.10, 0.20, 0.50, 0.60]&lt;|eot_id|&gt;</mark>" in text
    assert "Where is it? &lt;&amp;&gt;" in text
    assert "<b>[picture]</b>" in text
    assert "<del>" in text
    assert "image_count" in text
    assert text.count("data:image/png") == 2


def test_packing_is_told(tmp_path: Path) -> None:
    """One record fills half of a row, two all of it; a fourth of a row has no room for answers."""
    turns = (Turn("user", "a"), Turn("assistant", "b " * 20))
    source = InMemory(tuple(ConversationRecord(str(n), turns) for n in range(3)))
    one = pipeline(source, image_tokens=0, max_images=0, max_tokens=400)
    found = inspect_pipeline(one, tmp_path)["sources"]["memory"]
    length, answer = int(found["tokens"]["max"]), int(found["learnt_tokens"]["max"])
    assert length < 2 * answer
    both = dataclasses.replace(one, max_tokens=2 * length, pack=3)
    packing = inspect_pipeline(both, tmp_path)["packing"]
    assert packing["1"] == {"filled": 0.5, "cut": 0.0, "refused": 0.0}
    assert packing["2"] == {"filled": 1.0, "cut": 0.0, "refused": 0.0}
    assert packing["3"]["cut"] == pytest.approx(1 / 3, abs=1e-4)  # rounded to four places
    assert packing["4"]["cut"] == 0.5
    assert "16" not in packing


def test_sources_share_the_page(tmp_path: Path) -> None:
    mixed = Mixture((SceneTexts(count=9), SceneDialogues(count=9, told=True)), (1, 2))
    data = pipeline(mixed, image_tokens=0, max_images=0, max_tokens=160)
    facts = inspect_pipeline(data, tmp_path, samples=4)
    assert {f["usable"] for f in facts["sources"].values()} == {9}
    assert len(facts["sources"]) == 2
    with pytest.raises(DataError, match="no usable record among 9"):
        inspect_pipeline(dataclasses.replace(data, max_tokens=8), tmp_path)
