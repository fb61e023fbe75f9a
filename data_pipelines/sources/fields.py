"""The fields of one picture with captions and regions, as own data writes them.

One schema for JSON lines, the `.json` member of webdataset samples, and parquet columns:

  {"image": "photos/0001.jpg",
   "captions": ["a red kettle on a stove"],
   "long_caption": "The photo shows a glossy red kettle standing on a black gas stove ...",
   "width": 640, "height": 480,
   "regions": [{"box": [134, 86, 403, 384], "phrase": "red kettle",
                "long_phrase": "a glossy red kettle with a wooden handle",
                "negatives": ["blue kettle", "red glass kettle"],
                "label": "kettle"}]}

`captions` may be one string; `caption` is read as well. Everything but the picture is optional.
`width` and `height` spare reading the picture's header where boxes are in pixels. `id` overrides
the record's id. Any other field is kept in the record's `extra`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.batch import DataError
from data_pipelines.boxes import PIXELS, BoxConvention, to_canonical
from data_pipelines.images import image_size
from data_pipelines.records import BadRecordError, ImageLike, ImageTextRecord, Region
from data_pipelines.validation import decode_text

RECORD_FIELDS = (
    "id", "image", "caption", "captions", "long_caption", "width", "height", "regions",
)  # fmt: skip
REGION_FIELDS = ("box", "phrase", "long_phrase", "negatives", "label", "score")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes.

    Raises BadRecordError: invalid_utf8, or malformed_record when it is no JSON object.
    """
    text = decode_text(raw, what)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise BadRecordError("malformed_record", f"{what}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise BadRecordError(
            "malformed_record", f"{what}: expected a JSON object, found {type(value).__name__}"
        )
    return value


def record_from_fields(
    fields: Mapping[str, Any], *, record_id: str, image: ImageLike, boxes: BoxConvention
) -> ImageTextRecord:
    """A record from the fields above; `boxes` names the convention of the box numbers.

    Raises BadRecordError: malformed_record (a field of the wrong type), and the picture's reasons
    when its header has to be read for pixel boxes.
    """
    regions = sequence(fields.get("regions"), "regions")
    size = (1, 1)
    if regions and boxes in PIXELS:
        size = declared_size(fields) or image_size(image)
    captions = fields.get("captions", fields.get("caption"))
    extra = {k: v for k, v in fields.items() if k not in RECORD_FIELDS}
    return ImageTextRecord(
        id=str(fields.get("id", record_id)),
        image=image,
        short_captions=strings(captions, "captions"),
        long_caption=optional_string(fields.get("long_caption"), "long_caption"),
        regions=tuple(_region(r, boxes, size) for r in regions),
        extra=extra,
    )


def declared_size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """`(width, height)` as the annotation gives them, or None."""
    width, height = fields.get("width"), fields.get("height")
    if not isinstance(width, int | float) or not isinstance(height, int | float):
        return None
    if not (width >= 1 and height >= 1):
        return None
    return int(width), int(height)


def check_field_names(fields: Mapping[str, Any], where: str) -> None:
    """Refuse what looks like a misspelt field.

    Raises DataError with the field that was probably meant.
    """
    check_names(fields, RECORD_FIELDS, where)
    regions = fields.get("regions")
    for region in regions if isinstance(regions, list) else ():
        if isinstance(region, Mapping):
            check_names(region, REGION_FIELDS, f"{where}: regions")


def canonical_box(box: Any, convention: BoxConvention, size: tuple[int, int]) -> tuple[float, ...]:
    """`to_canonical` with a BadRecordError("malformed_record") where the numbers are none."""
    try:
        return to_canonical(box, convention, *size)
    except (TypeError, ValueError) as e:
        raise BadRecordError("malformed_record", f"box {box!r}: {e}") from e


def sequence(value: Any, what: str) -> list[Any]:
    """A list, empty for None. Raises BadRecordError("malformed_record")."""
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise BadRecordError(
            "malformed_record", f"{what}: expected a list, found {type(value).__name__}"
        )
    return list(value)


def strings(value: Any, what: str) -> tuple[str, ...]:
    """One string or a list of them. Raises BadRecordError: malformed_record, invalid_utf8."""
    items = [value] if isinstance(value, str | bytes) else sequence(value, what)
    return tuple(_string(item, what) for item in items)


def optional_string(value: Any, what: str) -> str | None:
    """A string or None. Raises BadRecordError: malformed_record, invalid_utf8."""
    return None if value is None else _string(value, what)


def _string(value: Any, what: str) -> str:
    if isinstance(value, bytes):
        return decode_text(value, what)
    if not isinstance(value, str):
        raise BadRecordError(
            "malformed_record", f"{what}: expected text, found {type(value).__name__} {value!r:.40}"
        )
    return value


def _region(value: Any, boxes: BoxConvention, size: tuple[int, int]) -> Region:
    if not isinstance(value, Mapping) or "box" not in value:
        raise BadRecordError(
            "malformed_record", f"regions: expected objects with a box, found {value!r:.60}"
        )
    box = canonical_box(value["box"], boxes, size)
    label = optional_string(value.get("label"), "label")
    phrase = optional_string(value.get("phrase"), "phrase")
    score = value.get("score")
    return Region(
        box=(box[0], box[1], box[2], box[3]),
        phrase=phrase if phrase is not None else label or "",
        long_phrase=optional_string(value.get("long_phrase"), "long_phrase"),
        negatives=strings(value.get("negatives"), "negatives"),
        label=label,
        score=float(score) if isinstance(score, int | float) else None,
    )


def check_names(
    fields: Mapping[str, Any], known: tuple[str, ...], where: str, cutoff: float = 0.8
) -> None:
    """Refuse what looks like a misspelling of one of `known`, more alike than `cutoff` (0 to 1).

    Raises DataError with the field that was probably meant.
    """
    for name in fields:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
        if name not in known and near and near[0] not in fields:
            raise DataError(
                f"{where}: unknown field {name!r}; did you mean {near[0]!r}? "
                f"Known fields are {', '.join(known)}"
            )
