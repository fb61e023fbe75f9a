"""What has to be settled before JAX is imported, and what is known about devices.

This module imports nothing heavy: the command line calls `settle_platform` first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Dense bfloat16 peak of one JAX device, FLOP/s, from the vendors' data sheets. A tpu7x chip shows
# as two devices.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


# PCI numbers of Google and of its chips (v3 to tpu7x); other Google devices are network and disks.
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def tpu_attached(pci: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this machine has a TPU, by its device files or on its bus."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    if any(Path("/dev/vfio").glob("[0-9]*")) and "TPU_NAME" in os.environ:
        return True
    for vendor in pci.glob("*/vendor"):
        try:
            numbers = [vendor.with_name(n).read_text().strip() for n in ("vendor", "device")]
        except OSError:
            continue
        if numbers[0] == _GOOGLE and numbers[1] in _TPUS:
            return True
    return False


def settle_platform() -> str | None:
    """Choose JAX's platform quietly when the environment leaves it open.

    Without an accelerator JAX would try every plugin that is installed and report each failure;
    here the CPU is chosen instead. Returns a sentence when an accelerator is present that cannot
    be used (nothing falls back silently), else None.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if os.environ.get("JAX_PLATFORMS") or "jax" in sys.modules:
        return None
    if tpu_attached():
        if importlib.util.find_spec("libtpu"):
            return None
        os.environ["JAX_PLATFORMS"] = "cpu"
        return (
            "a TPU is present but libtpu is not installed, using the CPU; pip install jaxmods[tpu]"
        )
    if any(Path("/dev").glob("nvidia[0-9]*")):
        plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
        if any(importlib.util.find_spec(p) for p in plugins):
            return None
        os.environ["JAX_PLATFORMS"] = "cpu"
        return "a GPU is present but JAX's CUDA plugin is not installed, using the CPU"
    os.environ["JAX_PLATFORMS"] = "cpu"
    return None


def use_compilation_cache() -> Path | None:
    """Keep compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or the user's cache.

    CPU programs are specific to the processor, so each kind has its own folder. Returns the
    folder; None when it cannot be written.
    """
    import jax

    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen:
        return Path(chosen)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "jaxmods" / "xla" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _machine() -> str:
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None when the kind is not in the table (as CPUs)."""
    import jax

    devices = jax.devices()
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


def versions() -> dict[str, str]:
    """Versions that a run's result may depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in ("jaxmods", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> str:
    """Version of the package and a hash of its source: equal where the same code runs."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for package in ("jaxmods", "train", "configs", "data_pipelines"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return f"{versions().get('jaxmods', '(not installed)')} {digest.hexdigest()[:12]}"


def device_summary() -> dict[str, Any]:
    """Kind and number of devices and processes."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }
