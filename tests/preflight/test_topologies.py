"""Names of TPU slices."""

from __future__ import annotations

import pytest

from train.exits import UsageError
from train.preflight import chips, topologies


@pytest.mark.parametrize(
    ("name", "expected", "chip_count", "devices", "hosts", "wrap"),
    [
        ("v5e:16x16", "v5e:16x16", 256, 256, 64, (True, True)),
        ("v5e-256", "v5e:16x16", 256, 256, 64, (True, True)),
        ("v5litepod-256", "v5e:16x16", 256, 256, 64, (True, True)),
        ("V5E-8", "v5e:2x4", 8, 8, 2, (False, False)),
        ("v6e-64", "v6e:8x8", 64, 64, 16, (False, False)),
        ("v6e-128", "v6e:8x16", 128, 128, 32, (False, True)),
        ("v5p-128", "v5p:4x4x4", 64, 64, 16, (True, True, True)),
        ("v5p-32", "v5p:2x2x4", 16, 16, 4, (False, False, False)),
        ("v5p:4x4x12", "v5p:4x4x12", 192, 192, 48, (True, True, True)),
        ("v4-8", "v4:2x2x1", 4, 4, 1, (False, False, False)),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16, (True, True, True)),
        ("tpu7x-2", "tpu7x:1x1x1", 1, 2, 1, (False, False, False)),
    ],
)
def test_names(name, expected, chip_count, devices, hosts, wrap):
    topology = topologies.parse(name)
    assert topology.name == expected
    assert (topology.chips, topology.devices, topology.hosts) == (chip_count, devices, hosts)
    assert topology.wrap == wrap


def test_slices_multiply():
    topology = topologies.parse("v5e-256", 4)
    assert (topology.chips, topology.devices, topology.hosts) == (1024, 1024, 256)
    assert topology.name == "4 x v5e:16x16"
    assert topology.product == "v5e-256"


def test_every_product_name_leads_back_to_its_shape():
    for kind, shapes in topologies.SHAPES.items():
        for shape in shapes:
            product = topologies.Topology(chips.CHIPS[kind], shape).product
            assert topologies.parse(product).shape == shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-255", "did you mean v5e-256"),
        ("v5e:15x16", "did you mean v5e:16x16"),
        ("v5e:32x32", "shapes of v5e"),
        ("v5p:4x4x6", "shapes of v5p"),
        ("v5p:8x4x4", "did you mean v5p:4x4x8"),
        ("h100-8", "chips: v4, v5e"),
        ("", "expected a chip and its torus"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(UsageError, match=message):
        topologies.parse(name)


def test_slices_must_be_positive():
    with pytest.raises(UsageError, match="--slices"):
        topologies.parse("v5e-256", 0)


def test_peaks_agree_with_those_of_running_chips():
    from train.runtime import PEAK_FLOPS

    for chip in chips.CHIPS.values():
        assert PEAK_FLOPS[chip.device_kind] == chip.peak


def test_the_table_of_the_documentation_is_that_of_the_code():
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "preflight.md"
    assert chips.table() in page.read_text(encoding="utf-8")
