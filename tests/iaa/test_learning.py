"""The tiny recipes by their commands: the base learns, adaptors leave it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.conversation.scenes import SceneDialogues
from jaxmods.weights import open_weights
from tests.command import jaxmods, losses


@pytest.mark.slow
def test_from_the_base_to_an_answer(tmp_path: Path) -> None:
    base, hub, run = tmp_path / "base", tmp_path / "base_hf", tmp_path / "run"
    settings = ("--set", "logging.every=10")
    jaxmods(
        "fit", "iaa/tiny_base", "--no-report", "--workdir", str(base), *settings, "steps=160",
        "optim.warmup_steps=20", "init.weights=null",
    )  # fmt: skip
    found = losses(base)
    # ln 768 = 6.6 before the first step, 1.08 after the last.
    assert found[0] > 4.0
    assert found[-1] < 1.4
    jaxmods("export", "iaa/tiny_base", "--from", str(base), "--to", str(hub))

    few = [f"evaluation.protocols.{n}.limit=8" for n in range(6)]
    jaxmods(
        "fit", "iaa/tiny", "--no-report", "--workdir", str(run), *settings, f"weights={hub}",
        "steps=40", "optim.warmup_steps=10", "optim.groups.1.start_step=0", "evaluation.every=0",
        *few,
    )  # fmt: skip
    found = losses(run)
    assert found[-1] < 0.5 * found[0]
    results = json.loads((run / "eval" / "40.json").read_text())["results"]
    assert len(results) == 6

    jaxmods("export", "iaa/tiny", "--from", str(run), "--to", str(tmp_path / "out"))
    with open_weights(hub) as before, open_weights(tmp_path / "out") as after:
        assert set(before.tensors) < set(after.tensors)
        for key, tensor in before.tensors.items():
            np.testing.assert_array_equal(tensor.all(), after.tensors[key].all(), err_msg=key)

    photo = tmp_path / "photo.png"
    Image.fromarray(SceneDialogues()[0].images[0]).save(photo)
    said = tmp_path / "said"
    jaxmods(
        "sample", "iaa/tiny", "--workdir", str(run), "--out", str(said), "--image", str(photo),
        "--prompt", "How many objects are there?",
    )  # fmt: skip
    assert list(said.rglob("*.jsonl"))
