"""The Llama decoder against transformers' LlamaForCausalLM and Qwen2ForCausalLM, live."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.backbones.llama import (
    LLAMA3_8B,
    QWEN2_7B,
    VICUNA_7B,
    Llama,
    LlamaConfig,
    RopeScaling,
    llama_map,
    rope_of,
)
from jaxmods.backbones.llama.rope import frequencies, turn
from jaxmods.generation import Limits, beam_search, generate
from jaxmods.nn.stack import Execution
from jaxmods.objectives.cross_entropy import next_token_labels, token_cross_entropy
from jaxmods.weights import WeightError, export_params
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

# Heads times their width is not the model's width. Small wavelengths, so that scaling shows.
TINY = LlamaConfig(
    vocab_size=61,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=40,
    rope_theta=100.0,
    max_positions=64,
    bos_id=1,
    eos_ids=(2,),
)
KINDS = {
    "llama": TINY,
    "vicuna 16k": dataclasses.replace(
        TINY, kv_heads=4, rope_scaling=RopeScaling("linear", 4.0), epsilon=1e-6
    ),
    "llama 3.2": dataclasses.replace(
        TINY, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32), tied=True
    ),
    "qwen2": dataclasses.replace(TINY, kv_heads=1, qkv_bias=True, epsilon=1e-6),
    "qwen2 tied": dataclasses.replace(TINY, qkv_bias=True, tied=True, eos_ids=(2, 5)),
}
LENGTHS = np.array([7, 12, 4])
NEW = 10


def theirs_of(config: LlamaConfig) -> Any:
    family = "Qwen2" if config.qkv_bias else "Llama"
    settings = getattr(transformers, f"{family}Config")(**config.hub_config())
    return getattr(transformers, f"{family}ForCausalLM")._from_config(
        settings, attn_implementation="eager"
    )


def abstract(config: LlamaConfig) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    return abstract_of(lambda rng: Llama(config).init(rng, ids))


@functools.cache
def pair_of(kind: str) -> tuple[Any, LlamaConfig, Any]:
    """(their model, its sizes, the same weights here)."""
    config = KINDS[kind]
    torch.manual_seed(0)
    theirs = perturbed(theirs_of(config))
    return theirs, config, imported(state_of(theirs), llama_map(config), abstract(config))


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, LlamaConfig, Any]:
    return pair_of(request.param)


def prompts() -> np.ndarray:
    """int [3, 12], rows of `LENGTHS` tokens padded with 0 on the right; no special tokens."""
    ids = np.random.default_rng(0).integers(6, TINY.vocab_size, (3, LENGTHS.max()))
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], ids, 0)


def apply(model: Llama, params: Any, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, **kwargs)


def test_values_loss_and_gradients(pair: tuple[Any, LlamaConfig, Any]) -> None:
    """Logits within 1e-5, the loss within 1e-6, every gradient within 1e-4, all relative."""
    theirs, config, params = pair
    ids = prompts()
    labels = np.where(np.arange(ids.shape[1]) < LENGTHS[:, None], ids, -100)
    labels[:, :2] = -100  # a prompt without a loss
    out = theirs(
        torch.tensor(ids),
        attention_mask=torch.tensor(ids != 0),
        position_ids=torch.arange(ids.shape[1])[None],
        labels=torch.tensor(labels),
    )
    theirs.zero_grad()
    out.loss.backward()
    # Two kinds run written out and recomputed, the others scanned.
    execution = Execution(unroll=True, remat="full") if config.tied else Execution()
    model = Llama(config, execution)

    @jax.jit
    def step(params: Any) -> Any:
        def objective(params: Any) -> Any:
            states = apply(model, params, ids)
            head = apply(model, params, method="head")
            result = token_cross_entropy(states, head, next_token_labels(labels), piece=12)
            return result.loss, apply(model, params, states, method="logits")

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, logits), grads = step(params)
    expected = float(out.loss.detach())
    real = ids != 0
    assert relative(np.asarray(logits)[real], out.logits.detach().numpy()[real]) < 1e-5
    assert abs(float(loss) - expected) < 1e-6 * expected
    assert_same_gradients(theirs, exported(grads, llama_map(config)), 1e-4)


def theirs_generated(
    theirs: Any, stop: tuple[int, ...], **options: Any
) -> tuple[list[list[int]], Any]:
    """Their new tokens for every prompt (padded on the left), and the scores under beam search."""
    ids = prompts()
    left = np.stack([np.roll(row, len(row) - n) for row, n in zip(ids, LENGTHS, strict=True)])
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(left),
            attention_mask=torch.tensor(left != 0),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(stop) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    rows = []
    for tokens in out.sequences[:, ids.shape[1] :].tolist():
        ends = [n for n, token in enumerate(tokens) if token in stop]
        rows.append(tokens[: ends[0] + 1] if ends else tokens)
    return rows, out.get("sequences_scores")


def cut(tokens: jax.Array, lengths: jax.Array) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize(
    ("kind", "searches"),
    [
        ("llama", [(1.0, False), (-1.0, False), (2.0, True)]),
        ("qwen2 tied", [(-1.0, False)]),
    ],
    ids=["llama", "qwen2 with two stop tokens"],
)
def test_generation_is_token_exact(kind: str, searches: list[tuple[float, bool]]) -> None:
    """A ragged batch: greedy, and by beam search with several penalties and both ways of stopping.
    Scores within 1e-5."""
    theirs, config, params = pair_of(kind)
    # Tokens that their decoding does come to in the middle of a row, greedy and by beam search.
    plain = [theirs_generated(theirs, (), num_beams=n)[0] for n in (1, 3)]
    stop = tuple(plain[n][n][NEW // 2 + n] for n in range(len(config.eos_ids)))
    limits = Limits(NEW, stop)
    model = Llama(config)

    def step(tokens: jax.Array, state: Any) -> Any:
        return apply(model, params, tokens, state, method="decode_step")

    @jax.jit
    def run(ids: jax.Array, lengths: jax.Array, penalty: Any, early: Any) -> Any:
        read = apply(model, params, ids, lengths, capacity=24, method="prefill")
        options = {"length_penalty": penalty, "early_stopping": early}
        return generate(step, *read, limits), beam_search(step, *read, limits, beams=3, **options)

    ended = 0
    for penalty, early in searches:
        greedy, beams = run(prompts(), LENGTHS, penalty, early)
        expected, scores = theirs_generated(
            theirs, stop, num_beams=3, length_penalty=penalty, early_stopping=early
        )
        assert cut(beams.tokens[:, 0], beams.lengths[:, 0]) == expected
        np.testing.assert_allclose(beams.scores[:, 0], scores.numpy(), rtol=1e-5)
        ended += sum(row[-1] in stop for row in expected)
    assert ended  # or the stop tokens would not have been tested
    expected, _ = theirs_generated(theirs, stop)
    assert cut(greedy.tokens, greedy.lengths) == expected
    assert greedy.stopped.tolist() == [row[-1] in stop for row in expected]
    assert greedy.stopped.any()


PUBLISHED = {
    "llama 3 8B": (LLAMA3_8B, 8_030_261_248),
    "vicuna 7B": (VICUNA_7B, 6_738_415_616),
    "qwen2 7B": (QWEN2_7B, 7_615_616_512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_by_shape(name: str) -> None:
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in theirs_of(config).state_dict().items()}
    shapes = abstract(config)
    assert count(shapes) == parameters
    assert llama_map(config).torch_shapes(shapes) == theirs


@pytest.mark.parametrize("kind", ["llama", "llama 3.2", "qwen2"])
def test_round_trip_and_exported_folder(kind: str, tmp_path: Path) -> None:
    """Bit-equal and strict both ways; their class loads what was exported, with our sizes."""
    theirs, config, params = pair_of(kind)
    assert_round_trip(state_of(theirs), llama_map(config), abstract(config))
    export_params(params, llama_map(config), tmp_path, config.hub_config())
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    assert LlamaConfig.from_hub_config(again.config.to_dict()) == config
    assert LlamaConfig.from_hub_config(config.hub_config()) == config


def test_tied_head_under_either_name() -> None:
    theirs, config, params = pair_of("llama 3.2")
    state = state_of(theirs)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one = {k: v for k, v in state.items() if k != name}
        found = imported(one, llama_map(config), abstract(config))
        np.testing.assert_array_equal(found["embedding"], params["embedding"])
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        imported(
            {**state, "lm_head.weight": state["lm_head.weight"] + 1},
            llama_map(config),
            abstract(config),
        )


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)],
    ids=str,
)
def test_frequencies_of_published_sizes(scaling: RopeScaling | None) -> None:
    """Ours are rounded once, from float64. Theirs are raised to powers in float32, and where
    "llama3" goes over from one to the other they subtract numbers that are nearly equal."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = dataclasses.replace(LLAMA3_8B, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config.hub_config())).inv_freq
    np.testing.assert_allclose(frequencies(config), theirs.numpy(), rtol=1e-6)


def test_positions_of_three_numbers() -> None:
    """Heads turned as Qwen2-VL's, within float32 rounding of angles up to 60."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VLRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = dataclasses.replace(QWEN2_7B, rope_sections=(16, 24, 24))
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 60, (3, 2, 5))
    q, k = (rng.normal(size=(2, heads, 5, 128)).astype(np.float32) for heads in (4, 2))
    fields = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    settings = transformers.Qwen2VLConfig(
        text_config={"rope_parameters": fields, "num_key_value_heads": 2}
    ).text_config
    assert LlamaConfig.from_hub_config(settings.to_dict(), "qwen2").rope_sections == (16, 24, 24)
    tables = Qwen2VLRotaryEmbedding(settings)(torch.tensor(q), torch.tensor(positions))
    expected = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), *tables)
    rope = rope_of(jnp.asarray(positions), config)
    for ours, theirs in zip((q, k), expected, strict=True):
        assert relative(turn(jnp.asarray(ours), rope), theirs.numpy()) < 1e-5
    # Three equal numbers are one.
    one = rope_of(jnp.asarray(positions[0]), config)
    three = rope_of(jnp.asarray(np.repeat(positions[:1], 3, axis=0)), config)
    np.testing.assert_array_equal(one.cos, three.cos)


def test_bad_configuration() -> None:
    with pytest.raises(ValueError, match="expected llama or qwen2, found 'llava_llama'"):
        LlamaConfig.from_hub_config({**TINY.hub_config(), "model_type": "llava_llama"})
    given = {**TINY.hub_config(), "model_type": "llava_llama"}
    assert LlamaConfig.from_hub_config(given, kind="llama") == TINY
    with pytest.raises(ValueError, match="attention_bias: expected False, found True"):
        LlamaConfig.from_hub_config({**TINY.hub_config(), "attention_bias": True})
    yarn = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ValueError, match="found 'yarn'"):
        LlamaConfig.from_hub_config({**TINY.hub_config(), "rope_scaling": yarn})
    with pytest.raises(ValueError, match="multiple of kv_heads, found 4 and 3"):
        dataclasses.replace(TINY, kv_heads=3)
