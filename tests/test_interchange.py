"""Import, export and the certificate, on a system of two layers that has a PyTorch twin."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file

from jaxmods.system import Array, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.weights import Entry, Linear, WeightMap, open_weights
from train.checkpoint import load_params, read_facts
from train.exits import UserError
from train.interchange import (
    abstract_params,
    dry_run,
    export_weights,
    hub_assets,
    import_to_folder,
    import_weights,
    read_params,
    verify,
)


@dataclasses.dataclass(frozen=True)
class Twin(System):
    """y = tanh(x W1 + b1) ... (stacked) with a scale. `error` spoils its own forward pass."""

    width: int = 8
    layers: int = 2
    error: float = 0.0

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        return {"x": ArraySpec((global_batch, self.width), "float32", ("batch", None))}

    def init(self, rng: Array) -> Params:
        shape = (self.layers, self.width, self.width)

        def boxed(value: Array, *names: str | None) -> Any:
            return nn.LogicallyPartitioned(value, names)

        return {
            "fc": {
                "kernel": boxed(jax.random.normal(rng, shape) / 3, "layers", "embed", "mlp"),
                "bias": boxed(jnp.zeros(shape[:2]), "layers", "embed"),
            },
            "scale": boxed(jnp.ones(())),
        }

    def forward(self, params: Params, x: Array) -> Array:
        for n in range(self.layers):
            x = jnp.tanh(x @ params["fc"]["kernel"][n] + params["fc"]["bias"][n])
        return x * params["scale"] + self.error

    def loss(
        self, params: Params, state: State, batch: Batch, rng: Array, step: Array
    ) -> LossOutput:
        return LossOutput(jnp.mean(self.forward(params, batch["x"]) ** 2), {}, state)

    def weights(self) -> WeightMap:
        return WeightMap(
            (
                Entry("layers.{i}.weight", "fc/kernel", Linear()),
                Entry("layers.{i}.bias", "fc/bias"),
                Entry("scale", "scale", optional=True),
            )
        )

    def hub_config(self) -> dict[str, Any]:
        part = {"hidden_size": self.width, "hidden_act": "tanh", "eos_token_id": 7}
        return {"num_hidden_layers": self.layers, "dropout": 0.0, "text_config": part}

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        if missing != {"scale"}:
            raise ValueError(f"no rule for {sorted(missing)}")
        return {**params, "scale": np.float32(5)}

    def verify_export(self, folder: Path, params: Params, rng: Array) -> dict[str, float]:
        config = json.loads((folder / "config.json").read_text())
        model = TorchTwin(config["text_config"]["hidden_size"], config["num_hidden_layers"])
        state = load_file(folder / "model.safetensors")
        model.load_state_dict({k: t.float() for k, t in state.items()}, strict=True)
        x = jax.random.normal(rng, (4, self.width))
        with torch.no_grad():
            theirs = model(torch.from_numpy(np.array(x))).numpy()
        ours = np.asarray(self.forward(params, x))
        return {"y": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))}


class TorchTwin(torch.nn.Module):
    """The published class, so to speak."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.scale


@dataclasses.dataclass(frozen=True)
class Lonely(Twin):
    """A system without a PyTorch reference."""

    def verify_export(self, folder: Path, params: Params, rng: Array) -> dict[str, float]:
        return {}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as on the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(TorchTwin().state_dict(), folder / "model.safetensors", {"format": "pt"})
    write_config(folder, Twin().hub_config())
    (folder / "tokenizer.json").write_text('{"model": 1}')
    (folder / "README.md").write_text("not an asset")
    return folder


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def equal(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- import --------------------------------------------------------------------------------------


def test_import_computes_what_pytorch_computes(published: Path) -> None:
    params = import_weights(Twin(), published)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    expected = TorchTwin()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(Twin().forward(params, x), expected, atol=1e-6)


def test_import_is_placed_and_cast_like_its_target(published: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.bfloat16,
            sharding=NamedSharding(
                mesh, PartitionSpec(None, "d") if len(leaf.shape) > 1 else PartitionSpec()
            ),
        ),
        abstract_params(Twin()),
    )
    params = import_weights(Twin(), published, like=like)
    whole = import_weights(Twin(), published)
    for path in (("fc", "kernel"), ("fc", "bias")):
        found, target = params[path[0]][path[1]], like[path[0]][path[1]]
        assert found.dtype == jnp.bfloat16
        assert found.sharding == target.sharding
        expected = np.asarray(whole[path[0]][path[1]]).astype(ml_dtypes.bfloat16)
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_missing_optional_keys_are_completed(published: Path) -> None:
    state = TorchTwin().state_dict()
    del state["scale"]
    save_file(state, published / "model.safetensors")
    params = import_weights(Twin(), published)
    assert params["scale"] == 5
    assert isinstance(params["scale"], jax.Array)

    @dataclasses.dataclass(frozen=True)
    class Strict(Twin):
        def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
            raise ValueError("expected a whole file")

    with pytest.raises(UserError, match=r"model\.safetensors: expected a whole file"):
        import_weights(Strict(), published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers: expected 2, found 3"),
        ({"text_config": {"hidden_size": 16}}, r"text_config\.hidden_size: expected 8, found 16"),
        ({"text_config": {"hidden_act": "gelu"}}, r"hidden_act: expected 'tanh', found 'gelu'"),
    ],
)
def test_another_size_is_refused_by_field(
    published: Path, change: dict[str, Any], message: str
) -> None:
    write_config(published, {**Twin().hub_config(), **change})
    with pytest.raises(UserError, match=message) as caught:
        import_weights(Twin(), published)
    assert "choose the recipe of this size" in str(caught.value)


def test_what_a_config_may_differ_in(published: Path) -> None:
    write_config(published, {"dropout": 0.1, "text_config": {"eos_token_id": 2}, "other": 3})
    import_weights(Twin(), published)
    (published / "config.json").unlink()
    import_weights(Twin(), published)
    (published / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        import_weights(Twin(), published)


def test_errors_are_for_the_user(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        import_weights(Twin(), tmp_path / "absent")
    save_file({"w": torch.zeros(1)}, published / "model.safetensors")
    with pytest.raises(UserError, match="4 missing"):
        import_weights(Twin(), published)


def test_dry_run_reads_no_tensor_and_tells_all(published: Path) -> None:
    state = TorchTwin().state_dict()
    del state["layers.1.bias"]
    save_file({**state, "stray": torch.zeros(2)}, published / "model.safetensors")
    found = dry_run(Twin(), published)
    assert not found.fits
    assert [r.key for r in found.with_status("missing")] == ["layers.1.bias"]
    assert [r.key for r in found.with_status("extra")] == ["stray"]
    assert "layers.0.weight" in str(found)


# --- native folders ------------------------------------------------------------------------------


def test_import_to_a_folder_and_read_it_back(published: Path, tmp_path: Path) -> None:
    to = tmp_path / "native"
    params = import_to_folder(Twin(), published, to, facts={"recipe": "twin/tiny"})
    assert equal(load_params(to, abstract_params(Twin())), params)
    assert equal(read_params(Twin(), to), params)
    assert equal(read_params(Twin(), published), params)
    facts = read_facts(to)
    assert facts["recipe"] == "twin/tiny"
    assert facts["imported_from"] == str(published.absolute())
    assert set(hub_assets(to / "assets")) == {"tokenizer.json"}
    with pytest.raises(UserError, match="exists already"):
        import_to_folder(Twin(), published, to, facts={})
    import_to_folder(Twin(), published, to, facts={}, overwrite=True)
    with pytest.raises(UserError, match=r"expected \(3, 8"):
        read_params(Twin(layers=3), to)


# --- export and the certificate ------------------------------------------------------------------


def test_export_loads_in_pytorch_and_verifies(published: Path, tmp_path: Path) -> None:
    system, to = Twin(), tmp_path / "out"
    params = import_weights(system, published)
    export_weights(system, params, to, assets=hub_assets(published))
    found = load_file(to / "model.safetensors")
    TorchTwin().load_state_dict(found, strict=True)
    for key, tensor in TorchTwin().state_dict().items():
        assert torch.equal(found[key], tensor)
    assert (to / "tokenizer.json").exists()
    assert not (to / "README.md").exists()
    certificate = verify(system, params, to)
    assert certificate.passed
    assert certificate.bit_equal
    assert certificate.forward == "compared"
    assert 0 <= certificate.relative_errors["y"] < 1e-6
    written = json.loads((to / "verify.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(certificate)))
    assert written["tensors"] == 5
    assert written["versions"]["torch"] == torch.__version__
    digest = hashlib.sha256((to / "model.safetensors").read_bytes()).hexdigest()
    assert written["sha256"] == {"model.safetensors": digest}
    assert written["tolerance"] == 1e-4


def test_sharded_export_verifies(published: Path, tmp_path: Path) -> None:
    system = Lonely()
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    params = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(None, "d") if x.ndim > 1 else PartitionSpec())
        ),
        import_weights(system, published),
    )
    exported = export_weights(system, params, tmp_path / "out", max_shard_bytes=300)
    assert len(exported.files) > 1
    certificate = verify(system, params, tmp_path / "out")
    assert certificate.passed
    assert certificate.forward == "not compared: Lonely has no PyTorch reference"
    assert set(certificate.sha256) == set(exported.files)


def test_narrower_export_verifies_against_the_rounded_values(
    published: Path, tmp_path: Path
) -> None:
    system, to = Twin(), tmp_path / "out"
    params = import_weights(system, published)
    export_weights(system, params, to, dtype="bfloat16")
    assert {t.dtype for t in load_file(to / "model.safetensors").values()} == {torch.bfloat16}
    certificate = verify(system, params, to, dtype="bfloat16")
    assert certificate.passed
    assert certificate.relative_errors["y"] < 1e-6
    assert not verify(system, params, to).bit_equal


def test_changed_weights_do_not_pass(published: Path, tmp_path: Path) -> None:
    system, to = Twin(), tmp_path / "out"
    params = import_weights(system, published)
    export_weights(system, params, to)
    state = load_file(to / "model.safetensors")
    state["layers.1.bias"][3] *= -1
    save_file(state, to / "model.safetensors")
    certificate = verify(system, params, to)
    assert not certificate.passed
    assert not certificate.bit_equal
    assert certificate.differing == ("fc/bias", "layers.1.bias")
    assert json.loads((to / "verify.json").read_text())["passed"] is False
    del state["layers.1.bias"]
    save_file(state, to / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing:\n    layers\.1\.bias"):
        verify(system, params, to)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_another_forward_pass_does_not_pass(published: Path, tmp_path: Path, error: float) -> None:
    system, to = Twin(error=error), tmp_path / "out"
    params = import_weights(system, published)
    export_weights(system, params, to)
    certificate = verify(system, params, to)
    assert certificate.bit_equal
    assert not certificate.passed
    written = json.loads((to / "verify.json").read_text(), parse_constant=pytest.fail)
    assert written["passed"] is False


def test_without_pytorch_the_certificate_says_so(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, to = Twin(), tmp_path / "out"
    params = import_weights(system, published)
    export_weights(system, params, to)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else real(name)
    )
    certificate = verify(system, params, to)
    assert certificate.passed
    assert certificate.forward == "not compared: PyTorch is not installed"
    assert certificate.relative_errors == {}


def test_export_refuses_a_taken_folder(published: Path, tmp_path: Path) -> None:
    params = import_weights(Twin(), published)
    with pytest.raises(UserError, match="exists already"):
        export_weights(Twin(), params, published)
    assert set(open_weights(published).tensors) == set(TorchTwin().state_dict())
