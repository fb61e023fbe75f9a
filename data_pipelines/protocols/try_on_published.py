"""Figures that RefTON publishes (arXiv 2511.00956, tables 1 and 2), by the names of `TryOn`.

KID is times 1000. The picture size that table 1 was computed at is not stated where it could be
read. The paired mask-free figures ("person") may have been computed with the target photo as the
model's input, which is what the official loader does, or with generated photos: also not stated.
They have not been reproduced here: that needs the published weights and the pictures.
"""

from __future__ import annotations

from typing import Literal

from data_pipelines.protocols.picture_scores import KID

Dataset = Literal["viton-hd", "dresscode"]

# (subject, reference): LPIPS, SSIM, FID, KID of the paired set; FID, KID of the unpaired one.
_TABLE_1: dict[Dataset, dict[tuple[str, bool], tuple[float, ...]]] = {
    "viton-hd": {
        ("agnostic", False): (0.057, 0.873, 5.45, 0.82, 8.58, 1.06),
        ("agnostic", True): (0.049, 0.879, 4.69, 0.68, 8.43, 0.91),
        ("person", False): (0.061, 0.866, 5.98, 1.04, 8.40, 0.81),
        ("person", True): (0.053, 0.872, 5.11, 0.82, 8.32, 0.78),
    },
    "dresscode": {
        ("agnostic", False): (0.037, 0.912, 3.48, 1.20, 5.31, 1.36),
        ("agnostic", True): (0.031, 0.918, 2.94, 0.95, 5.07, 1.15),
        ("person", False): (0.041, 0.901, 3.84, 1.33, 5.00, 1.17),
        ("person", True): (0.035, 0.906, 3.34, 1.15, 5.02, 1.28),
    },
}

# DressCode by category: FID, KID of the paired set; FID, KID of the unpaired one.
_TABLE_2: dict[tuple[str, bool], dict[str, tuple[float, ...]]] = {
    ("agnostic", False): {
        "upper": (7.62, 1.10, 11.13, 0.98),
        "lower": (7.60, 1.38, 13.07, 2.11),
        "dresses": (7.32, 1.30, 11.56, 1.98),
    },
    ("agnostic", True): {
        "upper": (6.39, 0.85, 11.08, 0.87),
        "lower": (6.61, 1.05, 12.56, 1.67),
        "dresses": (6.09, 1.16, 11.16, 1.72),
    },
    ("person", False): {
        "upper": (8.37, 1.43, 11.20, 1.11),
        "lower": (8.79, 1.51, 12.50, 1.83),
        "dresses": (7.36, 1.33, 10.73, 1.41),
    },
    ("person", True): {
        "upper": (7.20, 1.18, 11.53, 1.12),
        "lower": (7.85, 1.21, 12.74, 2.05),
        "dresses": (6.24, 1.20, 10.05, 1.30),
    },
}


def published(
    dataset: Dataset, subject: Literal["person", "agnostic"], reference: bool, paired: bool
) -> tuple[tuple[str, float], ...]:
    """The paper's figures for one setting, for `TryOn.published`."""
    row = _TABLE_1[dataset][subject, reference]
    pick = slice(0, 4) if paired else slice(4, 6)
    names = ("lpips", "ssim", "fid", KID) if paired else ("fid", KID)
    found = list(zip(names, row[pick], strict=True))
    for category, values in _TABLE_2[subject, reference].items() if dataset == "dresscode" else ():
        fid, kid = values[:2] if paired else values[2:]
        found += [(f"fid_{category}", fid), (f"{KID}_{category}", kid)]
    return tuple(found)
