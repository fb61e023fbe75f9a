"""An autoencoder without parameters, for tiny recipes: the pixels of a square are its latents.

Shape legend: B batch   H, W rows and columns of the picture   f side of a square   C channels
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Squares:
    """Pictures cut into squares of `factor` x `factor` pixels: exact both ways, nothing learned.

    It stands where a small AutoencoderKL would, with the same fields as `AutoencoderConfig` as far
    as a diffusion model sees them.

    Attributes:
      factor: side of a square in pixels.
      scaling_factor: latents are pixels in [-1, 1] times this.
      picture_channels: of the pictures.
    """

    factor: int = 4
    scaling_factor: float = 1.0
    picture_channels: int = 3

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.picture_channels * self.factor**2

    def encode(self, pixels: jax.Array) -> jax.Array:
        """[B, H, W, C] in [-1, 1] -> [B, H / f, W / f, f f C].

        Raises:
          ValueError: sides that are no multiples of the factor.
        """
        batch, height, width, channels = pixels.shape
        f = self.factor
        if height % f or width % f:
            raise ValueError(
                f"squares: expected height and width to be multiples of {f}, found {height} x "
                f"{width}; resize, crop or pad the pictures"
            )
        squares = pixels.reshape(batch, height // f, f, width // f, f, channels)
        joined = squares.transpose(0, 1, 3, 2, 4, 5)
        return joined.reshape(batch, height // f, width // f, -1) * self.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, f f C] -> [B, h f, w f, C]."""
        batch, rows, columns, _ = latents.shape
        f = self.factor
        squares = latents.reshape(batch, rows, columns, f, f, self.picture_channels)
        picture = squares.transpose(0, 1, 3, 2, 4, 5) / self.scaling_factor
        return picture.reshape(batch, rows * f, columns * f, self.picture_channels)
