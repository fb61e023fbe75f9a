"""The page that `jaxmods data inspect` writes."""

from __future__ import annotations

import base64
import html
import json
from typing import Any


def page(facts: dict[str, Any], sheet: bytes, note: str) -> str:
    """A page that stands alone: the sheet of samples, `note` under it, and a table of what was
    counted for each of `facts["sources"]`."""
    picture = base64.b64encode(sheet).decode()
    tables = "".join(
        f"<h2>{html.escape(name)}</h2><table>{_rows(found)}</table>"
        for name, found in facts["sources"].items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;color:#1c2026}"
        "td{padding:.2em 1em .2em 0;vertical-align:top}img{max-width:100%}"
        "code{white-space:pre-wrap;font-size:13px}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data</title>'
        f"<style>{style}</style><h1>The data as training sees it</h1>"
        f'<img alt="samples" src="data:image/png;base64,{picture}">'
        f"<p>{html.escape(note)}</p>{tables}</html>\n"
    )


def _rows(found: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td>{html.escape(key.replace('_', ' '))}</td>"
        f"<td><code>{html.escape(_show(value))}</code></td></tr>"
        for key, value in found.items()
    )


def _show(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, dict):
        return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
    return json.dumps(value, ensure_ascii=False)
