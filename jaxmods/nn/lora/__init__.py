"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen parameter tree.

    y = x W + bias + sum over adapters of  scale * weight * (dropout(x) a) b

The frozen product and the low-rank one stand side by side; W + a b is never formed in training. A
merged weight would cost a whole weight gradient per layer (dW = x^T dy) only to be contracted with
a and b afterwards, a copy of every kernel in flight, and the update's digits where W is bf16. Side
by side, the base is read as it is stored, takes no gradient, and has no second copy.

The contract, from the model's side:

1. A dense product goes through `jaxmods.nn.layers.Linear`, or `jaxmods.nn.layers.dense(params, x)`
   where parameters are at hand as a dict. Both look for a dict "lora" beside "kernel" and are
   unchanged where there is none. Nothing else in a model knows of adapters.
2. One published linear module is one kernel: q, k and v apart. (Fused ones are carried over exactly
   on import, but do not train as the published recipe does.)
3. Repeated blocks are stacked by `nn.scan` with `variable_axes={"params": 0}`, or are held with
   `jaxmods.nn.stack.stacked_param`; not with `Module.param` over a whole tree, which compares the
   tree's leaves with those of a fresh one and would trip over the added ones.
4. Kernels are [..., in, out]; every axis before the last two is a stack (layers, experts).

From a system's side, adapters are a tree of their own beside the untouched base:

    base = model.init(...)["params"]                       # boxed with logical axes, as always
    params = {"transformer": base, "lora": lora.init(rng, base, config)}
    labels = {"transformer": all "frozen", "lora": all "train"}

    def loss(params, ...):                                 # under jit: no arithmetic, no copies
        tree = lora.attach(params["transformer"], params["lora"], config, rng=rng)
        model.apply({"params": tree}, ...)

    adapters:  {name: {path of the module, nested: {"a": [..., in, r], "b": [..., r, out]}}}
    attached:  base with, beside each adapted "kernel",
               "lora": {name: {"a", "b", "scale" [, "key", "rate"]}}

Adapters compute in their own dtype, so a system decides by what it hands over (the training step
casts everything to `Precision.compute`); masters are fp32 like all trained parameters.

A system names its adapters once, as an `AdapterMap`; whatever reads, writes or merges them outside
of it goes by that. Below it:

    loaded = lora.load("folder", base, [Published(weight_map)])     # PEFT, diffusers or kohya
    lora.save("folder", adapters, config, base, [Published(weight_map)], dialect="diffusers")

A published module need not be one kernel: `modules` finds out from the weight map what lies where.
"""

from jaxmods.nn.lora.adapters import (
    DEFAULT,
    Factors,
    LoraConfig,
    attach,
    average,
    chosen,
    count,
    init,
    matching,
    merge,
    sites,
    unmerge,
)
from jaxmods.nn.lora.binding import AdapterMap
from jaxmods.nn.lora.entries import entries
from jaxmods.nn.lora.export import save
from jaxmods.nn.lora.files import Dialect, Loaded, load, weight_file
from jaxmods.nn.lora.modules import Published, targets_of

__all__ = [
    "DEFAULT",
    "AdapterMap",
    "Dialect",
    "Factors",
    "Loaded",
    "LoraConfig",
    "Published",
    "attach",
    "average",
    "chosen",
    "count",
    "entries",
    "init",
    "load",
    "matching",
    "merge",
    "save",
    "sites",
    "targets_of",
    "unmerge",
    "weight_file",
]
