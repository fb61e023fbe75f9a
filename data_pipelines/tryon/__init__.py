"""Virtual try-on: sources of `TryOnRecord`s and the pipeline that makes batches of them."""

from data_pipelines.tryon.jsonl import TryOnLines
from data_pipelines.tryon.pipeline import TryOnPipeline
from data_pipelines.tryon.published import (
    Combined,
    DressCode,
    FashionTryOn,
    IgPair,
    InTheWild,
    VitonHd,
    ViViD,
)
from data_pipelines.tryon.source import TryOnRecords, TryOnSource

__all__ = [
    "Combined",
    "DressCode",
    "FashionTryOn",
    "IgPair",
    "InTheWild",
    "TryOnLines",
    "TryOnPipeline",
    "TryOnRecords",
    "TryOnSource",
    "ViViD",
    "VitonHd",
]
