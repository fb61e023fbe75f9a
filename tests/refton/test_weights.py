"""RefTON's weights against diffusers, PEFT and transformers: the base, adapters both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxmods.backbones.flux import Tokens, pack
from jaxmods.nn import lora
from jaxmods.system import Params
from jaxmods.systems.flux.base import Prompt
from jaxmods.systems.flux.weights import published
from jaxmods.systems.refton.layout import condition_ids
from jaxmods.systems.refton.prompt import write_prompt
from jaxmods.systems.refton.system import Adapters
from jaxmods.systems.refton.weights import (
    adapter_keys,
    load_adapters,
    save_adapters,
    save_pipeline,
)
from jaxmods.weights import WeightError, open_weights
from tests.parity.live import relative
from tests.refton.tiny import BASE, PLAIN, SYSTEM, random_params
from train.adapters import merge_adapters
from train.exits import UserError
from train.interchange import abstract_params, export_weights, import_weights, verify

# fp32 on both sides; one block or a few convolutions.
TOLERANCE = 1e-5
PARTS = {"transformer", "vae", "text_encoder", "text_encoder_2"}


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(SYSTEM)


@pytest.fixture(scope="module")
def folder(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a diffusers folder, written by us."""
    target = tmp_path_factory.mktemp("base") / "pipeline"
    save_pipeline(SYSTEM, params, target)
    return target


@jax.jit
def _velocity(params: Params, packed: jax.Array, text: Any) -> jax.Array:
    config = SYSTEM.lora_config
    assert config is not None
    tree = lora.attach(params["transformer"], params["lora"], config)
    image = [Tokens(packed, condition_ids(4, 3, 0, 1))]
    return BASE.velocity(tree, image, text, jnp.full((packed.shape[0],), 0.7), 2.5)


def velocity(params: Params, packed: jax.Array, text: Any) -> np.ndarray:
    """Our transformer with its adapters on a grid of 4 x 3 tokens."""
    return np.asarray(_velocity(params, packed, Prompt(*text)))


@pytest.fixture(scope="module")
def inputs(params: Params) -> tuple[jax.Array, Any]:
    latents = jax.random.normal(jax.random.key(0), (2, 8, 6, 4))
    return pack(latents), jax.jit(SYSTEM.prompt)(params)


def test_a_folder_is_read_back_bit_by_bit(params: Params, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxKontextPipeline"
    assert set(index) - {"_class_name"} == PARTS
    assert (folder / "scheduler/scheduler_config.json").exists()
    found = import_weights(SYSTEM, folder)
    for name in PARTS:
        jax.tree.map(np.testing.assert_array_equal, found[name], params[name])
    # The folder has no adapters: fresh ones, which change nothing.
    assert all(not np.any(b) for b in leaves(found["lora"], "b"))
    assert all(np.any(a) for a in leaves(found["lora"], "a"))
    again = import_weights(SYSTEM, folder)
    jax.tree.map(np.testing.assert_array_equal, found["lora"], again["lora"])


def leaves(tree: Params, name: str) -> list[Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in found if path[-1].key == name]


def test_components_load_into_their_classes(params: Params, folder: Path, inputs: Any) -> None:
    """Strictly, by diffusers and transformers; same velocity, latents, picture, text."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    packed, (states, pooled) = inputs
    bare = {**params, "lora": jax.tree.map(jnp.zeros_like, params["lora"])}
    model, report = diffusers.FluxTransformer2DModel.from_pretrained(
        folder / "transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        theirs = model.eval()(
            hidden_states=tensor(packed),
            encoder_hidden_states=tensor(states).expand(2, -1, -1),
            pooled_projections=tensor(pooled).expand(2, -1),
            timestep=torch.full((2,), 0.7),
            guidance=torch.full((2,), 2.5),
            img_ids=torch.tensor(condition_ids(4, 3, 0, 1)),
            txt_ids=torch.zeros(states.shape[1], 3),
        ).sample
    assert relative(velocity(bare, packed, (states, pooled)), theirs.numpy()) < TOLERANCE

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    pixels = jax.random.uniform(jax.random.key(1), (1, 16, 8, 3), minval=-1)
    with torch.no_grad():
        mode = vae.encode(tensor(pixels.transpose(0, 3, 1, 2))).latent_dist.mode()
        theirs = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        picture = vae.decode(mode).sample
    latents = jax.jit(BASE.encode)(params, pixels)
    assert relative(latents.transpose(0, 3, 1, 2), theirs.numpy()) < TOLERANCE
    decoded = jax.jit(BASE.decode)(params, latents)
    assert relative(decoded.transpose(0, 3, 1, 2), picture.numpy()) < TOLERANCE

    t5_ids, clip_ids = (torch.tensor(np.asarray(ids)).long() for ids in BASE.prompt_ids())
    t5 = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval()
    clip = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        assert relative(states, t5(t5_ids).last_hidden_state.numpy()) < TOLERANCE
        assert relative(pooled, clip(clip_ids).pooler_output.numpy()) < TOLERANCE


def tensor(array: Any) -> Any:
    import torch

    return torch.tensor(np.asarray(array))


def test_what_diffusers_writes_is_read(params: Params, folder: Path, tmp_path: Path) -> None:
    """Also the text encoder of transformers 5, whose files lack the published prefix."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    clip = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    written = tmp_path / "pipeline"
    written.mkdir()
    for part in [*(PARTS - {"text_encoder"}), "model_index.json"]:
        (written / part).symlink_to(folder / part)
    clip.save_pretrained(written / "text_encoder")
    found = import_weights(SYSTEM, written)
    for name in PARTS:
        jax.tree.map(np.testing.assert_array_equal, found[name], params[name])


def test_adapters_load_into_diffusers_and_back(
    params: Params, folder: Path, inputs: Any, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    ranks = save_adapters(SYSTEM, params, tmp_path / "lora")
    assert set(ranks.values()) == {2}
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "np") as handle:
        keys = set(handle.keys())
        header = json.loads(handle.metadata()["lora_adapter_metadata"])
    assert keys == adapter_keys(SYSTEM)
    assert header["transformer.r"] == 2
    assert header["transformer.lora_alpha"] == 4
    assert "proj_mlp" in header["transformer.target_modules"]

    model = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    pipe = diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="dressed")
    packed, (states, pooled) = inputs
    with torch.no_grad():
        theirs = pipe.transformer.eval()(
            hidden_states=tensor(packed),
            encoder_hidden_states=tensor(states).expand(2, -1, -1),
            pooled_projections=tensor(pooled).expand(2, -1),
            timestep=torch.full((2,), 0.7),
            guidance=torch.full((2,), 2.5),
            img_ids=torch.tensor(condition_ids(4, 3, 0, 1)),
            txt_ids=torch.zeros(states.shape[1], 3),
        ).sample.numpy()
    ours = velocity(params, packed, (states, pooled))
    bare = {**params, "lora": jax.tree.map(jnp.zeros_like, params["lora"])}
    assert relative(ours, theirs) < TOLERANCE
    assert relative(velocity(bare, packed, (states, pooled)), theirs) > 0.01

    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(
            pipe.transformer,
            adapter_name="dressed",
            save_embedding_layers=False,  # "auto" would look the base up in the network
        ),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["dressed"].to_dict(),
    )
    back = load_adapters(SYSTEM, {**params, "lora": bare["lora"]}, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, back["lora"], params["lora"])


def test_scale_of_a_file_is_carried_over(params: Params, tmp_path: Path) -> None:
    """The recipe has scale 2; files of scale 4, of none (1), and one that is told (0.5)."""
    other = dataclasses.replace(SYSTEM, adapters=Adapters(rank=2, alpha=8.0))
    save_adapters(other, params, tmp_path / "lora")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "np") as handle:
        tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, tmp_path / "bare.safetensors")
    for source, alpha, factor in (
        (file, None, 2.0),
        (tmp_path / "bare.safetensors", None, 0.5),
        (tmp_path / "bare.safetensors", 1.0, 0.25),
    ):
        found = load_adapters(SYSTEM, params, source, alpha=alpha)["lora"]
        for ours, theirs in zip(leaves(found, "b"), leaves(params["lora"], "b"), strict=True):
            np.testing.assert_array_equal(ours, factor * theirs)
        for ours, theirs in zip(leaves(found, "a"), leaves(params["lora"], "a"), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_merged_is_attached(params: Params, tmp_path: Path, inputs: Any) -> None:
    save_pipeline(SYSTEM, params, tmp_path / "merged", merged=True)
    merged = import_weights(SYSTEM, tmp_path / "merged")
    packed, text = inputs
    ours = velocity(merged, packed, text)
    # The product's rounding is in the kernels now.
    assert relative(ours, velocity(params, packed, text)) < TOLERANCE


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_diffusers_verifies_an_export(params: Params, tmp_path: Path, merged: bool) -> None:
    """Adapters merged into a pipeline, and beside their base; what is not the same is noticed."""
    pytest.importorskip("diffusers")
    system, sent = merge_adapters(SYSTEM, params) if merged else (SYSTEM, params)
    folder = tmp_path / "export"
    export_weights(system, sent, folder)
    certificate = verify(system, sent, folder)
    assert (certificate.forward, certificate.passed) == ("compared", True)
    assert set(certificate.relative_errors) == {"velocity"}
    name, leaf = ("lora", "b") if not merged else ("transformer", "kernel")
    other = jax.tree_util.tree_map_with_path(
        lambda path, x: 1.01 * x if path[-1].key == leaf else x, sent[name]
    )
    found = system.verify_export(folder, {**sent, name: other}, jax.random.key(0))
    assert found["velocity"] > 10 * TOLERANCE


def test_wrong_adapters_are_refused(params: Params, tmp_path: Path) -> None:
    save_adapters(SYSTEM, params, tmp_path / "lora")
    wider = dataclasses.replace(SYSTEM, adapters=Adapters(rank=4, alpha=4.0))
    with pytest.raises(WeightError, match=r"rank 4, found 2; set system.adapters.rank=2"):
        load_adapters(wider, params, tmp_path / "lora")
    fewer = dataclasses.replace(SYSTEM, adapters=Adapters(2, 4.0, targets=("attn.to_q",)))
    held = {**params, "lora": abstract_params(fewer)["lora"]}
    with pytest.raises(WeightError, match=r"set system\.adapters\.targets"):
        load_adapters(fewer, held, tmp_path / "lora")
    smaller = dataclasses.replace(BASE.transformer, heads=1, rope_axes=(4, 6, 6))
    with pytest.raises(WeightError, match=r"another size|of this model"):
        lora.load(
            tmp_path / "lora",
            abstract_params(dataclasses.replace(PLAIN, base=_of(smaller)))["transformer"],
            [published(smaller)],
        )
    whole = dataclasses.replace(SYSTEM, adapters=None)
    with pytest.raises(WeightError, match="adapters=None"):
        load_adapters(whole, params, tmp_path / "lora")
    with pytest.raises(WeightError, match="no adapters"):
        save_adapters(whole, params, tmp_path / "none")


def _of(transformer: Any) -> Any:
    return dataclasses.replace(BASE, transformer=transformer, encoders=None)


def test_prompt_in_place_of_the_encoders(params: Params, folder: Path, tmp_path: Path) -> None:
    """Without encoders their features are asked for by name, and read from the folder."""
    copy = tmp_path / "pipeline"
    copy.mkdir()
    for part in folder.iterdir():
        (copy / part.name).symlink_to(part)
    with pytest.raises(UserError, match=r"prompt.pooled, prompt.states .*write_prompt"):
        import_weights(PLAIN, copy)
    write_prompt(copy, BASE)
    found = import_weights(PLAIN, copy)
    assert set(found) == {"transformer", "vae", "lora", "prompt"}
    states, pooled = jax.jit(SYSTEM.prompt)(params)
    np.testing.assert_allclose(found["prompt"]["states"], states[0], rtol=1e-6)
    np.testing.assert_allclose(found["prompt"]["pooled"], pooled[0], rtol=1e-6)
    with_encoders = import_weights(SYSTEM, copy)
    assert set(with_encoders) == PARTS | {"lora"}
    with pytest.raises(WeightError, match="exists already"):
        write_prompt(copy, BASE)


def test_some_adapters_are_not_enough(params: Params, folder: Path) -> None:
    keys = adapter_keys(SYSTEM)
    with pytest.raises(ValueError, match=rf"all {len(keys)} tensors of adapters or none, found 1"):
        SYSTEM.complete_import(params, frozenset(sorted(keys)[1:]))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightError, match="expected sub-folders with weights"):
        open_weights(tmp_path)
