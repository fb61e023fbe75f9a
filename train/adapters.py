"""Adapters of a run: from a file, to a file, merged into the base.

Which parameters they are is the system's to say (`System.adapter_map`); how files hold them is the
matter of `jaxmods.nn.lora`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxmods.nn.lora import AdapterMap, Dialect, Loaded, weight_file
from jaxmods.partitioning import unbox
from jaxmods.system import Params, System
from jaxmods.weights import open_weights
from jaxmods.weights.map import flatten
from train.certificate import Certificate, certify, one_process
from train.exits import UserError, as_user_error

LOG = logging.getLogger("train")


def adapter_map(system: System) -> AdapterMap:
    """The adapters of a system. Raises UserError when it has none."""
    found = system.adapter_map()
    if found is None:
        raise UserError(
            f"{type(system).__name__}: expected adapters, found none in this recipe; choose a "
            "recipe that trains adapters, or leave the options about adapters out"
        )
    return found


def read_adapters(system: System, params: Params, source: str | Path) -> tuple[Params, Loaded]:
    """`params` with the adapters of a file in place of their own, and what the file says.

    Args:
      params: of arrays; the new adapters take the dtype and the place of the old.
      source: a file or its folder in a format of PEFT, diffusers or kohya.

    Raises:
      UserError: no adapters in this recipe; a file of another model, rank or targets.
    """
    adapters, source = adapter_map(system), Path(source).expanduser()
    with as_user_error():
        found = adapters.read(source, params)
    own = {**params[adapters.under], **found.adapters}
    placed = jax.tree.map(_placed, own, params[adapters.under])
    LOG.info("%s", said(found, source))
    if found.alpha_from == "assumed":
        LOG.warning(
            "%s does not state the scale of its adapters; alpha is taken to be the rank, as "
            "diffusers does",
            source,
        )
    return {**params, adapters.under: placed}, found


def look_at(system: System, source: str | Path) -> str:
    """What a file of adapters holds, in one line, once it is known to fit.

    Raises:
      UserError: see `read_adapters`.
    """
    abstract = unbox(jax.eval_shape(system.init, jax.random.key(0)))
    with as_user_error():
        found = adapter_map(system).read(Path(source).expanduser(), abstract)
    return said(found, Path(source))


def said(found: Loaded, source: Path) -> str:
    """One line about a file of adapters."""
    where = {"metadata": "its header", "config": "its config", "keys": "its tensors"}
    config, stated = found.config, where.get(found.alpha_from)
    return (
        f"adapters of {found.modules} modules from {source} ({found.dialect}): rank {config.rank}, "
        f"alpha {config.alpha:g} {f'(from {stated})' if stated else '(assumed)'}"
    )


def _placed(value: Any, old: Any) -> Any:
    """An array in the dtype and at the place of another."""
    if value is old or isinstance(value, jax.Array):
        return value
    value = np.asarray(value).astype(old.dtype)
    if not isinstance(old, jax.Array):
        return value
    return jax.make_array_from_callback(value.shape, old.sharding, lambda index: value[index])


def verify_adapters(
    system: System, params: Params, folder: str | Path, *, dtype: DTypeLike | None = None
) -> Certificate:
    """Reads a folder of adapters back, compares it, and leaves `verify.json` in it.

    Args:
      params: what was exported, before the conversion to `dtype`; all but the adapters may be
        abstract.
      dtype: the dtype that the export converted to, None for none.

    Raises:
      UserError: the folder cannot be read, or is not one of this system; several processes.
    """
    one_process()
    adapters, folder = adapter_map(system), Path(folder)
    with as_user_error():
        found = adapters.read(folder, params).adapters[adapters.name]
        with open_weights(weight_file(folder)) as reader:
            sizes = [tensor.nbytes for tensor in reader.tensors.values()]
    ours = flatten(params[adapters.under][adapters.name])
    differing = [
        path for path, leaf in flatten(found).items() if not _same(ours[path], leaf, dtype)
    ]
    return certify(
        folder,
        differing,
        len(sizes),
        sum(sizes),
        forward="not compared: adapters alone compute nothing, export them merged to compare",
    )


def _same(ours: Any, stored: np.ndarray, dtype: DTypeLike | None) -> bool:
    """Whether values are those of float32 `stored`, to the bit."""
    value = np.asarray(ours)
    value = value if dtype is None else value.astype(jnp.dtype(dtype))
    return value.astype(np.float32).tobytes() == stored.tobytes()


def write_adapters(
    system: System,
    params: Params,
    to: str | Path,
    *,
    dialect: Dialect,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """The adapters alone, as a folder that states rank, alpha and targets; rank by module.

    Args:
      params: parameters, of which all but the adapters may be abstract.

    Raises:
      UserError: no adapters in this recipe, or the folder is taken.
    """
    with as_user_error():
        return adapter_map(system).write(
            to, params, dialect=dialect, dtype=dtype, overwrite=overwrite
        )


def merge_adapters(
    system: System, params: Params, *, dtype: DTypeLike | None = None
) -> tuple[System, Params]:
    """The system without adapters and its parameters, which hold what the adapters added; `dtype`
    is what they will be exported in, see `AdapterMap.merge`.

    Raises:
      UserError: no adapters in this recipe.
    """
    adapters = adapter_map(system)
    return adapters.merged, adapters.merge(params, dtype=dtype)
