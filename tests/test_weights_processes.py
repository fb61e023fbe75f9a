"""Import and export by several processes: each reads its own part, the first one writes."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmods.weights import open_weights
from jaxmods.weights.lazy import from_numpy, same_bits
from jaxmods.weights.writer import write_safetensors

PROCESS = textwrap.dedent(
    """
    import dataclasses, os, sys
    from pathlib import Path

    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    import ml_dtypes
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    from jaxmods.weights import (
        Entry, Linear, WeightMap, export_params, import_params, open_weights,
    )
    from jaxmods.weights.reader import WeightReader

    counted = 0

    def counting(tensor):
        def read(bounds):
            global counted
            value = tensor.read(bounds)
            counted += value.nbytes
            return value

        return dataclasses.replace(tensor, read=read)

    weight_map = WeightMap(
        (Entry("l.{i}.w", "l/w", Linear()), Entry("n", "n"), Entry("s", "s"))
    )
    struct = jax.ShapeDtypeStruct
    abstract = {
        "l": {"w": struct((6, 16, 8), ml_dtypes.bfloat16)},
        "n": struct((8,), np.float32),
        "s": struct((), np.float32),
    }
    mesh = Mesh(np.array(jax.devices()), ("d",))
    shardings = {
        "l": {"w": NamedSharding(mesh, P(None, "d"))},
        "n": NamedSharding(mesh, P("d")),
        "s": NamedSharding(mesh, P()),
    }
    reader = open_weights(folder / "in")
    reader = WeightReader("in", {k: counting(t) for k, t in reader.tensors.items()})
    for host_bytes in (1, 1 << 20):
        counted = 0
        params, _ = import_params(
            reader, weight_map, abstract, shardings=shardings, host_bytes=host_bytes
        )
        assert counted == (6 * 16 * 8 * 2 + 8 * 4) // 2 + 4, counted
    export_params(params, weight_map, folder / "out", max_shard_bytes=700)
    assert (folder / "out").exists()
    """
)


@pytest.mark.slow
def test_two_processes_import_their_parts_and_export_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {  # any bits, NaNs with payloads included
        f"l.{i}.w": rng.integers(0, 256, 8 * 16 * 2, np.uint8).view(ml_dtypes.bfloat16)
        for i in range(6)
    }
    arrays = {key: array.reshape(8, 16) for key, array in arrays.items()}
    arrays["n"] = np.array([-0.0, 1, np.nan, 2, np.inf, 3, 4, 5], np.float32)
    arrays["s"] = np.array(2.5, np.float32)
    (tmp_path / "in").mkdir()
    write_safetensors(
        tmp_path / "in" / "model.safetensors", {k: from_numpy(a, k) for k, a in arrays.items()}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(tmp_path)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    found = open_weights(tmp_path / "out").tensors
    assert set(found) == set(arrays)
    for key, array in arrays.items():
        assert same_bits(found[key].all(), array), key
