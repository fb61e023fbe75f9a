"""Pictures: every mode to RGB as PIL does it, and every kind of damage with its reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_pipelines.images import (
    ImageLimits,
    decode_rgb,
    encode_png,
    image_size,
    resize_shortest,
    resize_square,
)
from data_pipelines.records import BadRecordError
from tests.data.conftest import encoded, picture


def reason_of(image, **limits) -> str:
    with pytest.raises(BadRecordError) as caught:
        decode_rgb(image, ImageLimits(**limits))
    return caught.value.reason


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"),
     ("P", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP"), ("L", "TIFF")],
)  # fmt: skip
def test_modes_equal_pil(mode, form):
    data = encoded(picture(mode=mode), form)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    ours = decode_rgb(data)
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_sixteen_bit_grey_is_scaled_not_saturated():
    values = np.array([[0, 256, 257, 32896, 65535]], np.uint16).repeat(3, 0)
    ours = np.asarray(decode_rgb(encoded(Image.fromarray(values))))
    assert ours[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert np.array_equal(ours[..., 0], ours[..., 2])


def test_integer_pixels_beyond_sixteen_bits_are_refused():
    data = encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF")
    assert reason_of(data) == "undecodable_image"


def test_float_pixels_are_refused():
    data = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    assert reason_of(data) == "undecodable_image"


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    out = io.BytesIO()
    picture(24, 18).save(out, "JPEG", exif=exif)
    assert decode_rgb(out.getvalue()).size == (24, 18)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_truncated(form):
    data = encoded(picture(64, 64), form)
    assert reason_of(data[: len(data) // 2]) == "truncated_image"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8\xff" + bytes(40)])
def test_undecodable(data):
    assert reason_of(data) == "undecodable_image"


def test_a_format_that_runs_programs_is_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason_of(eps) == "undecodable_image"


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_one_pixel(size):
    assert reason_of(encoded(picture(*size))) == "image_too_small"


def _bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(k, b) for k, b in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side):
    guard = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert reason_of(_bomb(side, side)) == "image_too_large"
    assert Image.MAX_IMAGE_PIXELS == guard is not None


def test_pixel_limit_is_configuration():
    data = encoded(picture(30, 20))
    assert reason_of(data, max_pixels=599) == "image_too_large"
    assert decode_rgb(data, ImageLimits(max_pixels=600)).size == (30, 20)


def test_missing_file(tmp_path):
    assert reason_of(tmp_path / "gone.jpg") == "missing_file"
    assert reason_of(tmp_path) == "missing_file"
    with pytest.raises(BadRecordError, match="missing_file"):
        image_size(tmp_path / "gone.jpg")


def test_a_file_is_read_like_its_bytes(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    ours = np.asarray(decode_rgb(tmp_path / "a.png"))
    assert np.array_equal(ours, np.asarray(decode_rgb(data)))
    assert image_size(tmp_path / "a.png") == image_size(data) == (24, 18)


def test_arrays():
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_rgb(rgba)), rgba[..., :3])
    grey = np.asarray(decode_rgb(rgba[..., 0]))
    assert np.array_equal(grey, rgba[..., :1].repeat(3, -1))
    assert np.array_equal(np.asarray(decode_rgb(rgba[..., :1])), grey)
    assert image_size(rgba) == (7, 5)
    assert reason_of(rgba.astype(np.float32)) == "malformed_record"
    assert reason_of(rgba[..., :2]) == "malformed_record"
    assert reason_of(rgba[:1]) == "image_too_small"


def test_square_resize_equals_pil_and_crops_first():
    image = picture(40, 30)
    expected = np.asarray(image.resize((16, 16)))
    assert np.array_equal(resize_square(image, 16), expected)
    cropped = np.asarray(image.crop((10, 6, 30, 24)).resize((16, 16)))
    ours = resize_square(image, 16, (0.25, 0.2, 0.75, 0.8))
    # PIL's own crop-and-resize sees the neighbours of the window, a crop first does not.
    assert np.abs(ours[2:-2, 2:-2].astype(int) - cropped[2:-2, 2:-2]).max() <= 2


def test_shortest_keeps_the_aspect_and_tells_its_window():
    pixels, window = resize_shortest(picture(40, 20), 10)
    assert pixels.shape == (10, 10, 3)
    assert window == (0.25, 0.0, 0.75, 1.0)
    pixels, window = resize_shortest(picture(20, 31), 10)
    assert pixels.shape == (10, 10, 3)
    assert window == (0.0, 2 / 15, 1.0, 12 / 15)


def test_draft_is_close_but_only_on_request():
    data = encoded(picture(256, 256).resize((512, 512), Image.Resampling.BICUBIC), "JPEG")
    assert decode_rgb(data).size == (512, 512)
    assert decode_rgb(data, draft_size=64).size == (64, 64)


def test_png_round_trip():
    pixels = np.asarray(picture())
    assert np.array_equal(np.asarray(decode_rgb(encode_png(pixels))), pixels)
