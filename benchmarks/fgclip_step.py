"""One FG-CLIP training step in float32 on the CPU: this library against PyTorch.

    python benchmarks/fgclip_step.py --batch 2 --steps 5

Both sides train the same model (default: ViT-B/16 and its text tower) on the same batch with all
four losses and AdamW, from the same weights. Steps alternate within one process, so that both see
the same machine; medians and their ratio are printed (above 1: this library is faster).

The PyTorch side is `torch_reference` (fused attention, fused AdamW). It computes the last block
for every token, as the official code does; this library computes it only where its output is used.
Every slot of the batch is filled, so padding costs neither side anything.

On a machine that is busy with other things wall time says little. `--one-core` pins the process to
one core and counts its CPU seconds instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
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

from jaxmods import partitioning
from jaxmods.backbones.clip import normalise
from jaxmods.systems.fgclip import Execution, FgClip
from jaxmods.systems.fgclip.torch_reference import FgClipReference, RankBatch
from jaxmods.weights import export_tensors

WEIGHTS = {"long": 1.0, "short": 1.0, "region": 0.1, "hard": 0.5}
LR, DECAY = 1e-6, 1e-3


def make_system(args: argparse.Namespace) -> FgClip:
    """The base model, with the depth and execution asked for."""
    base = FgClip()
    return FgClip(
        vision=dataclasses.replace(base.vision, layers=args.vision_layers),
        text=dataclasses.replace(base.text, layers=args.text_layers),
        hard_pack_images=args.batch,
        hard_pack_slots=args.batch * args.hard,
        execution=Execution(unroll=not args.scan),
    )


def make_batch(system: FgClip, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch without an empty slot."""
    rng = np.random.default_rng(seed)
    text = system.text
    batch: dict[str, np.ndarray] = {}
    for name, spec in system.batch_spec(size).items():
        if "text" in name and spec.dtype == "int32":
            ids = rng.integers(0, text.bos_id, spec.shape)
            end = rng.integers(6, 20, spec.shape[:-1])[..., None]
            ids = np.where(np.arange(spec.shape[-1]) < end, ids, text.eos_id)
            batch[name] = ids.astype(np.int32)
        elif spec.dtype == "bool":
            batch[name] = np.ones(spec.shape, bool)
        elif spec.dtype == "uint8":
            batch[name] = rng.integers(0, 256, spec.shape).astype(np.uint8)
        elif name == "hard_image":
            batch[name] = np.arange(spec.shape[1], dtype=np.int32)[None] % size
        else:
            corners = np.sort(rng.random((*spec.shape[:-1], 2, 2)), axis=-2)
            batch[name] = corners.reshape(spec.shape).astype(np.float32)
    order = np.argsort(batch["hard_image"][0], kind="stable")
    for name in ("hard_box", "hard_image", "hard_text"):
        batch[name] = batch[name][:, order]
    return batch


def torch_batch(batch: dict[str, np.ndarray], boxes: int, hard: int) -> RankBatch:
    """The same batch in the official layout."""
    size = len(batch["image"])
    pixels = np.asarray(normalise(jnp.asarray(batch["image"]))).transpose(0, 3, 1, 2)
    infos = np.zeros((size, boxes, 4), np.float32)
    infos[:, :hard] = batch["hard_box"].reshape(size, hard, 4)
    length = batch["text_short"].shape[-1]

    def ids(name: str) -> torch.Tensor:
        return torch.tensor(batch[name].reshape(-1, batch[name].shape[-1]).astype(np.int64))

    assert batch["hard_text"].shape[-1] == length
    return RankBatch(
        image=torch.tensor(pixels),
        text_short=ids("text_short"),
        text_long=ids("text_long"),
        box_infos=torch.tensor(batch["box"].reshape(-1, 4)),
        box_texts=ids("box_text"),
        box_nums=torch.full((size,), boxes),
        hard_infos=torch.tensor(infos.reshape(-1, 4)),
        hard_texts=ids("hard_text"),
        hard_nums=torch.full((size,), hard),
    )


def jax_stepper(system: FgClip, params: Any, batch: Any) -> Callable[[], float]:
    """A function that makes one optimiser step and returns its loss."""
    optimiser = optax.adamw(LR, weight_decay=DECAY, mask=system.decay(params))

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return system.loss(params, {}, batch, jax.random.key(0), jnp.zeros(())).loss

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimiser.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    held = [params, state]

    def run() -> float:
        held[0], held[1], value = compiled(held[0], held[1], batch)
        return float(jax.block_until_ready((value, held[0]))[0])

    return run


def torch_stepper(system: FgClip, params: Any, batch: RankBatch) -> Callable[[], float]:
    """The same in PyTorch."""
    model = FgClipReference(system.hub_config())
    exported = export_tensors(params, system.weights())
    model.load_state_dict({k: torch.tensor(np.array(v.all())) for k, v in exported.items()})
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if "norm" in name or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def run() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = model.loss([batch], WEIGHTS)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--hard", type=int, default=1, help="hard boxes per image")
    parser.add_argument("--vision-layers", type=int, default=12)
    parser.add_argument("--text-layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--scan", action="store_true", help="scan over blocks instead of unrolling")
    parser.add_argument("--one-core", action="store_true", help="CPU seconds on one core")
    parser.add_argument("--json", action="store_true", help="one JSON line at the end")
    args = parser.parse_args()

    system = make_system(args)
    params = partitioning.unbox(jax.jit(system.init)(jax.random.key(0)))
    batch = make_batch(system, args.batch)
    theirs = torch_stepper(system, params, torch_batch(batch, system.max_boxes, args.hard))
    ours = jax_stepper(system, params, batch)
    times: dict[str, list[float]] = {"jaxmods": [], "torch": []}
    losses = {}
    clock = time.process_time if args.one_core else time.perf_counter
    for number in range(args.steps + 1):
        for name, run in (("jaxmods", ours), ("torch", theirs)):
            start = clock()
            losses[name] = run()
            if number:  # the first step of each warms up
                times[name].append(clock() - start)
        gap = abs(losses["jaxmods"] - losses["torch"]) / losses["torch"]
        if gap > 1e-4:
            raise SystemExit(f"step {number}: losses differ by {gap:.1e}: {losses}")
    median = {name: statistics.median(t) for name, t in times.items()}
    ratio = median["torch"] / median["jaxmods"]
    print(
        f"batch {args.batch}, {args.vision_layers}+{args.text_layers} blocks, "
        f"{torch.get_num_threads()} thread(s), {args.steps} steps each, "
        f"{'CPU' if args.one_core else 'wall'} seconds, loss {losses['jaxmods']:.4f}"
    )
    for name, value in median.items():
        spread = f"{min(times[name]):.3f}..{max(times[name]):.3f}"
        print(f"  {name:8s} median {value:7.3f} s   ({spread})")
    print(f"  ratio    {ratio:.2f}x (torch / jaxmods)")
    if args.json:
        print(json.dumps({"ratio": ratio, "median": median, "times": times}))


if __name__ == "__main__":
    main()
