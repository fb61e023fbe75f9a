"""Finding the pictures that annotations speak of, and saying what is wrong when there are none."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


class Listing:
    """Which files exist, from one directory listing per folder instead of one `stat` per file."""

    def __init__(self, folders: int = 4096) -> None:
        self._names = functools.lru_cache(maxsize=folders)(_names)

    def has(self, path: Path) -> bool:
        """Whether `path` is there (listed when its folder was first looked at)."""
        return path.name in self._names(str(path.parent))


def relative_path(value: str, strip: Iterable[str] = ()) -> str:
    """A published picture path as a clean relative one.

    The first prefix of `strip` that fits is removed, back slashes and a leading slash too.

    Raises:
      BadRecordError: malformed_record when the path climbs out of its root ("..").
    """
    text = value.replace("\\", "/")
    for prefix in strip:
        if text.startswith(prefix):
            text = text[len(prefix) :]
            break
    text = text.lstrip("/")
    if ".." in PurePosixPath(text).parts:
        raise BadRecordError(
            "malformed_record", f"picture path {value!r} leaves its folder; '..' is refused"
        )
    return text


def first_picture(root: Path) -> str:
    """Some picture under `root` (the first in walking order), for messages."""
    if not root.is_dir():
        return f"none: {root} is no folder"
    for folder, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            if name.lower().endswith(PICTURES):
                return os.path.relpath(os.path.join(folder, name), root)
    return f"none under {root}"


def check_match(
    matched: int, total: int, minimum: float, *, path: str, root: Path, field: str
) -> None:
    """Raise DataError when less than `minimum` of the annotations found their pictures.

    `path` is the first annotation path without a picture, `field` the setting that names the root.
    """
    if total and matched < minimum * total:
        raise DataError(
            f"matched {matched:,} of {total:,}; first annotation path {path}, "
            f"first file {first_picture(root)} (under {root}). Set {field} to the folder that the "
            "annotation paths are relative to, or lower data.source.min_match="
            f"{minimum:g} if so many pictures are meant to be missing"
        )


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
