"""Counting rules of evaluations: pure functions from features to numbers, on the host."""

from jaxmods.metrics.classification import class_vectors, label_ranks, top_accuracy, top_chance
from jaxmods.metrics.hard_negatives import (
    hard_negative_chance,
    hard_negative_correct,
    hard_negative_scores,
)
from jaxmods.metrics.numeric import normalise
from jaxmods.metrics.retrieval import (
    best_ranks,
    recall_at,
    recall_chance,
    retrieval_chance,
    retrieval_recalls,
)

__all__ = [
    "best_ranks",
    "class_vectors",
    "hard_negative_chance",
    "hard_negative_correct",
    "hard_negative_scores",
    "label_ranks",
    "normalise",
    "recall_at",
    "recall_chance",
    "retrieval_chance",
    "retrieval_recalls",
    "top_accuracy",
    "top_chance",
]
