"""Counting rules against plain loops, on ties, at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmods import metrics


def _loop_recall(image: np.ndarray, text: np.ndarray, owner: np.ndarray, k: int) -> tuple:
    """The official counting, written as loops over a dense float32 matrix."""
    a = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float64)
    b = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float64)
    similarity = (a @ b.T).astype(np.float32)
    i2t = 0
    for i, row in enumerate(similarity):
        best = np.argsort(row, kind="stable")[-k:]
        i2t += any(owner[j] == i for j in best)
    t2i = 0
    for j, row in enumerate(similarity.T):
        best = np.argsort(row, kind="stable")[-k:]
        t2i += owner[j] in best
    return i2t / len(image), t2i / len(text)


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_recalls_equal_loops_for_any_blocking(block: int) -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(17), rng.integers(1, 7, 17))
    image = rng.normal(size=(17, 6))
    text = image[owner] + rng.normal(size=(len(owner), 6))
    ours = metrics.retrieval_recalls(image, text, owner, ks=(1, 3, 10), block_entries=block)
    for k in (1, 3, 10):
        assert (ours[f"i2t_r{k}"], ours[f"t2i_r{k}"]) == _loop_recall(image, text, owner, k)


def test_recalls_with_equal_captions_equal_loops() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(-1, 2, (12, 3)) + 0.5
    text = image[rng.permutation(12)]
    owner = np.arange(12)
    ours = metrics.retrieval_recalls(image, text, owner, ks=(1, 5))
    for k in (1, 5):
        assert (ours[f"i2t_r{k}"], ours[f"t2i_r{k}"]) == _loop_recall(image, text, owner, k)


def test_a_collapsed_model_scores_chance() -> None:
    owner = np.repeat(np.arange(50), 5)
    image, text = np.ones((50, 4)), np.ones((250, 4))
    ours = metrics.retrieval_recalls(image, text, owner)
    assert ours["t2i_r1"] == 1 / 50
    assert ours["t2i_r10"] == 10 / 50
    assert ours["i2t_r5"] == 1 / 50


def test_chance_is_what_random_orders_give() -> None:
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 1, 1, 3])
    chance = metrics.retrieval_chance(8, owner, ks=(1, 3))
    seen = {name: [] for name in chance}
    for _ in range(400):
        image, text = rng.normal(size=(8, 4)), rng.normal(size=(len(owner), 4))
        for name, value in metrics.retrieval_recalls(image, text, owner, ks=(1, 3)).items():
            seen[name].append(value)
    for name, values in seen.items():
        spread = 5 * np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - chance[name]) < spread


def test_recall_chance_when_everything_is_looked_at() -> None:
    assert metrics.recall_chance([1, 2], 5, 10) == 1.0


def test_broken_features_are_an_error_and_not_a_perfect_score() -> None:
    bad = np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 rows"):
        metrics.retrieval_recalls(bad, np.ones((3, 2)), np.arange(3))
    with pytest.raises(ValueError, match="none for query 1"):
        metrics.best_ranks(np.ones((2, 2)), [0, 9], np.ones((2, 2)), [0, 1])


def test_class_vectors_are_the_normalised_mean_of_normalised() -> None:
    texts = np.array([[[3.0, 0.0], [0.0, 0.5]], [[0.0, 2.0], [0.0, 9.0]]])
    expected = [[np.sqrt(0.5), np.sqrt(0.5)], [0.0, 1.0]]
    np.testing.assert_allclose(metrics.class_vectors(texts), expected, atol=1e-7)


def test_label_ranks_count_scores_and_ties_by_index() -> None:
    classes = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    features = np.array([[500.0, 1.0], [500.0, 1.0], [500.0, 1.0]])
    ranks = metrics.label_ranks(features, classes, [0, 1, 2], block_entries=3)
    assert ranks.tolist() == [0, 1, 2]
    assert metrics.top_accuracy(ranks, (1, 2)) == {"top1": 1 / 3, "top2": 2 / 3}
    assert metrics.top_chance(3, (1, 5)) == {"top1": 1 / 3, "top5": 1.0}
    with pytest.raises(ValueError, match=r"0\.\.2"):
        metrics.label_ranks(features, classes, [0, 1, 3])


def test_long_box_vectors_do_not_underflow() -> None:
    """Softmax probabilities of these scores are 0 for all but the best; the order remains."""
    rng = np.random.default_rng(3)
    classes = metrics.normalise(rng.normal(size=(20, 8)))
    boxes = 1e4 * rng.normal(size=(30, 8))
    order = np.argsort(-(boxes @ classes.T), axis=1)
    for place in range(20):
        assert (metrics.label_ranks(boxes, classes, order[:, place]) == place).all()


def test_hard_negatives_ragged_and_tied() -> None:
    box = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    right, wrong = np.array([1.0, 0.1]), np.array([0.1, 1.0])
    texts = np.stack(
        [
            np.stack([right, wrong, wrong]),
            np.stack([right, wrong, np.full(2, np.nan)]),
            np.stack([right, right, wrong]),
        ]
    )
    mask = np.array([[True, True, True], [True, True, False], [True, True, False]])
    scores = metrics.hard_negative_scores(box, texts, mask)
    assert scores[1, 2] == -np.inf
    assert metrics.hard_negative_correct(scores).tolist() == [True, False, True]
    assert metrics.hard_negative_chance(mask) == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="true phrase in entry 0"):
        metrics.hard_negative_scores(box, texts, mask)
