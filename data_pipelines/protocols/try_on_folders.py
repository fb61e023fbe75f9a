"""Scores of pictures in folders, as the official `evaluation/eval.py`: results of any program.

    TryOnFolders("DressCode_gt_test/upper_body", "sample_person/upper_body", networks=Networks(...))

A generated picture belongs to the true one whose name has the same eight characters from its first
digit on. Scores are the official script's; a picture without a partner takes part in FID and KID,
which compare the folders as they are, and is counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.batch import DataError
from data_pipelines.images import decode_rgb
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Protocol
from data_pipelines.protocols.picture_scores import (
    PAIRED,
    Networks,
    Score,
    Scores,
    inception_features,
    set_distances,
    through_file,
    to_height,
)

T = TypeVar("T")

_ID = 8  # characters


@dataclasses.dataclass(frozen=True)
class TryOnFolders(Protocol):
    """See the module's description. No function of a model is needed.

    Attributes:
      truth, generated: folders, read with their sub-folders (.jpg and .png).
      paired: SSIM and LPIPS make sense.
      scores: which; None takes those whose networks are named.
      networks: files of the networks. batch_size: pictures per call. label: name in results.
    """

    truth: str
    generated: str
    _: dataclasses.KW_ONLY
    paired: bool = True
    scores: tuple[Score, ...] | None = None
    networks: Networks = dataclasses.field(default_factory=Networks)
    batch_size: int = 8
    label: str = "try_on_folders"

    @property
    def name(self) -> str:
        return self.label

    def check(self) -> None:
        """Also raises ValueError for networks that are not there."""
        self.networks.check(self.scores or (), self.name)
        wrong = [s for s in self.scores or () if s in PAIRED and not self.paired]
        if wrong:
            raise ValueError(f"{self.name}: {', '.join(wrong)} needs paired=True")

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        """Score the folders; `functions` and `panels` are not used."""
        start = time.perf_counter()
        self.check()
        scores = self.scores
        if scores is None:
            scores = self.networks.offered(self.paired)
        truth, generated = pictures_under(self.truth), pictures_under(self.generated)
        height = decode_rgb(generated[0]).height
        resized = decode_rgb(truth[0]).height != height

        def true_pixels(path: Path) -> np.ndarray:
            picture = to_height(decode_rgb(path), height) if resized else decode_rgb(path)
            jpeg = resized and path.suffix.lower() != ".png"
            return through_file(np.asarray(picture), "jpeg" if jpeg else "png")

        by_id = {picture_id(p): p for p in truth}
        pairs = [(by_id[picture_id(p)], p) for p in generated if picture_id(p) in by_id]
        if not pairs:
            raise DataError(
                f"{self.name}: expected pictures of one id in both folders, found none; first "
                f"ids {picture_id(truth[0])} in {self.truth}, {picture_id(generated[0])} in "
                f"{self.generated}"
            )
        totals = Scores([s for s in scores if s in PAIRED], self.networks, self.batch_size)
        if any(s in PAIRED for s in scores):
            for chunk in _chunks(pairs, self.batch_size, "paired scores"):
                first = [to_height(Image.fromarray(true_pixels(t)), height) for t, _ in chunk]
                second = [to_height(decode_rgb(g), height) for _, g in chunk]
                sizes = {p.size for p in (*first, *second)}
                if len(sizes) != 1:
                    raise DataError(
                        f"{self.name}: expected pictures of one size after resizing to height "
                        f"{height}, found {sorted(sizes)} from {chunk[0][1]} on"
                    )
                true, made = (np.stack([np.asarray(p) for p in half]) for half in (first, second))
                totals.add(true, made, [""] * len(chunk))
        values = totals.result() if totals.count else {}
        if "fid" in scores or "kid" in scores:
            sides = []
            for paths, read in ((truth, true_pixels), (generated, _pixels)):
                parts = [
                    inception_features(self.networks, [read(p) for p in chunk], self.batch_size)
                    for chunk in _chunks(paths, self.batch_size, "features")
                ]
                sides.append(np.concatenate(parts))
            values.update(set_distances(scores, *sides))
        counts = {
            "true_pictures": len(truth),
            "generated_pictures": len(generated),
            "generated_without_truth": len(generated) - len(pairs),
        }
        settings = {
            "truth": self.truth,
            "generated": self.generated,
            "height": height,
            "truth_resized": resized,
            "paired": self.paired,
            "scores": list(scores),
        }
        metrics = {name: Metric(value, fraction=False) for name, value in values.items()}
        seconds = time.perf_counter() - start
        return EvalResult(self.name, metrics, settings, len(pairs), seconds, (), counts)


def picture_id(path: Path) -> str:
    """Eight characters of the file name from its first digit on.

    Raises:
      DataError: a name without a digit.
    """
    name = path.name
    first = next((i for i, c in enumerate(name) if c.isdigit()), None)
    if first is None:
        raise DataError(f"{path}: expected a file name with a digit, by which pairs are found")
    return name[first : first + _ID]


def pictures_under(folder: str) -> list[Path]:
    """All .jpg and .png files in a folder and below, sorted.

    Raises:
      DataError: none.
    """
    root = Path(folder).expanduser()
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    if not found:
        raise DataError(f"expected pictures (.jpg, .png) under {root}, found none")
    return found


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(decode_rgb(path))


def _chunks(items: list[T], size: int, title: str) -> Iterator[list[T]]:
    bar: Iterable[T] = tqdm(items, desc=title, unit="picture", leave=False, disable=None)
    stream = iter(bar)
    while chunk := list(itertools.islice(stream, size)):
        yield chunk
