"""IAA, the inner-adaptor architecture (arXiv 2408.12902; official code
360CVGroup/Inner-Adaptor-Architecture).

A frozen Llama 3 with decoder layers of its own kind inserted after some of its layers. Each branch
(MM general, G grounding) has a projector of image features, a token embedding, inserted layers, a
final norm and a head; the base's own embedding, norm and head serve the third workflow, Text, which
is the base and nothing else.

    x = embedding_b(ids), with projector_b(CLIP features) where pictures stand
    for i in layers: x = base_i(x); if i in I: x = inserted_b[I.index(i)](x)
    logits = head_b(norm_b(x))

There is no gate and no parallel path. Published: `IAA_14` after layers in pairs every five; the
positions of IAA-8 are unpublished, `IAA_8` is an ASSUMPTION.

Shape legend:
  B batch   M pictures per row   S picture side   N tokens per picture   T positions
  D width   F width of image features   V vocabulary   L base layers   J inserted layers that run
"""

from __future__ import annotations

import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.clip import VisionConfig, VisionTower
from jaxmods.backbones.llama import (
    Context,
    DecoderLayer,
    Llama,
    LlamaConfig,
    layers_param,
    packed_positions,
    rope_of,
    unembed,
)
from jaxmods.nn.kv_cache import KV, Decoding, Past, start
from jaxmods.nn.layers import Linear, RMSNorm, boxed
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import constrain
from jaxmods.systems.iaa.layers import interleave

Branch = Literal["MM", "G"]
Workflow = Literal["MM", "G", "Text"]
BRANCHES: tuple[Branch, ...] = ("MM", "G")

IAA_14 = (0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)
IAA_8 = (0, 4, 8, 12, 16, 20, 24, 28)  # ASSUMPTION: the paper does not give the positions

# CLIP ViT-L/14 at 336 px.
CLIP_L_336 = VisionConfig(width=1024, layers=24, heads=16, mlp=4096, image_size=336, patch_size=14)


def projector_depth(kind: str) -> int:
    """Linear layers of a projector: 0 for "identity", 1 for "linear", n for "mlp{n}x_gelu".

    Raises:
      ValueError: another kind.
    """
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"projector: expected identity, linear or mlp<n>x_gelu (as mlp2x_gelu), found {kind!r}"
        )
    return int(match.group(1))


class Projector(nn.Module):
    """Image features to the width of the language model, token by token: linear layers with exact
    (erf) GELU between them; drawn with the standard deviation `initializer_range`."""

    kind: str
    width: int
    initializer_range: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., D]; the identity leaves F as it is."""
        normal = nn.initializers.normal(self.initializer_range)
        for number in range(projector_depth(self.kind)):
            if number:
                x = jax.nn.gelu(x, approximate=False)
            name = f"linear_{number}"
            x = Linear(self.width, ("embed", "proj"), kernel_init=normal, name=name)(x)
        return x


class BranchModule(nn.Module):
    """What one branch adds to the base.

    Attributes:
      config: of the base. inserted: layers that are held (all of I, also those that never run).
      projector_kind: see `projector_depth`. features: F.
    """

    config: LlamaConfig
    inserted: int
    projector_kind: str
    features: int

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.projector = Projector(self.projector_kind, c.width, c.initializer_range)
        self.embedding = self.param(
            "embedding", boxed(normal, ("vocab", "embed")), (c.vocab_size, c.width)
        )
        self.layers = layers_param(self, "layers", c, self.inserted)
        self.final_norm = RMSNorm(c.epsilon)
        self.unembedding = self.param(
            "unembedding", boxed(normal, ("embed", "vocab")), (c.width, c.vocab_size)
        )

    def __call__(self) -> Any:
        """Every parameter once (for initialisation)."""
        return self.projector(jnp.zeros((1, self.features))), self.final_norm(
            jnp.zeros((1, self.config.width))
        )

    def embed(self, ids: jax.Array, slot: jax.Array, features: jax.Array) -> jax.Array:
        """Rows of the table, and projected image tokens where they stand.

        Args:
          ids: int [B, T]. slot: int [B, T], index into the row's image tokens, -1 for none.
          features: [B, M N, F].

        Returns:
          [B, T, D].
        """
        words = jnp.take(self.embedding, ids, axis=0, mode="clip")
        seen = self.projector(features).astype(words.dtype)
        pictures = jnp.take_along_axis(seen, jnp.maximum(slot, 0)[..., None], axis=1)
        return jnp.where((slot >= 0)[..., None], pictures, words)


class IaaModel(nn.Module):
    """The whole model. Branches that are not in `branches` have no parameters.

    Attributes:
      llama, vision: sizes of the two published models underneath; vision may be None without
        branches.
      insert_after: I.
      branches: which are there.
      projector: see `projector_depth`.
      select_layer, select_feature: which of CLIP's hidden states is seen, with its class token
        ("cls_patch") or without ("patch").
      execution: how the language model's layers run. vision_execution: the tower's.
    """

    llama: LlamaConfig
    vision: VisionConfig | None
    insert_after: tuple[int, ...] = IAA_14
    branches: tuple[Branch, ...] = BRANCHES
    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"
    execution: Execution = Execution()
    vision_execution: Execution = Execution()

    def setup(self) -> None:
        self.base = Llama(self.llama, self.execution)
        if self.branches and self.vision is None:
            raise ValueError("IaaModel: expected a vision tower for the branches, found None")
        if self.vision is not None:
            self.vision_tower = VisionTower(self.vision, self.vision_execution)
        for branch in self.branches:
            assert self.vision is not None
            setattr(
                self,
                branch,
                BranchModule(self.llama, len(self.insert_after), self.projector, self.vision.width),
            )

    def __call__(self) -> Any:
        """Every parameter once (for initialisation)."""
        out = [self.base(jnp.zeros((1, 1), jnp.int32)), *(self._branch(b)() for b in self.branches)]
        if self.vision is not None:
            side = self.vision.image_size
            trunk = self.vision_tower.trunk(jnp.zeros((1, side, side, 3)))
            out.append(self.vision_tower.pooled(trunk))
        return out

    def _branch(self, branch: Branch) -> BranchModule:
        if branch not in self.branches:
            raise ValueError(f"IaaModel: expected one of {self.branches}, found branch {branch!r}")
        found: BranchModule = getattr(self, branch)
        return found

    # What the branches see and say ------------------------------------------------------------

    def features(self, image: jax.Array) -> jax.Array:
        """Image features of CLIP: [B, M, S, S, 3] (see `VisionTower.trunk`) -> [B, M N, F]."""
        rows, pictures = image.shape[:2]
        hidden = self.vision_tower.hidden(
            image.reshape(rows * pictures, *image.shape[2:]), self.select_layer
        )
        tokens = hidden if self.select_feature == "cls_patch" else hidden[:, 1:]
        return tokens.reshape(rows, -1, tokens.shape[-1])

    def project(self, features: jax.Array, branch: Branch) -> jax.Array:
        """[..., F] -> [..., D]."""
        return self._branch(branch).projector(features)

    def embed(
        self,
        ids: jax.Array,
        slot: jax.Array,
        valid: jax.Array,
        features: jax.Array,
        branch: Branch,
    ) -> jax.Array:
        """Inputs of the first layer [B, T, D], zero where not `valid` (bool [B, T])."""
        x = self._branch(branch).embed(ids, slot, features)
        return jnp.where(valid[..., None], x, 0)

    def states(
        self, x_BTD: jax.Array, branch: Branch, segments: jax.Array | None = None
    ) -> jax.Array:
        """Whole texts through base and inserted layers and the branch's norm: [B, T, D] both.

        Padding on the right needs no mask: no position sees a later one.

        Args:
          segments: int [B, T], numbers of the conversations of a row: none sees another, and
            positions restart with each; None: one per row.
        """
        own = self._branch(branch)
        if segments is None:
            positions = jnp.arange(x_BTD.shape[1])[None]
        else:
            positions = packed_positions(segments)
        context = Context(rope_of(positions, self.llama), segments)
        template = DecoderLayer(self.llama, self.execution.attention, parent=None)

        def layer(params: Any, x: jax.Array) -> tuple[jax.Array, None]:
            return template.apply({"params": params}, x, context), None  # type: ignore[return-value]  # linen types apply's result as a union

        x = constrain(x_BTD, ("batch", "seq", None))
        x, _, _ = interleave(
            self.base.layers,
            own.layers,
            x,
            self.insert_after,
            layer,
            layer,
            policy=self.execution.remat,
        )
        return own.final_norm(x)

    def head(self, workflow: Workflow) -> jax.Array:
        """The matrix [D, V] from states to logits."""
        if workflow == "Text":
            return self.base.head()
        return self._branch(workflow).unembedding

    def text_states(self, ids: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """The Text workflow: the base on int [B, T], states after its norm [B, T, D]; `segments`
        as in `states`."""
        positions = None if segments is None else packed_positions(segments)
        return self.base(ids, positions=positions, segments=segments)

    # Token by token ---------------------------------------------------------------------------

    def prefill(
        self, x_BTD: jax.Array, lengths: jax.Array, branch: Branch, *, capacity: int
    ) -> tuple[jax.Array, Decoding]:
        """Reads prompts, padded on the right.

        Args:
          x_BTD: from `embed`. lengths: int [B], at least 1. capacity: slots of a row, for prompt
            and answer.

        Returns:
          (float32 logits [B, V] after each prompt, state). The state's cache is (keys and values of
          the L base layers, of the J inserted layers that run).
        """
        positions = jnp.arange(x_BTD.shape[1])[None]
        logits, fresh = self._continue(x_BTD, positions, lengths, branch, None)
        lengths = lengths.astype(jnp.int32)
        return logits, start(fresh, lengths, lengths, capacity)

    def decode_step(
        self, tokens: jax.Array, state: Decoding, branch: Branch
    ) -> tuple[jax.Array, Decoding]:
        """Reads one token per row: int [B] -> (float32 logits [B, V], state)."""
        words = jnp.take(self._branch(branch).embedding, tokens[:, None], axis=0, mode="clip")
        one = jnp.ones_like(tokens)
        logits, fresh = self._continue(words, state.positions[:, None], one, branch, state)
        return logits, state.write(fresh, one)

    def _continue(
        self,
        x: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        branch: Branch,
        state: Decoding | None,
    ) -> tuple[jax.Array, tuple[KV, KV]]:
        own = self._branch(branch)
        context = Context(rope_of(positions, self.llama))
        template = DecoderLayer(self.llama, self.execution.attention, parent=None)

        def layer(part: Any, x: jax.Array) -> Any:
            params, kept = part
            past = () if state is None else (Past(KV(*kept), state.lengths),)
            return template.apply({"params": params}, x, context, past, method="cached")

        kept_base, kept_own = (None, None) if state is None else state.cache
        x, *fresh = interleave(
            (self.base.layers, kept_base),
            (own.layers, kept_own),
            constrain(x, ("batch", "seq", None)),
            self.insert_after,
            layer,
            layer,
            by_index=True,
        )
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = unembed(own.final_norm(last), own.unembedding)
        return logits, (fresh[0], fresh[1])
