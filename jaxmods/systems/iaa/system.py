"""IAA as a `System`: batch, loss, what trains in each stage, generation, weights.

Paper arXiv 2408.12902 (AAAI 2025); official code 360CVGroup/Inner-Adaptor-Architecture (inference
only: what training code would say is marked ASSUMPTION).

Shape legend:
  B batch   M pictures per row   S picture side   N tokens per picture   T positions of a row
  (M = pack x max_images in training, max_images in prompts)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmods.backbones.clip import VisionConfig
from jaxmods.backbones.llama import LLAMA3_8B, Llama, LlamaConfig
from jaxmods.generation import Limits, generate
from jaxmods.nn.kv_cache import KV, Decoding
from jaxmods.nn.stack import Execution
from jaxmods.system import FROZEN, TRAIN, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.systems.iaa.layers import plan
from jaxmods.systems.iaa.model import (
    BRANCHES,
    CLIP_L_336,
    IAA_14,
    Branch,
    IaaModel,
    Workflow,
    projector_depth,
)
from jaxmods.systems.iaa.objective import answer_loss
from jaxmods.systems.iaa.start import complete
from jaxmods.systems.iaa.weights import iaa_map
from jaxmods.weights import WeightMap

Part = Literal["projector", "insertion", "embedding", "norm", "head", "vision", "base"]
ADAPTOR: tuple[Part, ...] = ("projector", "insertion", "embedding", "norm", "head")

_PART_OF = {
    "projector": "projector",
    "layers": "insertion",
    "embedding": "embedding",
    "final_norm": "norm",
    "unembedding": "head",
}


@dataclasses.dataclass(frozen=True)
class Iaa(System):
    """IAA. The defaults are the published IAA-14 with both branches.

    Attributes:
      llama: the base. vision: CLIP; None for a model of text alone.
      insert_after: base layers after which an inserted one runs; all of them are held, those
        beyond the base never run.
      branches: which branches are there.
      branch: the workflow that `loss` trains: "MM", "G", or "Text" for the base itself.
      trains: parts of that branch that train ("vision" and "base" as well where named).
      projector: "identity", "linear", or "mlp<n>x_gelu".
      select_layer, select_feature: of CLIP's hidden states.
      max_tokens: tokens of a training row before splicing; T = max_tokens + M (N - 1).
      max_images: pictures of a conversation.
      pack: conversations of a training row, which do not see each other (`segments` of a batch);
        None: one.
      prompt_tokens: tokens of a prompt before splicing, for the functions.
      new_tokens: longest answer of the functions.
      stop_ids: ids that end an answer (`<|eot_id|>`); pad_id fills what follows.
      piece: tokens whose logits exist at once in the loss.
      seed: of what is drawn where an import lacks it.
      execution, vision_execution: how layers run.
    """

    sampling_fields: ClassVar[tuple[str, ...]] = ("prompt_tokens", "new_tokens")

    llama: LlamaConfig = LLAMA3_8B
    vision: VisionConfig | None = CLIP_L_336
    insert_after: tuple[int, ...] = IAA_14
    branches: tuple[Branch, ...] = BRANCHES
    branch: Workflow = "MM"
    trains: tuple[Part, ...] = ADAPTOR
    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"
    max_tokens: int = 2048
    max_images: int = 1
    pack: int | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    stop_ids: tuple[int, ...] = (128009,)
    pad_id: int = 128001
    piece: int = 1024
    seed: int = 0
    execution: Execution = dataclasses.field(default_factory=Execution)
    vision_execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        depth = projector_depth(self.projector)
        plan(self.insert_after, self.llama.layers)
        if not 1 <= self.conversations <= self.max_tokens:
            raise ValueError(
                f"Iaa.pack: expected 1 to max_tokens={self.max_tokens}, found {self.pack}"
            )
        if self.branch != "Text" and self.branch not in self.branches:
            raise ValueError(
                f"Iaa.branch: expected Text or one of the branches {self.branches}, found "
                f"{self.branch!r}; add it to system.branches"
            )
        if self.branches and self.vision is None:
            raise ValueError("Iaa.vision: expected sizes of a tower for the branches, found None")
        if depth == 0 and self.vision is not None and self.vision.width != self.llama.width:
            raise ValueError(
                f"Iaa.projector: identity needs image features as wide as the language model, "
                f"found {self.vision.width} and {self.llama.width}; use linear or mlp2x_gelu"
            )

    @functools.cached_property
    def model(self) -> IaaModel:
        """The Flax module of these sizes."""
        return IaaModel(
            self.llama,
            self.vision,
            self.insert_after,
            self.branches,
            self.projector,
            self.select_layer,
            self.select_feature,
            self.execution,
            self.vision_execution,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def conversations(self) -> int:
        """Conversations of a training row."""
        return 1 if self.pack is None else self.pack

    @property
    def image_tokens(self) -> int:
        """N."""
        if self.vision is None:
            return 0
        return self.vision.grid**2 + (self.select_feature == "cls_patch")

    def positions(self, tokens: int, conversations: int = 1) -> int:
        """Positions of a row of `tokens` tokens after splicing."""
        return tokens + conversations * self.max_images * max(self.image_tokens - 1, 0)

    # Batch and parameters ---------------------------------------------------------------------

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """Arrays of `data_pipelines.conversation.ConversationPipeline`; without pictures for the
        Text workflow."""
        names = ("ids", "labels", "valid", *(("segments",) if self.conversations > 1 else ()))
        if self.branch == "Text":
            return _rows(global_batch, self.max_tokens, names)
        spec = _rows(
            global_batch, self.positions(self.max_tokens, self.conversations), (*names, "slot")
        )
        return {**spec, "image": self._image_spec(global_batch, self.conversations)}

    def init(self, rng: jax.Array) -> Params:
        """Hugging Face's rules: N(0, `llama.initializer_range`) and ones. Branches start as copies
        of the base when weights of a base are imported (`complete_import`)."""
        return self.model.init(rng)["params"]

    def labels(self, params: Params) -> dict[str, Any]:
        """The named parts of the trained branch train; everything else is frozen, and so is what
        the features of the vision tower do not come from: its last norm, and its last block where
        an earlier layer is selected. "projector" and "vision" are labels of their own, for
        learning rates of their own (`GroupOptim`); all others are "train"."""

        last = self.vision is not None and self.select_layer in (-1, self.vision.layers)

        def label(path: tuple[Any, ...], leaf: Any) -> str:
            del leaf
            top = path[0].key
            if top == "vision_tower":
                if path[1].key == "post_norm" or (
                    not last and "last" in {step.key for step in path}
                ):
                    return FROZEN
                part = "vision"
            elif top == "base":
                part = "base"
            elif top == self.branch:
                part = _PART_OF[path[1].key]
            else:
                return FROZEN
            if part not in self.trains:
                return FROZEN
            return part if part in ("projector", "vision") else TRAIN

        return jax.tree_util.tree_map_with_path(label, params)

    def decay(self, params: Params) -> dict[str, Any]:
        """Everything but biases, norms' scales and CLIP's class token (Hugging Face's trainer)."""

        def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
            del leaf
            return path[-1].key not in ("bias", "scale", "class_embedding")

        return jax.tree_util.tree_map_with_path(decayed, params)

    # Loss -------------------------------------------------------------------------------------

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        """Cross-entropy on answers. Metrics: the share of their tokens that rank first, and how
        many there are."""
        del rng, step
        branch = self.branch
        if branch == "Text":
            states = self._apply(params, batch["ids"], batch.get("segments"), method="text_states")
        else:
            features = self._apply(params, batch["image"], method="features")
            states = self.states(params, batch, features, branch)
        head = self._apply(params, branch, method="head")
        found = answer_loss(states, head, batch["labels"], piece=self.piece)
        metrics = {"accuracy": found.accuracy, "tokens": found.weight}
        return LossOutput(found.loss, metrics, state)

    def states(
        self, params: Params, batch: Batch, features: jax.Array, branch: Branch
    ) -> jax.Array:
        """States [B, T, D] of `ids`, `slot`, `valid`, and `segments` where a row holds several
        conversations, of a batch with these image features."""
        x = self._apply(
            params, batch["ids"], batch["slot"], batch["valid"], features, branch, method="embed"
        )
        return self._apply(params, x, branch, batch.get("segments"), method="states")

    # Inference --------------------------------------------------------------------------------

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Generation, n rows; for each branch b (mm, g):

        sample_b(params, image [n, M, S, S, 3], ids [n, P], slot [n, P], length [n])
            -> int32 [n, new_tokens], greedy, filled with `pad_id` after a stop id
        prefill_b(the same) -> (logits float32 [n, V] after each prompt, the caches below)
        features_b: projected image tokens, (params, image) -> [n, M N, D]
        decode_b(params, token [n], base_k, base_v [L, n, K, C, W], own_k, own_v [J, n, K, C, W],
            length [n]) -> (logits float32 [n, V], the four caches); one step of serving

        and for the base alone sample_text(params, ids [n, prompt_tokens], length [n]),
        prefill_text, and decode_text with the base's two caches. P are the positions of
        `prompt_tokens` tokens with M pictures spliced in, C those of prompt and answer.
        """
        functions: dict[str, Callable[..., Any]] = {
            "sample_text": self.sample_text,
            "prefill_text": self._prefill_text,
            "decode_text": self._decode_text,
        }
        for branch in self.branches:
            name = branch.lower()
            functions[f"sample_{name}"] = functools.partial(self.sample, branch)
            functions[f"prefill_{name}"] = functools.partial(self._prefill, branch)
            functions[f"features_{name}"] = functools.partial(self._projected, branch)
            functions[f"decode_{name}"] = functools.partial(self._decode, branch)
        return functions

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """Inputs of all functions."""
        length = ArraySpec((batch_size,), "int32", ("batch",))
        text = _rows(batch_size, self.prompt_tokens, ("ids",))

        def cache(layers: int, positions: int) -> ArraySpec:
            slots = positions + self.new_tokens
            shape = (layers, batch_size, self.llama.kv_heads, slots, self.llama.head_dim)
            return ArraySpec(shape, "bfloat16", (None, "batch", "heads", None, None))

        alone = cache(self.llama.layers, self.prompt_tokens)
        found: dict[str, dict[str, ArraySpec]] = {
            "sample_text": {**text, "length": length},
            "prefill_text": {**text, "length": length},
            "decode_text": {"token": length, "base_k": alone, "base_v": alone, "length": length},
        }
        if not self.branches:
            return found
        positions = self.positions(self.prompt_tokens)
        row = _rows(batch_size, positions, ("ids",))["ids"]
        image = self._image_spec(batch_size)
        used = len([i for i in self.insert_after if i < self.llama.layers])
        base, own = cache(self.llama.layers, positions), cache(used, positions)
        for branch in self.branches:
            name = branch.lower()
            given = {"image": image, "ids": row, "slot": row, "length": length}
            found[f"sample_{name}"] = found[f"prefill_{name}"] = given
            found[f"features_{name}"] = {"image": image}
            found[f"decode_{name}"] = {
                "token": length,
                "base_k": base,
                "base_v": base,
                "own_k": own,
                "own_v": own,
                "length": length,
            }
        return found

    @property
    def limits(self) -> Limits:
        """When an answer ends."""
        return Limits(self.new_tokens, self.stop_ids, self.pad_id)

    def prefill(
        self,
        branch: Branch,
        params: Params,
        image: jax.Array,
        ids: jax.Array,
        slot: jax.Array,
        length: jax.Array,
        *,
        capacity: int | None = None,
    ) -> tuple[jax.Array, Decoding]:
        """Reads prompts of a branch: (float32 logits [n, V], state), as `sample` does.

        Args:
          image, ids, slot, length: see `functions`; rows of length 0 (filling) count as 1.
          capacity: slots per row; None: those of the prompt and `new_tokens`.
        """
        length = jnp.maximum(length, 1)
        features = self._apply(params, image, method="features")
        valid = jnp.arange(ids.shape[1]) < length[:, None]
        x = self._apply(params, ids, slot, valid, features, branch, method="embed")
        capacity = ids.shape[1] + self.new_tokens if capacity is None else capacity
        found: Any = self.model.apply(
            {"params": params}, x, length, branch, capacity=capacity, method="prefill"
        )
        return found

    def decode_step(
        self, branch: Branch, params: Params, tokens: jax.Array, state: Decoding
    ) -> tuple[jax.Array, Decoding]:
        """Reads one token per row: int [n] -> (float32 logits [n, V], state)."""
        return self._apply(params, tokens, state, branch, method="decode_step")

    def sample(
        self,
        branch: Branch,
        params: Params,
        image: jax.Array,
        ids: jax.Array,
        slot: jax.Array,
        length: jax.Array,
    ) -> jax.Array:
        """Greedy answers of a branch, see `functions`."""
        logits, state = self.prefill(branch, params, image, ids, slot, length)
        step = functools.partial(self.decode_step, branch, params)
        return generate(step, logits, state, self.limits).tokens

    def sample_text(self, params: Params, ids: jax.Array, length: jax.Array) -> jax.Array:
        """Greedy answers of the base, see `functions`."""
        logits, *cache = self._prefill_text(params, ids, length)
        length = jnp.maximum(length, 1)

        def step(tokens: jax.Array, state: Decoding) -> Any:
            return self.base.apply({"params": params["base"]}, tokens, state, method="decode_step")

        state = Decoding(KV(*cache), length, length)
        return generate(step, logits, state, self.limits).tokens

    def _prefill_text(
        self, params: Params, ids: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, ...]:
        found: Any = self.base.apply(
            {"params": params["base"]},
            ids,
            jnp.maximum(length, 1),
            capacity=ids.shape[1] + self.new_tokens,
            method="prefill",
        )
        return (found[0], *found[1].cache)

    def _decode_text(
        self,
        params: Params,
        token: jax.Array,
        base_k: jax.Array,
        base_v: jax.Array,
        length: jax.Array,
    ) -> tuple[jax.Array, ...]:
        state = Decoding(KV(base_k, base_v), length, length)
        found: Any = self.base.apply({"params": params["base"]}, token, state, method="decode_step")
        return (found[0], *found[1].cache)

    @property
    def base(self) -> Llama:
        """The base as a module of its own; its parameters are `params["base"]`."""
        return Llama(self.llama, self.execution)

    def _projected(self, branch: Branch, params: Params, image: jax.Array) -> jax.Array:
        features = self._apply(params, image, method="features")
        return self._apply(params, features, branch, method="project")

    def _prefill(
        self,
        branch: Branch,
        params: Params,
        image: jax.Array,
        ids: jax.Array,
        slot: jax.Array,
        length: jax.Array,
    ) -> tuple[jax.Array, ...]:
        logits, state = self.prefill(branch, params, image, ids, slot, length)
        return (logits, *state.cache[0], *state.cache[1])

    def _decode(
        self,
        branch: Branch,
        params: Params,
        token: jax.Array,
        base_k: jax.Array,
        base_v: jax.Array,
        own_k: jax.Array,
        own_v: jax.Array,
        length: jax.Array,
    ) -> tuple[jax.Array, ...]:
        state = Decoding((KV(base_k, base_v), KV(own_k, own_v)), length, length)
        logits, state = self.decode_step(branch, params, token, state)
        return (logits, *state.cache[0], *state.cache[1])

    # Weights ----------------------------------------------------------------------------------

    def weights(self) -> WeightMap:
        """The map of the official files; a base without branches fits too."""
        layers = None if self.vision is None else self.vision.layers
        return iaa_map(self.llama, layers, self.branches, self.projector)

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        """Fills what a base (or a model of one branch) lacks, see `start.complete`."""
        return complete(self, params, missing)

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` of the official class, or of LlamaForCausalLM without branches."""
        config = self.llama.hub_config()
        if not self.branches or self.vision is None:
            return config
        return {
            **config,
            "architectures": ["IAALlamaForCausalLM"],
            "model_type": "IAA",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": self.vision.width,
            "mm_num_tokens": self.vision.grid**2 + 1,
            "mm_projector_type": self.projector,
            "mm_vision_select_feature": self.select_feature,
            "mm_vision_select_layer": self.select_layer,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "tune_mm_mlp_adapter": False,
        }

    def flops_per_example(self) -> float:
        """Products of one training row: forward 2 per weight and token, backward the same again
        for activations, and once more for the weights that train. Attention is counted in full, and
        twice in the backward pass: both factors of its products have gradients."""
        c, inserted = self.llama, 0
        if self.branch != "Text":
            inserted = len([i for i in self.insert_after if i < c.layers])
        tokens = self.max_tokens
        if self.branch != "Text":
            tokens = self.positions(self.max_tokens, self.conversations)
        attention = c.width * c.head_dim * 2 * (c.heads + c.kv_heads)
        layer = attention + 3 * c.width * c.mlp
        scores = 2 * tokens * c.heads * c.head_dim
        head = c.width * c.vocab_size
        base_trains = "base" in self.trains
        forward = 2 * tokens * ((c.layers + inserted) * (layer + scores) + head)
        backward = forward + 2 * tokens * (c.layers + inserted) * scores
        of_weights = inserted * layer * ("insertion" in self.trains)
        of_weights += c.layers * layer * base_trains
        of_weights += head * ("head" in self.trains or (base_trains and self.branch == "Text"))
        total = forward + backward + 2 * tokens * of_weights
        if self.branch != "Text" and self.vision is not None:
            v = self.vision
            seen = self.conversations * self.max_images * (v.grid**2 + 1)
            block = 4 * v.width**2 + 2 * v.width * v.mlp + 2 * (v.grid**2 + 1) * v.width
            total += 2 * seen * v.layers * block * (3 if "vision" in self.trains else 1)
        return float(total)

    def _image_spec(self, rows: int, conversations: int = 1) -> ArraySpec:
        side = 0 if self.vision is None else self.vision.image_size
        shape = (rows, conversations * self.max_images, side, side, 3)
        return ArraySpec(shape, "uint8", ("batch", None, None, None, None))

    def _apply(self, params: Params, *args: Any, method: str) -> Any:
        return self.model.apply({"params": params}, *args, method=method)


def _rows(batch: int, positions: int, names: tuple[str, ...]) -> dict[str, ArraySpec]:
    """Arrays [batch, positions]: "valid" is bool, the others int32."""
    return {
        name: ArraySpec(
            (batch, positions), "bool" if name == "valid" else "int32", ("batch", "seq")
        )
        for name in names
    }
