"""CLIP's text tower alone against transformers' CLIPTextModel, live, with both ways of pooling."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.backbones.clip import TEXT_L, TextConfig, TextTower
from jaxmods.backbones.clip_weights import clip_text_map, text_prefix
from jaxmods.weights import export_params, import_params, open_weights
from tests.parity.live import (
    abstract_of,
    assert_round_trip,
    assert_same_gradients,
    count,
    exported,
    imported,
    perturbed,
    relative,
    state_of,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# "highest": the `config.json` says eos 2, as FLUX's does. "eos": the end is not the highest id, as
# after tokens were added to the vocabulary.
KINDS = {
    "highest": TextConfig(
        width=16,
        layers=3,
        heads=2,
        mlp=40,
        vocab_size=50,
        context_short=20,
        bos_id=48,
        eos_id=49,
        pad_id=49,
        pool="highest",
    )
}
KINDS["eos"] = dataclasses.replace(KINDS["highest"], pool="eos", bos_id=46, eos_id=47, pad_id=47)


def theirs_of(config: TextConfig) -> Any:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.hub_config()))


def outputs(tower: TextTower, ids: jax.Array) -> tuple[jax.Array, ...]:
    """States before the last block and after the final norm [B, L, D], and pooled ones [B, D]."""
    trunk = tower.trunk(ids)
    return trunk, tower.last_hidden(trunk), tower.pooled(trunk, ids)


def abstract(config: TextConfig) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    return abstract_of(lambda rng: TextTower(config).init(rng, ids, method=outputs))


@functools.cache
def pair_of(kind: str) -> tuple[Any, TextConfig, Any]:
    """(their model, its sizes, the same weights here)."""
    config = KINDS[kind]
    torch.manual_seed(0)
    theirs = perturbed(theirs_of(config))
    weight_map = clip_text_map(config.layers, prefix="")
    return theirs, config, imported(state_of(theirs), weight_map, abstract(config))


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, TextConfig, Any]:
    return pair_of(request.param)


def inputs(config: TextConfig) -> np.ndarray:
    """ids [3, L] with the end in three places; the first row holds added tokens where there are
    any, before and after its end."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.bos_id, (3, config.context_short))
    ids[:, 0] = config.bos_id
    for row, end in enumerate((5, 12, ids.shape[1] - 1)):
        ids[row, end:] = config.eos_id
    if config.eos_id + 1 < config.vocab_size:
        ids[0, [2, 8]] = config.vocab_size - 1
    return ids


def test_values_and_gradients(pair: tuple[Any, TextConfig, Any]) -> None:
    """All outputs within 1e-5 and the gradient of every parameter within 1e-4, relative.

    The states before the last block are what SDXL takes: transformers' last but one.
    """
    theirs, config, params = pair
    ids = inputs(config)
    rng = np.random.default_rng(1)
    out = theirs(torch.tensor(ids), output_hidden_states=True)
    expected = (out.hidden_states[-2], out.last_hidden_state, out.pooler_output)
    weights = [rng.normal(size=tuple(x.shape)).astype(np.float32) for x in expected]
    theirs.zero_grad()
    sum((x * torch.tensor(w)).sum() for x, w in zip(expected, weights, strict=True)).backward()

    @jax.jit
    def step(params: Any) -> Any:
        def objective(params: Any) -> Any:
            found = TextTower(config).apply({"params": params}, ids, method=outputs)
            return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True)), found

        return jax.value_and_grad(objective, has_aux=True)(params)

    (_, found), grads = step(params)
    for ours, reference in zip(found, expected, strict=True):
        assert relative(ours, reference.detach()) < 1e-5
    assert_same_gradients(theirs, exported(grads, clip_text_map(config.layers, prefix="")), 1e-4)


def test_published_size_by_shape() -> None:
    """L/14's text tower; its two ways of pooling are one with the published vocabulary."""
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in theirs_of(TEXT_L).state_dict().items()}
    shapes = abstract(TEXT_L)
    assert count(shapes) == 123_060_480
    assert clip_text_map(TEXT_L.layers, prefix="").torch_shapes(shapes) == theirs
    hub = {"eos_token_id": 2, "hidden_size": 768, "num_attention_heads": 12}
    assert TextConfig.from_hub_config({**hub, "intermediate_size": 3072}) == TEXT_L


def test_round_trip(pair: tuple[Any, TextConfig, Any]) -> None:
    theirs, config, _ = pair
    weight_map = clip_text_map(config.layers, prefix="")
    assert_round_trip(state_of(theirs), weight_map, abstract(config))


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_exported_folder_loads_into_transformers(
    pair: tuple[Any, TextConfig, Any], tmp_path: Path, prefix: str
) -> None:
    """Under the hub's prefix and without, and back, with the old buffer of positions beside."""
    theirs, config, params = pair
    folder = tmp_path / "text_encoder"
    weight_map = clip_text_map(config.layers, prefix)
    export_params(params, weight_map, folder, config.hub_config())
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    assert TextConfig.from_hub_config(again.config.to_dict()) == config
    with open_weights(folder) as reader:
        assert text_prefix(reader.tensors) == prefix
        back = import_params(reader, weight_map, abstract(config)).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, params))
    state = exported(params, weight_map)
    state[f"{prefix}embeddings.position_ids"] = np.arange(config.context_short)[None]
    imported(state, weight_map, abstract(config))


def test_config_refuses_what_the_tower_lacks() -> None:
    with pytest.raises(ValueError, match="hidden_act: expected 'quick_gelu', found 'gelu'"):
        TextConfig.from_hub_config({**TEXT_L.hub_config(), "hidden_act": "gelu"})
