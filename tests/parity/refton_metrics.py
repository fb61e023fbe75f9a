"""RefTON's recorded evaluation: pictures at one height, SSIM, Fréchet and kernel distance."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipelines.protocols.picture_scores import to_height
from jaxmods.metrics.distances import frechet_distance, kernel_distance
from jaxmods.metrics.ssim import ssim
from tests.parity.registry import Case, Kind, assert_close

METRICS = Kind(
    "refton", "metrics", lambda case: {"gt_u8", "pred_u8", "feat1", "feat2"} <= set(case.shapes)
)


def _resized(case: Case, name: str) -> np.ndarray:
    """uint8 pictures at the height of the generated ones."""
    height = case.shapes["pred_u8"][1]
    return np.stack([np.asarray(to_height(Image.fromarray(p), height)) for p in case.io[name]])


@METRICS.check
def same_height(case: Case) -> None:
    """Both sides at the generated height."""
    for name, expected in (("gt_u8", "gt_resized"), ("pred_u8", "pred_resized")):
        found = _resized(case, name).astype(np.float32).transpose(0, 3, 1, 2) / 255
        assert_close(expected, found, case.io[expected], case.tolerance("resized"))


@METRICS.check
def structural_similarity(case: Case) -> None:
    """SSIM of each pair and of the set."""
    truth, made = (_resized(case, n) / 255 for n in ("gt_u8", "pred_u8"))
    values = ssim(made, truth)
    assert_close("ssim", values, case.io["ssim.per_image"], case.tolerance("ssim"))
    assert_close("ssim of the set", values.mean(), case.io["ssim.dataset"], case.tolerance("ssim"))


@METRICS.check
def distances_of_features(case: Case) -> None:
    """Fréchet distance; kernel distance of one subset and of clean-fid's hundred."""
    a, b = case.io["feat1"], case.io["feat2"]
    assert_close("fid", frechet_distance(a, b), case.io["fid"], case.tolerance("fid"))
    hundred = case.io["kid.cleanfid_100subsets_numpy_seed0"]
    assert_close("kid", kernel_distance(a, b), hundred, case.tolerance("kid"))
    size = min(len(a), len(b))
    first = kernel_distance(a[:size], b[:size], subsets=1, subset_size=size)
    single = case.io[f"kid.single_subset_first{size}"]
    assert_close("kid of one subset", first, single, case.tolerance("kid"))
