"""Adapters as part of a system: where they are among its parameters, and how files name them.

A system that has adapters says so once (`System.adapter_map`); reading a file into a run, writing
adapters alone and merging them for an export all follow from that.

Shape legend:
  L stacked axes   r rank of the recipe   R rank in a file
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxmods.nn.lora.adapters import DEFAULT, Factors, LoraConfig, beside, chosen, merge, sites
from jaxmods.nn.lora.export import module_end, save, target_modules
from jaxmods.nn.lora.files import Dialect, Loaded, load
from jaxmods.nn.lora.modules import Published, modules
from jaxmods.system import Params, System
from jaxmods.weights.errors import WeightError
from jaxmods.weights.map import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class AdapterMap:
    """What is an adapter among a system's parameters.

    Attributes:
      config: targets as paths within the base, rank and scale.
      published: names in PEFT and diffusers files, one layout for each part of the base.
      merged: the same system without adapters. Its parameters are those of the system without
        `under`.
      base: path of the adapted tree within the parameters; "" for all but the adapters.
      under: name within the parameters of the adapters, `{name: tree}`.
      name: of the adapter that files are about.
      kohya: names in kohya's files where they are others (FLUX: those of the original code).
        Files in any of the layouts are read in any dialect.
      base_model: what the base is called on the hub; written into files.
      settings: where a recipe keeps `rank` and `targets`; named in errors.
    """

    config: LoraConfig
    published: tuple[Published, ...]
    merged: System
    base: str = "transformer"
    under: str = "lora"
    name: str = DEFAULT
    kohya: tuple[Published, ...] = ()
    base_model: str | None = None
    settings: str = "system.adapters"

    def base_of(self, params: Params) -> Params:
        """The adapted tree of `params` (arrays or their abstract forms)."""
        if not self.base:
            return {name: tree for name, tree in params.items() if name != self.under}
        for name in self.base.split("/"):
            params = params[name]
        return params

    def read(self, source: str | Path, params: Params, *, alpha: float | None = None) -> Loaded:
        """The adapters of a file, to take the place of `params[under]`.

        The scale of the file may differ from the recipe's: it is carried over into the factors, so
        that their product stays what it is.

        Args:
          source: a file or its folder, in the layout of diffusers, PEFT or kohya.
          params: parameters of the system or their abstract form; only shapes are used.
          alpha: takes the place of what the file says, or does not say.

        Returns:
          `adapters` float32 in the shapes and at the scale of `config`; the rest is as the file
          says.

        Raises:
          WeightError: the file is of another model, of another rank, or adapts other modules.
        """
        base = self.base_of(params)
        others = tuple(names for names in self.kohya if names not in self.published)
        found = load(source, base, (*self.published, *others), name=self.name, alpha=alpha)
        ours = chosen(base, self.config.targets)
        theirs = {path: by[self.name] for path, by in sites(base, found.adapters).items()}
        # A fused projection of which only some parts were trained has zeros for the others.
        theirs = {p: f for p, f in theirs.items() if p in ours or np.any(f.b)}
        fitted = {path: _narrowed(factors, self.config.rank) for path, factors in theirs.items()}
        if problems := list(self._problems(base, ours, theirs, fitted)):
            raise WeightError(
                f"{source}: these adapters are not those of the recipe: {'; '.join(problems)}"
            )
        factor = found.config.scale / self.config.scale
        exact = abs(factor - 1) < 1e-6  # kohya's files hold alpha in float32
        leaves = {}
        for path, f in fitted.items():
            leaves[beside(path, "a")] = f.a
            leaves[beside(path, "b")] = f.b if exact else f.b * np.float32(factor)
        return dataclasses.replace(found, adapters={self.name: unflatten(leaves)})

    def write(
        self,
        folder: str | Path,
        params: Params,
        *,
        dialect: Dialect,
        dtype: DTypeLike | None = None,
        overwrite: bool = False,
    ) -> dict[str, int]:
        """The adapters alone, as a folder in a dialect that states rank, alpha and targets.

        Args:
          params: parameters of the system, of which all but the adapters may be abstract.
          dtype: of the tensors; None for that of the adapters.
          overwrite: replace what is at `folder`.

        Returns:
          Rank by module.

        Raises:
          WeightError: see `jaxmods.nn.lora.save`.
        """
        return save(
            folder,
            self._own(params),
            self.config,
            self.base_of(params),
            (dialect == "kohya" and self.kohya) or self.published,
            dialect=dialect,
            base_model=self.base_model,
            dtype=dtype,
            overwrite=overwrite,
        )

    def merge(self, params: Params, *, dtype: DTypeLike | None = None) -> Params:
        """Parameters of `merged` that compute what `params` compute, up to rounding.

        Args:
          params: parameters of the system.
          dtype: what they will be converted to. Where it has digits that an adapted kernel lacks,
            the kernel is converted first, and the sum keeps them.
        """
        base = self.base_of(params)
        if dtype is not None:
            leaves = flatten(base)
            for path in chosen(base, self.config.targets):
                wide = jnp.promote_types(leaves[path].dtype, dtype)
                leaves[path] = jnp.asarray(leaves[path], wide)
            base = unflatten(leaves)
        base = merge(base, self._own(params), self.config)
        rest = {name: tree for name, tree in params.items() if name != self.under}
        return base if not self.base else _replaced(rest, self.base.split("/"), base)

    def _own(self, params: Params) -> Params:
        return {self.name: params[self.under][self.name]}

    def _problems(
        self,
        base: Params,
        ours: Sequence[str],
        theirs: dict[str, Factors],
        fitted: dict[str, Factors],
    ) -> Iterable[str]:
        """What keeps the adapters of a file from being those of the recipe."""
        wanted, rank = self.config.rank, {path: f.rank for path, f in fitted.items()}
        if set(ours) != set(theirs):
            lacking = [path for path in ours if path not in theirs]
            besides = [path for path in theirs if path not in set(ours)]
            says = [f"none on {self._modules(base, lacking)[0]}"] if lacking else []
            says += [f"some on {self._modules(base, besides)[0]} as well"] if besides else []
            short, exact = self._modules(base, list(theirs))
            yield (
                f"expected adapters on {self._modules(base, ours)[0]}, found {', '.join(says)}; "
                f"set {self.settings}.targets{'=' if exact else ' to '}{short}"
            )
        if len(set(rank.values())) > 1:
            low, high = min(rank, key=rank.__getitem__), max(rank, key=rank.__getitem__)
            yield (
                f"expected rank {wanted} everywhere, found {rank[low]} at {low} and {rank[high]} "
                f"at {high}; merge that file into the base, and train new adapters"
            )
        elif (found := next(iter(rank.values()))) != wanted:
            yield f"expected rank {wanted}, found {found}; set {self.settings}.rank={found}"
        for path in (path for path in ours if path in theirs):
            if bare := _bare_layers(theirs[path]):
                yield (
                    f"expected adapters on all layers of {path}, found none in "
                    f"{', '.join(map(str, bare[:8]))}{', ...' if len(bare) > 8 else ''}; adapters "
                    "of some layers cannot be continued, merge that file into the base"
                )
                break

    def _modules(self, base: Params, paths: Sequence[str]) -> tuple[str, bool]:
        """Kernels by the ends of their modules' published names, and whether these ends mean
        exactly those modules."""
        wanted, names, every = set(paths), set(), set()
        for part in self.published:
            for name, module in modules(part, base).items():
                every.add(name)
                if any(piece.path in wanted for piece in module.pieces):
                    names.add(name)
        ends = sorted({module_end(name) for name in names})
        return ",".join(ends), target_modules(names, every) == ends


def _replaced(tree: Params, path: Sequence[str], value: Params) -> Params:
    """`tree` with another value at a path."""
    name, *rest = path
    return {**tree, name: _replaced(tree[name], rest, value) if rest else value}


def _narrowed(factors: Factors, rank: int) -> Factors:
    """Factors of rank R as those of rank r, where no layer uses more: q, k and v that were trained
    apart and written as one fused projection come back with the ranks of all three."""
    *stack, wide, found = factors.a.shape
    if found <= rank:
        return factors
    a = np.asarray(factors.a).reshape(-1, wide, found)
    b = np.asarray(factors.b).reshape(len(a), found, -1)
    used = np.any(b != 0, axis=2)
    if used.sum(axis=1).max() > rank:
        return factors
    # The ranks in use, filled up with the first others, in their order.
    keep = np.sort(np.argsort(~used, axis=1, kind="stable")[:, :rank], axis=1)
    a = np.take_along_axis(a, keep[:, None, :], axis=2)
    b = np.take_along_axis(b, keep[:, :, None], axis=1)
    return Factors(a.reshape(*stack, wide, rank), b.reshape(*stack, rank, b.shape[-1]))


def _bare_layers(factors: Factors) -> list[int]:
    """Layers of a stack (numbers in C order) whose factors are both zero."""

    def some(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return np.any(x.reshape(-1, x.shape[-2] * x.shape[-1]) != 0, axis=1)

    return [int(n) for n in np.flatnonzero(~(some(factors.a) | some(factors.b)))]
