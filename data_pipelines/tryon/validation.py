"""What a usable try-on record is, beyond pictures that can be decoded."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from data_pipelines.records import BadRecordError, TryOnRecord

_GREY = (32, 223)  # levels between which a pixel is neither black nor white


@dataclasses.dataclass(frozen=True)
class TryOnLimits:
    """Limits of a usable record.

    Attributes:
      aspect_tolerance: agnostic photo, mask and DensePose picture show the target's own pixels, so
        their aspect ratio must be the target's, up to this relative difference
        (misaligned_pictures); None does not look.
      max_grey: share of a mask's pixels that may be neither black nor white, and the mean
        difference between its colour channels as a share of 255 (mask_not_binary: a segmentation
        or a photo in the mask's place); None does not look. A black mask is refused as mask_empty.
    """

    aspect_tolerance: float | None = 0.03
    max_grey: float | None = 0.25


def check_alignment(
    name: str, picture: Image.Image, target: Image.Image | None, limits: TryOnLimits
) -> None:
    """Raise BadRecordError("misaligned_pictures") when `picture` cannot lie over the target."""
    if target is None or limits.aspect_tolerance is None:
        return
    ratio = (picture.width * target.height) / (picture.height * target.width)
    if abs(ratio - 1) > limits.aspect_tolerance:
        raise BadRecordError(
            "misaligned_pictures",
            f"{name} is {picture.width}x{picture.height}, the target {target.width}x"
            f"{target.height}: expected the same aspect ratio; do they belong together?",
        )


def check_mask(mask: np.ndarray, limits: TryOnLimits) -> None:
    """Raise BadRecordError (mask_not_binary, mask_empty) when uint8 [h, w, 3] is no mask."""
    if limits.max_grey is None:
        return
    grey = float(np.mean((mask > _GREY[0]) & (mask < _GREY[1])))
    colour = float(np.ptp(mask.astype(np.int16), axis=-1).mean()) / 255
    if grey > limits.max_grey or colour > limits.max_grey:
        raise BadRecordError(
            "mask_not_binary",
            f"{grey:.0%} of the pixels are neither black nor white, colour channels differ by "
            f"{colour:.0%}: expected a black and white mask",
        )
    if not (mask >= _GREY[1]).any():
        raise BadRecordError("mask_empty", "expected a white region to fill, found none")


def check_shares(record: TryOnRecord) -> None:
    """Raise BadRecordError("malformed_record") when variants and their shares do not agree."""
    shares = record.agnostic_shares
    if shares and (len(shares) != len(record.agnostic) or min(shares) < 0 or sum(shares) <= 0):
        raise BadRecordError(
            "malformed_record",
            f"expected {len(record.agnostic)} shares, one per agnostic picture, found {shares}",
        )
