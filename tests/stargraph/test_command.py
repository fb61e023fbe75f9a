"""The command line on the demo: a run stopped and continued, its weights out and in again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmods.weights import open_weights
from train import cli, commands
from train.cli import main

FEW = ["batch_size=32", "evaluation.at_start=false", "evaluation.every=0", "checkpoint.every=2"]
LITTLE = [*FEW, "logging.tensorboard=false", "system.distinct=304", "data.distinct=304",
          "system.negatives=8", "data.negatives=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_report_and_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have their own tests; the log would stay set up for the tests that follow."""
    monkeypatch.setattr(commands, "_try_report", lambda folder: None)
    monkeypatch.setattr(cli, "_log_to_stderr", lambda: None)


def test_stopped_and_continued_exported_and_imported_ranks_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks after a run in two halves, and of parameters imported from its exported official state
    dict: the same."""

    def jaxmods(command: str, *words: str, steps: int = 4) -> dict:
        words = (command, "stargraph/tiny", *words, "--json", "--set", *LITTLE, f"steps={steps}")
        assert main([*words]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    def ranks(results: list[dict]) -> dict[str, float]:
        (test,) = (r for r in results if r["protocol"] == "link_prediction_test")
        return {name: metric["value"] for name, metric in test["metrics"].items()}

    run, hub, back = (str(tmp_path / n) for n in ("run", "hub", "back"))
    first = jaxmods("fit", "--workdir", run, steps=2)
    resumed = jaxmods("fit", "--workdir", run, "--allow-change", "steps")
    assert (first["step"], resumed["step"]) == (2, 4)
    expected = ranks(resumed["evaluation"]["results"])
    assert expected != ranks(first["evaluation"]["results"])

    jaxmods("export", "--from", run, "--to", hub)
    with open_weights(hub) as reader:
        assert {"hashes", "path_ids", "nodes", "node_embedding.weight"} <= reader.tensors.keys()
    assert len((tmp_path / "hub" / "entities.txt").read_text().splitlines()) == 599
    jaxmods("import", "--from", hub, "--to", back)
    found = ranks(
        jaxmods("eval", "--workdir", back, "--protocol", "link_prediction_test")["results"]
    )
    np.testing.assert_allclose(
        [found[n] for n in expected], list(expected.values()), rtol=0, atol=1e-12
    )
