"""Look at conversations before training: what the model sees and learns, and honest counts."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.batch import DataError
from data_pipelines.conversation.pipeline import ConversationPipeline, Example, shares
from data_pipelines.conversation.records import ConversationRecord
from data_pipelines.conversation.splice import IGNORE, IMAGE
from data_pipelines.inspect_page import page, spread_of
from data_pipelines.protocols.drawing import BOX_COLORS, Sheet, fit
from data_pipelines.protocols.referring import pieces
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source, spread, weights_of

_BARS, _SIDE, _DRAWS = 16, 200, 4096
_PACKS = (1, 2, 4, 8, 16)

_STYLE = (
    "<style>.talk{display:flex;gap:16px;margin:14px 0;border-top:1px solid #e2e0da;"
    "padding-top:14px}.talk pre{white-space:pre-wrap;margin:0;font-size:13px}"
    ".talk small{color:#707782}mark{background:#cdeeda}del{color:#c83e1e}"
    ".bar{background:#a8b2c0;display:inline-block;height:10px}</style>"
)


@dataclasses.dataclass(frozen=True)
class _Look:
    """One record as training would see it, or why it would not."""

    index: int
    tokens: int = 0
    learnt: int = 0
    first: int = 0  # place of the first learnt token
    images: int = 0
    rounds: int = 0
    task: str = ""
    bad: BadRecordError | None = None
    record_id: str = ""


def inspect_conversations(
    pipeline: ConversationPipeline, out_dir: Path, samples: int, scan: int
) -> dict[str, Any]:
    """Show `samples` records and count over `scan` records of each source, spread evenly.

    Writes `index.html` into `out_dir` (made if absent): pictures as the model takes them with the
    boxes of answers, the text with its learnt tokens marked and what is cut struck out, lengths,
    and what was left out and why.

    Returns:
      JSON-able facts: "files", "packing" (by `pack`: share of a row's tokens that is filled, of
      all tokens that is cut, of records whose answer begins behind the part that is theirs for
      certain, which training refuses), and per source what opening it found, "looked_at", "usable",
      "damaged" by reason with the first example, "tasks", "rounds", "pictures" (records by number),
      "tokens" and "learnt_tokens" of a record (before splicing), "lengths" (records by range),
      "records_cut" and "tokens_cut" at max_tokens.

    Raises:
      DataError: a source cannot be opened or has no usable record.
    """
    _ = pipeline.text_tokenizer
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"sources": {}}
    usable, cards, charts = [], [], []
    for source in pipeline.sources:
        looks = _look_at(pipeline, source, scan)
        good = [look for look in looks if look.bad is None]
        found = {**source.report(), **_count(pipeline, looks, good)}
        facts["sources"][source.name] = found
        if not good:
            raise DataError(
                f"{source.name}: no usable record among {len(looks):,}: {found['damaged']}"
            )
        usable.append(good)
        charts.append(_chart(source.name, found["lengths"]))
        share = -(-samples // len(pipeline.sources))
        cards += [_card(pipeline, source, good[k].index) for k in spread(len(good), share)]
    facts["packing"] = _packing(pipeline, usable)
    rows = "".join(
        f"<tr><td>{k}</td><td>{v['filled']:.1%}</td><td>{v['cut']:.1%}</td>"
        f"<td>{v['refused']:.1%}</td></tr>"
        for k, v in facts["packing"].items()
    )
    body = (
        f"{_STYLE}{''.join(cards[:samples])}{''.join(charts)}<h2>Packing</h2><table><tr><td>pack"
        "</td><td>tokens of a row that are filled</td><td>tokens that are cut</td>"
        f"<td>records without an answer in their part</td></tr>{rows}</table>"
    )
    note = (
        "Marked: learnt. Struck out: cut at max_tokens. Pictures are as the model takes them; "
        "boxes are those of answers."
    )
    (out_dir / "index.html").write_text(page(facts, body, note), "utf-8")
    facts["files"] = [str(out_dir / "index.html")]
    return facts


def _look_at(pipeline: ConversationPipeline, source: Source, scan: int) -> list[_Look]:
    def look(index: int) -> _Look:
        name = source.record_id(index)
        try:
            record: ConversationRecord = source[index]
            name = record.id
            example = pipeline.make(record, np.random.default_rng(0)).example
        except BadRecordError as error:
            return _Look(index, bad=error, record_id=name)
        learnt = [n for n, label in enumerate(example.labels) if n and label != IGNORE]
        return _Look(
            index,
            tokens=len(example.ids),
            learnt=len(learnt),
            first=learnt[0],
            images=len(record.images),
            rounds=len(record.turns) // 2,
            task=str(record.extra.get("task", "")),
        )

    picks = spread(len(source), scan)
    with ThreadPoolExecutor(max(1, pipeline.reading.threads)) as pool:
        found = pool.map(look, picks)
        bar = tqdm(found, source.name, len(picks), leave=False, unit="record", disable=None)
        return list(bar)


def _count(
    pipeline: ConversationPipeline, looks: Sequence[_Look], good: Sequence[_Look]
) -> dict[str, Any]:
    damaged: dict[str, dict[str, Any]] = {}
    for look in looks:
        if look.bad is not None:
            first = {"records": 0, "first": f"{look.record_id}: {look.bad.detail}"}
            damaged.setdefault(look.bad.reason, first)["records"] += 1
    tokens = np.array([look.tokens for look in good], np.int64)
    over = np.maximum(tokens - pipeline.max_tokens, 0)
    pictures = Counter(look.images for look in good)
    return {
        "looked_at": len(looks),
        "usable": len(good),
        "damaged": damaged,
        "tasks": dict(Counter(look.task for look in good if look.task)),
        "rounds": spread_of(np.array([look.rounds for look in good])),
        "pictures": {str(n): pictures[n] for n in sorted(pictures)},
        "tokens": spread_of(tokens),
        "learnt_tokens": spread_of(np.array([look.learnt for look in good])),
        "lengths": _histogram(tokens),
        "records_cut": int((over > 0).sum()),
        "tokens_cut": int(over.sum()),
    }


def _histogram(tokens: np.ndarray) -> dict[str, int]:
    """Records by ranges of equal width."""
    if not len(tokens):
        return {}
    width = 8 * -(-int(tokens.max()) // (8 * _BARS))
    counts = np.bincount((tokens - 1) // width)
    return {f"{n * width + 1} to {(n + 1) * width}": int(c) for n, c in enumerate(counts)}


def _packing(
    pipeline: ConversationPipeline, usable: Sequence[Sequence[_Look]]
) -> dict[str, dict[str, float]]:
    """What rows of several records would hold, for records drawn as training draws them."""
    rng = np.random.default_rng(0)
    weights = np.array(weights_of(pipeline.source) or [len(s) for s in pipeline.sources], float)
    chosen = rng.choice(len(usable), _DRAWS, p=weights / weights.sum())
    drawn = [usable[source][int(rng.integers(len(usable[source])))] for source in chosen]
    found = {}
    for pack in sorted({*_PACKS, pipeline.records}):
        certain = pipeline.max_tokens // pack
        lengths = [look.tokens for look in drawn if look.first < certain]
        rows = [lengths[n : n + pack] for n in range(0, len(lengths) - pack + 1, pack)]
        if not rows:
            break
        kept = sum(sum(shares(row, pipeline.max_tokens)) for row in rows)
        found[str(pack)] = {
            "filled": round(kept / (len(rows) * pipeline.max_tokens), 4),
            "cut": round(1 - kept / sum(map(sum, rows)), 4),
            "refused": round(1 - len(lengths) / _DRAWS, 4),
        }
    return found


def _card(pipeline: ConversationPipeline, source: Source, index: int) -> str:
    """One record: its pictures, and its text with what is learnt."""
    record: ConversationRecord = source[index]
    example = pipeline.make(record, np.random.default_rng(0)).example
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    boxes = [box for answer in answers for box in pieces(answer) if _is_box(box)]
    shown = "".join(
        f'<img alt="picture" width="{_SIDE}" src="data:image/png;base64,{picture}">'
        for picture in (_drawn(image, boxes) for image in example.images)
    )
    task = f", {record.extra['task']}" if record.extra.get("task") else ""
    head = html.escape(f"{source.name}:{record.id}{task}, {len(example.ids)} tokens")
    text = "".join(_marked(pipeline, example))
    return (
        f'<div class="talk"><div style="flex:0 0 {_SIDE}px">{shown}</div>'
        f"<div><small>{head}</small><pre>{text}</pre></div></div>"
    )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(isinstance(v, int | float) and -0.01 <= v <= 1.01 for v in value)
    )


def _drawn(image: np.ndarray, boxes: Sequence[Any]) -> str:
    picture = Image.fromarray(image)
    width, height = fit(picture, _SIDE, _SIDE)
    sheet = Sheet(width, height)
    sheet.picture(0, 0, width, height, picture)
    for number, box in enumerate(boxes):
        sheet.box(0, 0, width, height, box, BOX_COLORS[number % len(BOX_COLORS)])
    return base64.b64encode(sheet.png()).decode()


def _marked(pipeline: ConversationPipeline, example: Example) -> Iterator[str]:
    """The text in pieces that are learnt, cut, or neither."""
    start, ids, labels = 0, example.ids, example.labels
    kind = [
        "picture" if i == IMAGE else "cut" if n >= pipeline.max_tokens
        else "learnt" if label != IGNORE else ""
        for n, (i, label) in enumerate(zip(ids, labels, strict=True))
    ]  # fmt: skip
    tags = {"learnt": "<mark>{}</mark>", "cut": "<del>{}</del>", "": "{}"}
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kind[end] == kind[start]:
            continue
        if kind[start] == "picture":
            yield "<b>[picture]</b>" * (end - start)
        else:
            words = pipeline.text_tokenizer.decode(ids[start:end], skip_special=False)
            yield tags[kind[start]].format(html.escape(words))
        start = end


def _chart(name: str, lengths: dict[str, int]) -> str:
    most = max(lengths.values())
    rows = "".join(
        f'<tr><td>{label}</td><td><span class="bar" style="width:{300 * count / most:.0f}px">'
        f"</span> {count:,}</td></tr>"
        for label, count in lengths.items()
    )
    return f"<h2>{html.escape(name)}: records by tokens</h2><table>{rows}</table>"
