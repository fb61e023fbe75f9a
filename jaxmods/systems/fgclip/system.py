"""FG-CLIP as a `System`: batch, loss, optimiser labels, inference functions, weights.

Paper arXiv 2505.05071; official code 360CVGroup/FG-CLIP, branch v1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.clip import Execution, TextConfig, VisionConfig
from jaxmods.nn.filters import cosine_filters
from jaxmods.nn.positions import sincos_grid
from jaxmods.nn.stack import remat as checkpointed
from jaxmods.objectives.contrastive import SameText, hash_texts, info_nce, local_info_nce
from jaxmods.system import TRAIN, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.systems.fgclip import hub
from jaxmods.systems.fgclip.model import FgClipModel
from jaxmods.systems.fgclip.objective import hard_negative_loss, normalise
from jaxmods.systems.fgclip.weights import ADDED, fgclip_map
from jaxmods.weights import WeightMap

# Of the sincos table, beside patches that start with a root mean square of about 0.3.
_SINCOS = 0.2
# Of the cosine filters, whose outputs then have this root mean square as well.
_COSINES = 0.17


@dataclasses.dataclass(frozen=True)
class FgClip(System):
    """FG-CLIP. The defaults are the base model (CLIP B/16) with the published loss weights.

    Attributes:
      vision, text, projection_dim: sizes.
      weight_short, weight_long, weight_region, weight_hard: of the losses; a loss of weight 0 is
        not computed (its inputs stay in the batch).
      max_boxes: boxes per image (N), the rest is cut by the pipeline.
      negatives: hard negatives per box (M).
      hard_pack_images: images that share a pool of hard-box slots (g); divides the batch.
      hard_pack_slots: hard boxes per pool (K). Published: up to N per image; fewer save compute.
        0 for data without hard negatives: the batch then has no `hard_*` arrays, and `weight_hard`
        must be 0.
      context_region: length of box and hard texts; None is `text.context_short`, as published.
        Exact as long as the phrases fit (attention is causal and the end is the pooled token), and
        phrases are short: it saves most of the text tower's work.
      local_groups: slices of the global batch within which region and hard losses are computed
        (W). The official run computes them per device: W is its number of devices.
      same_text: what equal captions or phrases in a batch are to each other, see
        `jaxmods.objectives.contrastive`. The official code has "negative".
      chunk: columns of a piece of the contrastive score matrix.
      microbatch: images encoded at a time, recomputed in the backward pass; None for all. Exact,
        and memory of the towers is that of one microbatch.
      max_logit_scale: upper bound of the three exp(logit_scale); the official code has none.
      roi_bfloat16: round RoI vectors to bfloat16, as the official code does.
      text_group: label the text tower "text", for its own learning rate (`text_model_lr`).
      long_start: where long texts start without imported weights. "drawn" is what the official
        class does, N(0, 1) position tables, which drown the token embeddings for a long while;
        "stretched" makes tables and projection from the short ones, as from a plain CLIP.
      position_start: where the places of a picture start without imported weights. "drawn" is what
        the official class does, N(0, 0.02); "sincos" adds sines and cosines of row and column
        (`sincos_grid`), for towers that have to say where something is: from "drawn" a small one
        does not learn to tell left from right, which captions seldom ask for.
      patch_start: what patches are read through without imported weights. "drawn" is what the
        official class does, N(0, 0.02); "cosines" are `cosine_filters`, with which a small
        tower sees surfaces a little sooner.
      execution: remat, unrolling, attention implementation.
    """

    batch_negatives: ClassVar[bool] = True

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    projection_dim: int = 512
    weight_short: float = 1.0
    weight_long: float = 1.0
    weight_region: float = 0.1
    weight_hard: float = 0.5
    max_boxes: int = 4
    negatives: int = 10
    hard_pack_images: int = 8
    hard_pack_slots: int = 16
    context_region: int | None = None
    local_groups: int = 1
    same_text: SameText = "negative"
    chunk: int = 1024
    microbatch: int | None = None
    max_logit_scale: float | None = None
    roi_bfloat16: bool = False
    text_group: bool = False
    long_start: Literal["drawn", "stretched"] = "drawn"
    position_start: Literal["drawn", "sincos"] = "drawn"
    patch_start: Literal["drawn", "cosines"] = "drawn"
    execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.hard_pack_slots == 0 and self.weight_hard:
            raise ValueError(
                f"FgClip: weight_hard={self.weight_hard} needs hard_pack_slots of 1 or more, found "
                "0; set weight_hard=0 for data without hard negatives"
            )

    @property
    def model(self) -> FgClipModel:
        """The Flax module of these sizes."""
        return FgClipModel(self.vision, self.text, self.projection_dim, self.execution)

    # Batch and parameters --------------------------------------------------------------------

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """Arrays of a training batch; `hard_*` are packed over groups of `hard_pack_images`.

        Raises:
          ValueError: a batch that pack groups, local slices or microbatches do not divide.
        """
        self._check_batch(global_batch)
        b, n, groups = global_batch, self.max_boxes, global_batch // self.hard_pack_images
        k, m = self.hard_pack_slots, 1 + self.negatives
        region = self.context_region or self.text.context_short
        short, long, side = self.text.context_short, self.text.context_long, self.vision.image_size

        def spec(shape: tuple[int, ...], dtype: str, first: str = "batch") -> ArraySpec:
            return ArraySpec(shape, dtype, (first,) + (None,) * (len(shape) - 1))

        hard = {
            "hard_box": spec((groups, k, 4), "float32", "group"),
            "hard_image": spec((groups, k), "int32", "group"),
            "hard_text": spec((groups, k, m, region), "int32", "group"),
            "hard_text_mask": spec((groups, k, m), "bool", "group"),
            "hard_mask": spec((groups, k), "bool", "group"),
        }
        return {
            "image": spec((b, side, side, 3), "uint8"),
            "text_short": spec((b, short), "int32"),
            "text_long": spec((b, long), "int32"),
            "box": spec((b, n, 4), "float32"),
            "box_text": spec((b, n, region), "int32"),
            "box_mask": spec((b, n), "bool"),
            **(hard if k else {}),
        }

    def init(self, rng: jax.Array) -> Params:
        """Hugging Face's CLIP initialisation; the additions keep the framework's defaults."""
        side = self.vision.image_size
        variables = self.model.init(
            rng, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1), jnp.int32)
        )
        params = variables["params"]
        if self.long_start == "stretched":
            params = nn.meta.replace_boxed(params, self.from_openai(nn.meta.unbox(params)))
        plain = nn.meta.unbox(params)
        tower = dict(plain["vision_tower"])
        if self.position_start == "sincos":
            places = sincos_grid(self.vision.grid, self.vision.width)
            tower["position_embedding"] = tower["position_embedding"].at[1:].add(_SINCOS * places)
        if self.patch_start == "cosines":
            filters = cosine_filters(self.vision.patch_size, self.vision.width)
            tower["patch_embedding"] = jnp.asarray(_COSINES * filters)
        return nn.meta.replace_boxed(params, {**plain, "vision_tower": tower})

    def labels(self, params: Params) -> dict[str, Any]:
        """ "train", or "text" for what the official code names `text_model*` if `text_group`."""
        text = {"text_tower", "position_embedding_ori", "position_embedding_res"}

        def label(path: tuple[Any, ...], leaf: Any) -> str:
            del leaf
            return "text" if self.text_group and path[0].key in text else TRAIN

        return jax.tree_util.tree_map_with_path(label, params)

    def decay(self, params: Params) -> dict[str, Any]:
        """Everything but layer norms and biases: temperatures, class and position embeddings are
        decayed (as by the Hugging Face trainer of the official code)."""

        def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
            del leaf
            return path[-1].key not in ("bias", "scale")

        return jax.tree_util.tree_map_with_path(decayed, params)

    # Loss --------------------------------------------------------------------------------------

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        """The four losses. Metrics: each term without its weight, the three exp(logit_scale), and
        accuracies within the batch ("i2t" and "t2i", of texts, boxes and hard negatives)."""
        del rng, step
        self._check_batch(batch["image"].shape[0])
        features = self._encode_all(params, batch)
        scale, scale_region, scale_hard = (
            self._scale(params[name])
            for name in ("logit_scale", "logit_scale_region", "logit_scale_hard")
        )
        terms: dict[str, jax.Array] = {}
        metrics: dict[str, jax.Array] = {
            "logit_scale": scale,
            "logit_scale_region": scale_region,
            "logit_scale_hard": scale_hard,
        }
        image = normalise(features["image"])
        for length in ("long", "short"):
            if f"text_{length}" not in features:
                continue
            contrast = info_nce(
                image,
                normalise(features[f"text_{length}"]),
                scale,
                same_text=self.same_text,
                text=self._hash(batch[f"text_{length}"]),
                chunk=self.chunk,
            )
            terms[length] = contrast.loss
            metrics[f"accuracy_{length}_i2t"] = contrast.accuracy_rows
            metrics[f"accuracy_{length}_t2i"] = contrast.accuracy_columns
        if "box" in features:
            terms["region"], extra = self._region(features, batch, scale_region)
            metrics |= extra
        if "hard_box" in features:
            terms["hard"], extra = self._hard(features, batch, scale_hard)
            metrics |= extra
        metrics |= {f"loss_{name}": term for name, term in terms.items()}
        weights = {
            "long": self.weight_long,
            "short": self.weight_short,
            "region": self.weight_region,
            "hard": self.weight_hard,
        }
        total = sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))
        return LossOutput(total, metrics, state)

    def _region(
        self, features: Mapping[str, jax.Array], batch: Batch, scale: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask, width = batch["box_mask"], self.projection_dim
        boxes = normalise(self._round(features["box"]), mask)
        texts = normalise(features["box_text"], mask)
        w = self.local_groups
        hashes = self._hash(batch["box_text"])
        contrast = local_info_nce(
            boxes.reshape(w, -1, width),
            texts.reshape(w, -1, width),
            scale,
            same_text=self.same_text,
            text=None if hashes is None else hashes.reshape(w, -1, 2),
            valid=mask.reshape(w, -1),
            chunk=self.chunk,
        )
        return contrast.loss, {
            "accuracy_region_i2t": contrast.accuracy_rows,
            "accuracy_region_t2i": contrast.accuracy_columns,
        }

    def _hard(
        self, features: Mapping[str, jax.Array], batch: Batch, scale: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask, width, w = batch["hard_mask"], self.projection_dim, self.local_groups
        exists = batch["hard_text_mask"] & mask[..., None]
        boxes = normalise(self._round(features["hard_box"]), mask)
        texts = normalise(features["hard_text"], exists)
        result = hard_negative_loss(
            boxes.reshape(w, -1, width),
            texts.reshape(w, -1, texts.shape[2], width),
            scale,
            exists.reshape(w, -1, texts.shape[2]),
            mask.reshape(w, -1),
        )
        return result.loss, {"accuracy_hard": result.accuracy}

    def _scale(self, log_scale: jax.Array) -> jax.Array:
        scale = jnp.exp(log_scale.astype(jnp.float32))
        return scale if self.max_logit_scale is None else jnp.minimum(scale, self.max_logit_scale)

    def _hash(self, ids: jax.Array) -> jax.Array | None:
        return None if self.same_text == "negative" else hash_texts(ids)

    def _round(self, features: jax.Array) -> jax.Array:
        return features.astype(jnp.bfloat16) if self.roi_bfloat16 else features

    # Encoding ------------------------------------------------------------------------------------

    def _encode_all(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """All features of a batch, in microbatches if asked for."""
        size = batch["image"].shape[0]
        if self.microbatch is None or self.microbatch >= size:
            return self._encode(params, batch)
        parts = size // self.microbatch

        # Part j takes every parts-th row, so that each keeps an equal share of every device's rows.
        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

        # Images of one pack group stay together: they are split as groups.
        def group(x: jax.Array) -> jax.Array:
            return x.reshape(-1, self.hard_pack_images, *x.shape[1:])

        grouped = {k: x if k.startswith("hard") else group(x) for k, x in batch.items()}
        encode = checkpointed(
            lambda p, part: self._encode(
                p,
                {
                    k: x if k.startswith("hard") else x.reshape(-1, *x.shape[2:])
                    for k, x in part.items()
                },
            ),
            "full",
        )
        out = jax.lax.map(lambda part: encode(params, part), jax.tree.map(split, grouped))

        def join(name: str, x: jax.Array) -> jax.Array:
            if name.startswith("hard"):
                return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
            x = x.reshape(parts, -1, self.hard_pack_images, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[3:])

        return {name: join(name, x) for name, x in out.items()}

    def _encode(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Features of images and texts, not normalised.

        Keys: image [B, P], text_long, text_short [B, P], box, box_text [B, N, P],
        hard_box [B/g, K, P], hard_text [B/g, K, 1+M, P]; those of losses with weight 0 are absent.
        """
        regions, hards = bool(self.weight_region), bool(self.weight_hard)
        image = batch["image"]
        out: dict[str, jax.Array] = {}
        if regions or hards:
            hard_boxes = (batch["hard_box"], batch["hard_image"]) if hards else ()
            out["image"], boxes, hard = self._apply(
                "encode_images", params, image, batch["box"], *hard_boxes
            )
            out |= {"box": boxes} if regions else {}
            out |= {"hard_box": hard} if hards else {}
        else:
            out["image"] = self._apply("image_features", params, image)
        if self.weight_long:
            out["text_long"] = self._text_long(params, batch["text_long"])
        out |= self._encode_short(params, batch)
        return out

    def _encode_short(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """All texts with short positions, one pass for each length. They are laid side by side
        within a pack group, so that the leading dimension stays the one that is split over
        devices."""
        by_length: dict[int, list[str]] = {}
        for name, weight in (
            ("text_short", self.weight_short),
            ("box_text", self.weight_region),
            ("hard_text", self.weight_hard),
        ):
            if weight:
                by_length.setdefault(batch[name].shape[-1], []).append(name)
        groups = batch["image"].shape[0] // self.hard_pack_images
        out: dict[str, jax.Array] = {}
        for length, names in by_length.items():
            rows = [batch[name].reshape(groups, -1, length) for name in names]
            ids = jnp.concatenate(rows, axis=1)
            flat = self._text_short(params, ids.reshape(-1, length))
            features = flat.reshape(groups, ids.shape[1], self.projection_dim)
            start = 0
            for name, part in zip(names, rows, strict=True):
                stop = start + part.shape[1]
                shape = (*batch[name].shape[:-1], self.projection_dim)
                out[name] = features[:, start:stop].reshape(shape)
                start = stop
        return out

    def _apply(self, method: str, params: Params, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method, **kwargs)

    def _text_short(self, params: Params, ids: jax.Array) -> jax.Array:
        return self._apply("text_features", params, ids)

    def _text_long(self, params: Params, ids: jax.Array) -> jax.Array:
        return self._apply("text_features", params, ids, positions="long", projection="long")

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Feature functions (images as in the batch, features not normalised):

        image_features(params, image [B, S, S, 3]) -> [B, P]
        text_features_short(params, ids [B, L <= context_short]) -> [B, P]
        text_features_long(params, ids [B, L <= context_long]) -> [B, P]
        dense_features(params, image) -> [B, G, G, P]
        box_features(params, image, boxes [B, N, 4] as fractions) -> [B, N, P]
        """

        def method(name: str) -> Callable[..., jax.Array]:
            return lambda params, *args: self._apply(name, params, *args)

        return {
            "image_features": method("image_features"),
            "text_features_short": self._text_short,
            "text_features_long": self._text_long,
            "dense_features": method("dense_features"),
            "box_features": method("box_features"),
        }

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """Arguments of `functions` for `batch_size` images or texts at the published lengths."""
        side, text = self.vision.image_size, self.text

        def spec(dtype: str, *shape: int) -> ArraySpec:
            return ArraySpec((batch_size, *shape), dtype, ("batch", *(None for _ in shape)))

        image = {"image": spec("uint8", side, side, 3)}
        return {
            "image_features": image,
            "text_features_short": {"ids": spec("int32", text.context_short)},
            "text_features_long": {"ids": spec("int32", text.context_long)},
            "dense_features": image,
            "box_features": {**image, "boxes": spec("float32", self.max_boxes, 4)},
        }

    # Weights -------------------------------------------------------------------------------------

    def weights(self) -> WeightMap:
        """Official FG-CLIP state dict; a plain CLIP one fits too (see `complete_import`)."""
        return fgclip_map(self.vision.layers, self.text.layers)

    def hub_config(self) -> dict[str, Any]:
        """`config.json` in the official layout."""
        return hub.to_config(self)

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any], **options: Any) -> FgClip:
        """Sizes from a published `config.json` (FG-CLIP's or CLIP's); `options`: other fields."""
        vision, text, projection_dim = hub.sizes(config)
        return cls(vision=vision, text=text, projection_dim=projection_dim, **options)

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        """A plain CLIP becomes the FG-CLIP it is the start of.

        Raises:
          ValueError: some, but not all, of what FG-CLIP adds is missing: a damaged FG-CLIP file.
        """
        if not missing:
            return params
        if missing != ADDED:
            raise ValueError(
                f"FG-CLIP weights: missing {', '.join(sorted(missing))}, while "
                f"{', '.join(sorted(ADDED - missing))} are there; expected a whole FG-CLIP file, "
                "or a CLIP file that has none of them"
            )
        return self.from_openai(params)

    def from_openai(self, params: Params) -> Params:
        """Long tables, long projection and temperatures made anew from CLIP's own.

        What the official code does with `from_openai=True`. Meant for the start from a CLIP; on a
        trained FG-CLIP it overwrites what long texts have learned.
        """
        table = stretch_positions(
            params["text_tower"]["position_embedding"], self.text.keep, self.text.context_long
        )
        return self.reset_temperatures(
            {
                **params,
                "position_embedding_ori": table,
                "position_embedding_res": table,
                "text_long_projection": dict(params["text_projection"]),
            }
        )

    def reset_temperatures(self, params: Params) -> Params:
        """Region and hard-negative temperatures set to `logit_scale`: the official code does so at
        every start of stage 2, also from an FG-CLIP checkpoint."""
        scale = params["logit_scale"]
        return {**params, "logit_scale_region": scale, "logit_scale_hard": scale}

    def verify_export(self, folder: Path, params: Params, rng: jax.Array) -> dict[str, float]:
        """Relative errors ||a - b|| / ||b|| of PyTorch on `folder` against us, by output name.

        The folder's weights are loaded with `strict=True`, its `config.json` gives the sizes.
        """
        from jaxmods.systems.fgclip import verification

        return verification.verify(self, folder, params, rng)

    def flops_per_example(self) -> float:
        """Analytic FLOPs of one image with its texts, forward and backward (3 x forward).

        Products only. Padding slots count (they are computed); what the last block skips does not.
        """
        v, t = self.vision, self.text
        tokens = 1 + v.grid * v.grid
        trunk = _block_flops(v.width, v.mlp, tokens, v.layers - 1)
        patches = 2 * v.grid * v.grid * 3 * v.patch_size**2 * v.width
        total: float = trunk + patches + _one_flops(v.width, v.mlp, tokens)
        if self.weight_region or self.weight_hard:
            total += 2 * tokens * (2 * v.width * v.width + 2 * v.width * v.mlp)

        def texts(length: int) -> float:
            return _block_flops(t.width, t.mlp, length, t.layers - 1) + _one_flops(
                t.width, t.mlp, length
            )

        region = (self.weight_region != 0) * float(self.max_boxes)
        hard = self.hard_pack_slots * (1 + self.negatives) / self.hard_pack_images
        region += hard if self.weight_hard else 0
        total += region * texts(self.context_region or t.context_short)
        total += texts(t.context_short) if self.weight_short else 0
        total += texts(t.context_long) if self.weight_long else 0
        return 3.0 * total

    def _check_batch(self, size: int) -> None:
        g = self.hard_pack_images
        if size % g:
            raise ValueError(f"FG-CLIP: batch {size} is not a multiple of hard_pack_images={g}")
        if (size // g) % self.local_groups:
            raise ValueError(
                f"FG-CLIP: {size // g} pack groups (batch {size} / hard_pack_images={g}) cannot be "
                f"split into local_groups={self.local_groups} slices"
            )
        part = size if self.microbatch is None else min(self.microbatch, size)
        if size % part or part % g:
            raise ValueError(
                f"FG-CLIP: microbatch {part} must divide the batch {size} and be a multiple of "
                f"hard_pack_images={g}"
            )


def stretch_positions(table: jax.Array, keep: int, rows: int) -> jax.Array:
    """CLIP's position table stretched for long texts (official `resize_postion_embeding`).

    The first `keep` rows are copied. From there each interval between rows becomes four steps of
    linear interpolation; the last row continues with the last step.

    Args:
      table: [n, D]. keep: rows kept. rows: expected result, 4 n - 3 keep.

    Returns:
      [rows, D] in the table's dtype.

    Raises:
      ValueError: `rows` is not 4 n - 3 keep.
    """
    n = table.shape[0]
    if rows != 4 * n - 3 * keep:
        raise ValueError(
            f"long positions: {n} rows with {keep} kept stretch to {4 * n - 3 * keep}, expected "
            f"context_long={rows}; set context_long or keep accordingly"
        )
    wide = table.astype(jnp.float32)
    here, after = wide[keep:-1, None], wide[keep + 1 :, None]
    k = jnp.arange(4, dtype=jnp.float32)[:, None]
    between = (((4 - k) * here + k * after) / 4).reshape(-1, table.shape[1])
    end = wide[-1] + k * (wide[-1] - wide[-2]) / 4
    return jnp.concatenate([wide[:keep], between, end]).astype(table.dtype)


def _block_flops(width: int, mlp: int, tokens: int, layers: int) -> float:
    each = tokens * (4 * width * width + 2 * width * mlp) + 2 * tokens * tokens * width
    return 2.0 * layers * each


def _one_flops(width: int, mlp: int, tokens: int) -> float:
    """The last block for one token: keys and values everywhere, the rest once."""
    return 2.0 * (2 * tokens * width * width + 2 * tokens * width + 2 * width * (width + mlp))
