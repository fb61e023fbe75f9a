"""The published models of a FLUX.1 pipeline as one tree of parameters: transformer, autoencoder,
text encoders. Systems on top of FLUX hold a `FluxBase` and add what is theirs.

Parameters are named as the components of a diffusers folder:

    {"transformer": ..., "vae": ..., "text_encoder": CLIP, "text_encoder_2": T5}

Shape legend:
  B batch   H, W rows and columns of a picture   h, w of its latents   Z latent channels
  N image tokens   L text tokens   D width of the text states   P width of the pooled text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones import clip
from jaxmods.backbones.autoencoder_kl import FLUX, AutoencoderConfig, AutoencoderKL
from jaxmods.backbones.flux import DEV, FluxConfig, FluxTransformer, Tokens, text_ids
from jaxmods.backbones.t5.model import T5Config, T5Encoder
from jaxmods.diffusion import FlowSchedule
from jaxmods.nn.stack import Execution
from jaxmods.system import Params
from jaxmods.systems.flux.squares import Squares


class Prompt(NamedTuple):
    """What the transformer knows of a text: states [B, L, D] and pooled [B, P].

    A leading axis of 1 stands for one text for all examples.
    """

    states: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The two text encoders.

    Attributes:
      clip: gives the pooled features. t5: gives the states.
    """

    clip: clip.TextConfig = clip.TEXT_L
    t5: T5Config = dataclasses.field(default_factory=T5Config)


@dataclasses.dataclass(frozen=True)
class FluxBase:
    """Sizes of the models, and what one does with them.

    Attributes:
      transformer: of the transformer.
      vae: of the autoencoder; `Squares` has no parameters.
      encoders: the text encoders; None where text features come from elsewhere.
      text_length: L, tokens that T5 reads, padding included. Pads are attended to and go to the
        transformer, so another length gives other numbers.
      schedule: noise levels.
      execution: how the transformer's blocks run.
      encoder_execution: how the blocks of the text encoders run.
    """

    transformer: FluxConfig = DEV
    vae: AutoencoderConfig | Squares = FLUX
    encoders: TextEncoders | None = dataclasses.field(default_factory=TextEncoders)
    text_length: int = 512
    schedule: FlowSchedule = dataclasses.field(default_factory=FlowSchedule)
    execution: Execution = dataclasses.field(default_factory=Execution)
    encoder_execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        t = self.transformer
        if t.out_channels != 4 * self.vae.latent_channels:
            raise ValueError(
                f"FluxBase: expected transformer.out_channels = 4 * {self.vae.latent_channels} "
                f"(2 x 2 latents of the autoencoder), found {t.out_channels}"
            )
        if self.encoders is not None:
            widths = (self.encoders.t5.width, self.encoders.clip.width)
            if widths != (t.text_width, t.pooled_width):
                raise ValueError(
                    f"FluxBase: expected text encoders of widths T5 {t.text_width} and CLIP "
                    f"{t.pooled_width} as the transformer has, found {widths[0]} and {widths[1]}"
                )

    @property
    def multiple(self) -> int:
        """Sides of pictures are multiples of this."""
        return 2 * self.vae.factor

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of a picture.

        Raises:
          ValueError: sides that are no multiples of `multiple`.
        """
        if height % self.multiple or width % self.multiple or min(height, width) < 1:
            raise ValueError(
                f"FLUX: expected height and width to be multiples of {self.multiple}, found "
                f"{height} x {width}"
            )
        return height // self.vae.factor, width // self.vae.factor

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of all components, boxed with logical axes."""
        keys = jax.random.split(rng, 4)
        params = {"transformer": init_transformer(self.transformer, self.execution, keys[0])}
        if isinstance(self.vae, AutoencoderConfig):
            side = self.vae.factor
            picture = jnp.zeros((1, side, side, self.vae.picture_channels))
            params["vae"] = AutoencoderKL(self.vae).init(keys[1], picture)["params"]
        if self.encoders is not None:
            ids = jnp.zeros((1, 1), jnp.int32)
            tower, t5 = self._encoders(self.encoders)
            params["text_encoder"] = tower.init(keys[2], ids, method=_pooled)["params"]
            params["text_encoder_2"] = t5.init(keys[3], ids)["params"]
        return params

    def encode(self, params: Params, pictures: jax.Array) -> jax.Array:
        """Latents as the transformer sees them: mode of the posterior, shifted and scaled.

        Args:
          params: of all components.
          pictures: [B, H, W, 3], uint8, or float in [-1, 1].

        Returns:
          float32 [B, h, w, Z].
        """
        pixels = to_unit(pictures)
        if isinstance(self.vae, Squares):
            return self.vae.encode(pixels)
        posterior: Any = AutoencoderKL(self.vae).apply(
            {"params": params["vae"]}, pixels, method="encode"
        )
        return self.vae.scale(posterior.mode())

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """float32 pictures [B, H, W, 3], about [-1, 1] and not clamped, of `encode`'s latents."""
        latents = latents.astype(jnp.float32)
        if isinstance(self.vae, Squares):
            return self.vae.decode(latents)
        pictures: Any = AutoencoderKL(self.vae).apply(
            {"params": params["vae"]}, self.vae.unscale(latents), method="decode"
        )
        return pictures.astype(jnp.float32)

    def prompt(self, params: Params, t5_ids: jax.Array, clip_ids: jax.Array) -> Prompt:
        """Features of texts.

        Args:
          params: of all components.
          t5_ids: int32 [B, L], padded; pads are attended to, as published.
          clip_ids: int32 [B, 77].

        Raises:
          ValueError: a base without text encoders.
        """
        if self.encoders is None:
            raise ValueError("FLUX prompt: expected text encoders, found encoders=None")
        tower, t5 = self._encoders(self.encoders)
        states: Any = t5.apply({"params": params["text_encoder_2"]}, t5_ids)
        pooled: Any = tower.apply({"params": params["text_encoder"]}, clip_ids, method=_pooled)
        return Prompt(states, pooled)

    def prompt_ids(
        self, t5: Sequence[int] | None = None, clip: Sequence[int] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """One text's ids, padded: int32 [1, L] and [1, 77].

        Args:
          t5, clip: ids as the tokenisers give them, without padding; None for the empty text.

        Raises:
          ValueError: a base without text encoders, or more ids than places.
        """
        if self.encoders is None:
            raise ValueError("FLUX prompt: expected text encoders, found encoders=None")
        e = self.encoders
        t5 = (e.t5.eos_id,) if t5 is None else tuple(t5)
        clip = (e.clip.bos_id, e.clip.eos_id) if clip is None else tuple(clip)
        rows = []
        for name, ids, length, pad in (
            ("T5", t5, self.text_length, e.t5.pad_id),
            ("CLIP", clip, e.clip.context_short, e.clip.pad_id),
        ):
            if not 0 < len(ids) <= length:
                raise ValueError(
                    f"FLUX prompt: expected 1 to {length} ids for {name}, found {len(ids)}; "
                    "shorten the text"
                )
            rows.append(jnp.asarray([*ids, *[pad] * (length - len(ids))], jnp.int32)[None])
        return rows[0], rows[1]

    def velocity(
        self,
        transformer: Params,
        image: Sequence[Tokens],
        prompt: Prompt,
        time: jax.Array,
        guidance: jax.Array | float,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity of the first list of image tokens, the noise.

        Args:
          transformer: parameters of the transformer alone, adapters attached where there are any.
          image: packed latents [B, *, C]: the noise, then conditions.
          prompt: for each example, or one for all.
          time: float32 [B], noise level.
          guidance: scale for the embedding, [B] or one for all; ignored by a model without one.
          mask: bool [B, 1, 1, L + all image tokens]; False hides a token from all others.

        Returns:
          [B, N, C] in the compute dtype.
        """
        batch, length = image[0].values.shape[:2]
        states, pooled = (
            jnp.broadcast_to(x, (batch, *x.shape[1:])) if x.shape[0] == 1 else x for x in prompt
        )
        scale = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (batch,))
        model = FluxTransformer(self.transformer, self.execution)
        velocity: Any = model.apply(
            {"params": transformer},
            image,
            Tokens(states, text_ids(states.shape[1])),
            pooled,
            time,
            scale if self.transformer.guidance else None,
            mask=mask,
        )
        return velocity[:, :length]

    def _encoders(self, encoders: TextEncoders) -> tuple[clip.TextTower, T5Encoder]:
        run = self.encoder_execution
        return clip.TextTower(encoders.clip, run), T5Encoder(encoders.t5, run)


def init_transformer(config: FluxConfig, execution: Execution, rng: jax.Array) -> Params:
    """Fresh parameters of the transformer, boxed with logical axes."""
    point = np.zeros((1, len(config.rope_axes)), np.float32)
    variables: Any = FluxTransformer(config, execution).init(
        rng,
        Tokens(jnp.zeros((1, 1, config.in_channels)), point),
        Tokens(jnp.zeros((1, 1, config.text_width)), point),
        jnp.zeros((1, config.pooled_width)),
        jnp.zeros((1,)),
        jnp.zeros((1,)) if config.guidance else None,
    )
    return variables["params"]


def to_unit(pictures: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]: (x / 255 - 0.5) / 0.5; floats are taken as they are."""
    if pictures.dtype != jnp.uint8:
        return pictures
    return (pictures.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def to_display(pictures: jax.Array) -> jax.Array:
    """Decoded pictures as float32 in [0, 1]: clamp(x / 2 + 0.5)."""
    return jnp.clip(pictures.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def _pooled(tower: clip.TextTower, ids: jax.Array) -> jax.Array:
    """[B, 77] -> [B, P]; also touches all parameters, for `init`."""
    return tower.pooled(tower.trunk(ids), ids)
