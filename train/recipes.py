"""Recipes by name: found in `configs/`, resolved with overrides, saved and compared.

`system/recipe` is a function `recipe()` of `configs/system.py` that returns an `Experiment`. Own
recipes outside the repository are named `path/to/file.py:function` or `package.module:function`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from train.canonical import canonical, recipe_hash
from train.exits import UsageError
from train.experiment import Experiment
from train.overrides import apply_overrides

RECIPE_FILE = "recipe.json"
PACKAGE = "configs"

RecipeFn = Callable[[], Experiment]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
      name: as it was asked for. overrides: the settings applied. experiment: the result.
    """

    name: str
    overrides: tuple[str, ...]
    experiment: Experiment

    def document(self) -> dict[str, Any]:
        """What `recipe.json` holds: name, overrides, hash, and the canonical experiment."""
        form = canonical(self.experiment)
        return {
            "recipe": self.name,
            "overrides": list(self.overrides),
            "hash": recipe_hash(form),
            "experiment": form,
        }


def resolve(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe called `name` with `settings` (`path=value`) applied.

    Raises:
      UsageError: no such recipe (with the nearest), or a setting that does not fit.
    """
    function = find(name)
    try:
        experiment = function()
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"recipe {name}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"recipe {name}: expected a function that returns an Experiment, "
            f"found {type(experiment).__name__}"
        )
    chosen = apply_overrides(experiment, settings, dict(experiment.shorthands))
    return Recipe(name, tuple(settings), chosen)


def find(name: str) -> RecipeFn:
    """The function behind a recipe name."""
    if ":" in name:
        return _find_elsewhere(name)
    system, _, recipe = name.partition("/")
    systems = system_names()
    if system in systems:
        known = functions_of(importlib.import_module(f"{PACKAGE}.{system}"))
        if recipe in known:
            return known[recipe]
        names = [f"{system}/{r}" for r in known]
    else:
        names = list(all_recipes())
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"no recipe {name!r}; {hint}known: {', '.join(names) or 'none'}")


def system_names() -> list[str]:
    """Modules of `configs/` that hold recipes."""
    package = importlib.import_module(PACKAGE)
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
    )


def all_recipes() -> dict[str, RecipeFn]:
    """Every recipe of `configs/` by `system/recipe`."""
    return {
        f"{system}/{name}": function
        for system in system_names()
        for name, function in functions_of(importlib.import_module(f"{PACKAGE}.{system}")).items()
    }


def functions_of(module: ModuleType) -> dict[str, RecipeFn]:
    """Public functions of `module` annotated to return an `Experiment`, callable bare."""
    found: dict[str, RecipeFn] = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if function.__module__ != module.__name__:
            continue
        signature = inspect.signature(function)
        bare = all(p.default is not p.empty for p in signature.parameters.values())
        returns = signature.return_annotation
        if bare and (returns is Experiment or str(returns).split(".")[-1] == "Experiment"):
            found[name] = function
    return found


def summary(function: RecipeFn) -> str:
    """First line of a recipe's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _find_elsewhere(name: str) -> RecipeFn:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UsageError(f"recipe {name}: no file {place}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their annotations up there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise UsageError(f"recipe {name}: {error}") from error
    known = functions_of(module)
    if attribute not in known:
        raise UsageError(f"recipe {name}: {place} has {', '.join(known) or 'no recipes'}")
    return known[attribute]


def read_document(path: Path) -> dict[str, Any]:
    """A saved `recipe.json`."""
    return json.loads(path.read_text(encoding="utf-8"))
