"""FG-CLIP: counting rules of the official evaluation scripts, from recorded features."""

from __future__ import annotations

import re

import numpy as np

from jaxmods import metrics
from tests.parity.registry import Case, Kind, assert_close

EVAL = Kind(
    "fgclip",
    "eval",
    lambda case: bool(
        {"in.class_template_texts", "in.fgovd_roi", "in.short_captions"} & set(case.shapes)
    ),
)


def _recalls(case: Case, captions: str, prefix: str) -> None:
    """Every `out.<prefix>_{i2t,t2i}_r<k>` of the case, exactly."""
    found = [re.fullmatch(rf"out\.{prefix}_(i2t|t2i)_r(\d+)", name) for name in case.io]
    wanted = {m.group(0): (m.group(1), int(m.group(2))) for m in found if m}
    assert wanted, f"{case.id}: no recalls named out.{prefix}_*"
    image, text = case.io["in.image"], case.io[captions]
    assert len(text) % len(image) == 0
    owner = np.arange(len(text)) // (len(text) // len(image))
    ks = sorted({k for _, k in wanted.values()})
    ours = metrics.retrieval_recalls(image, text, owner, ks=ks)
    blocked = metrics.retrieval_recalls(image, text, owner, ks=ks, block_entries=7 * len(image))
    assert blocked == ours
    for name, (direction, k) in wanted.items():
        expected = case.io[name]
        actual = np.asarray(ours[f"{direction}_r{k}"], expected.dtype)
        assert actual == expected, f"{name}: expected {expected}, found {actual}"


@EVAL.check
def short_retrieval(case: Case) -> None:
    """R@k with several captions per image."""
    _recalls(case, "in.short_captions", "short")


@EVAL.check
def long_retrieval(case: Case) -> None:
    """R@k with one caption per image."""
    _recalls(case, "in.long_captions", "long")


@EVAL.check
def class_vectors(case: Case) -> None:
    """Zero-shot classifier from template texts."""
    ours = metrics.class_vectors(case.io["in.class_template_texts"])
    assert_close("class_weights", ours, case.io["out.class_weights"], case.tolerance("tensors"))


@EVAL.check
def box_probabilities(case: Case) -> None:
    """softmax(100 * roi . class vectors), the scores behind the ranking."""
    vectors = metrics.class_vectors(case.io["in.class_template_texts"]).astype(np.float64)
    logits = 100.0 * case.io["in.roi"].astype(np.float64) @ vectors.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    ours = weights / weights.sum(axis=1, keepdims=True)
    assert_close("box_probs", ours, case.io["out.box_probs"], case.tolerance("tensors"))


@EVAL.check
def box_classification(case: Case) -> None:
    """Top-1 exactly; top-5 within the number of rows that the case itself allows."""
    labels = case.io["in.roi_labels"]
    vectors = metrics.class_vectors(case.io["in.class_template_texts"])
    ranks = metrics.label_ranks(case.io["in.roi"], vectors, labels)
    ours = metrics.top_accuracy(ranks)
    top1 = case.io["out.box_top1"]
    assert np.asarray(ours["top1"], top1.dtype) == top1, f"expected {top1}, found {ours['top1']}"
    stated = re.search(r"below (\d[\d.]*e-?\d+)", str(case.meta["tolerance"]))
    assert stated, f"{case.id}: the tolerance does not say which probabilities count as 0"
    own = np.take_along_axis(case.io["out.box_probs"], labels[:, None], axis=1)
    allowed = int((own < float(stated.group(1))).sum())
    gap = round(abs(ours["top5"] - float(case.io["out.box_top5"])) * len(labels))
    assert gap <= allowed, f"box_top5: {gap} rows differ, the case allows {allowed}"


@EVAL.check
def hard_negatives(case: Case) -> None:
    """FG-OVD accuracy; exact ties with entry 0 are right."""
    texts = case.io["in.fgovd_texts"]
    mask = np.ones(texts.shape[:2], bool)
    scores = metrics.hard_negative_scores(case.io["in.fgovd_roi"], texts, mask)
    expected = case.io["out.fgovd_acc"]
    actual = np.asarray(metrics.hard_negative_correct(scores).mean(), expected.dtype)
    assert actual == expected, f"fgovd_acc: expected {expected}, found {actual}"
