"""RefTON as a `System`: a frozen FLUX.1-Kontext with adapters that learn to dress a person.

Paper arXiv 2511.00956 (v6); official code 360CVGroup/RefTon.

Shape legend:
  B batch   H, W rows and columns of target, subject and garment; h, w of their latents
  L text tokens   D width of the text states   P width of the pooled text   Z latent channels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.flux import unpack
from jaxmods.nn import lora
from jaxmods.system import FROZEN, TRAIN, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.systems.flux.base import FluxBase, Prompt, to_display
from jaxmods.systems.flux.flops import encoder_flops, step_flops
from jaxmods.systems.flux.objective import Draws, Scheme, draw, flow_loss
from jaxmods.systems.flux.sample import Sampling, generate
from jaxmods.systems.flux.weights import hub_config, target_paths
from jaxmods.systems.refton import weights
from jaxmods.systems.refton.layout import (
    ALWAYS,
    OPTIONAL,
    Condition,
    Optional,
    key_mask,
    reduced_size,
    tokens,
)
from jaxmods.weights import WeightMap
from jaxmods.weights.pipeline import HubPipeline

# Modules that are adapted (official `target_modules`): all projections of attention but the single
# blocks' output, and all MLPs but the single blocks' second layer.
TARGETS = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The trained adapters; the defaults are the official command's.

    Attributes:
      rank, alpha, dropout: see `jaxmods.nn.lora.LoraConfig`. The initialisation is "gaussian".
      targets: names of modules of diffusers' class, each for all modules that end so.
      seed: of their initialisation where a base is imported without adapters.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RefTon(System):
    """RefTON. The defaults are the published 512 x 384 command.

    Attributes:
      base: the models underneath. Without text encoders the prompt's features are two frozen
        parameters (`prompt/states`, `prompt/pooled`); with them they are computed once when a run
        starts, and carried in its state.
      height, width: of target, subject and garment in pixels.
      cond_scale: optional conditions have int(H // s) x int(W // s) pixels.
      optional: conditions that batches may have, in the order of their labels. An example that
        does not use one has `use_<name>` False: its tokens are hidden from all others, which gives
        what a sequence without them gives.
      adapters: what trains; None trains the whole transformer.
      guidance: scale that the guidance embedding sees in training.
      weighting_scheme: density of noise levels and weight of the loss, by the official name.
      sampling: how pictures are made.
      inputs: "pictures" (uint8), or "latents": what `encode` made of them, in bfloat16.
      prompt_t5, prompt_clip: ids of the one prompt of all examples, without padding; None for the
        empty prompt (official).
      reference_scale: scale of the reference's positions; None for `cond_scale`. The first release
        (RefVTON) sampled with 1.
    """

    sampling_fields: ClassVar[tuple[str, ...]] = (
        "height",
        "width",
        "cond_scale",
        "sampling",
        "inputs",
        "reference_scale",
    )

    base: FluxBase = dataclasses.field(default_factory=FluxBase)
    height: int = 512
    width: int = 384
    cond_scale: float = 2.0
    optional: tuple[Optional, ...] = ("reference",)
    adapters: Adapters | None = dataclasses.field(default_factory=Adapters)
    guidance: float = 1.0
    weighting_scheme: Scheme = "none"
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    inputs: Literal["pictures", "latents"] = "pictures"
    prompt_t5: tuple[int, ...] | None = None
    prompt_clip: tuple[int, ...] | None = None
    reference_scale: float | None = None

    def __post_init__(self) -> None:
        if not self.cond_scale > 0:
            raise ValueError(f"RefTon.cond_scale: expected more than 0, found {self.cond_scale}")
        for reduced, what in ((False, "target"), (True, "conditions")):
            try:
                self._grid(reduced)
            except ValueError as error:
                raise ValueError(
                    f"RefTon, size of the {what}: {error}; change height={self.height}, "
                    f"width={self.width} or cond_scale={self.cond_scale:g}"
                ) from error
        names = get_args(Optional)
        if tuple(name for name in names if name in self.optional) != self.optional:
            raise ValueError(
                f"RefTon.optional: expected some of {', '.join(names)} in this order, found "
                f"{self.optional}"
            )

    # Batch and parameters ----------------------------------------------------------------------

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions of a training batch, in the order of the sequence."""
        return (*ALWAYS, *(OPTIONAL[name] for name in self.optional))

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """`target`, `subject`, `garment`, and of each optional condition its picture and the flag
        `use_<name>` bool [B]. Pictures are uint8 [B, rows, columns, 3] (optional conditions in
        their reduced size), or latents bfloat16 [B, rows, columns, Z]."""
        kind = self.inputs
        spec = {"target": self._picture_spec(global_batch, kind, reduced=False)}
        for condition in self.conditions:
            spec[condition.name] = self._picture_spec(global_batch, kind, reduced=condition.reduced)
        for name in self.optional:
            spec[f"use_{name}"] = ArraySpec((global_batch,), "bool", ("batch",))
        return spec

    def init(self, rng: jax.Array) -> Params:
        """The base as its models are initialised, adapters that change nothing, a random prompt
        where there are no text encoders."""
        base_rng, lora_rng, prompt_rng = jax.random.split(rng, 3)
        params = self.base.init(base_rng)
        config = self.lora_config
        if config is not None:
            params["lora"] = lora.init(lora_rng, params["transformer"], config)
        if self.base.encoders is None:
            t, keys = self.base.transformer, jax.random.split(prompt_rng)
            states = jax.random.normal(keys[0], (self.base.text_length, t.text_width))
            pooled = jax.random.normal(keys[1], (t.pooled_width,))
            params["prompt"] = {
                "states": nn.LogicallyPartitioned(states, (None, None)),
                "pooled": nn.LogicallyPartitioned(pooled, (None,)),
            }
        return params

    def init_state(self, params: Params) -> State:
        """The prompt's features in float32, where there are text encoders to make them."""
        if self.base.encoders is None:
            return {}
        features = {name: x[0] for name, x in self.prompt(params)._asdict().items()}
        return {"prompt": {name: x.astype(jnp.float32) for name, x in features.items()}}

    def labels(self, params: Params) -> dict[str, Any]:
        """The adapters train, or the transformer where there are none; all else is frozen."""
        trained = "transformer" if self.adapters is None else "lora"
        return {
            name: jax.tree.map(lambda _, label=TRAIN if name == trained else FROZEN: label, tree)
            for name, tree in params.items()
        }

    def decay(self, params: Params) -> dict[str, Any]:
        """Everything, as by the official optimiser."""
        return jax.tree.map(lambda _: True, params)

    @property
    def lora_config(self) -> lora.LoraConfig | None:
        """The adapters on paths of kernels; None without adapters."""
        if self.adapters is None:
            return None
        a = self.adapters
        paths = target_paths(self.base.transformer, a.targets)
        return lora.LoraConfig(paths, a.rank, a.alpha, a.dropout, init="gaussian")

    # Loss --------------------------------------------------------------------------------------

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        """Flow-matching loss. Metrics: the mean noise level, and the share of examples that use
        each optional condition."""
        del step
        rows = batch["target"].shape[0]
        shape = (rows, *self._grid(False), self.base.vae.latent_channels)
        prompt = None
        if "prompt" in state:
            prompt = Prompt(state["prompt"]["states"][None], state["prompt"]["pooled"][None])
        draws = draw(rng, shape, self.weighting_scheme)
        value, metrics = self.objective(params, batch, draws, prompt)
        return LossOutput(value, metrics, state)

    def objective(
        self, params: Params, batch: Batch, draws: Draws, prompt: Prompt | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics for given draws.

        Args:
          params: all parameters.
          batch: as `batch_spec` says; latents may have another float dtype.
          draws: noise and times.
          prompt: None for `self.prompt(params)`.
        """
        latents = self.encode_batch(params, batch)
        prompt = self.prompt(params) if prompt is None else prompt
        used: dict[str, jax.Array] = {n: batch[f"use_{n}"] for n in self.optional}

        def predict(noisy: jax.Array, time: jax.Array) -> jax.Array:
            conditions = [(c, latents[c.name]) for c in self.conditions]
            return self.velocity(
                params,
                noisy,
                conditions,
                prompt,
                time,
                self.guidance,
                used=used,
                dropout=draws.dropout,
            )

        value, sigma = flow_loss(
            predict, latents["target"], draws, self.base.schedule, self.weighting_scheme
        )
        shares = {f"with_{name}": flag.astype(jnp.float32).mean() for name, flag in used.items()}
        return value, {"sigma": sigma.mean(), **shares}

    def encode_batch(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Latents [B, rows, columns, Z] of the target and all conditions, float32.

        Pictures of one size go through the encoder in a loop, so that it is compiled once for each
        size and its activations are those of one kind of picture.
        """
        whole = ["target", *(c.name for c in self.conditions if not c.reduced)]
        small = [c.name for c in self.conditions if c.reduced]
        if self.inputs == "latents":
            return {name: batch[name].astype(jnp.float32) for name in (*whole, *small)}
        result: dict[str, jax.Array] = {}
        for names in filter(None, (whole, small)):
            pictures = jnp.stack([batch[name] for name in names])
            latents = jax.lax.map(lambda x: self.base.encode(params, x), pictures)
            result.update(zip(names, latents, strict=True))
        return result

    def velocity(
        self,
        params: Params,
        noisy: jax.Array,
        conditions: Sequence[tuple[Condition, jax.Array]],
        prompt: Prompt,
        time: jax.Array,
        guidance: jax.Array | float,
        *,
        used: Mapping[str, jax.Array] | None = None,
        dropout: jax.Array | None = None,
    ) -> jax.Array:
        """Predicted velocity of the noise, [B, h, w, Z] in the compute dtype.

        Args:
          params: all parameters.
          noisy: [B, h, w, Z].
          conditions: with their latents, in the order of the sequence.
          prompt: for each example, or one for all.
          time: float32 [B], noise level.
          guidance: scale for the guidance embedding.
          used: bool [B] by name of a condition; False hides its tokens.
          dropout: key of the adapters' dropout, None for none.
        """
        transformer = params["transformer"]
        config = self.lora_config
        if config is not None:
            transformer = lora.attach(transformer, params["lora"], config, rng=dropout)
        noise = tokens(noisy)
        lists = [(c.name, tokens(x, c.label, self._scale(c))) for c, x in conditions]
        seen = prompt.states.shape[1] + noise.values.shape[1]
        mask = key_mask(seen, lists, used or {})
        image = [noise, *(x for _, x in lists)]
        out = self.base.velocity(transformer, image, prompt, time, guidance, mask)
        return unpack(out, *noisy.shape[1:3])

    def prompt(self, params: Params) -> Prompt:
        """Features of the prompt, [1, L, D] and [1, P]."""
        if self.base.encoders is None:
            return Prompt(params["prompt"]["states"][None], params["prompt"]["pooled"][None])
        return self.base.prompt(params, *self.base.prompt_ids(self.prompt_t5, self.prompt_clip))

    # Inference ---------------------------------------------------------------------------------

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Inference, n rows; pictures are uint8, or float in [-1, 1].

        sample(params, subject [n, H, W, 3], garment [n, H, W, 3], key uint32 [n, 2])
            -> float32 [n, H, W, 3] in [0, 1]
        sample_reference(params, subject, garment, reference [n, *reduced, 3], key) -> the same
        encode(params, pictures [n, H, W, 3]) -> latents float32 [n, h, w, Z]
        decode(params, latents) -> float32 [n, H, W, 3] in [0, 1]

        The subject is the photo with its own garment (mask-free) or with the region masked. A row's
        noise depends on its own key alone.
        """
        return {
            "sample": self.sample,
            "sample_reference": self.sample_reference,
            "encode": self.base.encode,
            "decode": self.decode,
        }

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """Inputs of all functions."""
        whole = self._picture_spec(batch_size, "pictures", reduced=False)
        small = self._picture_spec(batch_size, "pictures", reduced=True)
        latents = self._picture_spec(batch_size, "latents", reduced=False)
        pair = {"subject": whole, "garment": whole}
        key = ArraySpec((batch_size, 2), "uint32", ("batch", None))
        return {
            "sample": {**pair, "key": key},
            "sample_reference": {**pair, "reference": small, "key": key},
            "encode": {"pictures": whole},
            "decode": {"latents": dataclasses.replace(latents, dtype="float32")},
        }

    def sample(
        self, params: Params, subject: jax.Array, garment: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The subject in the garment; see `functions`."""
        return self._sample(params, {"subject": subject, "garment": garment}, key)

    def sample_reference(
        self,
        params: Params,
        subject: jax.Array,
        garment: jax.Array,
        reference: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """The same, given a picture of somebody else in the garment; see `functions`."""
        pictures = {"subject": subject, "garment": garment, "reference": reference}
        return self._sample(params, pictures, key)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Pictures of latents, see `functions`."""
        return to_display(self.base.decode(params, latents))

    def denoise(
        self,
        params: Params,
        pictures: Mapping[str, jax.Array],
        noise: jax.Array,
        *,
        trace: bool = False,
    ) -> Any:
        """Latents of the subject in the garment.

        Args:
          params: all parameters.
          pictures: by name of a condition; any of them but subject and garment may be missing.
          noise: float32 [n, h, w, Z].
          trace: see `generate`.
        """
        conditions = self.conditions_of(params, pictures)
        prompt = self.prompt(params)

        def velocity(x: jax.Array, time: jax.Array) -> jax.Array:
            return self.velocity(params, x, conditions, prompt, time, self.sampling.guidance)

        start = conditions[0][1]
        return generate(
            velocity, noise, self.base.schedule, self.sampling, start=start, trace=trace
        )

    def conditions_of(
        self, params: Params, pictures: Mapping[str, jax.Array]
    ) -> list[tuple[Condition, jax.Array]]:
        """Conditions with their latents, in the order of the sequence, for `velocity`."""
        known = [c for c in (*ALWAYS, *OPTIONAL.values()) if c.name in pictures]
        return [(c, self.base.encode(params, pictures[c.name])) for c in known]

    def _sample(
        self, params: Params, pictures: Mapping[str, jax.Array], key: jax.Array
    ) -> jax.Array:
        shape = (*self._grid(False), self.base.vae.latent_channels)
        noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(
            jax.random.wrap_key_data(key)
        )
        return self.decode(params, self.denoise(params, pictures, noise))

    # Weights and cost --------------------------------------------------------------------------

    def weights(self) -> WeightMap:
        """The map of a diffusers folder (transformer, vae, text_encoder, text_encoder_2), of the
        adapters under their published keys, and of the prompt's features."""
        return weights.refton_map(self)

    def hub_config(self) -> dict[str, Any]:
        """`config.json` of every component of the folder, by name."""
        return hub_config(self.base)

    def hub_pipeline(self) -> HubPipeline | None:
        """A diffusers folder; None with adapters, for which such a folder has no place."""
        return None if self.adapters is not None else weights.pipeline(self.base)

    def adapter_map(self) -> lora.AdapterMap | None:
        """The adapters on the transformer."""
        return weights.adapter_map(self)

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        """Fresh adapters for a base that has none; see `weights.complete`."""
        return weights.complete(self, params, missing)

    def verify_export(self, folder: Path, params: Params, rng: jax.Array) -> dict[str, float]:
        """Relative error of the velocity, given all conditions, of diffusers' transformer with the
        adapters of `folder` against ours; see `jaxmods.systems.flux.verification.verify`."""
        from jaxmods.systems.flux import verification

        *keys, rest = jax.random.split(rng, 2 + len(self.conditions))
        shape = (2, 8, 4, self.base.vae.latent_channels)
        noise, *others = (jax.random.normal(key, shape) for key in keys)
        pairs = zip(self.conditions, others, strict=True)
        image = [tokens(noise), *(tokens(x, c.label, self._scale(c)) for c, x in pairs)]
        transformer, config = params["transformer"], self.lora_config
        if config is not None:
            transformer = lora.attach(transformer, params["lora"], config)
        scale = 0.0 if config is None else config.scale
        return verification.verify(self.base, folder, transformer, image, rest, scale=scale)

    def flops_per_example(self) -> float:
        """Analytic FLOPs of a training step per example, products only: forward, backward through
        activations and to what trains, and the autoencoder's encoder. Hidden tokens count, since
        they are computed; recomputation does not."""
        reduced = [False, *(c.reduced for c in self.conditions)]
        areas = [rows * columns for rows, columns in map(self._grid, reduced)]
        config = self.lora_config
        total = step_flops(
            self.base.transformer,
            self.base.text_length,
            sum(areas) // 4,
            adapters=None if config is None else (config.targets, config.rank),
        )
        if self.inputs == "pictures":
            total += sum(encoder_flops(self.base.vae, *self._size(r)) for r in reduced)
        return total

    # Sizes -------------------------------------------------------------------------------------

    def _size(self, reduced: bool) -> tuple[int, int]:
        """Height and width in pixels."""
        whole = (self.height, self.width)
        return reduced_size(*whole, self.cond_scale) if reduced else whole

    def _grid(self, reduced: bool) -> tuple[int, int]:
        """Rows and columns of latents."""
        return self.base.grid(*self._size(reduced))

    def _scale(self, condition: Condition) -> float:
        """Scale of a condition's positions."""
        if not condition.reduced:
            return 1
        if condition.name == "reference" and self.reference_scale is not None:
            return self.reference_scale
        return self.cond_scale

    def _picture_spec(
        self, rows: int, kind: Literal["pictures", "latents"], *, reduced: bool
    ) -> ArraySpec:
        axes = ("batch", None, None, None)
        if kind == "pictures":
            return ArraySpec((rows, *self._size(reduced), 3), "uint8", axes)
        shape = (rows, *self._grid(reduced), self.base.vae.latent_channels)
        return ArraySpec(shape, "bfloat16", axes)
