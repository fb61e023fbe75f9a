"""Sampling as `jaxmods sample` sees it: the one interface between a recipe and that command.

A recipe hands over a `Sampler` (`Experiment.sampler`), a frozen description. It says what a person
may give (`inputs`), where examples come from when nothing is given (`count`, `example`), and turns
one example into arguments of a named function of the system (`call`) and one row of that function's
result into something to look at (`finish`). The command does everything that is the same for all:
reading the command line and batch files, batches, padding, shardings, compilation, progress,
pictures with metadata, `results.jsonl`, the sheet of all results.

    request = sampler.request(...)     files and texts by name, or a record of the evaluation data
    call = sampler.call(request)       function, and its arguments for one row
    ... the command stacks rows of calls of one function, pads, runs, cuts ...
    made = sampler.finish(request, call, row)

A sampler that talks (streaming tokens, several turns) also has a `conversation`.

The noise of example i depends on (seed, i) alone: `Request.key` is the key of its row, whatever the
size of the batch it is in.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_pipelines.protocols.base import Functions
from data_pipelines.protocols.panels import try_on_sheet
from data_pipelines.records import ImageLike

Value = ImageLike | str  # a picture (path, encoded bytes or pixels), or a text


@dataclasses.dataclass(frozen=True)
class Input:
    """One thing that may be given for an example.

    Attributes:
      name: as in `--input name=...`, and the key in lines of a batch file.
      kind: "picture" (the value is a path) or "text" (the value is the text itself).
      about: what it is, in a few words, for messages and the documentation.
      required: refused without it. many: may be given several times (a list in a batch file).
    """

    name: str
    kind: Literal["picture", "text"]
    about: str
    required: bool = True
    many: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """One example.

    Attributes:
      name: of its results, a file name without ending.
      index: its place among all examples (of the batch file, or of the evaluation data).
      seed: of the whole command.
      inputs: values by input name, in the order given; only names of `Sampler.inputs`.
      record: the record it comes from, for examples of the evaluation data.
    """

    name: str
    index: int
    seed: int
    inputs: Mapping[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    record: Any = None

    @property
    def key(self) -> np.ndarray:
        """Raw threefry key uint32 [2] of this example alone (`jax.random.wrap_key_data`)."""
        return np.array([self.seed, self.index], np.uint32)

    def one(self, name: str) -> Value | None:
        """The (first) value of an input; None where it is not given."""
        values = self.inputs.get(name, ())
        return values[0] if values else None


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of the system and its arguments after the parameters, for one row.

    Attributes:
      function: its name in `System.functions`.
      arrays: one per argument, in order, without the batch dimension. All calls of one function
        have the same shapes and dtypes: those of `System.function_inputs` where it lists them.
      kept: whatever `finish` wants back.
    """

    function: str
    arrays: tuple[np.ndarray, ...]
    kept: Any = None


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of one example.

    Attributes:
      facts: JSON values for its line in `results.jsonl` ("answer", "boxes", ...).
      picture: uint8 [H, W, 3], written under the name of the example; None for none.
      shown: pictures uint8 [H, W, 3] by title for a row of the sheet; None leaves a place empty.
      item: what the sampler's own `sheet` shows of it, where that is something else.
    """

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    picture: np.ndarray | None = None
    shown: Mapping[str, np.ndarray | None] = dataclasses.field(default_factory=dict)
    item: Any = None


class Conversation(abc.ABC):
    """Messages and answers in turn; holds the history. Made by `Sampler.conversation`.

    `commands` are words with a slash that messages to it may begin with ("/ground"); other lines
    with a slash are the terminal's.
    """

    commands: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def say(self, message: str, inputs: Mapping[str, tuple[Path, ...]]) -> Iterator[str]:
        """Pieces of the answer as they come; together they are the answer.

        Args:
          message: what the person typed.
          inputs: pictures attached since the last message, by input name.

        Raises:
          ValueError: a message that does not fit (too long, a picture too many); the history is as
            it was before.
        """


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """See the module's description. Constructing one touches no file."""

    @abc.abstractmethod
    def inputs(self) -> tuple[Input, ...]:
        """What may be given for an example; other names are refused by the command."""

    @abc.abstractmethod
    def requires(self) -> tuple[str, ...]:
        """Names of the functions that `call` may ask for; checked before anything is read."""

    def check(self) -> None:
        """Raise ValueError when the settings cannot work (sizes, missing files)."""
        return None

    @abc.abstractmethod
    def count(self) -> int:
        """Number of examples in the evaluation data; 0 where a recipe has none. May open it."""

    @abc.abstractmethod
    def example(self, index: int, seed: int) -> Request:
        """Example `index` of the evaluation data.

        Raises:
          BadRecordError: it cannot be used; the command says so and goes on with the next.
        """

    @abc.abstractmethod
    def call(self, request: Request) -> Call:
        """The function and its arguments for one example.

        Raises:
          BadRecordError: a picture that cannot be read.
          ValueError: inputs that do not go together, or a text that is too long.
        """

    @abc.abstractmethod
    def finish(self, request: Request, call: Call, output: Any) -> Made:
        """What the example's row of the result is. `output`: tree of host arrays without the batch
        dimension, as the function gives it."""

    def sheet(self, made: Sequence[Made]) -> bytes | None:
        """One PNG of several results; by default their `shown` pictures, an example a row."""
        rows = [m.shown for m in made if m.shown]
        return try_on_sheet(rows) if rows else None

    def conversation(self, functions: Functions) -> Conversation | None:
        """A new conversation (`jaxmods sample --chat`); None for a sampler that does not talk.

        Args:
          functions: all of the system, parameters bound, compiled once per shape of the arguments;
            host or device arrays in, device arrays out, so that caches stay where they are.
        """
        del functions
        return None
