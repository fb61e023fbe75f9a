"""Floating-point operations of a program, counted from its jaxpr.

Products of matrices, convolutions and attention kernels are counted, one multiplication and one
addition each; everything else (norms, softmax, optimiser) is not, as is usual for MFU. A loop
counts as often as it runs, recomputation counts again, the dearer branch of a conditional counts.
The compiler's own `cost_analysis()` is not used: it counts a loop's body once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

# Name of the scope that `jaxmods.nn.attention` works in.
_ATTENTION = "attention"

# Matrix products of queries x keys x width that each kernel does, 2 B H T S D operations each.
_KERNEL_PRODUCTS = (("dkv", 4), ("dq", 3), ("fwd", 2), ("splash", 2), ("flash", 2))


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a whole program, on all devices together.

    Attributes:
      matmul: products with weights, convolutions, logits of losses.
      attention: scores and weighted values, in kernels or plain.
      unknown_loops: loops without a known number of runs; their bodies count once.
    """

    matmul: float = 0.0
    attention: float = 0.0
    unknown_loops: int = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmul + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, n: float) -> Flops:
        """As if run `n` times."""
        return Flops(self.matmul * n, self.attention * n, self.unknown_loops)


def count(jaxpr: Any, *, inside_attention: bool = False) -> Flops:
    """Operations of a (closed) jaxpr."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = Flops()
    for eqn in jaxpr.eqns:
        names = str(eqn.source_info.name_stack).replace("(", "/").replace(")", "/").split("/")
        attention = inside_attention or _ATTENTION in names
        total = total + _one(eqn, attention)
    return total


def _one(eqn: Any, attention: bool) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        work = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        return Flops(attention=work) if attention else Flops(matmul=work)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        work = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs
        return Flops(matmul=work * (_dilated(params)))
    if name == "pallas_call":
        return Flops(attention=_kernel(eqn))
    if name == "cond":
        branches = [count(b, inside_attention=attention) for b in params["branches"]]
        return max(branches, key=lambda f: f.total)
    inner = Flops()
    for value in params.values():
        for sub in _jaxprs(value):
            inner = inner + count(sub, inside_attention=attention)
    if name == "scan":
        return inner.times(params["length"])
    if name == "shard_map":  # shapes inside are those of one device
        return inner.times(params["mesh"].size)
    if name == "while" and inner.total:
        return inner + Flops(unknown_loops=1)
    return inner


def _dilated(params: Any) -> float:
    """Share of a convolution's products that are not with the zeros of a dilated input."""
    return 1.0 / math.prod(params["lhs_dilation"] or (1,))


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item


def _kernel(eqn: Any) -> float:
    """Operations of one Pallas call: its own estimate, or attention's by its name and shapes."""
    name = str(eqn.params.get("name") or eqn.params.get("name_and_src_info") or "")
    arrays = [
        v.aval for v in eqn.invars if len(v.aval.shape) >= 3 and v.aval.dtype.kind not in "iub"
    ]
    products = next((n for word, n in _KERNEL_PRODUCTS if word in name), None)
    if products is not None and len(arrays) >= 3:
        return attention_work(arrays[0].shape, arrays[1].shape, products)
    estimate = eqn.params.get("cost_estimate")
    return float(estimate.flops) if estimate is not None else 0.0


def attention_work(query: tuple[int, ...], key: tuple[int, ...], products: int) -> float:
    """2 T S D per head and product, for `products` of them.

    Args:
      query: shape [..., H, T, D]. key: shape [..., K, S, D].
    """
    return 2.0 * products * math.prod(query) * key[-2]
