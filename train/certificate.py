"""The certificate that an exported folder holds what it should: findings, and digests of files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jaxmods.weights.writer import write_json
from train.exits import UserError

TOLERANCE = 1e-4  # relative error of a forward pass against PyTorch, fp32
CERTIFICATE = "verify.json"


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `verify` found; `verify.json` holds the same fields.

    Attributes:
      passed: bit-equal, and every relative error within `tolerance` where a comparison was made.
      bit_equal: re-reading the folder through the map gives every parameter back bit for bit.
      differing: parameters that are not bit-equal (first 20).
      tensors, nbytes: what was written.
      forward: "compared", or why no forward pass was compared with PyTorch.
      relative_errors: by output, ‖ours − PyTorch's‖ / ‖PyTorch's‖.
      tolerance: bound on the relative errors.
      versions: packages that took part.
      sha256: digest of every weight file, so that the certificate belongs to these weights.
    """

    passed: bool
    bit_equal: bool
    differing: tuple[str, ...]
    tensors: int
    nbytes: int
    forward: str
    relative_errors: dict[str, float]
    tolerance: float
    versions: dict[str, str | None]
    sha256: dict[str, str]


def one_process() -> None:
    """Raise UserError where several would verify one folder."""
    if jax.process_count() > 1:
        raise UserError(
            f"verify: expected one process, found {jax.process_count()}; run `jaxmods export "
            "--verify` on one host"
        )


def certify(
    folder: Path,
    differing: Sequence[str],
    tensors: int,
    nbytes: int,
    forward: str,
    errors: Mapping[str, float] | None = None,
    tolerance: float = TOLERANCE,
) -> Certificate:
    """The certificate of these findings, left in the folder; arguments as in `Certificate`."""
    errors = dict(errors or {})
    files = sorted(folder.rglob("*.safetensors"))
    certificate = Certificate(
        passed=not differing and all(error <= tolerance for error in errors.values()),
        bit_equal=not differing,
        differing=tuple(differing[:20]),
        tensors=tensors,
        nbytes=nbytes,
        forward=forward,
        relative_errors=errors,
        tolerance=tolerance,
        versions=_versions(),
        sha256={file.relative_to(folder).as_posix(): _digest(file) for file in files},
    )
    fields = dataclasses.asdict(certificate)
    fields["relative_errors"] = {  # JSON has no NaN
        name: error if math.isfinite(error) else str(error) for name, error in errors.items()
    }
    write_json(folder / CERTIFICATE, fields)
    return certificate


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("jaxmods", "jax", "flax", "safetensors", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
