"""The networks of LPIPS and FID against the original classes, and files that do not fit.

`recorded_networks.json` holds what torchmetrics' LPIPS ("squeeze") and pytorch-fid's Inception
computed with the tensors and pictures that `tensors` and `pictures` make here: raw Philox words,
equal on every machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.protocols.picture_scores import Networks, inception_input
from jaxmods.metrics import inception, lpips
from jaxmods.metrics.distances import frechet_distance, kernel_distance
from jaxmods.metrics.ssim import ssim

RECORDED = json.loads(Path(__file__).with_name("recorded_networks.json").read_text())


def uniform(key: int, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1)."""
    words = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations at one scale."""
    made = {}
    for name in sorted(shapes):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        u = uniform(int.from_bytes(digest, "little"), shapes[name])
        if name.endswith("running_var") or name.startswith("lin"):
            value = 0.5 + u
        elif name.endswith("bn.weight"):
            value = 0.75 + 0.5 * u
        elif u.ndim == 1:
            value = 0.2 * (u - 0.5)
        else:
            value = (2 * u - 1) * np.sqrt(6 / np.prod(shapes[name][1:]))
        made[name] = value.astype(np.float32)
    return made


def pictures(count: int, height: int, width: int, key: int) -> np.ndarray:
    """float32 noise in 0..1."""
    return uniform(key, (count, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def lpips_tensors() -> dict[str, np.ndarray]:
    return tensors(lpips.shapes(), 1)


@pytest.mark.parametrize("size", sorted(RECORDED["lpips"]))
def test_lpips_as_torchmetrics(size: str, lpips_tensors: dict[str, np.ndarray]) -> None:
    height, width = map(int, size.split("x"))
    first, other = pictures(3, height, width, 11), pictures(3, height, width, 12)
    second = (0.7 * first + 0.3 * other).astype(np.float32)
    found = jax.jit(lpips.distance)(lpips.load(lpips_tensors), first, second)
    # float32 sums over thousands of activations in another order
    np.testing.assert_allclose(found, RECORDED["lpips"][size], rtol=1e-5)


def test_inception_as_pytorch_fid() -> None:
    params = inception.load(tensors(inception.shapes(), 2))
    expected = RECORDED["inception"]["75"]
    x = (pictures(2, 75, 75, 13) * 255).astype(np.float32)
    found = np.asarray(jax.jit(inception.features)(params, x), np.float64)
    assert found.shape == (2, inception.WIDTH)
    first = np.array(expected["first"])
    # 94 float32 convolutions in another order; features are about 0.3
    np.testing.assert_allclose(found[:, : first.shape[1]], first, atol=2e-5)
    np.testing.assert_allclose(found.sum(1), expected["sum"], rtol=1e-5)
    np.testing.assert_allclose((found**2).sum(1), expected["squares"], rtol=1e-5)


def test_files_of_networks(tmp_path: Path, lpips_tensors: dict[str, np.ndarray]) -> None:
    """Tensors may lie in two files; others in them are ignored; what is missing is named."""
    net = {k: v for k, v in lpips_tensors.items() if k.startswith("features")}
    heads = {k: v for k, v in lpips_tensors.items() if k.startswith("lin")}
    paths = [str(tmp_path / n) for n in ("net.safetensors", "heads.safetensors")]
    save_file({**net, "classifier.1.bias": np.zeros(3, np.float32)}, paths[0])
    save_file(heads, paths[1])
    networks = Networks(lpips_weights=tuple(paths))
    networks.check(("ssim", "lpips"), "here")
    black, white = np.zeros((2, 40, 40, 3), np.float32), np.ones((2, 40, 40, 3), np.float32)
    found = networks.lpips(black, np.stack([black[0], white[0]]))
    assert abs(found[0]) < 1e-9  # equal pictures, up to rounding
    assert found[1] > 0
    with pytest.raises(ValueError, match=r"found 50 of 57 tensors; missing lin0\.model\.1\.weight"):
        _ = Networks(lpips_weights=(paths[0],)).lpips
    with pytest.raises(ValueError, match=r"lin3.* of another shape|of another shape.*lin3"):
        lpips.load({**lpips_tensors, "lin3.model.1.weight": np.zeros((1, 2, 1, 1))})


@pytest.mark.parametrize(
    ("networks", "score", "message"),
    [
        (Networks(), "lpips", r"here: lpips needs .*squeezenet1_1.* none is named.*lpips_weights"),
        (Networks(), "fid", r"pt_inception-2015-12-05.*none is named.*inception_weights"),
        (Networks(inception_weights="no/such.pth"), "kid", r"no file at no/such.pth"),
    ],
)
def test_missing_files_are_named(networks: Networks, score: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.check((score,), "here")


def test_inception_input_keeps_flat_colours_and_its_range() -> None:
    flat = np.full((40, 30, 3), (0, 128, 255), np.uint8)
    prepared = inception_input(flat)
    assert prepared.shape == (299, 299, 3)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(
        prepared, np.broadcast_to([0.0, 128, 255], prepared.shape), atol=1e-4
    )
    edges = np.zeros((8, 8, 3), np.uint8)
    edges[::2] = 255  # bicubic would overshoot
    assert inception_input(edges).min() >= 0
    assert inception_input(edges).max() <= 255


def test_ssim_of_equal_and_of_other_pictures() -> None:
    x, y = pictures(2, 16, 20, 5), pictures(2, 16, 20, 6)
    np.testing.assert_allclose(ssim(x, x), 1.0)
    assert (ssim(x, y) < 0.5).all()
    np.testing.assert_allclose(ssim(x, y), ssim(y, x))
    flat = np.full((1, 16, 20, 3), 0.5)
    assert ssim(flat, flat + 0.1)[0] < 1
    with pytest.raises(ValueError, match=r"expected target in 0\.\.1"):
        ssim(x, 255 * y)
    with pytest.raises(ValueError, match=r"expected predicted in 0\.\.1, found nan"):
        ssim(np.full_like(x, np.nan), x)
    with pytest.raises(ValueError, match="of one shape"):
        ssim(x, y[:, :12])


def test_ssim_crop_is_the_inside_of_the_map() -> None:
    """Only the inside is averaged: what happens in the outer pixels of the window matters less."""
    x = pictures(1, 32, 32, 7)
    y = x.copy()
    y[:, 0] = 1 - y[:, 0]
    assert ssim(x, y, border="crop")[0] > ssim(x, y)[0]


def test_distances() -> None:
    a, b = uniform(1, (50, 4)), uniform(2, (60, 4))
    assert abs(frechet_distance(a, a)) < 1e-9
    shift = np.array([1.0, 2.0, 0.0, 0.0])
    assert frechet_distance(a, a + shift) == pytest.approx(5.0)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    # C2 = 4 C1: tr(C1 + 4 C1 - 2 * 2 C1) = tr C1
    centred = a - a.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(a.T)))
    few = uniform(3, (5, 64))  # fewer rows than columns
    assert abs(frechet_distance(few, few)) < 1e-6
    assert kernel_distance(a, b, subset_size=40) == kernel_distance(a, b, subset_size=40)
    assert kernel_distance(a, a + 3) > kernel_distance(a, b)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(a, np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="one number of columns"):
        kernel_distance(a, uniform(2, (60, 5)))
