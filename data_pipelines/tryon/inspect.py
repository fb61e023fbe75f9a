"""Look at try-on data before training: every picture of some records, and honest counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.batch import DataError
from data_pipelines.inspect_page import page
from data_pipelines.protocols.panels import try_on_sheet
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import spread
from data_pipelines.tryon.draws import Conditions
from data_pipelines.tryon.pipeline import TryOnPipeline
from data_pipelines.tryon.source import TryOnSource
from data_pipelines.tryon.transforms import pictures

_COLUMNS = ("target", "person", "agnostic", "garment", "reference", "mask", "dense")


def inspect_try_on(
    pipeline: TryOnPipeline, out_dir: Path, samples: int, scan: int
) -> dict[str, Any]:
    """Draw `samples` records and count over `scan` records of each source, spread evenly.

    A record counts as usable when it can be made into a row of a batch whatever is drawn. Writes
    `samples.png` and `index.html` into `out_dir` (made if absent).

    Returns:
      JSON-able facts: "files", and per source what opening it found, "looked_at", "usable",
      "damaged" by reason with the first example, "lacking" (optional pictures that training may
      ask for).

    Raises:
      DataError: a source lacks what training needs, or has no usable record.
    """
    pipeline.check_sources()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"sources": {}}
    rows: list[dict[str, np.ndarray | None]] = []
    subjects = ("person",) * (pipeline.person_prob > 0) + ("agnostic",) * (pipeline.person_prob < 1)
    wanted = ("target", *subjects, *pipeline.included)
    for source in pipeline.sources:
        picks = spread(len(source), scan)
        good, found = _count(pipeline, source, picks)
        facts["sources"][source.name] = {**source.report(), **found}
        if not good:
            raise DataError(
                f"{source.name}: no usable record among {len(picks):,}: {found['damaged']}"
            )
        share = -(-samples // len(pipeline.sources))
        for k in spread(len(good), share):
            shown = pictures(source[good[k]], pipeline.frame, wanted)
            rows.append({name: shown.get(name) for name in _COLUMNS})
    sheet = try_on_sheet(rows[:samples])
    (out_dir / "samples.png").write_bytes(sheet)
    note = "One record a row, at the sizes that the model takes."
    (out_dir / "index.html").write_text(page(facts, sheet, note), "utf-8")
    facts["files"] = [str(out_dir / "samples.png"), str(out_dir / "index.html")]
    return facts


def _count(
    pipeline: TryOnPipeline, source: TryOnSource, indices: Sequence[int]
) -> tuple[list[int], dict[str, Any]]:
    """Usable records, and what was counted."""
    subjects = [True] * (pipeline.person_prob > 0) + [False] * (pipeline.person_prob < 1)
    good: list[int] = []
    damaged: dict[str, dict[str, Any]] = {}
    lacking: dict[str, int] = {}
    for index in tqdm(indices, source.name, leave=False, unit="record", disable=None):
        rng = np.random.default_rng(0)
        try:
            record = source[index]
            for person in subjects:
                made = pipeline.example(record, Conditions(person, True, True, True), rng)
        except BadRecordError as e:
            first = {"records": 0, "first": f"{source.record_id(index)}: {e.detail}"}
            damaged.setdefault(e.reason, first)["records"] += 1
            continue
        good.append(index)
        for name in made.repaired:
            lacking[name] = lacking.get(name, 0) + 1
    counts = {"looked_at": len(indices), "usable": len(good), "damaged": damaged}
    return good, {**counts, "lacking": lacking}
