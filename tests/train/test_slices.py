"""Meshes over several slices: only the axis "data" may cross the network between them."""

from __future__ import annotations

import dataclasses
import random

import pytest

from jaxmods.partitioning import MeshShape, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh construction asks of a device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int) -> list[Chip]:
    """Slices of 4 x 4 chips, in no order."""
    found = [
        Chip(16 * s + i, s, (i % 4, i // 4, 0), 4 * s + i // 4)
        for s in range(slices)
        for i in range(16)
    ]
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize(("slices", "data"), [(2, 4), (3, 6), (4, 8)])
def test_data_is_the_axis_between_slices(slices: int, data: int) -> None:
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2), chips(slices))
    assert dict(mesh.shape) == {"data": data, "fsdp": 4, "tensor": 2, "context": 1}
    rows = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert rows == [{s} for s in range(slices) for _ in range(2)]


def test_a_mesh_that_would_split_a_slice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 slices, found 1; set mesh\.data to 2"):
        make_mesh(MeshShape(data=1, fsdp=32), chips(2))
