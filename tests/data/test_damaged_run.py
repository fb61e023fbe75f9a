"""One epoch over a folder in which five records in a hundred are damaged, in every known way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_text import ImageTextPipeline
from data_pipelines.images import ImageLimits
from data_pipelines.sampling import Tolerance
from data_pipelines.sources import JsonLines
from data_pipelines.validation import Limits
from tests.data.conftest import encoded, picture

COUNT, EVERY = 400, 20

# Reason of the quarantine, by kind of damage.
KINDS = {
    "truncated": "truncated_image",
    "noise": "undecodable_image",
    "one_pixel": "image_too_small",
    "bomb": "image_too_large",
    "gone": "missing_file",
    "empty_caption": "empty_caption",
    "endless_caption": "caption_too_long",
    "latin1": "invalid_utf8",
    "surrogate": "invalid_utf8",
    "not_json": "malformed_record",
}
# Boxes that are left out or mended while the record stays.
BOXES = {
    "box_nan": [float("nan"), 0.1, 0.5, 0.5],
    "box_inverted": [0.5, 0.1, 0.2, 0.5],
    "box_outside": [1.5, 0.1, 1.8, 0.5],
    "box_empty": [0.2, 0.1, 0.2, 0.5],
    "box_clipped": [0.2, 0.1, 1.02, 0.5],
}
# Pictures that look odd and are fine.
ODD = ("grey", "cmyk", "alpha", "palette", "sixteen_bit")


def _picture(kind: str) -> bytes:
    match kind:
        case "truncated":
            return encoded(picture(64, 64), "JPEG")[:900]
        case "noise":
            return bytes(range(256)) * 4
        case "one_pixel":
            return encoded(picture(1, 1))
        case "bomb":
            return encoded(picture(400, 300), "PNG")
        case "grey":
            return encoded(picture(mode="L"), "JPEG")
        case "cmyk":
            return encoded(picture(mode="CMYK"), "JPEG")
        case "alpha":
            return encoded(picture(mode="RGBA"))
        case "palette":
            return encoded(picture(mode="P"), "GIF")
        case "sixteen_bit":
            values = np.random.default_rng(0).integers(0, 65536, (18, 24)).astype(np.uint16)
            return encoded(Image.fromarray(values))
    return encoded(picture(), "JPEG")


def _line(index: int, kind: str) -> bytes:
    fields = {"image": f"{index}.img", "captions": f"caption {index}", "regions": []}
    if kind in BOXES:
        fields["regions"] = [{"box": BOXES[kind], "phrase": "this one"}]
    fields["regions"].append({"box": [0.1, 0.1, 0.5, 0.5], "phrase": "a cup"})
    if kind == "empty_caption":
        fields["captions"] = " "
    if kind == "endless_caption":
        fields["captions"] = "word " * 2_000
    if kind == "surrogate":
        fields["captions"] = "half \ud800 a pair"
    if kind == "not_json":
        return b'{"image": '
    if kind == "latin1":
        fields["captions"] = "caf\u00e9"
        return json.dumps(fields, ensure_ascii=False).encode("latin-1")
    return json.dumps(fields).encode()


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[JsonLines, dict[str, str]]:
    """The source, and the damage of each record by its number."""
    kinds: dict[int, str] = {}
    for n, kind in enumerate((*KINDS, *KINDS)):
        kinds[n * EVERY + 7] = kind
    for n, kind in enumerate((*BOXES, *ODD)):
        kinds[n * EVERY + 3] = kind
    lines = []
    for i in range(COUNT):
        kind = kinds.get(i, "good")
        lines.append(_line(i, kind))
        if kind != "gone":
            (tmp_path / f"{i}.img").write_bytes(_picture(kind))
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    return JsonLines(str(tmp_path / "mine.jsonl")), kinds


def test_every_damaged_record_is_reported_with_its_reason(damaged, tokenizer_folder):
    source, kinds = damaged
    pipeline = ImageTextPipeline(
        source=source,
        tokenizer=tokenizer_folder,
        image_size=8,
        limits=Limits(image=ImageLimits(max_pixels=100_000)),
        tolerance=Tolerance(max_bad_fraction=0.1),
    )
    stream = pipeline.batches(global_batch=20, seed=1)
    infos = [next(stream).info for _ in range(COUNT // 20)]
    stream.close()

    found = {(q.record_id, q.reason) for info in infos for q in info.quarantined}
    expected = set()
    for i, kind in kinds.items():
        if kind in KINDS:
            unread = kind in ("latin1", "not_json")  # no id could be read from the line
            expected.add((f"row {i + 1}" if unread else f"{i}.img", KINDS[kind]))
    assert found == expected
    assert len(found) == COUNT // EVERY

    used = Counter(name for info in infos for name in info.record_ids)
    good = {f"mine:{i}.img" for i in range(COUNT) if kinds.get(i) not in KINDS}
    assert set(used) == good
    assert used.total() == COUNT

    repaired: Counter[str] = Counter()
    for info in infos:
        repaired.update(info.repaired)
    assert set(repaired) == set(BOXES)
