"""The FLUX.1 transformer against diffusers' FluxTransformer2DModel, live: tiny by value, published
by shape; its two weight layouts against diffusers' own conversion."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.backbones.flux import (
    CONTROL,
    DEV,
    FILL,
    SCHNELL,
    ExtraKeys,
    FluxConfig,
    FluxTransformer,
    Residuals,
    Tokens,
    flux_map,
    grid_ids,
    text_ids,
)
from jaxmods.backbones.flux.blocks import TimeText
from jaxmods.nn.stack import Execution
from jaxmods.weights import export_tensors, import_params, memory_reader

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = FluxConfig(
    in_channels=12,
    out_channels=8,
    double_layers=3,
    single_layers=4,
    heads=2,
    head_dim=16,
    text_width=10,
    pooled_width=6,
    rope_axes=(4, 6, 6),
)
PLAIN = FluxConfig(
    in_channels=8,
    out_channels=8,
    double_layers=2,
    single_layers=3,
    heads=3,
    head_dim=12,
    text_width=10,
    pooled_width=6,
    guidance=False,
    rope_axes=(4, 4, 4),
)
TEXT = 5


def flux_model(config: FluxConfig) -> Any:
    hub = {k: v for k, v in config.hub_config().items() if k != "_class_name"}
    return diffusers.FluxTransformer2DModel(**hub)


def init(model: FluxTransformer) -> Any:
    c = model.config
    return jax.eval_shape(
        lambda rng: model.init(
            rng,
            Tokens(jnp.zeros((1, 1, c.in_channels)), grid_ids(1, 1)),
            Tokens(jnp.zeros((1, 1, c.text_width)), text_ids(1)),
            jnp.zeros((1, c.pooled_width)),
            jnp.zeros(1),
            jnp.zeros(1) if c.guidance else None,
        )["params"],
        jax.random.key(0),
    )


@pytest.mark.parametrize(
    "config", [DEV, SCHNELL, FILL, CONTROL], ids=["dev", "schnell", "fill", "control"]
)
def test_published_sizes_by_shape(config: FluxConfig) -> None:
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in flux_model(config).state_dict().items()}
    abstract = partitioning.unbox(init(FluxTransformer(config)))
    assert flux_map(config).torch_shapes(abstract) == theirs


def test_config_of_the_class() -> None:
    """Read back from what the class itself writes, its defaults included."""
    for config in (TINY, PLAIN, SCHNELL):
        with torch.device("meta"):
            assert FluxConfig.from_hub_config(dict(flux_model(config).config)) == config
    with torch.device("meta"):
        written = dict(diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1).config)
    named = {"num_layers": 1, "num_single_layers": 1}
    assert FluxConfig.from_hub_config(named) == FluxConfig.from_hub_config(written)


def pair(config: FluxConfig) -> tuple[Any, Any]:
    """(diffusers' model with random weights, the same weights here)."""
    torch.manual_seed(0)
    theirs = flux_model(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    with memory_reader(state) as reader:
        abstract = partitioning.unbox(init(FluxTransformer(config)))
        return theirs, import_params(reader, flux_map(config), abstract).params


def arrays(config: FluxConfig, lengths: list[int], counts: tuple[int, int]) -> dict[str, Any]:
    """Inputs that are differentiated; the image and text lists are in `image0..`, `text0..`."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        **{f"image{n}": normal(2, length, config.in_channels) for n, length in enumerate(lengths)},
        "text0": normal(2, 2, config.text_width),
        "text1": normal(2, TEXT - 2, config.text_width),
        "pooled": normal(2, config.pooled_width),
        "double": normal(counts[0], 2, sum(lengths), config.width),
        "single": normal(counts[1], 2, sum(lengths), config.width),
    }


# Noise on 3 x 4 tokens; a condition picture at half the resolution, in another place.
IDS = [grid_ids(3, 4), grid_ids(2, 3, label=1, scale=2, offset=(1, -9))]
TIME = np.array([0.3, 0.9817], np.float32)
GUIDANCE = np.array([3.5, 2.5], np.float32)


def their_forward(theirs: Any, given: dict[str, Any], ids: list[np.ndarray], **options: Any) -> Any:
    """`given` are tensors; everything after the noise's list is a further list."""
    images = [v for k, v in given.items() if k.startswith("image")]
    return theirs(
        hidden_states=torch.cat(images, dim=1),
        encoder_hidden_states=torch.cat([given["text0"], given["text1"]], dim=1),
        pooled_projections=given["pooled"],
        timestep=torch.tensor(TIME),
        img_ids=torch.tensor(np.concatenate(ids)),
        txt_ids=torch.zeros(TEXT, 3),
        guidance=torch.tensor(GUIDANCE) if theirs.config.guidance_embeds else None,
        return_dict=False,
        **options,
    )[0]


def our_forward(
    model: FluxTransformer, params: Any, given: Any, ids: list[np.ndarray], **options: Any
) -> jax.Array:
    images = [Tokens(given[f"image{n}"], places) for n, places in enumerate(ids)]
    texts = [Tokens(given[k], text_ids(given[k].shape[1])) for k in ("text0", "text1")]
    return model.apply(
        {"params": params},
        images,
        texts,
        given["pooled"],
        jnp.asarray(TIME),
        jnp.asarray(GUIDANCE) if model.config.guidance else None,
        **options,
    )


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


CASES = {
    # guidance, a condition list, residuals of a ControlNet (two for three and three for four
    # blocks), a mask
    "all inputs": (TINY, IDS, (2, 3), Execution(remat="dots")),
    "plain": (PLAIN, IDS[:1], (0, 0), Execution(unroll=True, remat="full")),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    """Velocity within 1e-5, gradient of every input and parameter within 1e-4, relative.

    Both sides round in float32 in another order. The sinusoids take arguments up to 3500, where
    one unit in the last place of a frequency is 2e-4 in the result; two of the 128 frequencies
    differ by one (PyTorch's exp does not round correctly), which is most of the difference.
    """
    config, ids, counts, execution = CASES[name]
    theirs, params = pair(config)
    values = arrays(config, [len(i) for i in ids], counts)
    total = TEXT + sum(len(i) for i in ids)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(2, total - TEXT, config.out_channels)).astype(np.float32)
    mask = rng.random((2, 1, total, total)) > 0.2 if counts[0] else None

    given = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}
    velocity = their_forward(
        theirs,
        given,
        ids,
        controlnet_block_samples=list(given["double"]) or None,
        controlnet_single_block_samples=list(given["single"]) or None,
        joint_attention_kwargs=None if mask is None else {"attention_mask": torch.tensor(mask)},
    )
    (velocity * torch.tensor(weight)).sum().backward()

    model = FluxTransformer(config, execution)

    def objective(params: Any, given: Any) -> Any:
        residuals = Residuals(given["double"], given["single"]) if counts[0] else Residuals()
        out = our_forward(
            model,
            params,
            given,
            ids,
            residuals=residuals,
            mask=None if mask is None else jnp.asarray(mask),
        )
        return jnp.sum(out * weight), out

    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, out), (by_params, by_inputs) = step(params, jax.tree.map(jnp.asarray, values))
    assert relative(out, velocity.detach()) < 1e-5

    ours = {k: np.asarray(v.all()) for k, v in export_tensors(by_params, flux_map(config)).items()}
    expected = {k: v.grad.numpy() for k, v in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    ours |= {k: np.asarray(v) for k, v in by_inputs.items() if v.size}
    expected |= {k: v.grad.numpy() for k, v in given.items() if v.numel()}
    largest = max(float(np.linalg.norm(v)) for v in expected.values())
    for key, value in expected.items():
        error = np.linalg.norm(ours[key] - value)
        # A key bias has almost no gradient: both sides are rounding noise.
        assert error < 1e-4 * np.linalg.norm(value) + 1e-7 * largest, key


class WithExtraKeys:
    """Attention of diffusers' blocks with keys and values behind those of the tokens."""

    def __init__(self, keys: Any, values: Any) -> None:
        self.keys, self.values = keys, values  # [B, R, H, K]

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Any) -> Any:
            return x.unflatten(-1, (attn.heads, -1))

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            first = (
                attn.norm_added_q(heads(attn.add_q_proj(text))),
                attn.norm_added_k(heads(attn.add_k_proj(text))),
                heads(attn.add_v_proj(text)),
            )
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(first, (q, k, v), strict=True))
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        k, v = torch.cat([k, self.keys], dim=1), torch.cat([v, self.values], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2, 3)
        if encoder_hidden_states is None:
            return mixed
        text, image = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
        return attn.to_out[0](image), attn.to_add_out(text)


def test_extra_keys_and_repeated_residuals() -> None:
    """Every block has further keys of its own; the residuals are taken in turns (XLabs)."""
    theirs, params = pair(TINY)
    values = arrays(TINY, [len(i) for i in IDS], (2, 3))
    rng = np.random.default_rng(2)
    shape = (2, TINY.heads, 3, TINY.head_dim)
    extra = {
        kind: tuple(rng.normal(size=(n, *shape)).astype(np.float32) for _ in range(2))
        for kind, n in (("double", TINY.double_layers), ("single", TINY.single_layers))
    }
    for kind, blocks in (
        ("double", theirs.transformer_blocks),
        ("single", theirs.single_transformer_blocks),
    ):
        for block, *keys_values in zip(blocks, *extra[kind], strict=True):
            block.attn.set_processor(
                WithExtraKeys(*(torch.tensor(x).transpose(1, 2) for x in keys_values))
            )
    given = {k: torch.tensor(v) for k, v in values.items()}
    with torch.no_grad():
        expected = their_forward(
            theirs,
            given,
            IDS,
            controlnet_block_samples=list(given["double"]),
            controlnet_blocks_repeat=True,
        )

    @jax.jit
    def ours(params: Any, given: Any, extra: Any) -> Any:
        return our_forward(
            FluxTransformer(TINY),
            params,
            given,
            IDS,
            residuals=Residuals(given["double"], repeat=True),
            extra=ExtraKeys(lambda layer: layer, **extra),
        )

    assert relative(ours(params, values, extra), expected) < 1e-5


def test_time_in_bfloat16() -> None:
    """With `round_time` the time path is diffusers' in bf16: the same arguments to the last bit,
    and embeddings within one unit in the last place of bf16. (Two layers and a sum round up to half
    a unit each, on both sides: either is about half a unit from the same network in float32.)

    Without it the arguments keep their digits: 0.9817 is 981.7, not 984.
    """
    theirs, params = pair(TINY)
    theirs = theirs.to(torch.bfloat16)
    pooled = np.random.default_rng(0).normal(size=(2, TINY.pooled_width)).astype(np.float32)
    seen: list[Any] = []
    theirs.time_text_embed.time_proj.register_forward_hook(
        lambda module, args, out: seen.append((args[0], out))
    )
    with torch.no_grad():
        scaled = [torch.tensor(x).to(torch.bfloat16) * 1000 for x in (TIME, GUIDANCE)]
        expected = theirs.time_text_embed(*scaled, torch.tensor(pooled).to(torch.bfloat16))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["time_text"])
    ours, wide = (
        TimeText(TINY, round_time).apply(
            {"params": half}, jnp.asarray(TIME), jnp.asarray(GUIDANCE), jnp.asarray(pooled)
        )
        for round_time in (True, False)
    )
    assert ours.dtype == jnp.bfloat16
    expected = expected.float().numpy()
    assert relative(ours.astype(jnp.float32), expected) < 2**-7
    assert relative(wide.astype(jnp.float32), expected) > 0.1
    for value, (argument, features) in zip((TIME, GUIDANCE), seen, strict=True):
        rounded = TimeText(TINY, True)._features(jnp.asarray(value), jnp.bfloat16)
        np.testing.assert_array_equal(
            np.asarray(jnp.asarray(value, jnp.bfloat16) * jnp.bfloat16(1000), np.float32),
            argument.float().numpy(),
        )
        # One unit in the last place of a frequency at an argument of 3504 is 2e-4.
        np.testing.assert_allclose(rounded, features.float().numpy(), atol=3e-4, rtol=0)


def official_conversion(state: dict[str, Any], width: int) -> dict[str, Any]:
    """diffusers' conversion of the original layout, with its fixed width 3072 replaced."""
    from diffusers.loaders import single_file_utils

    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = function.__code__
    constants = tuple(width if c == 3072 else c for c in code.co_consts)
    assert width in constants
    resized = types.FunctionType(code.replace(co_consts=constants), function.__globals__)
    return resized(dict(state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_layout_as_diffusers_converts_it(prefix: str) -> None:
    """A file in the original layout, written here, is converted there into the same model, and
    comes back to the bit by the other layout."""
    theirs, params = pair(TINY)
    weight_map = flux_map(TINY, "bfl").under(prefix)
    original = {k: torch.tensor(v.all()) for k, v in export_tensors(params, weight_map).items()}
    converted = official_conversion(original, TINY.width)
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(converted[key], value), key
    with memory_reader({k: v.numpy() for k, v in original.items()}) as reader:
        again = import_params(reader, weight_map, partitioning.unbox(params)).params
    back = {k: torch.tensor(v.all()) for k, v in export_tensors(again, flux_map(TINY)).items()}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())
    flux_model(TINY).load_state_dict(back, strict=True)
