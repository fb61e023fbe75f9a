"""What `jaxmods sample` needs of a recipe: from files or records to a model's arrays, and back."""

from data_pipelines.samplers.base import (
    Call,
    Conversation,
    Input,
    Made,
    Request,
    Sampler,
    Value,
)

__all__ = ["Call", "Conversation", "Input", "Made", "Request", "Sampler", "Value"]
