"""Adapters against PEFT and diffusers, live: forward, gradients, and files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmods import partitioning
from jaxmods.backbones.flux import FluxConfig, FluxTransformer, Tokens, flux_map, grid_ids, text_ids
from jaxmods.nn import lora
from jaxmods.nn.lora import Published
from jaxmods.system import Params
from tests import lora_toy
from tests.parity.live import exported, imported, relative

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

APART = Published(lora_toy.apart_map())
SUFFIXES = ["attn.to_q", "attn.to_v", "mlp", "proj_out"]
TOLERANCE = 1e-5  # fp32 sums of at most 20 terms in another order


class TorchBlock(torch.nn.Module):
    """The toy block in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        width, hidden = lora_toy.WIDTH, lora_toy.HIDDEN
        self.attn = torch.nn.ModuleDict({f"to_{n}": torch.nn.Linear(width, width) for n in "qkv"})
        self.mlp = torch.nn.Linear(width, hidden)
        self.proj_out = torch.nn.Linear(width + hidden, width)

    def forward(self, x: Any) -> Any:
        mixed = self.attn["to_q"](x) * torch.sigmoid(self.attn["to_k"](x)) + self.attn["to_v"](x)
        wide = torch.nn.functional.gelu(self.mlp(x), approximate="tanh")
        return x + self.proj_out(torch.cat([mixed, wide], dim=-1))


class TorchNet(torch.nn.Module):
    """The toy network in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = torch.nn.Linear(lora_toy.INPUT, lora_toy.WIDTH)
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(lora_toy.LAYERS))
        self.proj_out = torch.nn.Linear(lora_toy.WIDTH, lora_toy.OUTPUT)

    def forward(self, x: Any) -> Any:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


@pytest.fixture(scope="module")
def base() -> Params:
    return partitioning.unbox(lora_toy.boxed(jax.random.key(0)))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 3, lora_toy.INPUT)).astype(np.float32)


def torch_net(base: Params) -> TorchNet:
    """The network in PyTorch with our weights."""
    net = TorchNet()
    state = {k: torch.tensor(v) for k, v in exported(base, lora_toy.apart_map()).items()}
    net.load_state_dict(state, strict=True)
    return net


def with_adapters(base: Params, **options: Any) -> Any:
    """The PyTorch network under PEFT, with random A and B."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=SUFFIXES, init_lora_weights=False, **options
    )
    return peft.get_peft_model(torch_net(base), config)


def apply(params: Params, x: Any) -> jax.Array:
    return lora_toy.Net().apply({"params": params}, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"mlp": 3, r"blocks\.1\.proj_out": 1}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_forward_and_gradients_of_a_file_that_peft_wrote(
    base: Params, x: np.ndarray, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = with_adapters(base, **options)
    theirs.save_pretrained(tmp_path / "peft")
    loaded = lora.load(tmp_path / "peft", base, [APART])
    assert (loaded.dialect, loaded.alpha_from, loaded.modules) == ("peft", "config", 3 * 4 + 1)

    out = theirs(torch.tensor(x))
    out.square().sum().backward()

    def loss(adapters: Params) -> Any:
        y = apply(lora.attach(base, adapters, loaded.config), x)
        return jnp.sum(jnp.square(y)), y

    (_, ours), grads = jax.value_and_grad(loss, has_aux=True)(loaded.adapters)
    assert relative(ours, out.detach()) < TOLERANCE

    def saved(adapters: Params, name: str) -> dict[str, np.ndarray]:
        lora.save(tmp_path / name, adapters, loaded.config, base, [APART], dialect="peft")
        return load_file(tmp_path / name / "adapter_model.safetensors")

    ours_now, found = saved(loaded.adapters, "ours"), saved(grads, "grads")
    theirs_now = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = {
        name.replace(".default.", "."): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == ours_now.keys() == expected.keys()
    for name, grad in expected.items():
        # Where the scale of a module is not the common one, our b is s times their B.
        ratio = np.linalg.norm(ours_now[name]) / np.linalg.norm(theirs_now[name])
        assert ratio == pytest.approx(1.0) or (options.get("alpha_pattern") and "lora_B" in name)
        assert relative(found[name] * ratio, grad) < 1e-4, name


def test_peft_loads_ours(base: Params, x: np.ndarray, tmp_path: Path) -> None:
    """Outputs, and the merged weights of both sides."""
    config = lora.LoraConfig(
        ("blocks/to_k/kernel", "blocks/out/kernel", "head/kernel"), rank=3, alpha=2.0, rslora=True
    )
    adapters = partitioning.unbox(lora.init(jax.random.key(1), base, config))
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    # One layer without an update: it must be absent from the file, not there as zeros.
    blocks = adapters["default"]["blocks"]["to_k"]
    blocks["a"], blocks["b"] = blocks["a"].at[1].set(0), blocks["b"].at[1].set(0)
    ranks = lora.save(tmp_path / "x", adapters, config, base, [APART], dialect="peft")
    assert "blocks.1.attn.to_k" not in ranks
    theirs = peft.PeftModel.from_pretrained(torch_net(base), tmp_path / "x")
    adapted = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == len(ranks) == 2 + 3 + 1
    attached = apply(lora.attach(base, adapters, config), x)
    assert relative(attached, apply(base, x)) > 0.01
    with torch.no_grad():
        assert relative(attached, theirs(torch.tensor(x))) < TOLERANCE
    state = {k: v.numpy() for k, v in theirs.merge_and_unload().state_dict().items()}
    merged = exported(lora.merge(base, adapters, config), lora_toy.apart_map())
    assert merged.keys() == state.keys()
    for key, weight in state.items():
        # The sum of rank products is formed in another order: float32 noise.
        np.testing.assert_allclose(merged[key], weight, atol=1e-6)


TINY = FluxConfig(
    in_channels=8,
    out_channels=8,
    double_layers=2,
    single_layers=2,
    heads=2,
    head_dim=16,
    text_width=12,
    pooled_width=10,
    rope_axes=(4, 6, 6),
)
FLUX_SUFFIXES = [
    "attn.to_q",
    "attn.to_v",
    "attn.add_k_proj",
    "attn.to_out.0",
    "ff.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]


def flux_base(config: FluxConfig) -> Params:
    """Abstract parameters of a FLUX transformer."""
    image = Tokens(jnp.zeros((1, 4, config.in_channels)), grid_ids(2, 2))
    text = Tokens(jnp.zeros((1, 3, config.text_width)), text_ids(3))
    pooled, time = jnp.zeros((1, config.pooled_width)), jnp.zeros((1,))
    model = FluxTransformer(config)
    init = lambda rng: model.init(rng, image, text, pooled, time, time)  # noqa: E731 - one use
    return partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))["params"]


def random_adapters(base: Params, config: lora.LoraConfig) -> Params:
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, config))
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32), partitioning.unbox(shapes)
    )


def flux_torch(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_output(model: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn((2, 4, 8), generator=generator),
            encoder_hidden_states=torch.randn((2, 3, 12), generator=generator),
            pooled_projections=torch.randn((2, 10), generator=generator),
            timestep=torch.tensor([0.3, 0.8]),
            guidance=torch.tensor([2.5, 2.5]),
            img_ids=torch.tensor(grid_ids(2, 2)).float(),
            txt_ids=torch.zeros((3, 3)),
        ).sample.numpy()


def flux_ours(params: Params) -> jax.Array:
    """This library's output for the inputs of `flux_output`."""
    generator = torch.Generator().manual_seed(5)
    image, text, pooled = (
        jnp.asarray(torch.randn(size, generator=generator).numpy())
        for size in ((2, 4, 8), (2, 3, 12), (2, 10))
    )
    return FluxTransformer(TINY).apply(
        {"params": params},
        Tokens(image, grid_ids(2, 2)),
        Tokens(text, text_ids(3)),
        pooled,
        jnp.array([0.3, 0.8]),
        jnp.array([2.5, 2.5]),
    )


def test_diffusers_loads_ours(tmp_path: Path) -> None:
    """Saved for diffusers and for PEFT, loaded by their own loaders into diffusers' FLUX: the same
    output as here with the adapters attached, and as from our merged weights in that class."""
    base, names = flux_base(TINY), Published(flux_map(TINY))
    config = lora.LoraConfig(lora.targets_of(names, base, FLUX_SUFFIXES), rank=3, alpha=5.0)
    adapters = random_adapters(base, config)
    lora.save(tmp_path / "x", adapters, config, base, [names], dialect="diffusers")
    lora.save(tmp_path / "y", adapters, config, base, [names], dialect="peft")

    model = flux_torch()
    weights = imported({k: v.numpy() for k, v in model.state_dict().items()}, flux_map(TINY), base)
    plain = flux_output(model)
    state, _, metadata = diffusers.FluxPipeline.lora_state_dict(
        tmp_path / "x", return_alphas=True, return_lora_metadata=True
    )
    # The scale is stated in the metadata alone: without them diffusers would take 1.
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (3, 5)
    model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    theirs = flux_output(model)
    assert relative(theirs, plain) > 0.01
    ours = jax.jit(flux_ours)(lora.attach(weights, adapters, config))
    assert relative(ours, theirs) < TOLERANCE

    wrapped = peft.PeftModel.from_pretrained(flux_torch(), tmp_path / "y")
    assert wrapped.peft_config["default"].lora_alpha == 5
    assert relative(flux_output(wrapped), theirs) < TOLERANCE

    merged = flux_torch()
    state = exported(lora.merge(weights, adapters, config), flux_map(TINY))
    merged.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    assert relative(flux_output(merged), theirs) < TOLERANCE


def test_we_load_what_diffusers_saves(tmp_path: Path) -> None:
    """Names, metadata and tensors of a file of `FluxPipeline.save_lora_weights`."""
    model = flux_torch()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["attn.to_k", "proj_mlp"], init_lora_weights="gaussian"
    )
    model.add_adapter(config)
    layers = peft.get_peft_model_state_dict(model)
    with torch.no_grad():
        for tensor in layers.values():
            tensor.add_(0.1)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    base, names = flux_base(TINY), Published(flux_map(TINY))
    loaded = lora.load(tmp_path, base, [names, Published(flux_map(TINY, "bfl"))])
    assert (loaded.dialect, loaded.alpha_from) == ("diffusers", "metadata")
    assert (loaded.config.rank, loaded.config.alpha, loaded.modules) == (2, 3.0, 2 + 2 + 2)
    lora.save(tmp_path / "back", loaded.adapters, loaded.config, base, [names], dialect="diffusers")
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    ours = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert back.keys() == ours.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(back[key], tensor)


def test_diffusers_converts_our_kohya_files(tmp_path: Path) -> None:
    """At FLUX.1's width, which diffusers' conversion takes for granted: adapters saved with the
    original names and fused projections, converted by diffusers, give the products B A that we
    hold (corners of 16 x 16 of each)."""
    config = FluxConfig(double_layers=1, single_layers=1)
    base = flux_base(config)
    names, original = Published(flux_map(config)), Published(flux_map(config, "bfl"))
    suffixes = [*FLUX_SUFFIXES[:-1], "attn.to_k", "norm1.linear"]
    settings = lora.LoraConfig(lora.targets_of(names, base, suffixes), rank=2, alpha=1.0)
    adapters = random_adapters(base, settings)
    lora.save(tmp_path / "x", adapters, settings, base, [original], dialect="kohya")
    converted = diffusers.FluxPipeline.lora_state_dict(
        str(tmp_path / "x"), weight_name="lora.safetensors"
    )
    ranks = lora.save(tmp_path / "y", adapters, settings, base, [names], dialect="diffusers")
    direct = load_file(tmp_path / "y" / "pytorch_lora_weights.safetensors")
    compared = 0
    for module in ranks:
        A, B = (direct[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        A2, B2 = (converted[f"transformer.{module}.lora_{half}.weight"].numpy() for half in "AB")
        for rows, columns in ((slice(16), slice(16)), (slice(-16, None), slice(-16, None))):
            expected = settings.scale * B[rows] @ A[:, columns]
            assert relative(B2[rows] @ A2[:, columns], expected) < TOLERANCE, module
            compared += 1
    assert compared == 2 * len(ranks) == 2 * (8 + 4)
