"""Text to image with FLUX.1 as a `System`: the transformer trains whole, the rest is frozen.

No training recipe of FLUX.1-dev is published; what is taken from diffusers' training scripts and
what is assumed stands in `configs/flux.py`.

Shape legend:
  B batch   H, W rows and columns of a picture; h, w of its latents   Z latent channels
  L text tokens   D width of the text states   P width of the pooled text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmods.backbones.flux import Tokens, grid_ids, pack, unpack
from jaxmods.system import FROZEN, TRAIN, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.systems.flux.base import FluxBase, Prompt, to_display
from jaxmods.systems.flux.flops import encoder_flops, step_flops, text_flops
from jaxmods.systems.flux.objective import Draws, Scheme, draw, flow_loss
from jaxmods.systems.flux.sample import Sampling, generate
from jaxmods.systems.flux.weights import base_map, hub_config, hub_pipeline
from jaxmods.weights import WeightMap
from jaxmods.weights.convert import Exported
from jaxmods.weights.pipeline import HubPipeline, export_pipeline
from jaxmods.weights.writer import Progress


@dataclasses.dataclass(frozen=True)
class Flux(System):
    """FLUX.1 text to image.

    Attributes:
      base: the models. With text encoders a batch holds ids, without them the texts' features.
      height, width: of pictures in pixels.
      guidance: scale that the guidance embedding sees in training.
      weighting_scheme: density of noise levels and weight of the loss, by the name in diffusers.
      sampling: how pictures are made.
      inputs: "pictures" (uint8), or "latents": what `encode` made of them, in bfloat16.
    """

    sampling_fields: ClassVar[tuple[str, ...]] = ("height", "width", "sampling", "inputs")

    base: FluxBase = dataclasses.field(default_factory=FluxBase)
    height: int = 1024
    width: int = 1024
    guidance: float = 3.5
    weighting_scheme: Scheme = "none"
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(guidance=3.5))
    inputs: Literal["pictures", "latents"] = "pictures"

    def __post_init__(self) -> None:
        self.base.grid(self.height, self.width)

    # Batch and parameters ----------------------------------------------------------------------

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """`image` uint8 [B, H, W, 3] or latents bfloat16 [B, h, w, Z]; with text encoders
        `text_t5` int32 [B, L] and `text_clip` int32 [B, 77], without them `states` bfloat16
        [B, L, D] and `pooled` bfloat16 [B, P]."""
        axes = ("batch", None, None, None)
        if self.inputs == "pictures":
            image = ArraySpec((global_batch, self.height, self.width, 3), "uint8", axes)
        else:
            image = ArraySpec((global_batch, *self._latents), "bfloat16", axes)
        return {"image": image, **self._text_spec(global_batch)}

    def init(self, rng: jax.Array) -> Params:
        """All components as their models are initialised."""
        return self.base.init(rng)

    def labels(self, params: Params) -> dict[str, Any]:
        """The transformer trains; autoencoder and text encoders are frozen."""
        return {
            name: jax.tree.map(
                lambda _, label=TRAIN if name == "transformer" else FROZEN: label, tree
            )
            for name, tree in params.items()
        }

    def decay(self, params: Params) -> dict[str, Any]:
        """Everything, as in diffusers' training scripts."""
        return jax.tree.map(lambda _: True, params)

    # Loss --------------------------------------------------------------------------------------

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        """Flow-matching loss. Metrics: the mean noise level."""
        del step
        draws = draw(rng, (batch["image"].shape[0], *self._latents), self.weighting_scheme)
        value, metrics = self.objective(params, batch, draws)
        return LossOutput(value, metrics, state)

    def objective(
        self, params: Params, batch: Batch, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics for given draws; latents in `batch` may have another float dtype."""
        clean = batch["image"].astype(jnp.float32)
        if self.inputs == "pictures":
            clean = self.base.encode(params, batch["image"])
        names = tuple(self._text_spec(1))
        prompt = self.prompt(params, *(batch[name] for name in names))

        def predict(noisy: jax.Array, time: jax.Array) -> jax.Array:
            return self.velocity(params, noisy, prompt, time, self.guidance)

        value, sigma = flow_loss(predict, clean, draws, self.base.schedule, self.weighting_scheme)
        return value, {"sigma": sigma.mean()}

    def velocity(
        self,
        params: Params,
        noisy: jax.Array,
        prompt: Prompt,
        time: jax.Array,
        guidance: jax.Array | float,
    ) -> jax.Array:
        """Predicted velocity of `noisy` [B, h, w, Z] at noise levels `time` [B], in its shape."""
        rows, columns = noisy.shape[1:3]
        noise = Tokens(pack(noisy), grid_ids(rows // 2, columns // 2))
        out = self.base.velocity(params["transformer"], [noise], prompt, time, guidance)
        return unpack(out, rows, columns)

    def prompt(self, params: Params, first: jax.Array, second: jax.Array) -> Prompt:
        """Features of texts from the two text arrays of a batch, ids or features."""
        if self.base.encoders is None:
            return Prompt(first, second)
        return self.base.prompt(params, first, second)

    # Inference ---------------------------------------------------------------------------------

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Inference, n rows.

        sample(params, text arrays as in a batch, key uint32 [n, 2]) -> float32 [n, H, W, 3], 0..1
        encode(params, pictures uint8 [n, H, W, 3]) -> latents float32 [n, h, w, Z]
        decode(params, latents) -> float32 [n, H, W, 3] in 0..1
        features(params, text_t5, text_clip) -> (states [n, L, D], pooled [n, P]), with encoders
        """
        named: dict[str, Callable[..., Any]] = {
            "sample": self.sample,
            "encode": self.base.encode,
            "decode": self.decode,
        }
        return named if self.base.encoders is None else {**named, "features": self.prompt}

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """Inputs of all functions."""
        axes = ("batch", None, None, None)
        text = self._text_spec(batch_size)
        inputs = {
            "sample": {**text, "key": ArraySpec((batch_size, 2), "uint32", ("batch", None))},
            "encode": {
                "pictures": ArraySpec((batch_size, self.height, self.width, 3), "uint8", axes)
            },
            "decode": {"latents": ArraySpec((batch_size, *self._latents), "float32", axes)},
        }
        return inputs if self.base.encoders is None else {**inputs, "features": text}

    def sample(
        self, params: Params, first: jax.Array, second: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Pictures of texts; see `functions`. A row's noise depends on its own key alone."""
        if self.sampling.strength < 1:
            raise ValueError("Flux sampling: there is no picture to start from; set strength=1")
        prompt = self.prompt(params, first, second)
        noise = jax.vmap(lambda k: jax.random.normal(k, self._latents, jnp.float32))(
            jax.random.wrap_key_data(key)
        )

        def velocity(x: jax.Array, time: jax.Array) -> jax.Array:
            return self.velocity(params, x, prompt, time, self.sampling.guidance)

        return self.decode(params, generate(velocity, noise, self.base.schedule, self.sampling))

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Pictures of latents, float32 in [0, 1]."""
        return to_display(self.base.decode(params, latents))

    # Weights and cost --------------------------------------------------------------------------

    def weights(self) -> WeightMap:
        """The map of a diffusers folder (transformer, vae, text_encoder, text_encoder_2)."""
        return base_map(self.base)

    def hub_config(self) -> dict[str, Any]:
        """`config.json` of every component of the folder, by name."""
        return hub_config(self.base)

    def hub_pipeline(self) -> HubPipeline:
        """A diffusers folder."""
        return hub_pipeline(self.base, "FluxPipeline")

    def save_pipeline(
        self,
        params: Params,
        folder: str | Path,
        *,
        dtype: DTypeLike | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """All components as a diffusers folder; see `jaxmods.weights.pipeline.export_pipeline`."""
        return export_pipeline(
            params,
            self.weights(),
            self.hub_pipeline(),
            folder,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )

    def verify_export(self, folder: Path, params: Params, rng: jax.Array) -> dict[str, float]:
        """Relative error ||a - b|| / ||b|| of the velocity of diffusers' transformer on `folder`
        against ours; see `jaxmods.systems.flux.verification.verify`."""
        from jaxmods.systems.flux import verification

        values, rest = jax.random.split(rng)
        noise = jax.random.normal(values, (2, 8, 4, self.base.vae.latent_channels))
        image = [Tokens(pack(noise), grid_ids(4, 2))]
        return verification.verify(self.base, folder, params["transformer"], image, rest)

    def flops_per_example(self) -> float:
        """Analytic FLOPs of a training step per example, products only: three times the forward
        pass of the transformer, and the encoders that run in a step."""
        base, (rows, columns) = self.base, self._latents[:2]
        total = step_flops(base.transformer, base.text_length, rows * columns // 4)
        if self.inputs == "pictures":
            total += encoder_flops(base.vae, self.height, self.width)
        if base.encoders is not None:
            total += text_flops(base.encoders, base.text_length)
        return total

    @property
    def _latents(self) -> tuple[int, int, int]:
        """Shape of a picture's latents."""
        return (*self.base.grid(self.height, self.width), self.base.vae.latent_channels)

    def _text_spec(self, rows: int) -> dict[str, ArraySpec]:
        base, t = self.base, self.base.transformer
        if base.encoders is None:
            states = (rows, base.text_length, t.text_width)
            return {
                "states": ArraySpec(states, "bfloat16", ("batch", None, None)),
                "pooled": ArraySpec((rows, t.pooled_width), "bfloat16", ("batch", None)),
            }
        short = base.encoders.clip.context_short
        return {
            "text_t5": ArraySpec((rows, base.text_length), "int32", ("batch", None)),
            "text_clip": ArraySpec((rows, short), "int32", ("batch", None)),
        }
