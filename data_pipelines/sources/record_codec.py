"""Records as bytes (msgpack, never pickle): what ArrayRecord files hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from data_pipelines.images import image_bytes
from data_pipelines.records import BadRecordError, ImageLike, ImageTextRecord, Region

VERSION = 1


def encode_record(record: ImageTextRecord) -> bytes:
    """A record with its picture embedded.

    Encoded pictures are kept byte for byte; arrays are kept raw; a path is read.

    Raises:
      BadRecordError: missing_file; invalid_utf8 (a text with lone surrogates); malformed_record
        (`extra` holds something other than numbers, texts, lists and dicts).
    """
    fields: dict[str, Any] = {
        "v": VERSION,
        "id": record.id,
        "image": _encode_image(record.image),
        "short": list(record.short_captions),
        "long": record.long_caption,
        "regions": [
            [list(r.box), r.phrase, r.long_phrase, list(r.negatives), r.label, r.score]
            for r in record.regions
        ],
        "extra": record.extra,
    }
    try:
        return msgpack.packb(fields, use_bin_type=True, default=_plain)
    except UnicodeEncodeError as e:
        raise BadRecordError("invalid_utf8", f"record {record.id}: {e}") from e
    except (TypeError, ValueError, OverflowError) as e:
        raise BadRecordError("malformed_record", f"record {record.id}: {e}") from e


def decode_record(data: bytes) -> ImageTextRecord:
    """The inverse of `encode_record`; lists in `extra` stay lists.

    Raises BadRecordError("malformed_record").
    """
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=False)
        if fields["v"] != VERSION:
            raise ValueError(f"version {fields['v']}, this program reads {VERSION}")
        return ImageTextRecord(
            id=fields["id"],
            image=_decode_image(fields["image"]),
            short_captions=tuple(fields["short"]),
            long_caption=fields["long"],
            regions=tuple(
                Region(tuple(box), phrase, long, tuple(negatives), label, score)
                for box, phrase, long, negatives, label, score in fields["regions"]
            ),
            extra=fields["extra"],
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
        raise BadRecordError("malformed_record", f"{len(data)} bytes: {e!r}") from e


def embed_image(record: ImageTextRecord) -> ImageTextRecord:
    """The record with a picture given by path read into bytes."""
    if not isinstance(record.image, Path):
        return record
    return dataclasses.replace(record, image=image_bytes(record.image))


def _encode_image(image: ImageLike) -> Any:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise BadRecordError(
                "malformed_record", f"image array: expected uint8, found {image.dtype}"
            )
        return [list(image.shape), image.tobytes()]
    return image_bytes(image)


def _decode_image(stored: Any) -> bytes | np.ndarray:
    if isinstance(stored, bytes):
        return stored
    shape, data = stored
    return np.frombuffer(data, np.uint8).reshape(shape)


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays in `extra` as plain ones."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"extra: cannot store {type(value).__name__}")
