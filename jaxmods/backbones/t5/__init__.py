"""The T5 v1.1 encoder (transformers' T5EncoderModel), and UMT5's."""

from jaxmods.backbones.t5.model import T5Config, T5Encoder, distance_buckets
from jaxmods.backbones.t5.weights import t5_map

__all__ = ["T5Config", "T5Encoder", "distance_buckets", "t5_map"]
