"""Try-on records as latents that were made once, and the rows of a batch from them.

An encoded record holds, in bfloat16 and without a batch dimension:

  target, garment              [rows, columns, Z]
  person, agnostic             [n, rows, columns, Z]: n is 0 or 1; of agnostic all variants
  mask, dense, reference       [n, rows, columns, Z] in their reduced size; of reference all views
  agnostic_shares              float64 [n], how often each variant is drawn; none for equally often

Conditions are drawn for every example of a batch, with the same random numbers as from pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.encoded import Encoded, EncodedRecord
from data_pipelines.encoding import Piece, Pieces
from data_pipelines.records import BadRecordError, TryOnRecord
from data_pipelines.sampling import Made
from data_pipelines.tryon.draws import Conditions, pick
from data_pipelines.tryon.transforms import Frame
from data_pipelines.tryon.validation import TryOnLimits, check_alignment, check_mask, check_shares

LISTS = ("person", "agnostic", "mask", "dense", "reference")
REDUCED = ("mask", "dense", "reference")
SHARES = "agnostic_shares"
_ENCODE = "encode"  # of the system: pictures uint8 to latents


def pieces_of(record: TryOnRecord, frame: Frame, checks: TryOnLimits) -> Pieces:
    """All pictures of a record; they are checked as in training from pictures.

    Raises:
      BadRecordError: a record without target, or with a picture that cannot be used.
    """
    check_shares(record)
    if record.target is None:
        raise BadRecordError("missing_target", "the record has no picture to learn from")
    target = frame.decode(record.target)
    found = [
        ("target", frame.full(target)),
        ("garment", frame.full(frame.decode(record.garment))),
    ]
    if record.person is not None:
        found.append(("person", frame.full(frame.decode(record.person))))
    for image in record.agnostic:
        picture = frame.decode(image)
        check_alignment("agnostic", picture, target, checks)
        found.append(("agnostic", frame.full(picture)))
    for name, extra in (("mask", record.mask), ("dense", record.dense)):
        if extra is None:
            continue
        picture = frame.decode(extra)
        check_alignment(name, picture, target, checks)
        pixels = frame.map(picture)
        if name == "mask":
            check_mask(pixels, checks)
        found.append((name, pixels))
    found += [("reference", frame.reference(frame.decode(r))) for r in record.references]
    pieces = tuple(Piece((name,), _ENCODE, (pixels,)) for name, pixels in found)
    return Pieces(record.id, pieces, {SHARES: np.asarray(record.agnostic_shares, np.float64)})


def list_forms(frame: Frame) -> dict[str, Piece]:
    """A blank piece for each name that a record may have none or several of."""
    return {
        name: Piece(
            (name,),
            _ENCODE,
            (np.zeros((*(frame.cond_size if name in REDUCED else frame.size), 3), np.uint8),),
        )
        for name in LISTS
    }


def sizes_of(frame: Frame) -> dict[str, Any]:
    """What the pictures depended on."""
    names = ("height", "width", "cond_scale", "resize", "alpha")
    return {name: getattr(frame, name) for name in names}


def check_encoded(source: Encoded, frame: Frame, digest: str) -> None:
    """Raise DataError unless examples were made at these sizes, and by an encoder with this digest
    ("" for any)."""
    found, wanted = source.about.get("sizes", {}), sizes_of(frame)
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        listing = ", ".join(f"{n} {wanted[n]} (encoded: {found.get(n)})" for n in other)
        raise DataError(
            f"{source.folder}: expected examples of the sizes of this recipe, found others: "
            f"{listing}; encode again (jaxmods encode), or set the sizes back"
        )
    made = source.about.get("encoder_digest")
    if digest and digest != made:
        raise DataError(
            f"{source.folder}: expected examples of the encoder {digest} (data.encoded_digest), "
            f"found {made}; encode again with these weights"
        )


def row_of(
    record: EncodedRecord,
    drawn: Conditions,
    rng: np.random.Generator,
    included: Sequence[str],
    *,
    person_from_target: bool,
) -> Made[dict[str, np.ndarray]]:
    """The arrays of one row for given conditions; see `TryOnPipeline.example`.

    Raises:
      BadRecordError: missing_person, missing_agnostic.
    """
    arrays = record.arrays
    variant = pick(len(arrays["agnostic"]), arrays[SHARES].tolist(), rng)
    view = pick(len(arrays["reference"]), (), rng)
    row = {"target": arrays["target"], "garment": arrays["garment"]}
    kind = "person" if drawn.person else "agnostic"
    if drawn.person and not len(arrays["person"]) and person_from_target:
        row["subject"] = arrays["target"]
    elif not len(arrays[kind]):
        raise BadRecordError(f"missing_{kind}", f"the record has no {kind} photo")
    else:
        row["subject"] = arrays[kind][0 if drawn.person else variant]
    repaired: dict[str, int] = {}
    for name in included:
        there, wanted = arrays[name], bool(getattr(drawn, name))
        use = wanted and len(there) > 0
        if wanted and not use:
            repaired[f"no_{name}"] = 1
        row[f"use_{name}"] = np.array(use)
        blank = np.zeros(there.shape[1:], there.dtype)
        row[name] = there[view if name == "reference" else 0] if use else blank
    return Made(row, repaired)
