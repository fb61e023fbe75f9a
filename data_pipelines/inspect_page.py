"""The page that `jaxmods data inspect` writes."""

from __future__ import annotations

import base64
import html
import json
from typing import Any

import numpy as np


def page(facts: dict[str, Any], samples: bytes | str, note: str) -> str:
    """A page that stands alone: the samples (a PNG, or HTML), `note` under them, and a table of
    what was counted for each of `facts["sources"]`."""
    if isinstance(samples, bytes):
        picture = base64.b64encode(samples).decode()
        samples = f'<img alt="samples" src="data:image/png;base64,{picture}">'
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
        f"{samples}<p>{html.escape(note)}</p>{tables}</html>\n"
    )


def spread_of(values: np.ndarray) -> dict[str, float]:
    """Least, median, 90 %, greatest; empty for none."""
    if not len(values):
        return {}
    quantiles = np.percentile(values, (0, 50, 90, 100))
    return dict(zip(("min", "median", "p90", "max"), (float(q) for q in quantiles), strict=True))


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
