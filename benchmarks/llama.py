"""A Llama decoder in float32 on the CPU: this library against transformers.

    python benchmarks/llama.py --repeats 5
    taskset -c 0 python benchmarks/llama.py --one-core     # beside other work

Prefill and decode (`generate` of transformers: greedy, a ragged batch, padded on its left there and
on its right here) and a training step (loss, gradients, clipping at a norm of 1, AdamW). Both sides
have the same weights and the same input, runs alternate within one process, and what they compute
is compared: the generated tokens have to be equal, the losses within 1e-4. Medians and their ratio
are printed (above 1: this library is faster).

Prefill is the time to the first new token; decode is the time of the others, by difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from jaxmods import partitioning
from jaxmods.backbones.llama import Llama, LlamaConfig, llama_map
from jaxmods.generation import Limits, generate
from jaxmods.nn.stack import Execution, unstack
from jaxmods.objectives.cross_entropy import next_token_labels, token_cross_entropy
from jaxmods.weights import export_tensors

LR, DECAY = 1e-4, 0.01


def make_config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary,
        width=args.width,
        layers=args.layers,
        heads=args.width // 64,
        kv_heads=max(1, args.width // 64 // args.group),
        head_dim=64,
        mlp=args.mlp,
        eos_ids=(),
        bos_id=None,
    )


def torch_model(config: LlamaConfig, params: Any) -> Any:
    settings = transformers.LlamaConfig(**config.hub_config())
    model = transformers.LlamaForCausalLM(settings)  # fused attention is its default
    tensors = export_tensors(params, llama_map(config))
    model.load_state_dict({k: torch.tensor(np.array(v.all())) for k, v in tensors.items()})
    return model


def jax_generator(config: LlamaConfig, params: Any, ids: np.ndarray, lengths: np.ndarray) -> Any:
    """`new tokens -> (() -> tokens)`, compiled once for each number."""
    model = Llama(config)
    params = {**params, "layers": unstack(params["layers"])}

    def make(new: int) -> Callable[[], np.ndarray]:
        @jax.jit
        def run(params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
            def step(tokens: jax.Array, state: Any) -> Any:
                return model.apply({"params": params}, tokens, state, method="decode_step")

            logits, state = model.apply(
                {"params": params}, ids, lengths, capacity=ids.shape[1] + new, method="prefill"
            )
            return generate(step, logits, state, Limits(new)).tokens

        return lambda: np.asarray(run(params, ids, lengths))

    return make


def torch_generator(model: Any, ids: np.ndarray, lengths: np.ndarray) -> Any:
    left = np.stack([np.roll(row, len(row) - n) for row, n in zip(ids, lengths, strict=True)])
    mask = np.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]

    def make(new: int) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            with torch.inference_mode():
                out = model.generate(
                    torch.tensor(left),
                    attention_mask=torch.tensor(mask),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            return out[:, ids.shape[1] :].numpy()

        return run

    return make


def jax_stepper(config: LlamaConfig, params: Any, ids: np.ndarray) -> Callable[[], float]:
    model = Llama(config, Execution(unroll=True))
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(LR, 0.9, 0.999, weight_decay=DECAY)
    )

    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        def objective(params: Any) -> jax.Array:
            states = model.apply({"params": params}, ids)
            head = model.apply({"params": params}, method="head")
            return token_cross_entropy(states, head, next_token_labels(ids)).loss

        loss, grads = jax.value_and_grad(objective)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.array, params)]
    held.append(jax.jit(optimiser.init)(held[0]))

    def run() -> float:
        held[0], held[1], loss = compiled(held[0], held[1], ids)
        return float(jax.block_until_ready((loss, held[0]))[0])

    return run


def torch_stepper(model: Any, ids: np.ndarray) -> Callable[[], float]:
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY, fused=True
    )
    tokens = torch.tensor(ids)

    def run() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return float(loss.detach())

    return run


def alternate(
    sides: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of `repeats` runs of each side in turn (after one that warms up), last results."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for number in range(repeats + 1):
        for name, run in sides.items():
            start = clock()
            results[name] = run()
            if number:
                times[name].append(clock() - start)
    return times, results


def report(what: str, tokens: int, seconds: dict[str, float]) -> dict[str, float]:
    """One line: tokens per second of both sides, and their ratio."""
    rate = {name: tokens / s for name, s in seconds.items()}
    ratio = rate["jaxmods"] / rate["transformers"]
    print(
        f"  {what:30s} jaxmods {rate['jaxmods']:9.0f} tokens/s   "
        f"transformers {rate['transformers']:9.0f} tokens/s   {ratio:.2f}x"
    )
    return {**rate, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=1408)
    parser.add_argument("--group", type=int, default=2, help="query heads per key head")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="generated tokens per row")
    parser.add_argument("--train-rows", type=int, default=2)
    parser.add_argument("--train-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--only", choices=("generate", "train"), help="one half of it")
    parser.add_argument("--one-core", action="store_true", help="CPU seconds on one core")
    parser.add_argument("--json", action="store_true", help="one JSON line at the end")
    args = parser.parse_args()

    clock = time.process_time if args.one_core else time.perf_counter
    config = make_config(args)
    rng = np.random.default_rng(0)
    init = jax.jit(lambda key: Llama(config).init(key, jnp.zeros((1, 1), jnp.int32)))
    params = partitioning.unbox(init(jax.random.key(0)))["params"]
    theirs = torch_model(config, params)
    print(
        f"{config.layers} layers, width {config.width}, {config.heads} heads ({config.kv_heads} of "
        f"keys), MLP {config.mlp}, vocabulary {config.vocab_size}, float32, "
        f"{torch.get_num_threads()} thread(s), {'CPU' if args.one_core else 'wall'} seconds, "
        f"medians of {args.repeats}"
    )
    found: dict[str, Any] = {}
    for rows in args.rows if args.only != "train" else ():
        lengths = np.linspace(args.prompt, args.prompt // 2, rows).astype(np.int32)
        ids = rng.integers(1, config.vocab_size, (rows, args.prompt))
        ids = np.where(np.arange(args.prompt) < lengths[:, None], ids, 0).astype(np.int32)
        make = {
            "jaxmods": jax_generator(config, params, ids, lengths),
            "transformers": torch_generator(theirs.eval(), ids, lengths),
        }
        medians = {}
        for new in (1, args.new):
            times, tokens = alternate({n: m(new) for n, m in make.items()}, args.repeats, clock)
            if not np.array_equal(tokens["jaxmods"], tokens["transformers"]):
                raise SystemExit(f"{rows} row(s), {new} token(s): the generated tokens differ")
            medians[new] = {n: statistics.median(t) for n, t in times.items()}
        first, all_ = medians[1], medians[args.new]
        rest = {n: all_[n] - first[n] for n in first}
        found[f"prefill_{rows}"] = report(
            f"prefill, {rows} x {args.prompt}", int(lengths.sum()), first
        )
        found[f"decode_{rows}"] = report(
            f"decode, {rows} row(s), {args.new} tokens", rows * (args.new - 1), rest
        )
    if args.only != "generate":
        ids = rng.integers(1, config.vocab_size, (args.train_rows, args.train_length))
        sides = {
            "jaxmods": jax_stepper(config, params, ids.astype(np.int32)),
            "transformers": torch_stepper(theirs.train(), ids),
        }
        times, losses = alternate(sides, args.repeats, clock)
        gap = abs(losses["jaxmods"] - losses["transformers"]) / losses["transformers"]
        if gap > 1e-4:
            raise SystemExit(f"training: losses differ by {gap:.1e}: {losses}")
        seconds = {n: statistics.median(t) for n, t in times.items()}
        found["train"] = report(
            f"training step, {args.train_rows} x {args.train_length}", ids.size, seconds
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
