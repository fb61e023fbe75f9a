"""Requests from what a person gives: names and files on a command line, or a batch file.

A batch file is JSON lines, an example a line:

    {"name": "anna_red", "person": "anna.jpg", "garment": "red.jpg"}

`name` is that of the results and may be missing (the number of the line is taken); every other key
is an input of the sampler, with a value or, for inputs that may be given several times, a list.
Paths are relative to the folder of the file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.records import BadRecordError
from data_pipelines.samplers.base import Input, Request, Sampler, Value

NAME = "name"
RESERVED = ("grid", "results", "sample")  # files of the results folder itself
_SAFE = re.compile(r"[^/\\\x00-\x1f:*?\"<>|]{1,120}")


class RequestError(ValueError):
    """What was given does not fit the sampler."""


def from_pairs(sampler: Sampler, pairs: Sequence[str], seed: int) -> Request:
    """One example of `name=value` texts; it is named after its first picture.

    Raises:
      RequestError: a malformed pair, an unknown name, one that may be given once given twice, one
        that is missing, or a file that is not there.
    """
    given: dict[str, list[str]] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise RequestError(f"--input: expected name=value, found {pair!r}; {listing(sampler)}")
        given.setdefault(name, []).append(value)
    inputs = check(sampler, given, Path(), "--input")
    paths = (v for values in inputs.values() for v in values if isinstance(v, Path))
    return Request(_free(next((p.stem for p in paths), "sample")), 0, seed, inputs)


def attached(sampler: Sampler, pairs: Sequence[str]) -> list[tuple[str, Path]]:
    """Pictures `name=path` that a conversation begins with.

    Raises:
      RequestError: as `from_pairs`, but nothing has to be there.
    """
    pictures = [i.name for i in sampler.inputs() if i.kind == "picture"]
    found = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        path = Path(value).expanduser()
        if name not in pictures:
            raise RequestError(
                f"--chat: expected pictures ({', '.join(pictures) or 'none'}), found {pair!r}; "
                "type texts into the conversation"
            )
        if not path.is_file():
            raise RequestError(f"--input: {name}: no file {path}")
        found.append((name, path))
    return found


def from_file(
    sampler: Sampler, path: Path, seed: int, start: int = 0, count: int | None = None
) -> list[Request]:
    """The examples of a batch file, from `start` on, at most `count`.

    Raises:
      RequestError: no such file, or a line that does not fit; file and line are named.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"--inputs {path}: cannot be read: {e}") from e
    found: list[Request] = []
    names: dict[str, int] = {}
    index = -1
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        index += 1
        if index < start or (count is not None and index >= start + count):
            continue
        where = f"{path}:{number}"
        request = _row(sampler, line, path.parent, where, index, seed)
        if request.name in names:
            raise RequestError(
                f"{where}: the name {request.name!r} is that of line {names[request.name]} too; "
                "results are written under their names, so give each its own"
            )
        names[request.name] = number
        found.append(request)
    if not found:
        raise RequestError(
            f"--inputs {path}: expected examples from number {start} on, found {index + 1} in all"
        )
    return found


def _row(sampler: Sampler, line: str, folder: Path, where: str, index: int, seed: int) -> Request:
    try:
        row: Any = json.loads(line)
    except ValueError as e:
        raise RequestError(f"{where}: expected one JSON object a line: {e}") from e
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected an object, found {type(row).__name__}")
    name = row.pop(NAME, f"{index:05d}")
    if not isinstance(name, str) or not _SAFE.fullmatch(name) or name.startswith("."):
        raise RequestError(
            f"{where}: expected a name that can be a file's (no slashes, not hidden, at most 120 "
            f"characters), found {name!r}"
        )
    if name in RESERVED:
        raise RequestError(f"{where}: {name!r} is a file of the results folder; choose another")
    given: dict[str, list[str]] = {}
    for key, value in row.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str) for v in values):
            raise RequestError(f"{where}: {key}: expected a text or a list of texts")
        given[key] = values
    return Request(name, index, seed, check(sampler, given, folder, where))


def from_data(sampler: Sampler, seed: int, start: int, count: int) -> Iterator[Request | str]:
    """Examples `start`, `start + 1`, ... of the evaluation data until `count` are usable; for one
    that is not, what is wrong with it."""
    total = sampler.count()
    names: set[str] = set()
    for index in range(start, total):
        if not count:
            return
        try:
            request = sampler.example(index, seed)
        except BadRecordError as error:
            yield f"example {index}: {error}"
            continue
        name = _free(request.name)
        if name in names:
            name = f"{name}_{index}"
        names.add(name)
        count -= 1
        yield Request(name, index, seed, request.inputs, request.record)


def check_data(sampler: Sampler, start: int) -> None:
    """Raise RequestError where the recipe has no evaluation data, or none from `start` on."""
    total = sampler.count()
    if total <= start:
        raise RequestError(
            f"expected evaluation data with an example {start}, found {total} examples; give "
            f"inputs instead: {listing(sampler)}"
        )


def check(
    sampler: Sampler, given: Mapping[str, Sequence[str]], folder: Path, where: str
) -> dict[str, tuple[Value, ...]]:
    """Values by input name: pictures as paths of files that exist, texts as they are.

    Raises:
      RequestError: see `from_pairs`.
    """
    known = {i.name: i for i in sampler.inputs()}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RequestError(f"{where}: no input {name!r}; {hint}{listing(sampler)}")
    missing = [name for name, i in known.items() if i.required and not given.get(name)]
    if missing:
        raise RequestError(f"{where}: {' and '.join(missing)} missing; {listing(sampler)}")
    found: dict[str, tuple[Value, ...]] = {}
    for name, values in given.items():
        if len(values) > 1 and not known[name].many:
            raise RequestError(f"{where}: {name} is given {len(values)} times, expected once")
        if known[name].kind == "text":
            found[name] = tuple(values)
            continue
        paths = [folder / Path(value).expanduser() for value in values]
        for path in paths:
            if not path.is_file():
                raise RequestError(f"{where}: {name}: no file {path}")
        found[name] = tuple(paths)
    return found


def listing(sampler: Sampler) -> str:
    """The inputs in one sentence, for messages."""
    return "inputs of this recipe: " + "; ".join(_said(i) for i in sampler.inputs())


def _said(i: Input) -> str:
    marks = ["picture" if i.kind == "picture" else "text"]
    marks += [] if i.required else ["optional"]
    marks += ["several times"] if i.many else []
    return f"{i.name} ({', '.join(marks)}): {i.about}"


def _free(name: str) -> str:
    """A name that can be a file's, made of any text."""
    safe = re.sub(r"[/\\\x00-\x1f:*?\"<>|]+", "_", name).lstrip(".")[:120] or "sample"
    return f"{safe}_" if safe in RESERVED else safe
