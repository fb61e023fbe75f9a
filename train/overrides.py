"""Dotted, typed overrides of a recipe: `optim.lr=1e-5`, `evaluation.protocols.0.limit=100`.

The dataclass annotations say what a value may be. All overrides of one call are applied together,
bottom up, so that two fields which a class checks against each other can be changed at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from train.exits import UsageError

T = TypeVar("T")

_NONE_WORDS = ("none", "null")
_TRUE_WORDS = ("true", "yes", "on")
_FALSE_WORDS = ("false", "no", "off")


def apply_overrides(
    recipe: T, settings: Iterable[str], shorthands: Mapping[str, Sequence[str]] | None = None
) -> T:
    """`recipe` with `path=value` settings applied; a later setting of one path wins.

    Args:
      shorthands: paths that stand for several others.

    Raises:
      UsageError: malformed setting, unknown name (with the nearest known), wrong type or a value
        that the class refuses. The message names path, expected and found.
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        path, sign, text = setting.partition("=")
        path = path.strip()
        if not sign or not path:
            raise UsageError(f"--set: expected path=value, found {setting!r}; as optim.lr=1e-4")
        for place in (shorthands or {}).get(path, (path,)):
            _insert(tree, place.split("."), text, place)
    return _rebuild(recipe, Any, tree, "") if tree else recipe


def _insert(tree: dict[str, Any], names: Sequence[str], text: str, path: str) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if isinstance(tree, str):
            raise UsageError(f"--set {path}: an earlier setting replaces a part of this path")
    if isinstance(tree.get(names[-1]), dict):
        raise UsageError(f"--set {path}: an earlier setting changes something inside {path}")
    tree[names[-1]] = text


def _rebuild(value: Any, annotation: Any, change: Any, path: str) -> Any:
    """`value` with `change` (text for a leaf, a dict for the inside) applied."""
    if isinstance(change, str):
        return parse(change, annotation, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        known = [f.name for f in dataclasses.fields(value) if f.init]
        new: dict[str, Any] = {}
        for name, inner in change.items():
            where = f"{path}.{name}" if path else name
            if name not in known:
                raise UsageError(_unknown(path, name, known, type(value).__name__))
            new[name] = _rebuild(getattr(value, name), field_type(type(value), name), inner, where)
        try:
            return dataclasses.replace(value, **new)
        except (ValueError, TypeError) as error:
            changed = ", ".join(f"{path}.{n}" if path else n for n in new)
            raise UsageError(f"--set {changed}: {error}") from error
    if isinstance(value, tuple):
        items = list(value)
        for name, inner in change.items():
            where = f"{path}.{name}"
            if not name.isdigit() or int(name) >= len(items):
                raise UsageError(
                    f"--set {where}: expected an index 0..{len(items) - 1} of {path}, "
                    f"found {name!r}"
                    if items
                    else f"--set {where}: {path} is empty; give the whole of it as JSON"
                )
            i = int(name)
            items[i] = _rebuild(items[i], _item_type(annotation, i), inner, where)
        return tuple(items)
    if isinstance(value, Mapping):
        result = dict(value)
        for name, inner in change.items():
            if name not in result:
                raise UsageError(_unknown(path, name, list(map(str, result)), "mapping"))
            args = typing.get_args(annotation)
            kind = args[1] if len(args) == 2 else type(result[name])
            result[name] = _rebuild(result[name], kind, inner, f"{path}.{name}")
        return result
    inner_name = next(iter(change))
    raise UsageError(
        f"--set {path}.{inner_name}: {path} is {value!r} and has no field {inner_name!r}"
    )


def _unknown(path: str, name: str, known: Sequence[str], owner: str) -> str:
    where = f"{path}.{name}" if path else name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    prefix = f"{path}." if path else ""
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"--set {where}: {owner} has no field {name!r}; {hint}(fields: {', '.join(known)})"


def field_type(cls: type, name: str) -> Any:
    """The evaluated annotation of one field, wherever in the class's bases it was written."""
    for base in cls.__mro__:
        annotation = inspect.get_annotations(base).get(name)
        if annotation is None:
            continue
        if not isinstance(annotation, str):
            return annotation
        scope = dict(vars(sys.modules[base.__module__]))
        try:
            return eval(annotation, scope, dict(vars(base)))  # annotations of our own classes
        except NameError:
            return Any  # imported for type checkers only: the value's own type decides
    return Any


def _item_type(annotation: Any, index: int) -> Any:
    for option in _options(annotation):
        args = typing.get_args(option)
        if typing.get_origin(option) is tuple and args:
            if len(args) == 2 and args[1] is Ellipsis:
                return args[0]
            return args[min(index, len(args) - 1)]
    return Any


def _options(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


class _MismatchError(Exception):
    """A value that does not fit one option of a union."""


def parse(text: str, annotation: Any, path: str) -> Any:
    """The value that `text` means for a field of this type.

    Raises:
      UsageError: with path, expected type and found text.
    """
    try:
        return _parse(text, annotation)
    except _MismatchError:
        raise UsageError(
            f"--set {path}: expected {describe_type(annotation)}, found {text!r}"
        ) from None


# Order in which the members of a union are tried: text would swallow everything, so it is last.
_PRIORITY = (type(None), bool, int, float)


def _parse(text: str, annotation: Any) -> Any:
    options = _options(annotation)
    if len(options) > 1:
        rank = {kind: i for i, kind in enumerate(_PRIORITY)}
        for option in sorted(options, key=lambda o: (o is str, rank.get(o, len(rank)))):
            try:
                return _parse(text, option)
            except _MismatchError:
                continue
        raise _MismatchError
    kind, word = options[0], text.strip()
    origin = typing.get_origin(kind)
    if kind is type(None):
        if word.lower() in _NONE_WORDS:
            return None
        raise _MismatchError
    if kind is bool:
        return _boolean(word)
    if kind in (int, float):
        return _number(word, kind)
    if kind is str:
        return text
    if kind is Path:
        return Path(text).expanduser()
    if origin is Literal:
        for option in typing.get_args(kind):
            if str(option) == word:
                return option
        raise _MismatchError
    if origin is tuple or kind is tuple:
        return _sequence(word, kind)
    if kind is Any:
        try:
            return coerce(json.loads(text), Any)
        except json.JSONDecodeError:
            return text
    if word.startswith(("{", "[")):
        try:
            return coerce(json.loads(word), kind)
        except json.JSONDecodeError:
            raise _MismatchError from None
    raise _MismatchError


def _boolean(word: str) -> bool:
    if word.lower() in _TRUE_WORDS:
        return True
    if word.lower() in _FALSE_WORDS:
        return False
    raise _MismatchError


def _number(word: str, kind: type) -> int | float:
    try:
        if kind is float:
            return float(word)
        try:
            return int(word)
        except ValueError:
            number = float(word)  # 1e5 is a fine way to write an integer
            if number != int(number):
                raise _MismatchError from None
            return int(number)
    except (ValueError, OverflowError):
        raise _MismatchError from None


def _sequence(word: str, kind: Any) -> tuple[Any, ...]:
    if word.startswith("["):
        try:
            return coerce(json.loads(word), kind)
        except json.JSONDecodeError:
            pass  # not JSON: read it as [a,b] below
    word = word.strip("()[]")
    parts = [p.strip() for p in word.split(",") if p.strip()]
    args = typing.get_args(kind)
    fixed = bool(args) and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed and len(parts) != len(args):
        raise _MismatchError
    return tuple(_parse(p, _item_type(kind, i)) for i, p in enumerate(parts))


def coerce(value: Any, annotation: Any) -> Any:
    """A JSON value as the annotated type: objects become dataclasses, arrays tuples."""
    if isinstance(value, dict):
        for option in _options(annotation):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                names = {f.name for f in dataclasses.fields(option)}
                if set(value) <= names and not inspect.isabstract(option):
                    try:
                        return option(
                            **{k: coerce(v, field_type(option, k)) for k, v in value.items()}
                        )
                    except (TypeError, ValueError):
                        raise _MismatchError from None
            if typing.get_origin(option) in (dict, Mapping):
                inner = typing.get_args(option)[1]
                return {k: coerce(v, inner) for k, v in value.items()}
        if annotation is Any:
            return {k: coerce(v, Any) for k, v in value.items()}
        raise _MismatchError
    if isinstance(value, list):
        if annotation is not Any and not any(
            o is tuple or typing.get_origin(o) is tuple for o in _options(annotation)
        ):
            raise _MismatchError
        return tuple(coerce(v, _item_type(annotation, i)) for i, v in enumerate(value))
    if annotation is Any:
        return value
    if value is None:
        return _parse("none", annotation)
    return _parse(str(value), annotation)


def describe_type(annotation: Any) -> str:
    """A type as a person would say it: `float or none`, `one of adamw, lion`."""
    options = _options(annotation)
    if len(options) > 1:
        return " or ".join(describe_type(o) for o in options)
    kind = options[0]
    if kind is type(None):
        return "none"
    if kind is bool:
        return "true or false"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {describe_type(args[0])}"
        return f"({', '.join(describe_type(a) for a in args)})"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        names = ", ".join(f.name for f in dataclasses.fields(kind))
        return f"{kind.__name__} (set one of its fields: {names})"
    return getattr(kind, "__name__", str(kind))
