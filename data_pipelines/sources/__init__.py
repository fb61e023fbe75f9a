"""Sources: files in their published layouts, read as typed records."""

from data_pipelines.sources.array_record import ArrayRecords, BuildReport, write_array_record
from data_pipelines.sources.base import InMemory, Mixture, Source
from data_pipelines.sources.coco import Coco
from data_pipelines.sources.finehard import FineHard
from data_pipelines.sources.jsonl import JsonLines
from data_pipelines.sources.parquet import Parquet
from data_pipelines.sources.tfds import Tfds
from data_pipelines.sources.webdataset import WebDataset

__all__ = [
    "ArrayRecords",
    "BuildReport",
    "Coco",
    "FineHard",
    "InMemory",
    "JsonLines",
    "Mixture",
    "Parquet",
    "Source",
    "Tfds",
    "WebDataset",
    "write_array_record",
]
