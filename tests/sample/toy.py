"""A system that tints pictures and counts letters, small enough to compile at once.

`tests.sample.toy:tinting` on a command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.images import decode_rgb
from data_pipelines.protocols.base import Functions
from data_pipelines.records import BadRecordError, ImageLike
from data_pipelines.samplers.base import Call, Conversation, Input, Made, Request, Sampler
from jaxmods.system import ArraySpec, Params
from tests.train.toy import Regression, regression
from train.experiment import Evaluation, Experiment

HEIGHT, WIDTH = 4, 6
BROKEN = 2  # example of the evaluation data that cannot be used


@dataclasses.dataclass(frozen=True)
class Tinting(Regression):
    """A picture, as bright as `brightness` says, with noise of its own key on it."""

    sampling_fields: ClassVar[tuple[str, ...]] = ("brightness",)

    brightness: float = 0.5

    def sample(self, params: Params, picture: jax.Array, key: jax.Array) -> jax.Array:
        """[n, H, W, 3] in [0, 1]."""
        noise = jax.vmap(lambda k: jax.random.uniform(k, (HEIGHT, WIDTH, 3)))(
            jax.random.wrap_key_data(key)
        )
        shift = params["hidden"]["bias"].mean()
        return jnp.clip(picture / 255 * self.brightness + 0.4 * noise + shift, 0, 1)

    def count(self, params: Params, letters: jax.Array) -> jax.Array:
        """int32 [n]: letters of texts [n, 8] that are not blank."""
        del params
        return (letters > 0).sum(axis=1)

    def functions(self) -> dict[str, Callable[..., Any]]:
        return {"sample": self.sample, "count": self.count}

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        picture = ArraySpec((batch_size, HEIGHT, WIDTH, 3), "uint8", ("batch", None, None, None))
        key = ArraySpec((batch_size, 2), "uint32", ("batch", None))
        return {"sample": {"picture": picture, "key": key}}


class Counting(Conversation):
    """Says how many letters it has heard, in two pieces."""

    commands = ("/more",)

    def __init__(self, functions: Functions) -> None:
        self._functions, self._heard = functions, 0

    def say(self, message: str, inputs: Mapping[str, tuple[Path, ...]]) -> Iterator[str]:
        if len(message) > 8:
            raise ValueError(f"expected at most 8 letters, found {len(message)}")
        self._heard += int(self._functions["count"](letters(message)[None])[0])
        yield f"{self._heard} "
        yield f"letters, {sum(map(len, inputs.values()))} pictures"


def letters(text: str) -> np.ndarray:
    """uint8 [8]."""
    return np.frombuffer(text.encode("ascii").ljust(8, b"\0"), np.uint8)


@dataclasses.dataclass(frozen=True)
class Tints(Sampler):
    """A picture is tinted; without one the letters of the text are counted."""

    examples: int = 6
    rows: int = HEIGHT

    def inputs(self) -> tuple[Input, ...]:
        return (
            Input("picture", "picture", "what is tinted", required=False),
            Input("words", "text", "what is counted", required=False, many=True),
            Input("garment", "picture", "is only looked at", required=False),
        )

    def requires(self) -> tuple[str, ...]:
        return ("sample", "count")

    def count(self) -> int:
        return self.examples

    def example(self, index: int, seed: int) -> Request:
        if index == BROKEN:
            raise BadRecordError("malformed_record", "left out on purpose")
        pixels = np.full((HEIGHT, WIDTH, 3), 20 * index, np.uint8)
        return Request(f"tint/{index}", index, seed, {"picture": (pixels,)}, record=index)

    def call(self, request: Request) -> Call:
        picture = request.one("picture")
        if picture is None:
            return Call("count", (letters("".join(cast(Any, request.inputs["words"]))),))
        size = (WIDTH, self.rows)
        pixels = np.asarray(decode_rgb(cast(ImageLike, picture)).resize(size))
        return Call("sample", (pixels, request.key), pixels)

    def finish(self, request: Request, call: Call, output: Any) -> Made:
        if call.function == "count":
            return Made({"letters": int(output)})
        made = np.asarray(output * 255, np.uint8)
        return Made({"mean": float(output.mean())}, made, {"before": call.kept, "after": made})

    def conversation(self, functions: Functions) -> Conversation | None:
        return Counting(functions)


def tinting() -> Experiment:
    """A picture is tinted."""
    return dataclasses.replace(
        regression(),
        system=Tinting(),
        sampler=Tints(),
        evaluation=Evaluation(batch_size=4),
    )


def silent() -> Experiment:
    """No sampler."""
    return dataclasses.replace(tinting(), sampler=None)


def lacking() -> Experiment:
    """A sampler for a system without the functions it needs."""
    return dataclasses.replace(tinting(), system=Regression())
