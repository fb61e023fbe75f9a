"""Adapters as parameter trees: choosing kernels, initialisation, attaching, merging.

Shape legend:
  L stacked axes (layers, experts; none for a kernel alone)   r rank
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.partitioning import logical_axes, unbox
from jaxmods.system import Array, Params
from jaxmods.weights.map import flatten, unflatten

KERNEL = "kernel"
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
      targets: patterns on the paths of kernels ("double/attn/q/kernel"): shell patterns, in which
        "*" also runs over "/", or regular expressions for the whole path after "re:". Each must
        match a kernel.
      rank: inner width.
      alpha: numerator of the scale; None for `rank` (a scale of 1).
      dropout: probability with which an input of the adapter is dropped in training.
      rslora: scale alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
      init: of `a`, as PEFT names them: "kaiming" U(-1/sqrt(in), 1/sqrt(in)), "gaussian" standard
        deviation 1/rank. `b` is zero, so that an untrained adapter changes nothing.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank: expected 1 or more, found {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora dropout: expected 0 <= p < 1, found {self.dropout}")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"lora init: expected 'kaiming' or 'gaussian', found {self.init!r}")

    @property
    def scale(self) -> float:
        """Factor of the low-rank product, the same for every kernel."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank


Configs = LoraConfig | Mapping[str, LoraConfig]


def matching(base: Params, targets: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Paths of the kernels of `base` (arrays or their abstract forms) that each pattern matches.

    Raises:
      ValueError: no patterns, or a pattern that matches no kernel.
    """
    if not targets:
        raise ValueError("lora targets: expected at least one pattern, found none")
    kernels = {
        path: leaf
        for path, leaf in flatten(base).items()
        if path.rsplit("/", 1)[-1] == KERNEL and len(leaf.shape) >= 2
    }
    found = {}
    for pattern in targets:
        if pattern.startswith("re:"):
            matches = re.compile(pattern[3:]).fullmatch
        else:
            matches = re.compile(fnmatch.translate(pattern)).match
        found[pattern] = tuple(path for path in kernels if matches(path))
        if not found[pattern]:
            shown = ", ".join(list(kernels)[:8]) or "none"
            raise ValueError(
                f"lora target {pattern!r}: expected the path of a kernel, found no match among "
                f"{len(kernels)} ({shown}{', ...' if len(kernels) > 8 else ''}); patterns are for "
                "whole paths, such as '*/attn/q/kernel'"
            )
    return found


def chosen(base: Params, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Paths that any of the patterns matches, each once, in the order of `base`; see `matching`."""
    hits = {path for paths in matching(base, targets).values() for path in paths}
    return tuple(path for path in flatten(base) if path in hits)


def init(rng: Array, base: Params, config: LoraConfig, name: str = DEFAULT) -> Params:
    """Fresh float32 adapters for `base`, boxed with logical axes.

    The input axis of `a` and the output axis of `b` are named as the kernel's own, and split as
    these are. The rank axis ("rank") is split over fsdp where the other is not; `dense` gathers it.

    Args:
      base: boxed parameters (or their abstract form) of the model.
      name: of the adapter; merge the results of several calls to train several.

    Returns:
      `{name: tree}`, see `jaxmods.nn.lora`.

    Raises:
      ValueError: see `matching`.
    """
    axes = flatten(logical_axes(base))
    shapes = flatten(base)
    leaves = {}
    for number, path in enumerate(chosen(base, config.targets)):
        *stack, wide, out = shapes[path].shape
        *stack_axes, in_axis, out_axis = axes[path]
        key = jax.random.fold_in(rng, number)
        shape = (*stack, wide, config.rank)
        if config.init == "gaussian":
            a = jax.random.normal(key, shape, jnp.float32) / config.rank
        else:
            bound = 1.0 / math.sqrt(wide)
            a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, config.rank, out), jnp.float32)
        leaves[beside(path, "a")] = nn.LogicallyPartitioned(a, (*stack_axes, in_axis, "rank"))
        leaves[beside(path, "b")] = nn.LogicallyPartitioned(b, (*stack_axes, "rank", out_axis))
    return {name: unflatten(leaves)}


def beside(path: str, name: str) -> str:
    """The path of `name` in the module of another leaf."""
    return path[: path.rfind("/") + 1] + name


@dataclasses.dataclass(frozen=True)
class Factors:
    """The two factors on one kernel: a [*L, in, r], b [*L, r, out]."""

    a: Any
    b: Any

    @property
    def rank(self) -> int:
        """Inner width."""
        return int(self.a.shape[-1])


def sites(base: Params, adapters: Params) -> dict[str, dict[str, Factors]]:
    """Factors by path of the kernel and name of the adapter, checked against `base`.

    Raises:
      ValueError: an adapter for a kernel that `base` lacks, or whose shapes do not fit it; no
        adapters at all.
    """
    kernels = flatten(base)
    found: dict[str, dict[str, Factors]] = {}
    for name, tree in adapters.items():
        leaves = flatten(tree)
        for path in dict.fromkeys(beside(leaf, KERNEL) for leaf in leaves):
            if path not in kernels:
                raise ValueError(
                    f"lora adapter {name!r}: expected a kernel at {path}, found none in the base; "
                    "these adapters belong to another model"
                )
            factors = Factors(leaves[beside(path, "a")], leaves[beside(path, "b")])
            *stack, wide, out = kernels[path].shape
            expected = ((*stack, wide, factors.rank), (*stack, factors.rank, out))
            shapes = (tuple(factors.a.shape), tuple(factors.b.shape))
            if shapes != expected:
                raise ValueError(
                    f"lora adapter {name!r} at {path}: expected a {list(expected[0])} and b "
                    f"{list(expected[1])} for this kernel, found {list(shapes[0])} and "
                    f"{list(shapes[1])}"
                )
            found.setdefault(path, {})[name] = factors
    if not found:
        raise ValueError("lora: expected at least one adapter, found none")
    return found


def attach(
    base: Params,
    adapters: Params,
    config: Configs,
    *,
    weights: Mapping[str, float | Array] | None = None,
    rng: Array | None = None,
) -> Params:
    """`base` with its adapters beside the kernels: what a model is applied to.

    A rearrangement, to be called under jit; nothing of `base` is copied or computed.

    Args:
      base: unboxed parameters of the model.
      adapters: by name, as from `init`.
      config: of all adapters, or by name. Only its scale and dropout count here.
      weights: further factor of each adapter, 1 where not given; 0 switches one off. An array
        weights activations: it broadcasts with the leading axes of the inputs of every adapted
        layer ([B, 1] one weight per example, [T] or [1, T] per token).
      rng: key of the dropout; None for none (evaluation). Each kernel and layer draws its own.

    Raises:
      ValueError: adapters that do not fit `base`, or weights or configs for unknown names.
    """
    found = sites(base, adapters)
    weights = dict(weights or {})
    if unknown := sorted(set(weights) - set(adapters)):
        raise ValueError(f"lora weights: no adapter {unknown}; there are {sorted(adapters)}")
    leaves = flatten(base)
    for number, (path, by_name) in enumerate(found.items()):
        stack = tuple(leaves[path].shape[:-2])
        for name, factors in by_name.items():
            own = config_of(config, name)
            weight = jnp.asarray(weights.get(name, 1.0), jnp.float32)
            scale = own.scale * weight
            added = {
                "a": factors.a,
                "b": factors.b,
                "scale": jnp.broadcast_to(scale, (*stack, *weight.shape)),
            }
            if rng is not None and own.dropout > 0.0:
                key = jax.random.fold_in(rng, number)
                if len(adapters) > 1:
                    key = jax.random.fold_in(key, list(adapters).index(name))
                added["key"] = jax.random.split(key, stack) if stack else key
                added["rate"] = jnp.full(stack, own.dropout, jnp.float32)
            leaves.update({beside(path, f"lora/{name}/{k}"): v for k, v in added.items()})
    return unflatten(leaves)


def config_of(config: Configs, name: str) -> LoraConfig:
    """The config of one adapter. Raises ValueError when there is none."""
    if isinstance(config, LoraConfig):
        return config
    if name not in config:
        raise ValueError(f"lora configs: expected one for adapter {name!r}, found {sorted(config)}")
    return config[name]


def merge(
    base: Params,
    adapters: Params,
    config: Configs,
    *,
    weights: Mapping[str, float] | None = None,
) -> Params:
    """`base` with W + scale * weight * a b in place of each adapted kernel W.

    For sampling and export: one product less per layer. Computed in float32, layer by layer, and
    rounded to the dtype of W: a bf16 base keeps 8 significant bits of the sum, so small updates
    lose digits (attached adapters do not).

    Raises:
      ValueError: see `attach`.
    """
    return _added(base, adapters, config, weights, 1.0)


def unmerge(
    base: Params,
    adapters: Params,
    config: Configs,
    *,
    weights: Mapping[str, float] | None = None,
) -> Params:
    """The reverse of `merge`, up to rounding: (W + d) - d is W only to about one unit in the last
    place of the larger of W + d and d. Where the bits matter, keep the base instead.

    Raises:
      ValueError: see `attach`.
    """
    return _added(base, adapters, config, weights, -1.0)


def _added(
    base: Params,
    adapters: Params,
    config: Configs,
    weights: Mapping[str, float] | None,
    sign: float,
) -> Params:
    weights = dict(weights or {})
    if unknown := sorted(set(weights) - set(adapters)):
        raise ValueError(f"lora weights: no adapter {unknown}; there are {sorted(adapters)}")
    leaves = flatten(base)
    for path, by_name in sites(base, adapters).items():
        scales = [sign * config_of(config, name).scale * weights.get(name, 1.0) for name in by_name]
        pairs = [(factors.a, factors.b) for factors in by_name.values()]
        leaves[path] = _plus(jnp.asarray(leaves[path]), pairs, jnp.asarray(scales, jnp.float32))
    return unflatten(leaves)


@jax.jit
def _plus(kernel: Array, pairs: list[tuple[Array, Array]], scales: Array) -> Array:
    """kernel + sum of scale * a b; over a stack one layer at a time, so that the float32 sum of
    only one layer exists."""

    def one(args: tuple[Array, list[tuple[Array, Array]]]) -> Array:
        w, factors = args
        total = w.astype(jnp.float32)
        for scale, (a, b) in zip(scales, factors, strict=True):
            product = jnp.matmul(
                a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
            )
            total = total + scale * product
        return total.astype(w.dtype)

    if kernel.ndim == 2:
        return one((kernel, pairs))
    stack = kernel.shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), (kernel, pairs))
    return jax.lax.map(one, flat).reshape(*stack, *kernel.shape[-2:])


def average(trees: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
    """Weighted sum of the factors themselves, for adapters that began as copies of one.

    Not the sum of their products: for that, `attach` or `merge` all of them with `weights`.

    Args:
      trees: adapters by name, of equal shapes. weights: one for each.

    Returns:
      One adapter's tree.

    Raises:
      ValueError: names or shapes that differ.
    """
    if set(trees) != set(weights):
        raise ValueError(
            f"lora average: expected a weight for each of {sorted(trees)}, found {sorted(weights)}"
        )
    shapes = {name: jax.tree.map(lambda x: tuple(x.shape), tree) for name, tree in trees.items()}
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            raise ValueError(
                f"lora average: adapters {first!r} and {name!r} differ in their paths or shapes; "
                "factors can only be averaged between copies of one adapter"
            )
    factors = [weights[name] for name in trees]
    return jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(factors, leaves, strict=True)), *trees.values()
    )


def count(adapters: Params) -> int:
    """Numbers in all adapters (arrays or abstract forms)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unbox(adapters)))
