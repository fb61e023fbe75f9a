"""Where training starts: branches made of the base, and what is drawn because nobody brings it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxmods.backbones.clip import VisionConfig, VisionTower
from jaxmods.partitioning import unbox
from jaxmods.system import Params
from jaxmods.systems.iaa.model import BRANCHES, Branch, Projector
from jaxmods.systems.iaa.weights import NAMES

if TYPE_CHECKING:
    from jaxmods.systems.iaa.system import Iaa


def complete(system: Iaa, params: Params, missing: frozenset[str]) -> Params:
    """Fills what a base (or a model of one branch) lacks.

    A missing grounding branch is a copy of the general one where that is there. Otherwise a branch
    starts from the base: its embedding, norm and head as copies, inserted layer k as a copy of base
    layer I[k] (ASSUMPTION: the paper's figure says so for embedding and head; the released code
    only names a number of copied layers). Projectors are drawn with `system.seed`, and so is a
    missing vision tower, but only where it trains.

    Args:
      params: as imported. missing: keys of the published files that were not there.

    Raises:
      ValueError: a branch that is there in parts, or a missing tower that does not train.
    """
    params = dict(params)
    paths = {k: b.paths[0] for b in system.weights().bind(params) for k, _ in b.tensors()}
    lost: dict[str, set[str]] = {}
    for key in missing:
        lost.setdefault(paths[key].split("/")[0], set()).add(key)
    for top, keys in lost.items():
        whole = {k for k, path in paths.items() if path.split("/")[0] == top}
        if keys != whole:
            raise ValueError(
                f"{top}: {len(keys)} of its {len(whole)} tensors are missing, as "
                f"{sorted(keys)[0]}; expected all of them or none"
            )
    if "vision_tower" in lost and system.vision is not None:
        if "vision" not in system.trains:
            raise ValueError(
                "the vision tower is missing and does not train; expected its tensors "
                "(model.vision_tower.vision_tower.vision_model...); put a Llama and a CLIP "
                "into one folder with python -m jaxmods.systems.iaa.assemble"
            )
        params["vision_tower"] = _drawn_tower(system.vision, system.seed)
    chosen = jnp.asarray([min(i, system.llama.layers - 1) for i in system.insert_after])
    for branch in sorted((b for b in lost if b in NAMES), reverse=True):  # MM before G
        if branch == "G" and "MM" in params:
            params["G"] = params["MM"]
            continue
        base = params["base"]
        projector = _drawn_projector(system, branch)
        params[branch] = {
            **({"projector": projector} if projector else {}),
            "embedding": base["embedding"],
            "layers": jax.tree.map(lambda leaf: leaf[chosen], base["layers"]),
            "final_norm": base["final_norm"],
            "unembedding": base["embedding"].T if system.llama.tied else base["unembedding"],
        }
    return params


def _drawn_tower(vision: VisionConfig, seed: int) -> Params:
    def every(tower: VisionTower, image: jax.Array) -> jax.Array:
        return tower.pooled(tower.trunk(image))

    image = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    return unbox(VisionTower(vision).init(jax.random.key(seed), image, method=every)["params"])


def _drawn_projector(system: Iaa, branch: Branch) -> Params:
    assert system.vision is not None
    key = jax.random.fold_in(jax.random.key(system.seed), BRANCHES.index(branch))
    module = Projector(system.projector, system.llama.width, system.llama.initializer_range)
    return unbox(module.init(key, jnp.zeros((1, system.vision.width))).get("params", {}))
