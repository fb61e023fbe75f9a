"""Adapters as part of a system's weight map, so that one map covers everything it holds."""

from __future__ import annotations

from collections.abc import Collection

from jaxmods.nn.lora.adapters import DEFAULT, KERNEL, beside
from jaxmods.nn.lora.modules import Published
from jaxmods.system import Params
from jaxmods.weights.errors import WeightError
from jaxmods.weights.map import Entry
from jaxmods.weights.transforms import Linear


def entries(
    published: Published,
    base: Params,
    paths: Collection[str],
    *,
    under: str = "lora",
    name: str = DEFAULT,
) -> tuple[Entry, ...]:
    """Optional entries for the adapters on the kernels at `paths`, under diffusers' keys.

    A system whose parameters are `{"transformer": base, "lora": adapters}` puts these beside the
    map of its base. A base checkpoint then imports as it is: the adapters' keys are missing, their
    values come as zeros, and `System.complete_import` draws them.

    Args:
      published: layout in which one module is one kernel.
      base: parameters or their abstract form.
      paths: of the adapted kernels, as `chosen` gives them.
      under: of the adapters within the parameters. name: of the adapter.

    Raises:
      WeightError: a kernel that is no plain linear module in this layout.
    """
    prefix = f"{published.path}/" if published.path else ""
    wanted, result = set(paths), []
    for binding in published.weight_map.bind(published.part(base)):
        mine = {prefix + path for path in binding.paths} & wanted
        entry = binding.entry
        if not mine:
            continue
        pattern = entry.torch_patterns[0]
        if entry.transform != Linear() or not pattern.endswith(".weight"):
            raise WeightError(
                f"lora: expected {', '.join(sorted(mine))} to be one linear module, found {entry} "
                f"with {entry.transform}; give the layout that keeps modules apart"
            )
        wanted -= mine
        module = prefix + entry.jax_patterns[0].removesuffix(KERNEL)
        for half, leaf in (("lora_A", "a"), ("lora_B", "b")):
            key = f"{published.component}.{pattern.removesuffix('.weight')}.{half}.weight"
            path = beside(f"{under}/{name}/{module}{KERNEL}", leaf)
            result.append(Entry(key, path, Linear(), optional=True))
    if wanted:
        raise WeightError(f"lora: no kernels at {', '.join(sorted(wanted)[:5])} in this map")
    return tuple(dict.fromkeys(result))
