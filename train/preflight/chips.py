"""Constants of TPU chips, per JAX device (a tpu7x chip shows as two devices).

Sources, row by row, in `docs/preflight.md`; `python -m train.preflight.chips` prints its table.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
      kind: name in topologies. device_kind: `jax.Device.device_kind`.
      devices: JAX devices per chip.
      peak: dense bfloat16 FLOP/s of a device.
      hbm: bytes that the compiler lets a program use, of a device.
      hbm_nominal: GiB of a chip on the data sheet.
      hbm_rate: bytes/s of a device.
      link: bytes/s of one inter-chip link in one direction, as achieved.
      dcn: bytes/s of a chip's share of the data-centre network.
      clock: cycles/s behind the compiler's `estimated_cycles`.
    """

    kind: str
    device_kind: str
    devices: int
    peak: float
    hbm: float
    hbm_nominal: int
    hbm_rate: float
    link: float
    dcn: float
    clock: float


CHIPS: dict[str, Chip] = {
    chip.kind: chip
    for chip in (
        Chip("v4", "TPU v4", 1, 275e12, 30.75 * GIB, 32, 1200e9, 45e9, 6.25e9, 1.05e9),
        Chip("v5e", "TPU v5 lite", 1, 197e12, 15.75 * GIB, 16, 819e9, 45e9, 3.1e9, 1.5e9),
        Chip("v5p", "TPU v5", 1, 459e12, 95.73 * GIB, 96, 2765e9, 90e9, 6.25e9, 1.75e9),
        Chip("v6e", "TPU v6 lite", 1, 918e12, 31.24 * GIB, 32, 1638e9, 90e9, 12.5e9, 1.75e9),
        Chip("tpu7x", "TPU7x", 2, 1153.5e12, 94.74 * GIB, 192, 3690e9, 90e9, 6.25e9, 2.2e9),
    )
}

# Seconds per hop between neighbouring chips.
HOP_LATENCY = 1e-6
# The matrix unit's side: narrower heads leave part of it idle.
MXU_WIDTH = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}


def table() -> str:
    """The constants as a Markdown table."""
    rows = [
        ("JAX devices per chip", lambda c: str(c.devices)),
        ("bf16 TFLOP/s per device", lambda c: f"{c.peak / 1e12:g}"),
        ("HBM per chip, GiB nominal", lambda c: str(c.hbm_nominal)),
        ("HBM usable per device, GiB", lambda c: f"{c.hbm / GIB:g}"),
        ("HBM GB/s per device", lambda c: f"{c.hbm_rate / 1e9:g}"),
        ("one link, one way, GB/s", lambda c: f"{c.link / 1e9:g}"),
        ("DCN GB/s per chip", lambda c: f"{c.dcn / 1e9:g}"),
        ("clock of estimated_cycles, GHz", lambda c: f"{c.clock / 1e9:g}"),
    ]
    lines = ["| | " + " | ".join(CHIPS) + " |", "|---" * (len(CHIPS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(show(chip) for chip in CHIPS.values()) + " |"
        for name, show in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
