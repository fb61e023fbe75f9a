"""`report.html`: one page about a run that stands alone.

Everything is inside the file (style, SVG curves, pictures as data URIs), so it can be mailed or
kept. It is written from what lies in the run folder and nothing else; a part that is not there is
left out. Files read: `recipe.json, summary.json, metrics.jsonl, counters.json, quarantine.jsonl,
eval/` (see `train.results`) and any `verify.json` of an export inside the folder.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, features

from data_pipelines.protocols.base import EvalResult, Metric, Panel
from train.charts import Curve, line_chart, number, progress_bar
from train.exits import UserError
from train.page import big, details, duration, escape, flat, number_cell, pairs, table
from train.results import load_results

REPORT = "report.html"

_FILES = {
    REPORT: "this page",
    "recipe.json": "the resolved recipe; the run can be repeated from it",
    "summary.json": "status and last numbers, for programs",
    "metrics.jsonl": "every log line",
    "counters.json": "what was read, left out, mended and cut",
    "quarantine.jsonl": "every record that was left out, with its reason",
    "log.txt": "the log",
    "eval": "results per step, and their pictures",
    "checkpoints": "checkpoints: parameters, optimiser, position in the data",
    "tensorboard": "event files for TensorBoard",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What lies in a run folder."""

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    lines: list[dict[str, Any]]
    counters: dict[str, Any]
    quarantine: list[dict[str, Any]]
    results: dict[int, dict[str, EvalResult]]
    certificates: dict[str, dict[str, Any]]

    def first_and_last(self) -> dict[str, list[tuple[int, EvalResult]]]:
        """Per protocol: its first and its last result with their steps (once if there is one)."""
        found: dict[str, list[tuple[int, EvalResult]]] = {}
        for step, by_protocol in self.results.items():
            for name, result in by_protocol.items():
                found.setdefault(name, []).append((step, result))
        return {n: [r[0], r[-1]] if len(r) > 1 else r for n, r in found.items()}


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: there is nothing of a run in it.
    """
    if not any((folder / name).exists() for name in ("recipe.json", "metrics.jsonl", "eval")):
        raise UserError(
            f"report: expected a run folder (recipe.json, metrics.jsonl or eval/), found none of "
            f"them in {folder}; give the --workdir of a run"
        )
    nested = [p for depth in ("", "*/", "*/*/") for p in folder.glob(f"{depth}verify.json")]
    return Run(
        folder,
        _object(folder / "recipe.json"),
        _object(folder / "summary.json"),
        _objects(folder / "metrics.jsonl"),
        _object(folder / "counters.json"),
        _objects(folder / "quarantine.jsonl"),
        load_results(folder),
        {str(p.parent.relative_to(folder)): _object(p) for p in sorted(nested)},
    )


def write_report(workdir: Path) -> Path:
    """Write `report.html` into a run folder.

    Returns:
      Its path.

    Raises:
      UserError: not a run folder.
    """
    run = read_run(Path(workdir))
    sections = {
        "results": ("What was learned", _results(run)),
        "pictures": ("Pictures", _pictures(run)),
        "curves": ("Curves", _curves(run)),
        "data": ("Data", _data(run)),
        "export": ("Export certificate", _certificates(run)),
        "recipe": ("Recipe", _recipe(run)),
        "settings": ("Settings of the evaluations", _settings(run)),
        "files": ("Where everything lies", _places(run)),
    }
    shown = {k: (title, body) for k, (title, body) in sections.items() if body}
    links = "".join(f'<a href="#{k}">{escape(title)}</a>' for k, (title, _) in shown.items())
    bodies = "".join(
        f'<section id="{k}"><h2>{escape(title)}</h2>{body}</section>'
        for k, (title, body) in shown.items()
    )
    style = (Path(__file__).parent / "report_style.html").read_text(encoding="utf-8")
    name = str(run.recipe.get("recipe") or run.folder.resolve().name)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title>{style}</head><body><main>"
        f"<header><h1>{escape(name)}</h1>{_lead(run)}<nav>{links}</nav></header>"
        f"{_facts(run)}{bodies}{_footer(run)}</main></body></html>\n"
    )
    path = run.folder / REPORT
    partial = path.with_name(f".{REPORT}.part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


# Parts of the page, top to bottom


def _lead(run: Run) -> str:
    summary = run.summary
    if not summary:
        return '<p class="lead">The run has not ended yet; this is what it has written so far.</p>'
    words = f"{summary['status']} at step {summary['step']:,} of {summary['steps']:,}"
    device = summary.get("device", {})
    if device:
        words += f" on {device.get('devices', 1)} {device.get('kind') or device.get('platform')}"
    return f'<p class="lead">{escape(words)}</p>'


def _facts(run: Run) -> str:
    summary, facts = run.summary, []
    if "examples" in summary:
        facts.append((f"{summary['examples']:,}", "examples seen in training"))
    if "training_seconds" in summary:
        facts.append((duration(summary["training_seconds"]), "of training"))
    parameters = summary.get("parameters", {})
    if parameters:
        frozen = parameters.get("frozen", 0)
        label = "parameters trained" + (f", {big(frozen)} frozen" if frozen else "")
        facts.append((big(parameters.get("trained", 0)), label))
    last = summary.get("metrics", {})
    if isinstance(last.get("loss"), int | float):
        facts.append((number(last["loss"]), "loss at the end"))
    if isinstance(last.get("examples_per_second"), int | float):
        facts.append((number(last["examples_per_second"]), "examples per second"))
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in facts)
    return f'<div class="facts">{cells}</div>' if cells else ""


def _results(run: Run) -> str:
    chosen = run.first_and_last()
    if not chosen:
        return ""
    several = any(len(r) > 1 for r in chosen.values())
    published = any(
        m.published is not None for r in chosen.values() for m in r[-1][1].metrics.values()
    )
    head = ["<th>metric</th>"]
    if several:
        head.append('<th class="n">first</th>')
    head.append('<th class="n">last</th><th></th><th class="n">chance</th>')
    head.append('<th class="n">× chance</th>')
    if published:
        head.append('<th class="n">published</th>')
    rows = []
    columns = len(head) + 2
    for name, results in chosen.items():
        rows.append(_group(name, results, columns))
        first = results[0][1].metrics if len(results) > 1 else {}
        for metric, value in results[-1][1].metrics.items():
            rows.append(_metric_row(metric, first.get(metric), value, several, published))
    key = '<span><i class="full"></i>last</span>'
    if several:
        key = "<span><i></i>first</span>" + key
    key += '<span><i class="line" style="background:var(--chance)"></i>chance</span>'
    if published:
        key += '<span><i class="line" style="background:var(--published)"></i>published</span>'
    return (
        f'<div class="key">{key}</div><div class="scroll"><table><thead><tr>{"".join(head)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _group(name: str, results: Sequence[tuple[int, EvalResult]], columns: int) -> str:
    step, result = results[-1]
    steps = f"step {step:,}" if len(results) == 1 else f"step {results[0][0]:,} and {step:,}"
    about = f"{result.records:,} records, {steps}, {duration(result.seconds)}"
    badge = ""
    if result.settings.get("comparable") is False:
        badge = ' <span class="badge">not comparable with the published number</span>'
    return (
        f'<tr class="group"><td colspan="{columns}">{escape(name)} '
        f'<span class="note">{escape(about)}</span>{badge}</td></tr>'
    )


def _metric_row(
    name: str, first: Metric | None, last: Metric, several: bool, published: bool
) -> str:
    fraction = last.fraction and 0 <= last.value <= 1
    shown = [f"<td>{escape(metric_label(name))}</td>"]
    if several:
        shown.append(number_cell("" if first is None else number(first.value, fraction)))
    shown.append(
        number_cell(
            f'<strong class="end">{escape(number(last.value, fraction))}</strong>', raw=True
        )
    )
    bar = ""
    if fraction:
        start = first.value if first is not None and 0 <= first.value <= 1 else None
        bar = progress_bar(start, last.value, last.chance, last.published)
    shown.append(f"<td>{bar}</td>")
    shown.append(number_cell("" if last.chance is None else number(last.chance, fraction)))
    times = last.value / last.chance if last.chance else None
    shown.append(number_cell("" if times is None else f"{times:.3g}"))
    if published:
        shown.append(
            number_cell("" if last.published is None else number(last.published, fraction))
        )
    return f"<tr>{''.join(shown)}</tr>"


def metric_label(name: str) -> str:
    """A metric's name in words: "image → text R@1", "top-5"."""
    words = {"i2t": "image → text", "t2i": "text → image"}
    recall = re.fullmatch(r"(\w+?)_r(\d+)", name)
    if recall:
        what = words.get(recall[1], recall[1].replace("_to_", " → ").replace("_", " "))
        return f"{what} R@{recall[2]}"
    return re.sub(r"^top(\d+)$", r"top-\1", name).replace("_", " ")


def _pictures(run: Run) -> str:
    parts = []
    for name, results in run.first_and_last().items():
        step, last = results[-1]
        if not last.panels:
            continue
        parts.append(f"<h3>{escape(name)}, step {step:,}</h3>")
        earlier = results[0][1].panels if len(results) > 1 else ()
        for n, panel in enumerate(last.panels):
            parts.append(_figure(panel))
            if n < len(earlier):
                parts.append(
                    f"<details><summary>the same at step {results[0][0]:,}</summary>"
                    f"{_figure(earlier[n])}</details>"
                )
    return "".join(parts)


def _figure(panel: Panel) -> str:
    body = panel.html or ""
    if panel.png is not None:
        body = f'<img alt="{escape(panel.title)}" src="{picture_uri(panel.png)}">' + body
    caption = f"<figcaption><b>{escape(panel.title)}.</b> {escape(panel.caption)}</figcaption>"
    return f'<figure class="panel">{caption}{body}</figure>'


def picture_uri(png: bytes) -> str:
    """A data URI: WebP where that is smaller (photographs), else the PNG itself."""
    if features.check("webp"):
        out = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(out, "WEBP", quality=88, method=4)
        if len(out.getvalue()) < len(png):
            return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _curves(run: Run) -> str:
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for line in run.lines:
        for name, value in line.items():
            usable = value is None or (isinstance(value, int | float) and math.isfinite(value))
            if name != "step" and usable and "step" in line:
                curves.setdefault(name, []).append((line["step"], value))
    charts = [
        Curve(name, points, percent=name in ("data_wait", "mfu"), noisy=not name.startswith("lr"))
        for name, points in sorted(curves.items(), key=lambda c: _order(c[0]))
        if not name.startswith("eval/") and len(points) > 1
    ]
    by_protocol = "".join(
        f"<h3>{escape(name)} over the steps</h3>{_grid(found)}"
        for name, found in _evaluation_curves(run).items()
    )
    return _grid(charts) + by_protocol


def _evaluation_curves(run: Run) -> dict[str, list[Curve]]:
    """By protocol, its metrics over the steps they were evaluated at, where there are more than
    the two that the table shows."""
    found: dict[tuple[str, str], list[tuple[float, Metric]]] = {}
    for step, by_protocol in run.results.items():
        for name, result in by_protocol.items():
            for metric, value in result.metrics.items():
                found.setdefault((name, metric), []).append((step, value))
    curves: dict[str, list[Curve]] = {}
    for (name, metric), values in found.items():
        if len(values) > 2:
            fraction = all(m.fraction and 0 <= m.value <= 1 for _, m in values)
            points = [(s, m.value if math.isfinite(m.value) else None) for s, m in values]
            curve = Curve(metric_label(metric), points, values[-1][1].chance, fraction)
            curves.setdefault(name, []).append(curve)
    return curves


def _order(name: str) -> tuple[int, str]:
    """Losses first, then the optimiser, then speed."""
    if name == "loss":
        return 0, name
    if "loss" in name:
        return 1, name
    if name.startswith(("lr", "grad", "update")):
        return 3, name
    if name in ("examples_per_second", "data_wait", "mfu", "peak_memory_gib"):
        return 4, name
    return 2, name


def _grid(curves: Sequence[Curve]) -> str:
    cells = []
    for curve in curves:
        known = [v for _, v in curve.points if v is not None]
        if known:
            last = number(known[-1], curve.percent)
            cells.append(
                f"<figure><figcaption><b>{escape(curve.title)}</b><span>{escape(last)}</span></figcaption>"
                f"{line_chart(curve)}</figure>"
            )
    return f'<div class="charts">{"".join(cells)}</div>' if cells else ""


def _data(run: Run) -> str:
    counters, parts = run.counters, []
    if counters:
        left_out = sum(int(v.get("records", 0)) for v in counters.get("quarantine", {}).values())
        seen, used = counters.get("seen", 0), counters.get("used", 0)
        parts.append(
            f"<p>{seen:,} records were looked at in training and {used:,} used. "
            f"{left_out:,} distinct records were left out."
            + (" Nothing was left out, mended or cut.</p>" if _clean(counters) else "</p>")
        )
        if counters.get("quarantine"):
            examples: dict[str, dict[str, Any]] = {}
            for bad in run.quarantine:
                examples.setdefault(str(bad.get("reason")), bad)
            rows = [
                (
                    reason.replace("_", " "),
                    f"{count.get('records', 0):,}",
                    f"{count.get('met', 0):,}",
                    _example(examples.get(reason, {})),
                )
                for reason, count in counters["quarantine"].items()
            ]
            head = ("left out because", "records", "times met", "first example")
            parts.append(table(head, rows, numbers=(1, 2)))
        for word, title in (("repaired", "mended"), ("cut", "cut by static shapes")):
            times = {k.replace("_", " "): v for k, v in counters.get(word, {}).items() if v}
            if times:
                entries = [(k, f"{v:,}") for k, v in times.items()]
                parts.append(table((title, "times"), entries, numbers=(1,)))
    described = run.summary.get("data", {})
    if described:
        parts.append(details("the training data", pairs(described)))
    for name, results in run.first_and_last().items():
        result = results[-1][1]
        if result.counts or result.notes:
            body = pairs(result.counts) + "".join(
                f'<p class="note">{escape(n)}</p>' for n in result.notes
            )
            parts.append(details(f"what the evaluation {name} read", body))
    return "".join(parts)


def _clean(counters: Mapping[str, Any]) -> bool:
    return not (
        counters.get("quarantine")
        or any(counters.get("repaired", {}).values())
        or any(counters.get("cut", {}).values())
    )


def _example(bad: Mapping[str, Any]) -> str:
    if not bad:
        return ""
    return f"{bad.get('source', '')}:{bad.get('id', '')} — {bad.get('detail', '')}"


def _certificates(run: Run) -> str:
    parts = []
    for place, found in run.certificates.items():
        passed = found.get("passed")
        word = '<span class="good">passed</span>' if passed else '<span class="bad">failed</span>'
        equal = "bit for bit equal" if found.get("bit_equal") else "with differences"
        parts.append(
            f'<p>The exported folder <span class="path">{escape(place)}</span>: {word}; '
            f"re-read {equal}; forward pass with PyTorch: "
            f"{escape(str(found.get('forward', 'unknown')))}.</p>"
        )
        errors = found.get("relative_errors") or {}
        if errors:
            rows = [(k, f"{float(v):.2e}") for k, v in errors.items()]
            head = ("output", f"relative error (allowed {found.get('tolerance')})")
            parts.append(table(head, rows, numbers=(1,)))
        parts.append(details("the whole certificate", pairs(found)))
    return "".join(parts)


def _recipe(run: Run) -> str:
    if not run.recipe:
        return ""
    overrides = run.recipe.get("overrides") or []
    changed = ", ".join(f"<code>{escape(str(o))}</code>" for o in overrides)
    text = f"<p>Changed on the command line: {changed}.</p>" if changed else ""
    experiment = run.recipe.get("experiment", {})
    notes = experiment.get("notes") if isinstance(experiment, dict) else None
    if notes:
        text += f"<p>{escape(str(notes))}</p>"
    top = {
        k: v
        for k, v in flat(experiment)
        if k.split(".")[0] in ("steps", "batch_size", "seed", "optim", "precision", "mesh", "init")
    }
    return text + pairs(top) + details("every setting", pairs(dict(flat(experiment))))


def _settings(run: Run) -> str:
    parts = []
    for name, results in run.first_and_last().items():
        result = results[-1][1]
        marked = [n for n in result.notes if n.startswith("not comparable")]
        warning = "".join(f'<div class="warn">{escape(n)}</div>' for n in marked)
        parts.append(f"{warning}{details(name, pairs(dict(flat(result.settings))))}")
    return "".join(parts)


def _places(run: Run) -> str:
    rows = [
        (name, what)
        for name, what in _FILES.items()
        if name == REPORT or (run.folder / name).exists()
    ]
    rows += [(place, "exported weights for PyTorch") for place in run.certificates]
    listing = table(("in the run folder", ""), rows, path=0)
    return (
        f'<p>Run folder: <span class="path">{escape(str(run.folder.resolve()))}</span></p>{listing}'
    )


def _footer(run: Run) -> str:
    found = run.summary.get("versions", {})
    text = ", ".join(f"{k} {v}" for k, v in found.items())
    return f"<footer>{escape(text)}</footer>" if text else ""


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _objects(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; a torn last line of a run that is still writing is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
