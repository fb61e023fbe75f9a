"""Typed dotted overrides, and recipes by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from tests.train.toy import Fit, Regression, regression
from train import recipes
from train.canonical import canonical, diff_lines, recipe_hash
from train.exits import UsageError
from train.overrides import apply_overrides


@dataclasses.dataclass(frozen=True)
class Inner:
    root: Path = Path("a")
    sizes: tuple[int, ...] = (1, 2)
    box: tuple[float, float] = (0.0, 1.0)
    mode: Literal["mask", "positive", 4] = "mask"
    by_name: dict[str, float] = dataclasses.field(default_factory=lambda: {"a": 1.0})


@dataclasses.dataclass(frozen=True)
class Outer:
    low: int = 0
    high: int = 1
    inner: Inner = Inner()
    limit: float | None = None
    either: int | str = 0
    on: bool = False
    inners: tuple[Inner, ...] = (Inner(),)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("high=7", "high", 7),
        ("high=1e5", "high", 100_000),
        ("limit=1e-5", "limit", 1e-5),
        ("limit=none", "limit", None),
        ("limit=3", "limit", 3.0),
        ("either=12", "either", 12),
        ("either=12a", "either", "12a"),
        ("on=true", "on", True),
        ("on=no", "on", False),
        ("inner.root=/x/y z", "inner.root", Path("/x/y z")),
        ("inner.sizes=3,4,5", "inner.sizes", (3, 4, 5)),
        ("inner.sizes=[3]", "inner.sizes", (3,)),
        ("inner.sizes=", "inner.sizes", ()),
        ("inner.box=(0.5, 2)", "inner.box", (0.5, 2.0)),
        ("inner.mode=positive", "inner.mode", "positive"),
        ("inner.mode=4", "inner.mode", 4),
        ("inner.by_name.a=2", "inner.by_name", {"a": 2.0}),
        ("inners.0.mode=4", "inners", (Inner(mode=4),)),
        ('inners=[{"sizes": [9]}, {}]', "inners", (Inner(sizes=(9,)), Inner())),
    ],
)
def test_value_by_type(setting: str, path: str, value: object) -> None:
    found: object = apply_overrides(Outer(), [setting])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("high=1.5", "--set high: expected int, found '1.5'"),
        ("limit=abc", "--set limit: expected float or none, found 'abc'"),
        ("on=2", "--set on: expected true or false, found '2'"),
        ("inner.mode=msk", "--set inner.mode: expected one of mask, positive, 4, found 'msk'"),
        ("inner.sizes=1,x", "--set inner.sizes: expected a list of int, found '1,x'"),
        ("inner.box=1", r"--set inner.box: expected \(float, float\), found '1'"),
        ("inner.rot=1", r"Inner has no field 'rot'; did you mean inner.root\? \(fields: root"),
        ("hihg=1", r"Outer has no field 'hihg'; did you mean high\?"),
        ("inner=3", r"--set inner: expected Inner \(set one of its fields: root"),
        ("inners.1.mode=mask", r"--set inners.1: expected an index 0\.\.0 of inners, found '1'"),
        ("high.x=1", "--set high.x: high is 1 and has no field 'x'"),
        ("inner.by_name.b=1", "has no field 'b'"),
        ("low=3", "--set low: low 3 must be below high 1"),
        ("high", "expected path=value, found 'high'"),
    ],
)
def test_refused_with_path_and_type(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_overrides(Outer(), [setting])


def test_fields_checked_against_each_other_change_together() -> None:
    assert apply_overrides(Outer(), ["low=5", "high=9", "high=6"]) == Outer(low=5, high=6)


def test_reaches_into_abstract_fields_of_an_experiment() -> None:
    changed = apply_overrides(
        regression(),
        [
            "evaluation.protocols.0.limit=3",
            "system.width=4",
            "optim.groups.0.lr=none",
            "mesh.fsdp=2",
            "data.poison=7",
        ],
    )
    assert changed.evaluation.protocols == (Fit(limit=3),)
    assert changed.system == Regression(width=4)
    assert changed.optim.groups[0].lr is None
    assert (changed.mesh.fsdp, changed.mesh.data) == (2, -1)
    assert changed.data == dataclasses.replace(regression().data, poison=7)


def test_canonical_form_hash_and_diff() -> None:
    one = canonical(regression())
    assert one["_type"] == "train.experiment.Experiment"
    assert one["system"]["_type"] == "tests.train.toy.Regression"
    assert recipe_hash(one) == recipe_hash(canonical(regression()))
    other = canonical(apply_overrides(regression(), ["optim.lr=0.5", "optim.clip_norm=none"]))
    assert recipe_hash(other) != recipe_hash(one)
    assert diff_lines(one, other) == ["optim.lr: 0.01 → 0.5", "optim.clip_norm: 1.0 → null"]
    assert diff_lines(one, one) == []
    grown = {**one, "added": {"depth": 3}}
    assert diff_lines(one, grown) == ["added.depth: (absent) → 3"]


def test_a_value_without_canonical_form_is_named() -> None:
    with pytest.raises(TypeError, match=r"experiment\.inner\.root.*found function"):
        canonical(Outer(inner=Inner(root=test_canonical_form_hash_and_diff)))  # type: ignore[arg-type]  # the point of the test


def test_recipe_by_module_and_by_file(tmp_path: Path) -> None:
    by_module = recipes.resolve("tests.train.toy:regression", ["steps=3"])
    assert by_module.experiment.steps == 3
    assert by_module.document()["overrides"] == ["steps=3"]
    own = tmp_path / "own_recipe.py"
    own.write_text(
        "from __future__ import annotations\n"
        "from tests.train.toy import pair\n"
        "from train.experiment import Experiment\n"
        "def mine() -> Experiment:\n"
        "    '''My own.'''\n"
        "    return pair()\n"
        "def helper(x) -> Experiment: ...\n"
    )
    assert recipes.resolve(f"{own}:mine").experiment.steps == 6
    assert recipes.summary(recipes.find(f"{own}:mine")) == "My own."
    with pytest.raises(UsageError, match="has mine"):
        recipes.resolve(f"{own}:min")
    with pytest.raises(UsageError, match="no file"):
        recipes.resolve(f"{tmp_path / 'none.py'}:mine")


def test_wrong_recipe_name_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"clip/tiny": regression, "clip/base_stage1": regression, "graph/tiny": regression}
    monkeypatch.setattr(recipes, "all_recipes", lambda: known)
    monkeypatch.setattr(recipes, "system_names", lambda: ["clip", "graph"])
    with pytest.raises(UsageError, match=r"no recipe 'clp/tiny'; did you mean clip/tiny"):
        recipes.find("clp/tiny")


def test_a_shorthand_fills_several_places() -> None:
    experiment = dataclasses.replace(
        regression(), shorthands=(("rate", ("optim.lr", "optim.eps")),)
    )
    changed = apply_overrides(experiment, ["rate=0.5"], dict(experiment.shorthands))
    assert (changed.optim.lr, changed.optim.eps) == (0.5, 0.5)
    with pytest.raises(UsageError, match=r"optim\.lr"):
        apply_overrides(experiment, ["rate=fast"], dict(experiment.shorthands))
