"""docs/sampling.md: its commands are understood, its batch file fits the recipe it is given to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.samplers.requests import from_file
from train import recipes
from train.cli import build_parser
from train.sample import Given

TEXT = (Path(__file__).resolve().parents[2] / "docs/sampling.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^jaxmods .+$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    options = build_parser().parse_args(shlex.split(command)[1:])
    experiment = recipes.resolve(options.recipe, options.settings).experiment
    if command.startswith("jaxmods sample"):
        assert experiment.sampler is not None
        names = {i.name for i in experiment.sampler.inputs()}
        assert {pair.partition("=")[0] for pair in options.pairs} <= names


def test_settings_in_the_text_exist() -> None:
    found = re.findall(r"`(?:--batch 1 )?--set ([^`]+)`", TEXT)
    assert len(found) == 2
    for settings in found:
        recipes.resolve("refton/tiny", settings.split())


def test_the_batch_file(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(block)
    for name in ("anna", "red", "blue", "model"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
    sampler = recipes.resolve("refton/tiny").experiment.sampler
    assert sampler is not None
    requests = from_file(sampler, tmp_path / "rows.jsonl", 0)
    assert [r.name for r in requests] == ["anna_red", "anna_blue"]
    assert [sampler.call(r).function for r in requests] == ["sample", "sample_reference"]
    _, total = Given(file=str(tmp_path / "rows.jsonl")).requests(sampler)
    assert total == 2
