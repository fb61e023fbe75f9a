"""Results of sampling on the disk: pictures that know where they come from, lines, a sheet.

DIR/NAME.png (or .jpg)   pictures; what made them is inside, see `read_metadata`
DIR/results.jsonl        an example a line: name, index, inputs, what the sampler found, or why not
DIR/grid.png             the first examples beside their inputs
DIR/sample.json          the whole command
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Format = Literal["png", "jpeg"]
SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg"}

KEY = "jaxmods"  # of the text chunk in PNG files
_EXIF, _USER_COMMENT, _SOFTWARE = 0x8769, 0x9286, 0x0131
_ASCII = b"ASCII\x00\x00\x00"  # EXIF: the code of the comment that follows


def encode_picture(
    pixels: np.ndarray, metadata: Mapping[str, Any], kind: Format, quality: int = 95
) -> bytes:
    """A picture file with `metadata` as JSON inside: PNG text `jaxmods`, or the user comment in
    the EXIF part of a JPEG file.

    Args:
      pixels: uint8 [H, W, 3].
      metadata: JSON values.
      kind: the format. quality: of JPEG files.
    """
    picture, out = Image.fromarray(pixels), io.BytesIO()
    text = json.dumps(metadata, ensure_ascii=True, separators=(",", ":"))
    software = f"jaxmods {metadata.get('code', '')}".strip()
    if kind == "png":
        chunks = PngInfo()
        chunks.add_text("Software", software)
        chunks.add_text(KEY, text)
        picture.save(out, "PNG", pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[_SOFTWARE] = software
        exif.get_ifd(_EXIF)[_USER_COMMENT] = _ASCII + text.encode("ascii")
        picture.save(out, "JPEG", quality=quality, subsampling=0, exif=exif)
    return out.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `encode_picture` put into a file.

    Raises:
      ValueError: nothing of the kind is in it.
    """
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(KEY)
        if text is None:
            comment = picture.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
            if isinstance(comment, bytes) and comment.startswith(_ASCII):
                text = comment[len(_ASCII) :].decode("ascii")
    if not text:
        raise ValueError(f"{path}: expected a picture made by jaxmods sample, found no settings")
    found: dict[str, Any] = json.loads(text)
    return found
