"""The map between a PyTorch state dict and a parameter tree: data, read in two directions.

    WeightMap(
        (
            Entry("text_projection.weight", "text_projection/kernel", Linear()),
            # `{i}` only on the left: the layers are stacked on a leading axis (nn.scan)
            Entry("layers.{i}.mlp.fc1.weight", "layers/fc1/kernel", Linear()),
            # `{i}` on both sides: layer by layer
            Entry("down.{i}.conv.weight", "down_{i}/conv/kernel", Conv2d()),
            # several keys, one array
            Entry(
                ("attn.q.weight", "attn.k.weight", "attn.v.weight"),
                "attn/qkv/kernel",
                Linear() >> Fuse(axis=1),
            ),
            Drop("embeddings.position_ids", "a constant 0..n-1, computed here"),
        )
    )

Which keys a file must hold, and in which shapes, follows from the map and the abstract parameters
alone (`WeightMap.bind`), so a file is judged before a byte of it is converted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmods.partitioning import unbox
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Shape
from jaxmods.weights.transforms import IDENTITY, Transform

_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[a-z]\w*")


@dataclasses.dataclass(frozen=True)
class Entry:
    """PyTorch key or keys ↔ path or paths of the parameter tree, by an invertible transform.

    Attributes:
      torch: key pattern(s). A field in braces is an index: a name, or a sum of names and numbers
        with factors (`{i}`, `{i+1}`, `{4*g+i}`). Several keys become one array (`Fuse`, `Stack`,
        `Tie`).
      jax: path pattern(s) with "/" between the levels; fields are plain names. A name that is
        only in `torch` becomes a leading axis of the array (the first name the first axis), in
        index order from 0. Several paths share one tensor (`Split`).
      transform: between the tensors and the array(s) of one index.
      optional: a file may lack the keys; their values are then zeros, and the missing keys are
        reported to `System.complete_import`.
    """

    torch: str | tuple[str, ...]
    jax: str | tuple[str, ...]
    transform: Transform = IDENTITY
    optional: bool = False

    @property
    def torch_patterns(self) -> tuple[str, ...]:
        """The PyTorch key patterns, always as a tuple."""
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def jax_patterns(self) -> tuple[str, ...]:
        """The path patterns, always as a tuple."""
        return (self.jax,) if isinstance(self.jax, str) else self.jax

    def __post_init__(self) -> None:
        inside = [_names(p) for p in self.torch_patterns]
        outside = [_names(p) for p in self.jax_patterns]
        if any(set(names) != set(inside[0]) for names in inside):
            raise ValueError(f"{self}: expected the same index names in every PyTorch key")
        if any(set(names) != set(outside[0]) for names in outside):
            raise ValueError(f"{self}: expected the same index names in every path")
        if unknown := set(outside[0]) - set(inside[0]):
            raise ValueError(
                f"{self}: index {sorted(unknown)} is only in the path; every index of the path "
                "must be in the PyTorch key"
            )
        found = self.transform.outputs(len(self.torch_patterns), len(self.jax_patterns))
        if found != len(self.jax_patterns):
            raise ValueError(
                f"{self}: the transform makes {found} array(s) of {len(self.torch_patterns)} "
                f"tensor(s), but {len(self.jax_patterns)} path(s) are given; use Fuse, Stack, Tie "
                "or Split"
            )

    @property
    def stacked_names(self) -> tuple[str, ...]:
        """Index names that become leading axes, outermost first."""
        paired = _names(self.jax_patterns[0])
        return tuple(n for n in _names(self.torch_patterns[0]) if n not in paired)

    def __str__(self) -> str:
        return f"Entry({' + '.join(self.torch_patterns)} ↔ {' + '.join(self.jax_patterns)})"


@dataclasses.dataclass(frozen=True)
class Drop:
    """PyTorch keys that a file may hold, that are not read, and that an export does not write.

    `pattern` may hold index fields (any whole number) and `*` (anything).
    """

    pattern: str
    reason: str

    def matches(self, key: str) -> bool:
        """Whether `key` is dropped by this rule."""
        parts = re.split(r"(\{[^{}]*\}|\*)", self.pattern)
        regex = "".join(
            ".*" if p == "*" else r"\d+" if p.startswith("{") else re.escape(p) for p in parts
        )
        return re.fullmatch(regex, key) is not None


@dataclasses.dataclass(frozen=True)
class Binding:
    """One entry applied to concrete parameters (and to one choice of the paired indices).

    Attributes:
      entry: where it comes from.
      paths: paths of the arrays; `jax_shapes` are their whole shapes, stacked axes included.
      stack: sizes of the leading stacked axes, () for none.
      keys: for every stacked index in C order, one PyTorch key per pattern.
      inner_shapes: the arrays' shapes without the stacked axes.
      torch_shapes: shape of each tensor of a row of `keys`.
    """

    entry: Entry
    paths: tuple[str, ...]
    jax_shapes: tuple[Shape, ...]
    stack: Shape
    keys: tuple[tuple[str, ...], ...]
    inner_shapes: tuple[Shape, ...]
    torch_shapes: tuple[Shape, ...]

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Every PyTorch key with its shape."""
        for row in self.keys:
            yield from zip(row, self.torch_shapes, strict=True)


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Entries that cover every parameter and every PyTorch key exactly once.

    Attributes:
      entries: `Entry` and `Drop` rules.
      hub_names: published models whose files fit, as `"owner/name"`.
    """

    entries: tuple[Entry | Drop, ...]
    hub_names: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[Entry, ...]:
        """The entries that carry weights."""
        return tuple(e for e in self.entries if isinstance(e, Entry))

    @property
    def drops(self) -> tuple[Drop, ...]:
        """The keys that are tolerated and not read."""
        return tuple(e for e in self.entries if isinstance(e, Drop))

    def dropped(self, key: str) -> Drop | None:
        """The rule that drops `key`, if one does."""
        return next((d for d in self.drops if d.matches(key)), None)

    def under(self, torch: str = "", jax: str = "") -> WeightMap:
        """The same map with `torch` before every key and `jax` before every path.

        For a system made of several published models: `vae.under("vae.", "vae/") + unet`.
        """

        def moved(entry: Entry | Drop) -> Entry | Drop:
            if isinstance(entry, Drop):
                return dataclasses.replace(entry, pattern=torch + entry.pattern)
            return dataclasses.replace(
                entry,
                torch=tuple(torch + p for p in entry.torch_patterns),
                jax=tuple(jax + p for p in entry.jax_patterns),
            )

        return dataclasses.replace(self, entries=tuple(moved(e) for e in self.entries))

    def __add__(self, other: WeightMap) -> WeightMap:
        """Both maps' entries and hub names."""
        return WeightMap(self.entries + other.entries, self.hub_names + other.hub_names)

    def bind(self, abstract_params: Any) -> tuple[Binding, ...]:
        """The map applied to parameters (arrays or `ShapeDtypeStruct`s, boxed or not).

        Raises:
          WeightError: a parameter that no entry covers or that two cover, an entry without a
            parameter, a PyTorch key written twice, a shape that a transform cannot produce.
        """
        shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params).items()}
        bindings = [b for entry in self.rules for b in _bind(entry, shapes)]
        problems = []
        covered = Counter(path for b in bindings for path in b.paths)
        if bare := [path for path in shapes if path not in covered]:
            problems.append(f"parameters without an entry: {', '.join(bare)}; add entries for them")
        if twice := [path for path, n in covered.items() if n > 1]:
            problems.append(f"parameters with more than one entry: {', '.join(twice)}")
        written = Counter(key for b in bindings for row in b.keys for key in row)
        if again := [key for key, n in written.items() if n > 1]:
            problems.append(f"PyTorch keys with more than one entry: {', '.join(again)}")
        bound = {id(b.entry) for b in bindings}
        if idle := [str(e) for e in self.rules if id(e) not in bound]:
            problems.append(
                f"entries without a parameter: {', '.join(idle)}; correct their path or remove them"
            )
        if clash := [key for key in written if self.dropped(key)]:
            problems.append(f"PyTorch keys both mapped and dropped: {', '.join(clash)}")
        if problems:
            raise WeightError("the weight map does not fit the parameters: " + "; ".join(problems))
        return tuple(bindings)

    def torch_shapes(self, abstract_params: Any) -> dict[str, Shape]:
        """Every PyTorch key of these parameters with its shape, in the order of the entries."""
        return {k: s for binding in self.bind(abstract_params) for k, s in binding.tensors()}


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a nested dict by path ("a/b/c"), without logical-axis boxes."""
    result: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                walk(child, f"{prefix}/{name}" if prefix else str(name))
        else:
            result[prefix] = node

    walk(unbox(tree), "")
    return result


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _names(pattern: str) -> tuple[str, ...]:
    """Index names of a pattern, each once, in order of appearance."""
    found: dict[str, None] = {}
    for field in _FIELD.findall(pattern):
        names = _NAME.findall(field)
        if not names and not field.isdigit():
            raise ValueError(
                f"pattern {pattern!r}: expected an index such as {{i}}, found {field!r}"
            )
        found.update(dict.fromkeys(names))
    return tuple(found)


def _fill(pattern: str, values: Mapping[str, int]) -> str:
    """The pattern with its index fields evaluated."""

    def term(text: str) -> int:
        factors = [f.strip() for f in text.split("*")]
        return math.prod(values[f] if f in values else int(f) for f in factors)

    def evaluate(match: re.Match[str]) -> str:
        return str(sum(term(t) for t in match.group(1).split("+")))

    return _FIELD.sub(evaluate, pattern)


def _bind(entry: Entry, shapes: Mapping[str, Shape]) -> list[Binding]:
    """All bindings of one entry: one per choice of the indices that its paths hold."""
    first = entry.jax_patterns[0]
    pieces = re.split(r"\{(\w+)\}", first)
    seen: set[str] = set()
    regex = ""
    for n, piece in enumerate(pieces):
        if n % 2 == 0:
            regex += re.escape(piece)
        else:
            regex += f"(?P={piece})" if piece in seen else rf"(?P<{piece}>\d+)"
            seen.add(piece)
    bindings = []
    for path in shapes:
        if match := re.fullmatch(regex, path):
            values = {name: int(text) for name, text in match.groupdict().items()}
            bindings.append(_bind_one(entry, values, shapes))
    return sorted(bindings, key=lambda b: [_natural(p) for p in b.paths])


def _bind_one(entry: Entry, values: Mapping[str, int], shapes: Mapping[str, Shape]) -> Binding:
    paths = tuple(_fill(p, values) for p in entry.jax_patterns)
    if absent := [p for p in paths if p not in shapes]:
        raise WeightError(f"{entry}: no parameter {', '.join(absent)}")
    whole = tuple(shapes[p] for p in paths)
    names = entry.stacked_names
    stack = whole[0][: len(names)]
    if any(len(s) < len(names) or s[: len(names)] != stack for s in whole):
        raise WeightError(
            f"{entry}: expected {len(names)} leading axes for {', '.join(names)}, found shapes "
            f"{[list(s) for s in whole]}"
        )
    inner = tuple(s[len(names) :] for s in whole)
    try:
        torch_shapes = entry.transform.torch_shapes(inner, len(entry.torch_patterns))
    except ValueError as error:
        raise WeightError(f"{entry}: parameter {', '.join(paths)}: {error}") from None
    keys = []
    for index in itertools.product(*(range(n) for n in stack)):
        here = {**values, **dict(zip(names, index, strict=True))}
        keys.append(tuple(_fill(p, here) for p in entry.torch_patterns))
    return Binding(entry, paths, whole, stack, tuple(keys), inner, torch_shapes)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that orders layer_2 before layer_10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text)]
