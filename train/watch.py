"""Guards of a run: signals that ask it to stop, and tensors that never change."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np

from train.exits import UserError
from train.optim import Group
from train.peers import Peers

LOG = logging.getLogger("train")

_PATIENCE = 100  # steps after which a tensor that trains must have changed


class StopRequestedError(Exception):
    """The run was asked to stop; every step so far is settled."""


class StopSignal:
    """Turns SIGTERM and SIGINT into a request to stop after the present step.

    A second signal acts as it would have without us. Installed only from the main thread.
    """

    def __init__(self, peers: Peers | None = None) -> None:
        """Args: peers: the other processes, which stop at the same step."""
        self._peers = peers
        self._name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    @property
    def name(self) -> str | None:
        """What asked to stop, and on which process where there are several; None for nothing."""
        return self._peers.stop_reason if self._peers is not None else self._name

    def agreed(self) -> bool:
        """Whether to stop here. With several processes all have to ask equally often, and all get
        the same answer."""
        return self._name is not None if self._peers is None else self._peers.stops_here()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._name = signal.Signals(number).name
        self._restore()
        if self._peers is not None:
            self._peers.ask_to_stop(self._name)
        LOG.warning("%s: saving after this step, then stopping", self._name)


class ChangeWatch:
    """Fails a run whose group has not changed at all after 100 steps; warns about single tensors.

    A group with a `start_step` is given 100 steps from there.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[str],
        groups: Mapping[str, Group],
        still: Sequence[str] | None,
        step: int,
    ) -> None:
        """Args:
        names, labels: path and label of each trained tensor.
        still: names that had not changed at `step`; None for a new run.
        """
        self._names, self._labels = list(names), np.asarray(labels)
        unchanged = set(names if still is None else still)
        self._still = np.asarray([n in unchanged for n in names])
        deadlines = {label: group.start_step + _PATIENCE for label, group in groups.items()}
        self._deadlines = {k: v for k, v in deadlines.items() if v > step}

    @property
    def active(self) -> bool:
        """Whether there is anything left to check."""
        return bool(self._deadlines)

    def enter(self, changes: np.ndarray, done: int) -> None:
        """Account for a step. `changes`: squared change of each tensor; `done`: steps done.

        Raises:
          UserError: a whole group is as it was at the start.
        """
        self._still &= changes == 0
        for label in [k for k, v in self._deadlines.items() if v == done]:
            del self._deadlines[label]
            mine = self._labels == label
            names = [n for n, s, m in zip(self._names, self._still, mine, strict=True) if s and m]
            if len(names) == mine.sum():
                raise UserError(
                    f"nothing has changed: no tensor of group {label!r} differs from its start "
                    f"after {done} steps; check its learning rate, its loss, and whether "
                    "precision.params can hold so small an update"
                )
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                LOG.warning(
                    "not changed after %d steps: %s%s; freeze what no loss uses",
                    done,
                    ", ".join(names[:5]),
                    more,
                )

    def state(self) -> list[str]:
        """Names that have not changed yet, for the checkpoint."""
        return [n for n, s in zip(self._names, self._still, strict=True) if s]
