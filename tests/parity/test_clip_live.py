"""The CLIP backbone against transformers' CLIPModel, live: tiny by value, published by shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.systems.fgclip import Execution, FgClip
from jaxmods.systems.fgclip.weights import ADDED
from jaxmods.weights import export_tensors, import_params, memory_reader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "projection_dim": 12,
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "vocab_size": 50,
        "bos_token_id": 48,
        "eos_token_id": 49,
        "pad_token_id": 49,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 20,
        "patch_size": 5,
    },
}


def published(vision: tuple[int, ...], text: tuple[int, ...], projection: int) -> dict[str, Any]:
    """`config.json` fields of an OpenAI checkpoint."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "projection_dim": projection,
        "text_config": dict(zip(names, text, strict=True)),
        "vision_config": dict(zip((*names, "image_size", "patch_size"), vision, strict=True)),
    }


PUBLISHED = {
    "B/32": published((768, 3072, 12, 12, 224, 32), (512, 2048, 12, 8), 512),
    "B/16": published((768, 3072, 12, 12, 224, 16), (512, 2048, 12, 8), 512),
    "L/14": published((1024, 4096, 24, 16, 224, 14), (768, 3072, 12, 12), 768),
    "L/14@336": published((1024, 4096, 24, 16, 336, 14), (768, 3072, 12, 12), 768),
}


def clip_model(config: dict[str, Any]) -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(**config))


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_sizes_by_shape(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in clip_model(config).state_dict().items()}
    system = FgClip.from_hub_config(config)
    abstract = partitioning.unbox(jax.eval_shape(system.init, jax.random.key(0)))
    weight_map = system.weights()
    ours = weight_map.torch_shapes(abstract)
    assert {k: v for k, v in ours.items() if k not in ADDED} == {
        k: v for k, v in theirs.items() if not weight_map.dropped(k)
    }


@pytest.fixture(scope="module")
def pair() -> tuple[Any, FgClip, Any]:
    """(CLIPModel with random weights, our system, the same weights here)."""
    torch.manual_seed(0)
    theirs = clip_model(TINY)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    system = FgClip.from_hub_config({**TINY, "text_config": {**TINY["text_config"], "keep_len": 4}})
    abstract = partitioning.unbox(jax.eval_shape(system.init, jax.random.key(0)))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    with memory_reader(state) as reader:
        imported = import_params(reader, system.weights(), abstract)
    return theirs, system, system.complete_import(imported.params, imported.missing)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """(pixels [2, 3, S, S], ids [3, L]) with the end of text in three different places."""
    rng = np.random.default_rng(0)
    side, text = TINY["vision_config"]["image_size"], TINY["text_config"]
    ids = rng.integers(0, text["bos_token_id"], (3, text["max_position_embeddings"]))
    ids[:, 0] = text["bos_token_id"]
    for row, end in enumerate((5, 12, ids.shape[1] - 1)):
        ids[row, end:] = text["eos_token_id"]
    return rng.normal(size=(2, 3, side, side)).astype(np.float32), ids


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "execution", [Execution(), Execution(unroll=True, remat="full")], ids=["scan", "unrolled"]
)
def test_both_towers_by_value(pair: tuple[Any, FgClip, Any], execution: Execution) -> None:
    """Features within 1e-5 and the gradient of every parameter within 1e-4, relative."""
    theirs, system, params = pair
    system = FgClip(system.vision, system.text, system.projection_dim, execution=execution)
    pixels, ids = inputs()
    rng = np.random.default_rng(1)
    weights = [
        rng.normal(size=(n, TINY["projection_dim"])).astype(np.float32)
        for n in (len(pixels), len(ids))
    ]

    vision = theirs.visual_projection(theirs.vision_model(torch.tensor(pixels)).pooler_output)
    text = theirs.text_projection(theirs.text_model(torch.tensor(ids)).pooler_output)
    theirs.zero_grad()
    total = (vision * torch.tensor(weights[0])).sum() + (text * torch.tensor(weights[1])).sum()
    total.backward()

    functions = system.functions()

    def objective(params: Any) -> Any:
        a = functions["image_features"](params, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
        b = functions["text_features_short"](params, jnp.asarray(ids, jnp.int32))
        return jnp.sum(a * weights[0]) + jnp.sum(b * weights[1]), (a, b)

    (_, (ours_vision, ours_text)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params
    )
    assert relative(ours_vision, vision.detach()) < 1e-5
    assert relative(ours_text, text.detach()) < 1e-5
    ours = {k: np.asarray(v.all()) for k, v in export_tensors(grads, system.weights()).items()}
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert not ours[name].any(), name
            continue
        expected = parameter.grad.numpy()
        error = np.linalg.norm(ours[name] - expected)
        # A key bias has exactly no gradient: both sides are rounding noise.
        assert error < 1e-4 * np.linalg.norm(expected) + 1e-6 * largest, name
