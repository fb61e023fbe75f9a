"""Names of TPU slices, and their devices without the hardware.

Two spellings are understood: chip and torus (`v5e:16x16`), and the product's name (`v5e-256`,
`v5litepod-256`). Product names count what the vendor counts: chips for v5e and v6e, TensorCores
(two per chip) for v4, v5p and tpu7x, so that v5p-128 is 64 chips.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
import sys
from typing import Any

from train.exits import UsageError, UserError
from train.preflight.chips import CHIPS, Chip

_SYNONYMS = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "v7x": "tpu7x",
    "tpu7": "tpu7x",
    "v7": "tpu7x",
}
_CORES_PER_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2, "v5e": 1, "v6e": 1}
_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBES = ((4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
_LARGE = ((8, 8, 16), (8, 16, 16))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v4": (*_BELOW_A_CUBE, *_CUBES, *_LARGE),
    "v5e": _PLANE,
    "v5p": (*_BELOW_A_CUBE, *_CUBES, *_LARGE),
    "v6e": _PLANE,
    "tpu7x": ((1, 1, 1), *_BELOW_A_CUBE, *_CUBES, *_LARGE),
}
_MOST_CHIPS = {"v4": 4096, "v5p": 8960, "tpu7x": 9216}
_CHIPS_PER_HOST = 4

# Settings of libtpu for a process that only compiles. The accelerator type keeps it quiet; it has
# no influence on the target. Several such processes may run beside each other.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

MISSING = (
    "preflight compiles with libtpu, which is not installed: pip install 'jaxmods[preflight]' "
    "(Linux x86-64; no TPU is needed)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices of TPU chips.

    Attributes:
      chip: its kind. shape: the torus in chips. slices: how many, joined by the network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """`v5e:16x16`, with the number of slices where there are several."""
        times = f"{self.slices} x " if self.slices > 1 else ""
        return f"{times}{self.chip.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def product(self) -> str:
        """The product's name of one slice, as `v5p-128`."""
        return f"{self.chip.kind}-{math.prod(self.shape) * _CORES_PER_CHIP[self.chip.kind]}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return max(1, math.prod(self.shape) // _CHIPS_PER_HOST) * self.slices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which physical axes are rings. In a plane those of length 16; in 3D all axes of a slice
        made of whole 4x4x4 cubes."""
        if len(self.shape) == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * 3


def parse(text: str, slices: int = 1) -> Topology:
    """The topology called `text`.

    Raises:
      UsageError: unknown chip or a shape that is not sold, with the nearest names.
    """
    if slices < 1:
        raise UsageError(f"--slices: expected 1 or more, found {slices}")
    match = re.fullmatch(r"([a-z0-9]+?)(?:[:=](\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    kind = _SYNONYMS.get(match[1], match[1]) if match else ""
    if match is None or kind not in CHIPS:
        raise UsageError(
            f"--topology: expected a chip and its torus (v5e:16x16) or a product (v5e-256), "
            f"found {text!r}; {_nearest(text)}chips: {', '.join(CHIPS)}"
        )
    if match[2]:
        shape = tuple(int(side) for side in match[2].split("x"))
        if not _sold(kind, shape):
            ordered = tuple(sorted(shape))
            near = (
                f"did you mean {kind}:{'x'.join(map(str, ordered))}? "
                if _sold(kind, ordered)
                else _nearest(f"{kind}:{match[2]}")
            )
            raise UsageError(
                f"--topology: no {kind} slice has the shape {match[2]}; {near}shapes of {kind}: "
                + ", ".join("x".join(map(str, s)) for s in SHAPES[kind])
            )
        return Topology(CHIPS[kind], shape, slices)
    for shape in SHAPES[kind]:
        topology = Topology(CHIPS[kind], shape, slices)
        if topology.product == f"{kind}-{match[3]}":
            return topology
    raise UsageError(
        f"--topology: no product {kind}-{match[3]}; {_nearest(text)}known: "
        + ", ".join(Topology(CHIPS[kind], s).product for s in SHAPES[kind])
    )


def larger(topology: Topology) -> Topology | None:
    """The next larger slice of the same chip; None when it is the largest that has a name."""
    for shape in SHAPES[topology.chip.kind]:
        if math.prod(shape) > math.prod(topology.shape):
            return dataclasses.replace(topology, shape=shape)
    return None


def _sold(kind: str, shape: tuple[int, ...]) -> bool:
    if shape in SHAPES[kind]:
        return True
    cubes = len(shape) == 3 and kind in _MOST_CHIPS and all(s % 4 == 0 and s for s in shape)
    return cubes and list(shape) == sorted(shape) and math.prod(shape) <= _MOST_CHIPS[kind]


def _nearest(text: str) -> str:
    names = [
        name
        for kind, shapes in SHAPES.items()
        for shape in shapes
        for name in (
            f"{kind}:{'x'.join(map(str, shape))}",
            Topology(CHIPS[kind], shape).product,
        )
    ]
    near = difflib.get_close_matches(text.lower(), names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}? " if near else ""


def require_libtpu() -> None:
    """Raise UserError, naming the extra, when libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(MISSING)


def settle_environment() -> None:
    """Prepare this process for compiling without a TPU: JAX on the CPU, libtpu quiet.

    Raises:
      UserError: JAX already runs on something else.
    """
    os.environ.update(_ENVIRONMENT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
        if jax.default_backend() != "cpu":
            raise UserError(
                f"preflight: expected JAX on the CPU, found {jax.default_backend()}; "
                "run it as a command of its own"
            )
    import jax

    # A compile-only client writes entries of the compilation cache that nobody can read.
    jax.config.update("jax_enable_compilation_cache", False)


def devices(topology: Topology) -> list[Any]:
    """Compile-only devices of `topology`. Call `settle_environment` first.

    Raises:
      UserError: libtpu is missing, or refuses.
    """
    require_libtpu()
    from jax.experimental import topologies

    options: dict[str, Any] = {"wrap": (*topology.wrap, *(False,) * (3 - len(topology.wrap)))}
    if topology.chip.kind == "v4":
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(map(str, topology.shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.chip.kind}:{shape}", **options
        ).devices
    except Exception as error:  # libtpu raises several types, each with a full sentence
        raise UserError(f"preflight: libtpu refuses {topology.name}: {error}") from error
    if len(found) != topology.devices:
        raise UserError(
            f"preflight: expected {topology.devices} devices for {topology.name}, "
            f"libtpu gives {len(found)}; report this with its version"
        )
    return list(found)
