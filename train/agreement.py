"""At the start: who takes part, whether all hosts run the same thing, and see the same folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from train.exits import UserError
from train.peers import Peers
from train.recipes import Recipe
from train.runtime import code_version, versions

LOG = logging.getLogger("train")

_VISIBLE = 6.0  # seconds for a new file to be seen on another host
_SKEW = 5.0  # seconds between clocks above which it is said


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that must be the same on all hosts.

    Attributes:
      name: what it is. value: compared and shown. advice: what to do where it differs.
    """

    name: str
    value: str
    advice: str


def items(recipe: Recipe, fingerprint: str | None = None) -> tuple[Item, ...]:
    """What has to agree before a job may begin.

    Args:
      fingerprint: of the training data; None where it is not used.
    """
    found = versions()
    devices = jax.local_devices()
    result = [
        Item("recipe", recipe.document()["hash"], "give the same recipe and --set on every host"),
        Item("code", code_version(), "install the same version of jaxmods on every host"),
        Item(
            "versions",
            ", ".join(f"{k} {found[k]}" for k in ("python", "jax", "jaxlib") if k in found),
            "install the same packages on every host",
        ),
        Item(
            "devices",
            f"{len(devices)} {devices[0].device_kind}",
            "use hosts with equally many devices of one kind, all of them free",
        ),
    ]
    if fingerprint is not None:
        advice = "put the same data on every host (jaxmods data inspect shows what is read)"
        result.append(Item("data", fingerprint, advice))
    return tuple(result)


def compare(everyone: Sequence[Sequence[Item]], names: Sequence[str]) -> str:
    """What differs and where, as text; empty when all agree.

    Expected is what most hosts have; where no value has more than another, that of the first.

    Args:
      everyone: the items of each host, in one order. names: of the hosts.
    """
    lines = []
    for row in zip(*everyone, strict=True):
        counts = Counter(item.value for item in row)
        expected, _ = counts.most_common(1)[0]  # the first of the most frequent
        for item, name in zip(row, names, strict=True):
            if item.value != expected:
                lines.append(
                    f"  {item.name}: process {name}: expected {expected}, found {item.value}; "
                    f"{item.advice}"
                )
    return "the hosts of this job do not agree:\n" + "\n".join(lines) if lines else ""


def check(peers: Peers, recipe: Recipe, fingerprint: str | None = None) -> list[str]:
    """Compare all hosts. Called by all.

    Returns:
      One line per host: number, name, devices, clock.

    Raises:
      UserError: on all hosts, naming those that differ from the majority.
    """
    mine = [dataclasses.astuple(item) for item in items(recipe, fingerprint)]
    gathered: list[Any] = peers.collect(mine)
    everyone = [[Item(*fields) for fields in host] for host in gathered]
    problem = peers.share(compare(everyone, [str(m) for m in peers.members]))
    if problem:
        raise UserError(problem)
    devices = next(value for name, value, _ in mine if name == "devices")
    return [
        f"process {m}, pid {m.pid}: {devices}, clock {m.ahead:+.1f} s"
        + (" (clocks differ; times in logs will too)" if abs(m.ahead) > _SKEW else "")
        for m in peers.members
    ]


def check_shared(peers: Peers, folder: Path) -> None:
    """Make sure that all hosts see the same `folder`, which process 0 has made. Called by all.

    Raises:
      UserError: on all hosts, naming those that do not see it.
    """
    token = peers.share(secrets.token_hex(8))
    mark = folder / f".shared-{token}"
    if peers.index == 0:
        mark.write_text(token, encoding="utf-8")
    peers.wait()
    seen = _sees(mark, token)
    blind = [i for i, there in enumerate(peers.collect(seen)) if not there]
    who = peers.share(", ".join(f"process {peers.members[i]}" for i in blind))
    if peers.index == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    if who:
        raise UserError(
            f"--workdir {folder} is not one folder for all hosts: what process {peers.members[0]} "
            f"writes there is not seen by {who}; give a path on storage that all hosts share "
            "(NFS, Filestore, a mounted bucket)"
        )


def _sees(mark: Path, token: str) -> bool:
    deadline = time.monotonic() + _VISIBLE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if mark.read_text(encoding="utf-8") == token:
                return True
        time.sleep(0.1)
    return False
