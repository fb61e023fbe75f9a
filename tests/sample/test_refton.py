"""Sampling and encoding with the tiny RefTON: any mesh gives the same pictures; training from
encoded data is training from pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.encoded import Encoded, EncodedRecord, write_parts
from data_pipelines.protocols.picture_scores import to_bytes
from data_pipelines.samplers.base import Request
from data_pipelines.samplers.outputs import read_metadata
from data_pipelines.samplers.try_on import TryOnSampler
from data_pipelines.scenes.try_on import TryOnScenes
from data_pipelines.tryon import TryOnPipeline
from jaxmods.partitioning import MeshShape, make_mesh
from jaxmods.system import Params
from tests.refton.tiny import PLAIN, random_params
from train.checkpoint import save_params
from train.cli import main
from train.encode import encode, encoder_digest
from train.exits import ExitCode
from train.experiment import Evaluation, Experiment
from train.sample import Runner
from train.state import Plan, make_plan

# Two steps are enough to see that a whole run agrees.
SYSTEM = dataclasses.replace(PLAIN, sampling=dataclasses.replace(PLAIN.sampling, steps=2))
SOURCE = TryOnScenes(count=5, height=32, width=24)
DATA = TryOnPipeline(
    SOURCE,
    height=32,
    width=24,
    cond_scale=2.0,
    draws="record",
    multiple=SYSTEM.base.multiple,
)


def tiny() -> Experiment:
    """The recipe of these tests."""
    return Experiment(
        system=SYSTEM,
        data=DATA,
        steps=1,
        batch_size=4,
        sampler=TryOnSampler(SOURCE, DATA.frame, reference=True, multiple=SYSTEM.base.multiple),
        evaluation=Evaluation(batch_size=2),
    )


def one_device() -> Plan:
    """The plan of the recipe on one device."""
    return make_plan(tiny(), make_mesh(MeshShape(data=1), jax.devices()[:1]))


RECIPE = "tests.sample.test_refton:tiny"


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(SYSTEM)


@pytest.fixture(scope="module")
def weights(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_params(folder, params, {"step": 3})
    return folder


def pictures(params: Params, mesh: MeshShape, rows: int) -> np.ndarray:
    """Float pictures of the first examples, made on `mesh`."""
    recipe = dataclasses.replace(tiny(), mesh=mesh)
    devices = int(np.prod([max(1, n) for n in dataclasses.astuple(mesh)]))
    plan = make_plan(recipe, make_mesh(mesh, jax.devices()[:devices]))
    placed = jax.device_put(params, plan.shardings.params)
    sampler = recipe.sampler
    assert sampler is not None
    calls = [sampler.call(sampler.example(index, 3)) for index in range(rows)]
    arrays = tuple(np.stack(column) for column in zip(*(c.arrays for c in calls), strict=True))
    return np.asarray(Runner(plan, placed).run("sample_reference", arrays))


def test_any_mesh_makes_the_same_pictures(params: Params) -> None:
    """A batch over `data`, each picture over `tensor` and `context`."""
    alone = pictures(params, MeshShape(data=1), 2)
    shared = pictures(params, MeshShape(data=2, tensor=2, context=2), 2)
    # float32; sums in another order, and two Euler steps through the model.
    np.testing.assert_allclose(shared, alone, atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1  # rows exchanged would be seen


def test_the_command(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--workdir", str(weights), "--out", str(out), "--count", "3", "--seed", "3"]
    options += ["--batch", "2"]
    assert main(["sample", RECIPE, *options, "--set", "system.sampling.guidance=1.5"]) == 0
    facts = json.loads((out / "sample.json").read_text())
    # Three pictures in batches of two: one program.
    assert [c["function"] for c in facts["compiled"]] == ["sample_reference"]
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["index"] for line in found] == [0, 1, 2]
    about = read_metadata(out / found[2]["file"])
    assert about["system"]["sampling"] == {
        "_type": "jaxmods.systems.flux.sample.Sampling",
        "steps": 2,
        "guidance": 1.5,
        "strength": 1.0,
    }
    assert (out / "grid.png").is_file()


def test_own_pictures_are_those_of_records(params: Params) -> None:
    """The same preprocessing and the same noise, whether pictures come from records or files."""
    sampler = tiny().sampler
    assert isinstance(sampler, TryOnSampler)
    record = SOURCE[1]
    given = {
        "person": (record.person,),
        "garment": (record.garment,),
        "reference": record.references[:1],
    }
    own = sampler.call(Request("x", 1, 3, given))  # type: ignore[arg-type] # pictures are there
    known = sampler.call(sampler.example(1, 3))
    assert own.function == known.function == "sample_reference"
    for a, b in zip(own.arrays, known.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    without = sampler.call(dataclasses.replace(sampler.example(1, 3), inputs={
        k: v for k, v in sampler.example(1, 3).inputs.items() if k != "reference"
    }))  # fmt: skip
    assert without.function == "sample"
    made = sampler.finish(sampler.example(1, 3), known, np.full((32, 24, 3), 0.5, np.float32))
    assert set(made.shown) == {"person", "garment", "reference", "result", "truth"}
    assert made.picture is not None
    assert np.all(made.picture == to_bytes(np.full((1,), 0.5, np.float32))[0])


# Encoding ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded")
    options = ["--workdir", str(weights), "--out", str(out), "--batch", "2"]
    assert main(["encode", RECIPE, *options]) == ExitCode.OK
    return out


def test_training_from_encoded_data_is_training_from_pictures(
    params: Params, encoded: Path
) -> None:
    latents = dataclasses.replace(SYSTEM, inputs="latents")
    other = dataclasses.replace(DATA, encoded=str(encoded))
    batches = [next(iter(data.batches(global_batch=4, seed=1))) for data in (DATA, other)]
    # The same records in the same order, the same conditions.
    assert (
        batches[0].info.record_ids[0].split(":", 1)[1]
        == batches[1].info.record_ids[0].split(":", 1)[1]
    )
    np.testing.assert_array_equal(
        batches[0].arrays["use_reference"], batches[1].arrays["use_reference"]
    )
    spec = latents.batch_spec(4)
    for name, array in batches[1].arrays.items():
        assert (array.shape, array.dtype) == (spec[name].shape, spec[name].struct().dtype)

    def jitted(system: Any) -> Any:
        state = system.init_state(params)
        return jax.jit(lambda p, b: system.loss(p, state, b, jax.random.key(2), 0).loss)

    def loss(call: Any, arrays: dict[str, np.ndarray]) -> float:
        return float(call(params, {name: jnp.asarray(a) for name, a in arrays.items()}))

    from_pictures, from_latents = jitted(SYSTEM), jitted(latents)
    losses = [
        loss(from_pictures, dict(batches[0].arrays)),
        loss(from_latents, dict(batches[1].arrays)),
    ]
    # Latents are rounded to bfloat16 (relative 2^-9 an entry, in both directions).
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)
    assert losses[1] != losses[0]
    # Other pictures are another loss by far more than that.
    mixed = {**batches[1].arrays, "target": batches[1].arrays["garment"]}
    assert loss(from_latents, mixed) != pytest.approx(losses[0], rel=2**-8)


def test_what_was_encoded_is_said_and_checked(
    encoded: Path, weights: Path, capsys: pytest.CaptureFixture[str], params: Params
) -> None:
    about = Encoded(str(encoded / "source-0")).about
    assert about["records"] == 5
    assert about["dtype"] == "bfloat16"
    assert about["sizes"]["height"] == 32
    data = dataclasses.replace(DATA, encoded=str(encoded))
    assert data.fingerprint() != DATA.fingerprint()
    digest = about["encoder_digest"]
    dataclasses.replace(data, encoded_digest=digest).check_sources()
    with pytest.raises(DataError, match=f"found {digest}"):
        dataclasses.replace(data, encoded_digest="0000").check_sources()
    with pytest.raises(DataError, match=r"width 48 \(encoded: 24\)"):
        dataclasses.replace(data, width=48).check_sources()
    with pytest.raises(DataError, match="found none"):
        dataclasses.replace(data, encoded=str(encoded / "nowhere")).check_sources()
    # The digest is of the encoder alone.
    plan = one_device()
    pieces = tuple(DATA.lists().values())
    assert encoder_digest(plan, params, pieces) == digest
    changed = {**params, "transformer": jax.tree.map(lambda x: x + 1, params["transformer"])}
    assert encoder_digest(plan, changed, pieces) == digest
    changed = {**params, "vae": jax.tree.map(lambda x: x + 1, params["vae"])}
    assert encoder_digest(plan, changed, pieces) != digest
    again = ["encode", RECIPE, "--workdir", str(weights), "--out", str(encoded)]
    assert main(again) == ExitCode.DATA
    assert "already holds encoded examples" in capsys.readouterr().err
    assert main(["encode", "tests.sample.toy:tinting", "--out", str(encoded)]) == ExitCode.ERROR
    assert "expected data that can be encoded once, found Numbers" in capsys.readouterr().err


def test_encoding_goes_on_where_it_was_cut_off(params: Params, tmp_path: Path) -> None:
    runner = Runner(one_device(), params)
    whole = encode(runner, DATA, tmp_path / "whole", {"a": 1}, rows=2, per_file=2)
    assert list(whole.folders.values()) == [5]

    @dataclasses.dataclass(frozen=True)
    class Failing(TryOnScenes):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    failing = dataclasses.replace(DATA, source=Failing(count=5, height=32, width=24))
    with pytest.raises(KeyboardInterrupt):
        encode(runner, failing, tmp_path / "cut", {"a": 1}, rows=2, per_file=2)
    with pytest.raises(DataError, match="found none"):
        _ = Encoded(str(tmp_path / "cut" / "source-0")).about
    with pytest.raises(DataError, match="a: 1 → 2"):
        encode(runner, DATA, tmp_path / "cut", {"a": 2}, rows=2, per_file=2)
    first = tmp_path / "cut" / "source-0" / "examples-00000.array_record"
    before = first.stat().st_mtime_ns
    encode(runner, DATA, tmp_path / "cut", {"a": 1}, rows=2, per_file=2)
    assert first.stat().st_mtime_ns == before
    one, two = (Encoded(str(tmp_path / name / "source-0")) for name in ("whole", "cut"))
    assert len(one) == len(two) == 5
    for index in range(5):
        assert one[index].id == two[index].id == SOURCE[index].id
        for name, array in one[index].arrays.items():
            np.testing.assert_array_equal(array, two[index].arrays[name])


def test_arrays_that_differ_are_refused(tmp_path: Path) -> None:
    def part(*shapes: tuple[int, ...]) -> Any:
        return lambda: [EncodedRecord("x", {"a": np.zeros(s, np.float32)}) for s in shapes]

    assert write_parts([part((2, 3)), part((0, 3))], tmp_path / "a", {}, lists=("a",)) == 2
    with pytest.raises(DataError, match="expected arrays"):
        write_parts([part((2, 3)), part((0, 4))], tmp_path / "b", {}, lists=("a",))
    with pytest.raises(DataError, match="expected arrays"):
        write_parts([part((2, 3), (1, 3))], tmp_path / "c", {})
    with pytest.raises(DataError, match="at least one example"):
        write_parts([part()], tmp_path / "d", {})
