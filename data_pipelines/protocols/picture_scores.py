"""Scores of generated pictures against true ones: SSIM, LPIPS, FID, KID.

Pictures are scored as a script would find them on disk: brought to bytes by truncation and, with
`encoding="jpeg"`, through a JPEG file with Pillow's defaults (quality 75, chroma at half size),
which is how the official RefTON code writes its results. Arithmetic and networks are those of
`jaxmods/metrics`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import jax
import numpy as np
import numpy.typing as npt
from PIL import Image

from jaxmods.metrics import inception, lpips
from jaxmods.metrics.distances import frechet_distance, kernel_distance
from jaxmods.metrics.ssim import ssim
from jaxmods.weights import open_weights

Encoding: TypeAlias = Literal["jpeg", "png"]
Score: TypeAlias = Literal["ssim", "lpips", "fid", "kid"]
SCORES: tuple[Score, ...] = get_args(Score)
PAIRED: tuple[Score, ...] = ("ssim", "lpips")  # compare a picture with its own truth
KID = "kid_x1000"  # the number that papers print

_HELP = {
    "lpips": (
        "lpips_weights",
        "torchvision's squeezenet1_1-b8a52dc0.pth and the heads squeeze.pth of LPIPS 0.1",
    ),
    "fid": ("inception_weights", "pytorch-fid's pt_inception-2015-12-05-6726825d.pth"),
    "kid": ("inception_weights", "pytorch-fid's pt_inception-2015-12-05-6726825d.pth"),
}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Files of the networks that LPIPS, FID and KID need. Nothing is ever downloaded.

    Attributes:
      lpips_weights: files that together hold SqueezeNet and the heads.
      inception_weights: the Inception network of 2015.
    Each may be a PyTorch file (read with PyTorch, tensors only) or safetensors with the same names.
    """

    lpips_weights: tuple[str, ...] = ()
    inception_weights: str = ""

    def check(self, scores: Sequence[Score], where: str) -> None:
        """Raise ValueError when a file that a score needs is not named or not there."""
        for score in scores:
            if score not in _HELP:
                continue
            field, what = _HELP[score]
            value = getattr(self, field)
            files = [value] if isinstance(value, str) else list(value)
            absent = [f for f in files if f and not Path(f).expanduser().is_file()]
            if absent or not any(files):
                found = f"no file at {', '.join(absent)}" if absent else "none is named"
                raise ValueError(
                    f"{where}: {score} needs {what} (or safetensors with the same tensors), and "
                    f"{found}; set networks.{field} or leave {score!r} out of scores"
                )

    def offered(self, paired: bool) -> tuple[Score, ...]:
        """Scores whose networks are named, in the order of `SCORES`; without true pictures to
        compare with (`paired` False) neither SSIM nor LPIPS."""
        there = {
            "ssim": True,
            "lpips": bool(self.lpips_weights),
            "fid": bool(self.inception_weights),
            "kid": bool(self.inception_weights),
        }
        return tuple(s for s in SCORES if there[s] and (paired or s not in PAIRED))

    @functools.cached_property
    def lpips(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """LPIPS of float32 [N, H, W, 3] pairs in 0..1, float32 [N]."""
        params = lpips.load(read_tensors(self.lpips_weights), self.lpips_weights)
        distance = jax.jit(lpips.distance)
        return lambda a, b: np.asarray(distance(params, a, b))

    @functools.cached_property
    def inception(self) -> Callable[[np.ndarray], np.ndarray]:
        """Features float32 [N, 2048] of prepared pictures."""
        files = (self.inception_weights,)
        params = inception.load(read_tensors(files), files)
        features = jax.jit(inception.features)
        return lambda x: np.asarray(features(params, x))


def read_tensors(files: Sequence[str]) -> dict[str, np.ndarray]:
    """All tensors of some weight files. Raises WeightError, or ImportError without PyTorch."""
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        with open_weights(Path(file).expanduser()) as reader:
            tensors.update({name: lazy.all() for name, lazy in reader.tensors.items()})
    return tensors


def to_bytes(pictures: np.ndarray) -> np.ndarray:
    """uint8 of pictures that are uint8 already or float in 0..1, by truncation as the official code
    writes them (`uint8(255 x)`).

    Raises:
      ValueError: an entry that is not finite.
    """
    if pictures.dtype == np.uint8:
        return pictures
    if not np.isfinite(pictures).all():
        raise ValueError("generated pictures: expected finite numbers, found NaN or infinity")
    return (np.asarray(pictures, np.float32) * 255).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, encoding: Encoding) -> bytes:
    """The file that holds uint8 [H, W, 3]; JPEG with Pillow's defaults."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, encoding.upper())
    return out.getvalue()


def through_file(pixels: np.ndarray, encoding: Encoding) -> np.ndarray:
    """What a reader of that file sees, uint8 [H, W, 3]."""
    if encoding == "png":
        return pixels
    return np.asarray(Image.open(io.BytesIO(encoded(pixels, encoding))).convert("RGB"))


def to_height(picture: Image.Image, height: int) -> Image.Image:
    """A picture at the height of the generated ones: Lanczos, width `int(w * height / h)`."""
    if picture.height == height:
        return picture
    width = int(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def inception_input(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [299, 299, 3], 0..255, as clean-fid's mode "clean": bicubic with
    antialiasing on each channel as floats, clipped and not rounded."""
    size = (inception.SIDE, inception.SIDE)
    channels = [
        np.asarray(
            Image.fromarray(pixels[..., c].astype(np.float32)).resize(
                size, Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    return np.stack(channels, -1).clip(0, 255)


def inception_features(
    networks: Networks, pictures: Sequence[np.ndarray] | np.ndarray, rows: int
) -> np.ndarray:
    """Features float32 [n, 2048] of at most `rows` pictures uint8 [H, W, 3] of any sizes."""
    prepared = np.stack([inception_input(p) for p in pictures])
    return networks.inception(_padded(prepared, rows))[: len(pictures)]


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])


class Scores:
    """Adds up scores over batches of pairs.

    Args:
      scores: which ones.
      networks: their files.
      batch_size: rows that the networks are compiled for.
    """

    def __init__(self, scores: Sequence[Score], networks: Networks, batch_size: int) -> None:
        self._scores, self._networks, self._rows = scores, networks, batch_size
        self._values: dict[str, list[float]] = {"ssim": [], "lpips": []}
        self._features: dict[str, list[np.ndarray]] = {"truth": [], "generated": []}
        self._groups: list[str] = []

    def add(self, truth: np.ndarray, generated: np.ndarray, groups: Sequence[str]) -> None:
        """Score pairs uint8 [n, H, W, 3], n at most the batch size; `groups` names a part of the
        set for each, as a garment category."""
        self._groups.extend(groups)
        if "ssim" in self._scores:
            self._values["ssim"].extend(ssim(generated / 255.0, truth / 255.0).tolist())
        if "lpips" in self._scores:
            pair = (_padded(x, self._rows) / np.float32(255) for x in (truth, generated))
            self._values["lpips"].extend(self._networks.lpips(*pair)[: len(truth)].tolist())
        if "fid" in self._scores or "kid" in self._scores:
            for name, pictures in (("truth", truth), ("generated", generated)):
                self._features[name].append(
                    inception_features(self._networks, pictures, self._rows)
                )

    @property
    def count(self) -> int:
        """Pairs so far."""
        return len(self._groups)

    def result(self) -> dict[str, float]:
        """Scores of the whole set, and of each group with two pictures or more as "fid_<group>"
        where there are several groups. KID is given times 1000 (`KID`)."""
        names = list(dict.fromkeys(self._groups))
        groups = np.array(self._groups)
        found = self._of(np.ones(len(groups), bool), "")
        for name in names if len(names) > 1 else ():
            found.update(self._of(groups == name, f"_{name}"))
        return found

    def _of(self, rows: npt.NDArray[np.bool_], suffix: str) -> dict[str, float]:
        found = {
            f"{name}{suffix}": float(np.mean(np.array(self._values[name])[rows]))
            for name in PAIRED
            if name in self._scores
        }
        if ("fid" in self._scores or "kid" in self._scores) and rows.sum() > 1:
            truth, made = (np.concatenate(self._features[n])[rows] for n in self._features)
            found.update(
                (f"{k}{suffix}", v) for k, v in set_distances(self._scores, truth, made).items()
            )
        return found


def set_distances(
    scores: Sequence[Score], truth: np.ndarray, generated: np.ndarray
) -> dict[str, float]:
    """FID and KID (times 1000), as far as asked for, of Inception features [n, 2048]."""
    found = {}
    if "fid" in scores:
        found["fid"] = frechet_distance(truth, generated)
    if "kid" in scores:
        found[KID] = 1000 * kernel_distance(truth, generated)
    return found
