"""Tokens of FLUX: latents in squares of 2 x 2, and where each token is.

Shape legend: B batch   h, w rows and columns of latents   Z latent channels   S tokens

Latents are channels last, as those of `jaxmods.backbones.autoencoder_kl`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A list of tokens and their positions. It is part of a program, not an argument of one: the
    positions have to be known when the program is traced (see `rope`).

    Attributes:
      values: [B, S, C].
      ids: [S, A] positions; `grid_ids` or `text_ids`.
    """

    values: jax.Array
    ids: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.ids.shape[:-1] != self.values.shape[1:2]:
            raise ValueError(
                "Tokens: expected values [B, S, C] and ids [S, axes], found "
                f"{list(self.values.shape)} and {list(self.ids.shape)}"
            )


def pack(latents: jax.Array) -> jax.Array:
    """Squares of 2 x 2 latents as tokens, in reading order.

    Args:
      latents: [B, h, w, Z], h and w even.

    Returns:
      [B, (h / 2) (w / 2), 4 Z]; feature 4 z + 2 y + x is channel z at (y, x) within the square.

    Raises:
      ValueError: an odd number of rows or columns.
    """
    batch, rows, columns, channels = latents.shape
    if rows % 2 or columns % 2:
        raise ValueError(
            f"pack: expected an even number of latent rows and columns, found {rows} x {columns}; "
            "the sides of pictures have to be multiples of 16 pixels"
        )
    squares = latents.reshape(batch, rows // 2, 2, columns // 2, 2, channels)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * channels)


def unpack(tokens: jax.Array, rows: int, columns: int) -> jax.Array:
    """The latents [B, rows, columns, Z] of `pack`.

    Raises:
      ValueError: tokens that do not make such a picture.
    """
    batch, length, features = tokens.shape
    if rows % 2 or columns % 2 or 4 * length != rows * columns or features % 4:
        raise ValueError(
            f"unpack: expected [B, {rows // 2} * {columns // 2}, 4 Z] for {rows} x {columns} "
            f"latents, found {list(tokens.shape)}; cut the tokens of conditions off first"
        )
    squares = tokens.reshape(batch, rows // 2, columns // 2, features // 4, 2, 2)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(batch, rows, columns, features // 4)


def grid_ids(
    rows: int,
    columns: int,
    *,
    label: float = 0.0,
    scale: float = 1.0,
    offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Positions of a picture's tokens, in reading order.

    Token (i, j) is at (label, i * scale + offset[0], j * scale + offset[1]). The noise has label 0,
    the condition picture of FLUX.1-Kontext label 1.

    Args:
      rows, columns: of tokens (a 16th of the picture's sides in pixels).

    Returns:
      float32 [rows * columns, 3].
    """
    ids = np.zeros((rows, columns, 3))
    ids[..., 0] = label
    ids[..., 1] = np.arange(rows)[:, None] * scale + offset[0]
    ids[..., 2] = np.arange(columns)[None, :] * scale + offset[1]
    return ids.reshape(-1, 3).astype(np.float32)


def text_ids(length: int) -> np.ndarray:
    """Positions of text tokens, all at the origin: float32 [length, 3]."""
    return np.zeros((length, 3), np.float32)
