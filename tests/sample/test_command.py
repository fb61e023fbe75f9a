"""`jaxmods sample`: where examples come from, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.samplers.outputs import encode_picture, read_metadata
from jaxmods.partitioning import make_mesh, unbox
from tests.sample import toy
from train.chat import chat
from train.checkpoint import Checkpoints, save_params
from train.cli import main
from train.exits import ExitCode
from train.recipes import Recipe
from train.sample import Given, Runner
from train.state import init_state, make_plan
from train.workdir import match_recipe

RECIPE = "tests.sample.toy:tinting"
Sample = Callable[..., int]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parameters."""
    folder = tmp_path_factory.mktemp("weights")
    save_params(folder, unbox(toy.Tinting().init(jax.random.key(0))), {"step": 7})
    return folder


@pytest.fixture
def sample(weights: Path) -> Sample:
    """The command with parameters."""
    return lambda *options: main(["sample", RECIPE, "--workdir", str(weights), *map(str, options)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_evaluation_data_in_any_batches(sample: Sample, tmp_path: Path) -> None:
    for batch in (2, 3):
        out = tmp_path / str(batch)
        assert sample("--out", out, "--count", 4, "--batch", batch, "--seed", 5) == ExitCode.OK
    found = lines(tmp_path / "2")
    # Example 2 cannot be used; the next one takes its place, and keeps its own number and noise.
    assert [line["index"] for line in found] == [0, 1, 3, 4]
    assert [line["file"] for line in found] == [f"tint_{i}.png" for i in (0, 1, 3, 4)]
    for line in found:
        in_twos, in_threes = (pixels(tmp_path / n / line["file"]) for n in ("2", "3"))
        np.testing.assert_array_equal(in_twos, in_threes)
    assert (tmp_path / "2" / "grid.png").stat().st_size > 500
    facts = json.loads((tmp_path / "3" / "sample.json").read_text())
    assert facts["made"] == 4
    assert facts["weights"]["step"] == 7
    # Compiled once for one shape, although the last batch is a padded one.
    assert [(c["function"], c["rows"]) for c in facts["compiled"]] == [("sample", 3)]


def test_noise_is_of_seed_and_index_alone(sample: Sample, tmp_path: Path) -> None:
    for name, options in {
        "a": ("--count", 3, "--seed", 5),
        "b": ("--start", 1, "--count", 2, "--seed", 5),
        "c": ("--count", 2, "--seed", 6),
    }.items():
        assert sample("--out", tmp_path / name, *options) == ExitCode.OK
    first = pixels(tmp_path / "a" / "tint_1.png")
    np.testing.assert_array_equal(first, pixels(tmp_path / "b" / "tint_1.png"))
    assert np.any(first != pixels(tmp_path / "c" / "tint_1.png"))
    noise = first.astype(int) - first.astype(int).min()
    other = pixels(tmp_path / "a" / "tint_3.png").astype(int)
    assert np.any(noise != other - other.min())


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_say_what_made_them(sample: Sample, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    settings = ("--set", "system.brightness=0.25")
    options = ("--out", out, "--count", 1, "--seed", 9, "--format", kind, *settings)
    assert sample(*options) == ExitCode.OK
    (line,) = lines(out)
    found = read_metadata(out / line["file"])
    assert found["recipe"] == RECIPE
    assert found["overrides"] == ["system.brightness=0.25"]
    assert (found["seed"], found["index"], found["function"]) == (9, 0, "sample")
    assert found["system"]["brightness"] == 0.25
    assert found["weights"]["step"] == 7
    assert found["code"]


def test_metadata_of_a_picture(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    about = {"name": "ein Käfer 🐞", "code": "1"}
    for kind, suffix in (("png", ".png"), ("jpeg", ".jpg")):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(encode_picture(picture, about, kind))  # type: ignore[arg-type] # both are
        assert read_metadata(path) == about
    Image.fromarray(picture).save(tmp_path / "bare.png")
    with pytest.raises(ValueError, match="found no settings"):
        read_metadata(tmp_path / "bare.png")


def test_a_batch_file(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9), (200, 10, 10)).save(tmp_path / "in" / "red.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    rows: list[dict[str, Any]] = [
        {"name": "anna", "picture": "red.png"},
        {"words": ["ab", "c"]},
        {"name": "torn", "picture": "broken.png"},
        {"name": "berta", "picture": "red.png"},
    ]
    file = tmp_path / "in" / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    out = tmp_path / "out"
    # One of four cannot be read: the others are made, and the exit code says so.
    assert sample("--inputs", file, "--out", out, "--batch", 2) == ExitCode.ERROR
    anna, words, torn, berta = lines(out)
    assert (out / "anna.png").is_file()
    assert anna["inputs"] == {"picture": str(tmp_path / "in" / "red.png")}
    assert (words["name"], words["letters"]) == ("00001", 3)
    assert "undecodable_image" in torn["error"]
    assert berta["index"] == 3
    # The same picture, another number: another noise.
    assert np.any(pixels(out / "anna.png") != pixels(out / "berta.png"))


def test_one_example_of_a_command_line(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9), (200, 10, 10)).save(tmp_path / "red.png")
    options = ("--input", f"picture={tmp_path / 'red.png'}", "--out", tmp_path / "out", "--json")
    assert sample(*options) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["made"] == 1
    assert (tmp_path / "out" / "red.png").is_file()
    # The folder is taken now.
    assert sample(*options) == ExitCode.ERROR
    assert "--overwrite" in capsys.readouterr().err
    assert sample(*options, "--overwrite") == ExitCode.OK


def test_the_moving_average_of_a_run_is_used(tmp_path: Path) -> None:
    recipe, run = toy.tinting(), tmp_path / "run"
    state = init_state(make_plan(recipe, make_mesh(recipe.mesh)))
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 0.1, state.trained))
    run.mkdir()
    match_recipe(run, Recipe(RECIPE, (), recipe), ())
    checkpoints = Checkpoints(run, recipe.checkpoint)
    checkpoints.begin(state)
    checkpoints.save(state, {})
    checkpoints.close()
    options = ["--workdir", str(run), "--count", "1", "--out", str(tmp_path / "out")]
    assert main(["sample", RECIPE, *options, "--set", "system.brightness=0.25"]) == ExitCode.OK
    (line,) = lines(tmp_path / "out")
    picture, key = (
        jnp.zeros((1, toy.HEIGHT, toy.WIDTH, 3), jnp.uint8),
        jnp.zeros((1, 2), jnp.uint32),
    )
    system = toy.Tinting(brightness=0.25)
    averaged, newest = (
        float(system.sample(params, picture, key).mean())
        for params in (state.averaged, state.params)
    )
    assert averaged > newest + 0.05
    assert line["mean"] == pytest.approx(averaged, rel=1e-6)
    # What parameters depend on has to be that of the run.
    other = [*options[:-1], str(tmp_path / "other"), "--set", "system.width=8"]
    assert main(["sample", RECIPE, *other]) == ExitCode.ERROR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "pictur=x.png"], "did you mean picture"),
        (["--input", "picture"], "expected name=value"),
        (["--input", "picture=/nowhere.png"], "no file /nowhere.png"),
        (["--input", "picture=a", "picture=b"], "given 2 times"),
        (["--image", "x.png"], "no input 'image'; inputs of this recipe: picture (picture"),
        (["--inputs", "/nowhere.jsonl"], "cannot be read"),
        (["--start", "6"], "found 6 examples"),
        (["--start", "2", "--count", "0"], "--count from 1"),
        (["--seed", "-1"], "--seed from 0"),
        (["--set", "sampler.rows=5"], "sample expected uint8 [4, 6, 3]"),
        (["--batch", "-1"], "--batch: expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_said(
    sample: Sample,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert sample("--out", tmp_path / "out", *options) != ExitCode.OK
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "rows.jsonl:1: expected an object"),
        ("{", "expected one JSON object"),
        ('{"words": 3}', "expected a text or a list"),
        ('{"name": "a/b", "words": "x"}', "expected a name that can be a file's"),
        ('{"name": "grid", "words": "x"}', "choose another"),
        ('{"name": "a", "words": "x"}\n{"name": "a", "words": "y"}', "is that of line 1 too"),
        ("\n", "expected examples from number 0"),
    ],
)
def test_lines_that_do_not_fit(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(row)
    assert sample("--inputs", file, "--out", tmp_path / "out") == ExitCode.ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recipes_and_folders_that_cannot_be_used(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(recipe: str, *options: str) -> str:
        assert main(["sample", f"tests.sample.toy:{recipe}", *options]) != ExitCode.OK
        return capsys.readouterr().err

    there, out = ("--workdir", str(weights)), ("--out", str(tmp_path / "out"))
    assert "has no sampler" in error("silent", *there, *out)
    assert "needs sample, count; this system offers predict" in error("lacking", *there, *out)
    assert "expected --out DIR" in error("tinting", *there)
    assert "expected --workdir RUN or --weights" in error("tinting", *out)
    (tmp_path / "empty").mkdir()
    assert "found neither" in error("tinting", "--workdir", str(tmp_path / "empty"), *out)
    assert "expected adapters" in error("tinting", *there, *out, "--adapters", "x.safetensors")


def test_talking(weights: Path, tmp_path: Path) -> None:
    recipe = toy.tinting()
    params = unbox(recipe.system.init(jax.random.key(0)))
    runner = Runner(make_plan(recipe, make_mesh(recipe.mesh)), params)
    (tmp_path / "a.png").write_bytes(b"")
    typed = iter(
        [
            f"/picture {tmp_path / 'a.png'}",
            "abc",
            "de",
            "much too long",
            "/nothing",
            "/new",
            "f",
            "/more",
        ]
    )
    said: list[str] = []

    def read(prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    given = Given(pairs=(f"garment={tmp_path / 'a.png'}",))
    assert recipe.sampler is not None
    code = chat(recipe.sampler, runner.functions(), given, read=read, write=said.append)
    assert code == ExitCode.OK
    answers = "".join(said).splitlines()[1:]
    assert answers[0] == "3 letters, 2 pictures"
    assert answers[1] == "5 letters, 0 pictures"
    assert "expected at most 8 letters, found 13" in answers[2]
    assert "no command /nothing" in answers[3]
    assert answers[4:] == ["1 letters, 0 pictures", "6 letters, 0 pictures"]
