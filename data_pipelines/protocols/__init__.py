"""Evaluation by named protocol: published ones by name, and generic ones over any source."""

from data_pipelines.protocols.base import (
    EvalResult,
    Functions,
    IncomparableError,
    Metric,
    Panel,
    Protocol,
)
from data_pipelines.protocols.captions import SourceRetrieval
from data_pipelines.protocols.classes import SourceBoxClassification, SourceClassification
from data_pipelines.protocols.negatives import SourceHardNegatives
from data_pipelines.protocols.published import PROTOCOLS, PublishedProtocol
from data_pipelines.protocols.regions import RegionRetrieval
from data_pipelines.protocols.try_on import TryOn
from data_pipelines.protocols.try_on_folders import TryOnFolders

__all__ = [
    "PROTOCOLS",
    "EvalResult",
    "Functions",
    "IncomparableError",
    "Metric",
    "Panel",
    "Protocol",
    "PublishedProtocol",
    "RegionRetrieval",
    "SourceBoxClassification",
    "SourceClassification",
    "SourceHardNegatives",
    "SourceRetrieval",
    "TryOn",
    "TryOnFolders",
]
