"""Indexes of large files, kept between runs where asked for."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def cached_index(
    folder: str, key: str, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """`build()`, or what it gave before under the same `key`.

    Args:
      folder: where `<key>.npz` lies; "" builds anew each time. Made if absent.
      key: must contain a hash of everything the index depends on.
      build: named arrays without objects (names other than "file").

    A damaged or half-written file is rebuilt; writing is atomic, so several processes may race.
    """
    if not folder:
        return build()
    path = Path(folder).expanduser() / f"{key}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as saved:
                return {name: saved[name] for name in saved.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
    index = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(partial, **index)  # type: ignore[arg-type]  # the stub takes allow_pickle for a name
    os.replace(partial, path)
    return index
