"""The FLUX transformer in float32 on the CPU: this library against diffusers and PEFT.

    python benchmarks/flux_step.py --steps 5

Two things are timed: the forward pass without adapters, and a training step of low-rank adapters on
the attention projections of a frozen base (forward, backward, AdamW). Both sides have the same
weights, inputs and adapters (written here, loaded by diffusers' own loader). Calls alternate within
one process, so that both see the same machine; outputs and losses must agree; medians and their
ratio are printed (above 1: this library is faster). The PyTorch side is FluxTransformer2DModel with
its fused attention, and fused AdamW.

On a machine that is busy with other things wall time says little. `--one-core` pins the process to
one core and counts its CPU seconds instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--one-core" in sys.argv:  # both libraries count the cores when they are imported
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from jaxmods import partitioning
from jaxmods.backbones.flux import FluxConfig, FluxTransformer, Tokens, flux_map, grid_ids, text_ids
from jaxmods.nn import lora
from jaxmods.nn.stack import Execution
from jaxmods.weights import import_params, memory_reader

LR, DECAY = 1e-4, 1e-2
TARGETS = (
    *(f"attn.to_{part}" for part in ("q", "k", "v", "out.0")),
    *(f"attn.add_{part}_proj" for part in "qkv"),
    "attn.to_add_out",
)

Batch = dict[str, np.ndarray]
Run = Callable[[], np.ndarray]


def make_config(args: argparse.Namespace) -> FluxConfig:
    """FLUX.1-dev with the width and depth asked for."""
    return FluxConfig(
        double_layers=args.double,
        single_layers=args.single,
        heads=args.heads,
        text_width=1024,
    )


def make_batch(config: FluxConfig, args: argparse.Namespace) -> Batch:
    """Random inputs and a target velocity."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(args.batch, *shape)).astype(np.float32)

    return {
        "image": normal(args.side**2, config.in_channels),
        "target": normal(args.side**2, config.out_channels),
        "text": normal(args.text, config.text_width),
        "pooled": normal(config.pooled_width),
        "time": rng.random(args.batch).astype(np.float32),
        "guidance": np.full(args.batch, 3.5, np.float32),
    }


class Ours:
    """This library's side."""

    def __init__(self, config: FluxConfig, args: argparse.Namespace, batch: Batch) -> None:
        self.model = FluxTransformer(config, Execution(unroll=args.unroll))
        self.side, self.text = args.side, args.text
        self.batch = jax.tree.map(jnp.asarray, batch)
        self.boxed = jax.eval_shape(
            lambda rng: self.model.init(rng, **self._inputs(self.batch))["params"],
            jax.random.key(0),
        )
        names = lora.Published(flux_map(config))
        paths = lora.targets_of(names, partitioning.unbox(self.boxed), TARGETS)
        self.config, self.names = lora.LoraConfig(paths, rank=args.rank), names
        fresh = partitioning.unbox(lora.init(jax.random.key(1), self.boxed, self.config))
        self.adapters = jax.tree.map(lambda x: x + 0.01, fresh)  # else b is zero

    def load(self, state: dict[str, np.ndarray], config: FluxConfig) -> None:
        """The base from diffusers' state dict."""
        with memory_reader(state) as reader:
            self.params = import_params(
                reader, flux_map(config), partitioning.unbox(self.boxed)
            ).params

    def _inputs(self, batch: Any) -> dict[str, Any]:
        return {
            "image": Tokens(batch["image"], grid_ids(self.side, self.side)),
            "text": Tokens(batch["text"], text_ids(self.text)),
            "pooled": batch["pooled"],
            "timestep": batch["time"],
            "guidance": batch["guidance"],
        }

    def _velocity(self, params: Any, batch: Any) -> jax.Array:
        return self.model.apply({"params": params}, **self._inputs(batch))

    def forward(self) -> Run:
        """A function that returns the velocity."""
        compiled = _compiled("forward", jax.jit(self._velocity), self.params, self.batch)
        return lambda: np.asarray(compiled(self.params, self.batch))

    def step(self) -> Run:
        """A function that makes one optimiser step and returns its loss."""
        optimiser = optax.adamw(LR, weight_decay=DECAY)

        def step(base: Any, adapters: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            def loss(adapters: Any) -> jax.Array:
                found = self._velocity(lora.attach(base, adapters, self.config), batch)
                return jnp.mean(jnp.square(found - batch["target"]))

            value, grads = jax.value_and_grad(loss)(adapters)
            updates, state = optimiser.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, value

        held = [self.adapters, optimiser.init(self.adapters)]
        jitted = jax.jit(step, donate_argnums=(1, 2))
        compiled = _compiled("step", jitted, self.params, *held, self.batch)

        def run() -> np.ndarray:
            held[0], held[1], value = compiled(self.params, held[0], held[1], self.batch)
            return np.asarray(jax.block_until_ready((value, held[0]))[0])

        return run


def _compiled(what: str, jitted: Any, *arguments: Any) -> Any:
    start = time.perf_counter()
    result = jitted.lower(*arguments).compile()
    print(f"{what} compiled in {time.perf_counter() - start:.1f} s")
    return result


class Theirs:
    """diffusers' side."""

    def __init__(self, config: FluxConfig, args: argparse.Namespace, batch: Batch) -> None:
        torch.manual_seed(0)
        hub = {k: v for k, v in config.hub_config().items() if k != "_class_name"}
        self.model = FluxTransformer2DModel(**hub).requires_grad_(False)
        given = {k: torch.tensor(v) for k, v in batch.items()}
        self.target = given["target"]
        self.inputs = {
            "hidden_states": given["image"],
            "encoder_hidden_states": given["text"],
            "pooled_projections": given["pooled"],
            "timestep": given["time"],
            "guidance": given["guidance"],
            "img_ids": torch.tensor(grid_ids(args.side, args.side)).float(),
            "txt_ids": torch.zeros((args.text, 3)),
            "return_dict": False,
        }

    def state(self) -> dict[str, np.ndarray]:
        """The state dict."""
        return {k: v.numpy() for k, v in self.model.state_dict().items()}

    def forward(self) -> Run:
        """A function that returns the velocity."""

        def run() -> np.ndarray:
            with torch.no_grad():
                return self.model(**self.inputs)[0].numpy()

        return run

    def step(self, folder: str) -> Run:
        """A function that makes one optimiser step on the adapters of a file."""
        state, _, metadata = FluxPipeline.lora_state_dict(
            folder, return_alphas=True, return_lora_metadata=True
        )
        self.model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
        trained = [p for name, p in self.model.named_parameters() if "lora_" in name]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, eps=1e-8, fused=True)

        def run() -> np.ndarray:
            optimiser.zero_grad(set_to_none=True)
            loss = torch.mean(torch.square(self.model(**self.inputs)[0] - self.target))
            loss.backward()
            optimiser.step()
            return loss.detach().numpy()

        return run


def compare(what: str, ours: Run, theirs: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Times of both in turns, printed; raises SystemExit where the results differ."""
    times: dict[str, list[float]] = {"jaxmods": [], "diffusers": []}
    results: dict[str, np.ndarray] = {}
    sizes: list[float] = []
    clock = time.process_time if args.one_core else time.perf_counter
    for number in range(args.steps + 1):
        for name, run in (("jaxmods", ours), ("diffusers", theirs)):
            start = clock()
            results[name] = run()
            if number:  # the first call of each warms up
                times[name].append(clock() - start)
        expected = results["diffusers"]
        sizes.append(float(np.linalg.norm(results["jaxmods"])))
        gap = np.linalg.norm(results["jaxmods"] - expected) / np.linalg.norm(expected)
        if not gap < 1e-4:
            raise SystemExit(f"{what}, call {number}: results differ by {gap:.1e}")
    median = {name: statistics.median(t) for name, t in times.items()}
    ratio = median["diffusers"] / median["jaxmods"]
    print(f"{what} (size of the result {sizes[0]:.6f} .. {sizes[-1]:.6f}, relative gap {gap:.1e})")
    for name, value in median.items():
        spread = f"{min(times[name]):.3f}..{max(times[name]):.3f}"
        print(f"  {name:9s} median {value:7.3f} s   ({spread})")
    print(f"  ratio     {ratio:.2f}x (diffusers / jaxmods)")
    return {"ratio": ratio, "median": median, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6, help="of 128 channels each")
    parser.add_argument("--double", type=int, default=3, help="double blocks")
    parser.add_argument("--single", type=int, default=6, help="single blocks")
    parser.add_argument("--side", type=int, default=16, help="rows and columns of image tokens")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--steps", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--unroll", action="store_true", help="write blocks out, do not scan")
    parser.add_argument("--one-core", action="store_true", help="CPU seconds on one core")
    parser.add_argument("--json", action="store_true", help="one JSON line at the end")
    args = parser.parse_args()

    config = make_config(args)
    batch = make_batch(config, args)
    ours, theirs = Ours(config, args, batch), Theirs(config, args, batch)
    ours.load(theirs.state(), config)
    print(
        f"batch {args.batch}, width {config.width}, {args.double}+{args.single} blocks "
        f"{'unrolled' if args.unroll else 'scanned'}, {args.text}+{args.side**2} tokens, "
        f"rank {args.rank}, {torch.get_num_threads()} thread(s), {args.steps} calls each, "
        f"{'CPU' if args.one_core else 'wall'} seconds"
    )
    results = {"forward": compare("forward", ours.forward(), theirs.forward(), args)}
    base = partitioning.unbox(ours.boxed)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(folder, ours.adapters, ours.config, base, [ours.names], dialect="diffusers")
        step = theirs.step(folder)
    results["LoRA step"] = compare("LoRA step", ours.step(), step, args)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
