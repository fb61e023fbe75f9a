"""From encoded pictures to RGB arrays of one size: exactly the official path, guarded.

Decoding is PIL's; the official readers open, convert to RGB and resize with PIL, and the goldens
hold the same bytes. EXIF orientation is not applied (no official reader does). Everything that can
be wrong with a file ends in a `BadRecordError` with a reason; PIL's own guard against decompression
bombs stays on, and a limit of ours is checked from the header before any pixel is decoded.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.boxes import Box
from data_pipelines.records import BadRecordError, ImageLike

CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)

# Formats that datasets hold. Others (EPS runs an interpreter, PDF, ...) are refused.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

Image.preinit()  # PIL registers its codecs lazily, which is not safe from several threads


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What a usable picture is.

    Attributes:
      max_pixels: width x height above which a file is refused unread (image_too_large). PIL's own
        guard (about 179 million pixels) holds in any case.
      min_side: shortest side in pixels below which a picture is refused (image_too_small).
    """

    max_pixels: int = 50_000_000
    min_side: int = 2


def image_bytes(image: bytes | Path) -> bytes:
    """The encoded picture. Raises BadRecordError("missing_file")."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise BadRecordError("missing_file", f"no picture at {image}") from e
    except OSError as e:
        raise BadRecordError("missing_file", f"cannot read {image}: {e}") from e


def image_size(image: ImageLike) -> tuple[int, int]:
    """`(width, height)` from the header only. Raises BadRecordError like `decode_rgb`."""
    if isinstance(image, np.ndarray):
        return int(image.shape[1]), int(image.shape[0])
    return _open(io.BytesIO(image) if isinstance(image, bytes) else image).size


def decode_rgb(
    image: ImageLike,
    limits: ImageLimits = ImageLimits(),
    draft_size: int | None = None,
    background: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Decode to a PIL picture of mode RGB.

    Greyscale, palette, CMYK, YCbCr and alpha pictures go through PIL's `convert("RGB")` as in the
    official readers (alpha is dropped, not composited). 16-bit greyscale is scaled to 8 bits
    (`round(v / 257)`), where PIL alone would saturate.

    Args:
      image: encoded bytes, a path, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
      limits: see `ImageLimits`.
      draft_size: let libjpeg decode JPEG at a reduced scale not below this size. Faster for large
        pictures, but the pixels differ slightly from a full decode, so never the default.
      background: RGB colour that pictures with alpha are put on, instead of dropping alpha.

    Raises:
      BadRecordError: missing_file, undecodable_image, truncated_image, image_too_small,
        image_too_large, malformed_record (array of another type or shape).
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, limits, background)
    encoded = image_bytes(image)
    picture = _open(io.BytesIO(encoded))
    _check_size(picture.size, limits)
    try:
        if draft_size is not None:
            picture.draft("RGB", (draft_size, draft_size))
        picture.load()
        return _to_rgb(picture if background is None else _on(picture, background))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, zlib.error, struct.error) as e:
        text = str(e) or type(e).__name__
        cut = isinstance(e, EOFError) or "truncated" in text.lower() or "end of" in text.lower()
        reason = "truncated_image" if cut else "undecodable_image"
        raise BadRecordError(reason, f"{picture.format} of {len(encoded)} bytes: {text}") from e


def resize_square(picture: Image.Image, size: int, crop: Box | None = None) -> np.ndarray:
    """uint8 [size, size, 3]: bicubic with antialiasing, aspect ratio ignored (spec section 5).

    `crop` selects a part first, as fractions `(x1, y1, x2, y2)`; None takes the whole picture and
    then equals `picture.resize((size, size))` of the official code bit for bit.
    """
    window = None
    if crop is not None:
        w, h = picture.size
        window = (crop[0] * w, crop[1] * h, crop[2] * w, crop[3] * h)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=window))


def resize_shortest(picture: Image.Image, size: int) -> tuple[np.ndarray, Box]:
    """Shortest edge to `size`, bicubic, then the centre square (CLIPImageProcessor alone).

    The longer edge becomes `int(size * long / short)`; crop offsets are floor((side - size) / 2).

    Returns:
      uint8 [size, size, 3] and the kept window as fractions `(x1, y1, x2, y2)` of the picture.
    """
    w, h = picture.size
    short, long = min(w, h), max(w, h)
    longer = int(size * long / short)
    new_w, new_h = (size, longer) if w <= h else (longer, size)
    resized = picture.resize((new_w, new_h), Image.Resampling.BICUBIC)
    left, top = (new_w - size) // 2, (new_h - size) // 2
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    window = (left / new_w, top / new_h, (left + size) / new_w, (top + size) / new_h)
    return pixels, window


def normalise(pixels: np.ndarray) -> np.ndarray:
    """float32 of the same shape [..., 3]: `(x / 255 - mean) / std` with CLIP's constants.

    The training step does this on the device; here for evaluation by other means and for parity.
    """
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    return (scaled - CLIP_MEAN) / CLIP_STD


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a uint8 array [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _open(file: io.BytesIO | Path) -> Image.Image:
    """Open without decoding."""
    try:
        return Image.open(file, formats=FORMATS)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise BadRecordError("missing_file", f"no picture at {file}") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRecordError("image_too_large", f"{e} (PIL's guard)") from e
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as e:
        where = f"{len(file.getvalue())} bytes" if isinstance(file, io.BytesIO) else str(file)
        raise BadRecordError(
            "undecodable_image", f"{where} are none of {', '.join(FORMATS)}"
        ) from e


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    w, h = size
    if w * h > limits.max_pixels:
        raise BadRecordError(
            "image_too_large", f"{w}x{h} is {w * h:,} pixels, the limit is {limits.max_pixels:,}"
        )
    if min(w, h) < limits.min_side:
        raise BadRecordError(
            "image_too_small", f"{w}x{h}, the shortest side allowed is {limits.min_side}"
        )


def _on(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A picture with alpha over a colour; others as they are."""
    if not picture.has_transparency_data:
        return picture
    canvas = Image.new("RGBA", picture.size, (*background, 255))
    canvas.alpha_composite(picture.convert("RGBA"))
    return canvas


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # "I;16", "I;16B" and 32-bit "I": integer greyscale
        grey = np.asarray(picture).astype(np.int64)
        top = int(grey.max(initial=0))
        if int(grey.min(initial=0)) < 0 or top > 65535:
            raise ValueError(f"integer pixels up to {top} exceed 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    return picture.convert("RGB")


def _from_array(
    image: np.ndarray, limits: ImageLimits, background: tuple[int, int, int] | None = None
) -> Image.Image:
    shape = image.shape
    channels = shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise BadRecordError(
            "malformed_record",
            f"image array: expected uint8 [H, W, 3], found {image.dtype} {list(shape)}",
        )
    _check_size((shape[1], shape[0]), limits)
    if channels == 1:
        return Image.fromarray(image.reshape(shape[:2])).convert("RGB")
    if channels == 4 and background is not None:
        return _on(Image.fromarray(np.ascontiguousarray(image)), background).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(image[..., :3]))
