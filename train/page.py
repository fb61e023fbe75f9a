"""Pieces of HTML and of wording that the report is put together from."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def escape(text: str) -> str:
    """Text as HTML."""
    return html.escape(text, quote=True)


def number_cell(text: str, raw: bool = False) -> str:
    """A right-aligned table cell; `raw` takes HTML."""
    return f'<td class="n">{text if raw else escape(text)}</td>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    path: int | None = None,
) -> str:
    """A table of text; columns `numbers` are right-aligned, column `path` is set as a path."""

    def cell(tag: str, n: int, text: str) -> str:
        if n in numbers:
            return f'<{tag} class="n">{escape(text)}</{tag}>'
        if tag == "td" and n == path:
            return f'<td class="path">{escape(text)}</td>'
        return f'<{tag} class="wrap">{escape(text)}</{tag}>'

    top = "".join(cell("th", n, h) for n, h in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell('td', n, v) for n, v in enumerate(row))}</tr>" for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """Two columns: name and value."""
    rows = [(k, _shown(v)) for k, v in values.items()]
    body = "".join(
        f'<tr><td class="path">{escape(k)}</td><td class="wrap">{escape(v)}</td></tr>'
        for k, v in rows
    )
    return f'<table class="pairs"><tbody>{body}</tbody></table>' if rows else ""


def details(title: str, body: str) -> str:
    """A part that opens on demand; nothing where the body is empty."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:397] + "..."


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects by dotted path; lists of plain values stay whole."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for n, inner in enumerate(value):
            yield from flat(inner, f"{prefix}.{n}")
    else:
        yield prefix, value


def duration(seconds: float) -> str:
    """Seconds as "3.2 s", "4 min 05 s" or "2 h 03 min"."""
    whole = int(max(seconds, 0))
    if whole < 60:
        return f"{max(seconds, 0):.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def big(count: int) -> str:
    """A count in three digits: "149 M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
