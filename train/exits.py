"""Exit codes, and the errors that a person is expected to meet.

Every error of this module carries one complete message (what, expected, found, what to do) and is
printed without a traceback by the command line; `--debug` shows the traceback.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager


class ExitCode(enum.IntEnum):
    """What a process of `jaxmods` ends with."""

    OK = 0
    ERROR = 1
    USAGE = 2
    PREEMPTED = 10  # stopped by a signal, state saved: run the same command again
    HOST_LOST = 11
    OUT_OF_MEMORY = 12
    NON_FINITE = 13
    DATA = 14  # nothing to read, or more bad records than the pipeline allows


class UserError(RuntimeError):
    """Something the caller can put right. `code` is the exit code that belongs to it."""

    code = ExitCode.ERROR


class UsageError(UserError):
    """A wrong name, option or value on the command line."""

    code = ExitCode.USAGE


class NonFiniteError(UserError):
    """NaN or infinity in the loss or in a gradient norm.

    Attributes:
      step: step that was refused (its update was not applied).
      record_ids: records of the batch, in order.
    """

    code = ExitCode.NON_FINITE

    def __init__(self, message: str, step: int, record_ids: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.record_ids = record_ids


@contextmanager
def as_user_error() -> Iterator[None]:
    """Errors about weights are the caller's to put right: one message, no traceback."""
    from jaxmods.weights import WeightError

    try:
        yield
    except (WeightError, ImportError) as error:
        raise UserError(str(error)) from error


def classify(error: BaseException) -> ExitCode:
    """Exit code for any exception that ended a command."""
    from data_pipelines.batch import DataError

    if isinstance(error, UserError):
        return error.code
    if isinstance(error, DataError):
        return ExitCode.DATA
    text = str(error)
    if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
        if "RESOURCE_EXHAUSTED" in text:
            return ExitCode.OUT_OF_MEMORY
        lost = ("heartbeat", "UNAVAILABLE", "coordination service", "DEADLINE_EXCEEDED")
        if any(word in text for word in lost):
            return ExitCode.HOST_LOST
    if isinstance(error, MemoryError):
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.ERROR
