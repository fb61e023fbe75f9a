"""Look at the data before training: pictures with their boxes drawn back, and honest counts.

`inspect_pipeline` reads a spread of records the way training would, writes `samples.png` and a
stand-alone `index.html`, and returns what it counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.batch import DataError, Pipeline
from data_pipelines.conversation import ConversationPipeline
from data_pipelines.conversation.inspect import inspect_conversations
from data_pipelines.image_text import ImageTextPipeline
from data_pipelines.images import decode_rgb
from data_pipelines.inspect_page import page, spread_of
from data_pipelines.protocols.drawing import BOX_COLORS, MUTED, Sheet, fit
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import Source, spread
from data_pipelines.sources.record_codec import embed_image
from data_pipelines.tryon.inspect import inspect_try_on
from data_pipelines.tryon.pipeline import TryOnPipeline
from data_pipelines.validation import CheckedRecord, check_record

_CELL, _PICTURE, _COLUMNS, _LINES = 250, 234, 4, 8


@dataclasses.dataclass(frozen=True)
class _Look:
    """One record as training would see it, or why it would not."""

    index: int
    checked: CheckedRecord | None = None
    size: tuple[int, int] = (0, 0)
    picture_hash: bytes = b""
    bad: BadRecordError | None = None
    record_id: str = ""


def inspect_pipeline(
    pipeline: Pipeline, out_dir: Path, samples: int = 16, scan: int = 2000
) -> dict[str, Any]:
    """Draw `samples` records and count over `scan` records of each source, spread evenly.

    Writes `samples.png` and `index.html` into `out_dir` (made if absent).

    Returns:
      JSON-able facts: "files", and per source "records" and what opening it found, "looked_at",
      "damaged" by reason with examples, "repaired", "captions" (lengths in tokens against the
      context, tokens cut), "boxes" (per record, with negatives, over the slots), "pictures"
      (sizes, smaller than the model's input), "duplicates" (same picture; same short caption).

    Raises:
      DataError: a source cannot be opened or has no usable record.
      ValueError: the pipeline is of a kind that cannot be drawn.
    """
    if isinstance(pipeline, TryOnPipeline):
        return inspect_try_on(pipeline, out_dir, samples, scan)
    if isinstance(pipeline, ConversationPipeline):
        return inspect_conversations(pipeline, out_dir, samples, scan)
    if not isinstance(pipeline, ImageTextPipeline):
        raise ValueError(
            "data inspect: expected an ImageTextPipeline, a TryOnPipeline or a "
            f"ConversationPipeline, found {type(pipeline).__name__}"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"sources": {}}
    drawn: list[tuple[Source, int]] = []
    for source in pipeline.sources:
        looks = _look_at(pipeline, source, scan)
        facts["sources"][source.name] = _count(pipeline, source, looks)
        good = [look.index for look in looks if look.checked is not None]
        if not good:
            reasons = facts["sources"][source.name]["damaged"]
            raise DataError(f"{source.name}: no usable record among {len(looks):,}: {reasons}")
        share = -(-samples // len(pipeline.sources))
        drawn += [(source, good[i]) for i in spread(len(good), share)]
    sheet = _contact_sheet(pipeline, drawn[:samples])
    (out_dir / "samples.png").write_bytes(sheet)
    note = "Boxes in grey are beyond the slots of a batch."
    (out_dir / "index.html").write_text(page(facts, sheet, note), "utf-8")
    facts["files"] = [str(out_dir / "samples.png"), str(out_dir / "index.html")]
    return facts


def _look_at(pipeline: ImageTextPipeline, source: Source, scan: int) -> list[_Look]:
    picks = spread(len(source), scan)

    def look(index: int) -> _Look:
        try:
            record = embed_image(source[index])
            checked = check_record(record, pipeline.limits)
            size = decode_rgb(record.image, pipeline.limits.image).size
        except BadRecordError as e:
            return _Look(index, bad=e, record_id=source.record_id(index))
        image = record.image
        data = image if isinstance(image, bytes) else np.asarray(image).tobytes()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        light = dataclasses.replace(checked.record, image=b"")
        return _Look(index, CheckedRecord(light, checked.repaired), size, digest)

    with ThreadPoolExecutor(max(1, pipeline.reading.threads)) as pool:
        found = pool.map(look, picks)
        return list(tqdm(found, source.name, len(picks), leave=False, unit="record", disable=None))


def _count(pipeline: ImageTextPipeline, source: Source, looks: Sequence[_Look]) -> dict[str, Any]:
    good = [look for look in looks if look.checked is not None]
    records = [look.checked.record for look in looks if look.checked is not None]
    damaged: dict[str, dict[str, Any]] = {}
    repaired: Counter[str] = Counter()
    for look in looks:
        if look.bad is not None:
            entry = damaged.setdefault(
                look.bad.reason,
                {"records": 0, "first": f"{look.record_id}: {look.bad.detail}"},
            )
            entry["records"] += 1
        elif look.checked is not None:
            repaired.update(look.checked.repaired)
    regions = [len(r.regions) for r in records]
    shorts = Counter(c for r in records for c in r.short_captions)
    pictures = Counter(look.picture_hash for look in good)
    sides = np.array([look.size for look in good]).reshape(-1, 2)
    per_record = Counter(min(n, pipeline.max_boxes + 1) for n in regions)
    return {
        **source.report(),
        "looked_at": len(looks),
        "usable": len(good),
        "damaged": damaged,
        "repaired": dict(repaired),
        "captions": _caption_lengths(pipeline, records),
        "boxes": {
            "total": sum(regions),
            "with_negatives": sum(bool(g.negatives) for r in records for g in r.regions),
            "over_the_slots": sum(max(0, n - pipeline.max_boxes) for n in regions),
            "records_by_boxes": {
                (str(n) if n <= pipeline.max_boxes else f">{pipeline.max_boxes}"): per_record[n]
                for n in sorted(per_record)
            },
        },
        "pictures": {
            "width": spread_of(sides[:, 0]),
            "height": spread_of(sides[:, 1]),
            "smaller_than_input": int((sides.min(axis=1) < pipeline.image_size).sum())
            if len(sides)
            else 0,
        },
        "duplicates": {
            "pictures": sum(n - 1 for n in pictures.values()),
            "short_captions": sum(n - 1 for n in shorts.values()),
        },
    }


def _caption_lengths(
    pipeline: ImageTextPipeline, records: Sequence[ImageTextRecord]
) -> dict[str, Any]:
    tokens = pipeline.text_tokenizer.tokens
    texts = {
        "short": (
            [pipeline.short_prefix + c for r in records for c in r.short_captions],
            pipeline.context_short,
        ),
        "long": (
            [r.long_caption for r in records if r.long_caption is not None],
            pipeline.context_long,
        ),
        "region": (
            [p for r in records for g in r.regions for p in (g.phrase, g.long_phrase) if p],
            pipeline.layout.region_length,
        ),
    }
    found = {}
    for name, (values, context) in texts.items():
        lengths = np.array([len(tokens(v)) + 2 for v in values], np.int64)
        over = np.maximum(lengths - context, 0)
        found[name] = {
            "texts": len(values),
            "context": context,
            "tokens": spread_of(lengths),
            "texts_cut": int((over > 0).sum()),
            "tokens_cut": int(over.sum()),
        }
    return found


def _contact_sheet(pipeline: ImageTextPipeline, drawn: Sequence[tuple[Source, int]]) -> bytes:
    height = _PICTURE + 16 + 15 * _LINES
    rows = -(-len(drawn) // _COLUMNS)
    sheet = Sheet(_COLUMNS * _CELL + 16, rows * height + 16)
    for n, (source, index) in enumerate(drawn):
        x, y = 12 + n % _COLUMNS * _CELL, 12 + n // _COLUMNS * height
        record = source[index]
        picture = decode_rgb(record.image, pipeline.limits.image)
        checked = check_record(record, pipeline.limits).record
        _draw(sheet, x, y, picture, checked, pipeline.max_boxes)
    return sheet.png()


def _draw(
    sheet: Sheet, x: float, y: float, picture: Image.Image, record: ImageTextRecord, slots: int
) -> None:
    """One cell: the picture with numbered boxes (grey beyond the slots), caption and phrases."""
    width, height = fit(picture, _PICTURE, _PICTURE)
    sheet.picture(x, y, width, height, picture)
    colors = [
        BOX_COLORS[i % len(BOX_COLORS)] if i < slots else MUTED for i in range(len(record.regions))
    ]
    for i, region in reversed(list(enumerate(record.regions))):
        label = str(i + 1) if i < slots else ""
        sheet.box(x, y, width, height, region.box, colors[i], label)
    top = y + height + 4
    caption = record.short_captions[0] if record.short_captions else record.long_caption or ""
    top += sheet.text(x, top, caption, size=11, width=_PICTURE, max_lines=2)
    bottom = y + _PICTURE + 15 * _LINES - 10
    for i, region in enumerate(record.regions):
        if top > bottom:
            sheet.text(x, top, f"and {len(record.regions) - i} more", size=10, color=MUTED)
            return
        text = f"{i + 1} {region.phrase}"
        if region.negatives:
            text += f" / not: {region.negatives[0]}"
        top += sheet.text(x, top, text, size=10, color=colors[i], width=_PICTURE, max_lines=1)
