"""FG-CLIP (arXiv 2505.05071, section 3; official code branch v1.0, `fgclip/model/clip_strc`).

A CLIP with four additions: two 248-row position tables for long texts, a second text projection,
two more temperatures, and dense patch features from a last block without attention.

Published sizes: base is CLIP B/16 at 224 px, large is CLIP L/14 at 336 px (`BASE`, `LARGE`).

Shape legend:
  B images   N boxes per image   R texts   L tokens   T vision tokens   G patches per side
  D width of a tower   P projection width
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.clip import (
    LOGIT_SCALE_INIT,
    Execution,
    TextConfig,
    TextTower,
    VisionConfig,
    VisionTower,
)
from jaxmods.nn.layers import Initializer, Linear, boxed
from jaxmods.nn.roi_align import pool, roi_weights

BASE = (VisionConfig(), TextConfig(), 512)
LARGE = (
    VisionConfig(width=1024, layers=24, heads=16, mlp=4096, image_size=336, patch_size=14),
    TextConfig(width=768, heads=12, mlp=3072),
    768,
)

TextMode = Literal["short", "long"]


class FgClipModel(nn.Module):
    """The whole model; every method takes raw inputs and returns features that are not normalised.

    Attributes:
      vision, text, projection_dim: sizes.
      execution: how the towers run.
    """

    vision: VisionConfig
    text: TextConfig
    projection_dim: int
    execution: Execution = Execution()

    def setup(self) -> None:
        width_v, width_t = self.vision.width, self.text.width
        self.vision_tower = VisionTower(self.vision, self.execution)
        self.text_tower = TextTower(self.text, self.execution)
        # Hugging Face's rules for CLIP skip the long tables and the long projection, which keep
        # the framework's defaults: N(0, 1) and U(+-1 / sqrt(D)).
        table = boxed(nn.initializers.normal(1.0), ("pos", "embed"))
        shape = (self.text.context_long, width_t)
        self.position_embedding_ori = self.param("position_embedding_ori", table, shape)
        self.position_embedding_res = self.param("position_embedding_res", table, shape)

        def projection(init: Initializer) -> Linear:
            return Linear(self.projection_dim, ("embed", "proj"), use_bias=False, kernel_init=init)

        self.visual_projection = projection(nn.initializers.normal(width_v**-0.5))
        self.text_projection = projection(nn.initializers.normal(width_t**-0.5))
        self.text_long_projection = projection(
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        )
        scale = boxed(nn.initializers.constant(LOGIT_SCALE_INIT), ())
        self.logit_scale = self.param("logit_scale", scale, ())
        self.logit_scale_region = self.param("logit_scale_region", scale, ())
        self.logit_scale_hard = self.param("logit_scale_hard", scale, ())

    def __call__(self, image: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        """Every parameter once (for initialisation)."""
        return (
            self.image_features(image),
            self.dense_features(image),
            self.text_features(ids),
            self.text_features(ids, positions="long", projection="long"),
        )

    def image_features(self, image: jax.Array) -> jax.Array:
        """[B, H, W, 3] (see `VisionTower.trunk`) -> [B, P]."""
        return self.visual_projection(self.vision_tower.pooled(self.vision_tower.trunk(image)))

    def dense_features(self, image: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, G, G, P], row-major patches."""
        tokens = self.visual_projection(self.vision_tower.dense(self.vision_tower.trunk(image)))
        grid = self._grid(image)
        return tokens.reshape(tokens.shape[0], grid, grid, -1)

    def box_features(self, image: jax.Array, boxes: jax.Array, cells: bool = False) -> jax.Array:
        """RoI features, [B, S, S, 3] and [B, N, 4] -> float32 [B, N, P].

        Boxes are (x1, y1, x2, y2), fractions of the image, or in feature-map cells if `cells`.
        """
        boxes = boxes if cells else boxes * self._grid(image)
        tokens = self.vision_tower.dense(self.vision_tower.trunk(image))
        return self._project_pooled(pool(tokens, self._box_weights(boxes, self._grid(image))))

    def encode_images(
        self,
        image: jax.Array,
        box: jax.Array,
        hard_box: jax.Array | None = None,
        hard_image: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Image, region and hard-box features from one pass over the images.

        Args:
          image: [B, S, S, 3]. box: [B, N, 4], fractions.
          hard_box: [B / g, K, 4]; hard_image: int [B / g, K], index 0..g-1 in the pack group; both
            None for none.

        Returns:
          ([B, P], float32 [B, N, P], float32 [B / g, K, P] or None).
        """
        trunk = self.vision_tower.trunk(image)
        tokens = self.vision_tower.dense(trunk)
        grid = self._grid(image)
        regions = self._project_pooled(pool(tokens, self._box_weights(box * grid, grid)))
        pooled = self.visual_projection(self.vision_tower.pooled(trunk))
        if hard_box is None or hard_image is None:
            return pooled, regions, None
        groups = hard_box.shape[0]
        weights = self._box_weights(hard_box * grid, grid)
        group = image.shape[0] // groups
        owner = jax.nn.one_hot(hard_image, group, dtype=weights.dtype)
        spread = owner[..., :, None] * weights[..., None, :]
        hard = pool(
            tokens.reshape(groups, group * grid * grid, -1),
            spread.reshape(groups, weights.shape[1], -1),
        )
        return pooled, regions, self._project_pooled(hard)

    def text_features(
        self, ids: jax.Array, positions: TextMode = "short", projection: TextMode = "short"
    ) -> jax.Array:
        """int [R, L] -> [R, P].

        The official `get_text_features(walk_short_pos, use_bbox)` is: (True, any) short positions
        and projection, (False, False) long both, (False, True) short positions, long projection.
        """
        table = self.long_positions() if positions == "long" else None
        pooled = self.text_tower.pooled(self.text_tower.trunk(ids, table), ids)
        return (
            self.text_projection(pooled)
            if projection == "short"
            else (self.text_long_projection(pooled))
        )

    def long_positions(self) -> jax.Array:
        """The long table [context_long, D]: the first `keep` rows from `ori`, the rest from `res`.

        The official code multiplies each table with a 0/1 mask and adds them: unused halves get
        exactly no gradient, here as there.
        """
        keep = self.text.keep
        return jnp.concatenate(
            [self.position_embedding_ori[:keep], self.position_embedding_res[keep:]]
        )

    def vision_hidden(self, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(input of the last block, its output [B, T, D], pooled [B, D]), none projected."""
        trunk = self.vision_tower.trunk(image)
        return trunk, self.vision_tower.last_hidden(trunk), self.vision_tower.pooled(trunk)

    def text_hidden(
        self, ids: jax.Array, positions: TextMode = "short"
    ) -> tuple[jax.Array, jax.Array]:
        """(all tokens [R, L, D], pooled [R, D]) after the final norm, not projected."""
        trunk = self.text_tower.trunk(ids, self.long_positions() if positions == "long" else None)
        return self.text_tower.last_hidden(trunk), self.text_tower.pooled(trunk, ids)

    def _box_weights(self, boxes_cells: jax.Array, grid: int) -> jax.Array:
        """[..., N, 4] in cells -> float32 [..., N, G * G]."""
        rows, columns = roi_weights(boxes_cells, (grid, grid))
        outer = rows[..., :, None] * columns[..., None, :]
        return outer.reshape(*outer.shape[:-2], grid * grid)

    def _project_pooled(self, pooled: jax.Array) -> jax.Array:
        """Projection of RoI means in float32. RoIAlign and the projection are both linear, so the
        order does not matter, and this one projects N vectors instead of G * G."""
        kernel = self.visual_projection.variables["params"]["kernel"]
        return jnp.matmul(pooled, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    def _grid(self, image: jax.Array) -> int:
        height, width = image.shape[1], image.shape[2]
        if height != width:
            raise ValueError(
                f"dense features: expected square images, found {image.shape}; resize them to "
                f"{self.vision.image_size} x {self.vision.image_size}"
            )
        return height // self.vision.patch_size
