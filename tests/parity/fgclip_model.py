"""FG-CLIP: model, losses, gradients and weights against the official code's recorded numbers."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxmods import partitioning
from jaxmods.systems.fgclip import FgClip
from jaxmods.systems.fgclip.objective import normalise
from jaxmods.systems.fgclip.system import stretch_positions
from jaxmods.systems.fgclip.torch_reference import FgClipReference, RankBatch
from jaxmods.weights import WeightMap, export_tensors, import_params, open_weights
from jaxmods.weights.map import flatten
from tests.parity.registry import Case, Kind, assert_close

TRAIN_STEP = Kind("fgclip", "train_step", lambda case: "rank0.in.image" in case.shapes)
INFERENCE = Kind(
    "fgclip",
    "inference",
    lambda case: (
        case.weights_path.exists()
        and "rank0.in.image" not in case.shapes
        and any(re.match(r"out\.(image|text|dense|roi|vision)_", name) for name in case.shapes)
    ),
)
INIT_FROM_CLIP = Kind(
    "fgclip", "init_from_clip", lambda case: "in.position_embedding" in case.shapes
)

RANK_INPUTS = tuple(RankBatch.__dataclass_fields__)


def system_of(case: Case, **options: Any) -> FgClip:
    """The system of a case's `config`."""
    return FgClip.from_hub_config(hub_config(case), **options)


def hub_config(case: Case) -> dict[str, Any]:
    """`config` of a case in the layout of `config.json`."""
    config = case.meta["config"]
    return {
        "text_config": config["text"],
        "vision_config": config["vision"],
        "projection_dim": config["projection_dim"],
    }


def params_of(case: Case, system: FgClip) -> dict[str, Any]:
    """The case's weights through the weight map."""
    abstract = partitioning.unbox(jax.eval_shape(system.init, jax.random.key(0)))
    with open_weights(case.weights_path) as reader:
        imported = import_params(reader, system.weights(), abstract)
    return system.complete_import(imported.params, imported.missing)


def to_torch_layout(weight_map: WeightMap, tree: Any) -> dict[str, np.ndarray]:
    """A tree like the parameters, under PyTorch keys and in PyTorch layouts."""
    return {k: np.asarray(v.all()) for k, v in export_tensors(tree, weight_map).items()}


def ranks_of(case: Case) -> list[dict[str, np.ndarray]]:
    """Inputs of every rank."""
    ranks = sorted({int(m.group(1)) for k in case.shapes if (m := re.match(r"rank(\d+)\.in", k))})
    assert ranks == list(range(case.meta["world_size"])), f"{case.id}: ranks {ranks}"
    return [
        {
            name: case.io[f"rank{r}.in.{name}"]
            for name in RANK_INPUTS
            if f"rank{r}.in.{name}" in case.io
        }
        for r in ranks
    ]


def batch_of(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The official ragged layout of all ranks as one padded batch; a pack group is a rank."""
    images = len(ranks[0]["image"])
    slots = len(ranks[0]["box_infos"]) // images
    hard = [int(r["hard_nums"].sum()) for r in ranks]
    texts = {len(r["hard_texts"]) // n for r, n in zip(ranks, hard, strict=True) if n} or {2}
    assert len(texts) == 1, f"texts per hard box: {texts}"
    each, packed = texts.pop(), max(1, *hard)
    length = ranks[0]["text_short"].shape[1]
    size = (len(ranks), packed)
    batch = {
        "image": np.concatenate([r["image"] for r in ranks]).transpose(0, 2, 3, 1),
        "text_short": np.concatenate([r["text_short"] for r in ranks]).astype(np.int32),
        "text_long": np.concatenate([r["text_long"] for r in ranks]).astype(np.int32),
        "box": np.concatenate([r["box_infos"] for r in ranks]).reshape(-1, slots, 4),
        "box_text": np.concatenate([r["box_texts"] for r in ranks])
        .reshape(-1, slots, length)
        .astype(np.int32),
        "box_mask": np.arange(slots) < np.concatenate([r["box_nums"] for r in ranks])[:, None],
        "hard_box": np.zeros((*size, 4), np.float32),
        "hard_image": np.zeros(size, np.int32),
        "hard_text": np.zeros((*size, each, length), np.int32),
        "hard_text_mask": np.zeros((*size, each), bool),
        "hard_mask": np.arange(packed) < np.asarray(hard)[:, None],
    }
    for r, (rank, count) in enumerate(zip(ranks, hard, strict=True)):
        used = np.arange(slots) < rank["hard_nums"][:, None]
        batch["hard_box"][r, :count] = rank["hard_infos"].reshape(-1, slots, 4)[used]
        batch["hard_image"][r, :count] = np.nonzero(used)[0]
        batch["hard_text"][r, :count] = rank["hard_texts"].reshape(count, each, length)
        batch["hard_text_mask"][r, :count] = True
    return batch


def loss_weights(case: Case) -> dict[str, float]:
    """Weights of the losses; a loss that the case does not name was not used."""
    return {f"weight_{k}": case.meta["loss_weights"].get(k, 0.0) for k in TERMS}


TERMS = ("long", "short", "region", "hard")


@functools.lru_cache(maxsize=2)
def train_step(case: Case) -> tuple[FgClip, dict[str, Any], dict[str, np.ndarray], Any, Any]:
    """(system, params, batch, LossOutput, gradients) of the whole data-parallel step."""
    batch = batch_of(ranks_of(case))
    world = case.meta["world_size"]
    system = system_of(
        case,
        **loss_weights(case),
        max_boxes=batch["box"].shape[1],
        negatives=batch["hard_text"].shape[2] - 1,
        hard_pack_images=len(batch["image"]) // world,
        hard_pack_slots=batch["hard_mask"].shape[1],
        local_groups=world,
    )
    params = params_of(case, system)

    def loss(params: Any, batch: Any) -> Any:
        out = system.loss(params, {}, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return system, params, batch, out, grads


@TRAIN_STEP.check
def losses(case: Case) -> None:
    """Each unweighted term and the total, as means over ranks."""
    _, _, _, out, _ = train_step(case)
    tolerance = case.tolerance("losses")
    world = case.meta["world_size"]
    assert_close("mean_loss", out.loss, case.io["mean_loss"], tolerance)
    per_rank = [case.io[f"rank{r}.out.loss"] for r in range(world)]
    assert_close("mean of the ranks' losses", out.loss, np.mean(per_rank), tolerance)
    for term in TERMS:
        recorded = [case.io.get(f"rank{r}.out.loss_{term}") for r in range(world)]
        if any(value is not None for value in recorded):
            assert_close(f"loss_{term}", out.metrics[f"loss_{term}"], np.mean(recorded), tolerance)


@TRAIN_STEP.check
def local_losses(case: Case) -> None:
    """Region and hard-negative loss of every rank by itself: they see that rank's boxes only."""
    system, params, batch, _, _ = train_step(case)
    world = case.meta["world_size"]
    local = system_of(
        case,
        **loss_weights(case),
        max_boxes=system.max_boxes,
        negatives=system.negatives,
        hard_pack_images=system.hard_pack_images,
        hard_pack_slots=system.hard_pack_slots,
    )
    run = jax.jit(lambda part: local.loss(params, {}, part, jax.random.key(0), jnp.zeros(())))
    for r in range(world):
        part = {k: v[r * (len(v) // world) : (r + 1) * (len(v) // world)] for k, v in batch.items()}
        metrics = run(part).metrics
        for term in ("region", "hard"):
            name = f"rank{r}.out.loss_{term}"
            if name in case.io:
                assert_close(name, metrics[f"loss_{term}"], case.io[name], case.tolerance("losses"))


@TRAIN_STEP.check
def embeddings(case: Case) -> None:
    """The normalised embeddings that enter the losses, padding removed."""
    system, params, batch, _, _ = train_step(case)
    features = jax.jit(system._encode)(params, batch)
    units = {name: np.asarray(normalise(value)) for name, value in features.items()}
    world = case.meta["world_size"]
    for r in range(world):
        ours = _embeddings_of_rank(units, batch, r, world)
        for name, value in case.io.items():
            if name.startswith(f"rank{r}.out.") and ".loss" not in name:
                short = name.removeprefix(f"rank{r}.out.")
                assert short in ours, f"{name}: no rule for this tensor"
                expected = value.reshape(-1, system.projection_dim)
                assert_close(name, ours[short], expected, case.tolerance("activations"))


def _embeddings_of_rank(
    units: dict[str, np.ndarray], batch: dict[str, np.ndarray], rank: int, world: int
) -> dict[str, np.ndarray]:
    """Rows of one rank under their recorded names, padding slots removed."""
    images = len(batch["image"]) // world
    mine = slice(rank * images, (rank + 1) * images)
    boxes, hard = batch["box_mask"][mine], batch["hard_mask"][rank]
    rows = {
        "image_embeds": ("image", lambda x: x[mine]),
        "long_embeds": ("text_long", lambda x: x[mine]),
        "short_embeds": ("text_short", lambda x: x[mine]),
        "region_image_embeds_valid": ("box", lambda x: x[mine][boxes]),
        "region_text_embeds_valid": ("box_text", lambda x: x[mine][boxes]),
        "hard_image_embeds_valid": ("hard_box", lambda x: x[rank][hard]),
        "hard_text_embeds": ("hard_text", lambda x: x[rank][hard].reshape(-1, x.shape[-1])),
    }
    return {name: pick(units[key]) for name, (key, pick) in rows.items() if key in units}


@TRAIN_STEP.check
def gradients(case: Case) -> None:
    """Rank-averaged gradients, their global norm, and the parameters that get none."""
    system, _, _, _, grads = train_step(case)
    ours = to_torch_layout(system.weights(), grads)
    tolerance = case.tolerance("grads")
    recorded = [name for name in case.io if name.startswith("grad.")]
    assert recorded, f"{case.id}: no gradients recorded"
    for name in recorded:
        assert_close(name, ours[name.removeprefix("grad.")], case.io[name], tolerance)
    norm = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in ours.values()))
    assert_close("grad_global_norm", norm, case.io["grad_global_norm"], tolerance)
    for name in case.meta.get("parameters_without_gradient", []):
        assert not ours[name].any(), f"{name}: expected no gradient"


@TRAIN_STEP.check
def weight_decay(case: Case) -> None:
    """Which parameters the official optimiser decays."""
    system, params, _, _, _ = train_step(case)
    decay = flatten(system.decay(params))
    ours: dict[bool, set[str]] = {True: set(), False: set()}
    for binding in system.weights().bind(params):
        for key, _ in binding.tensors():
            ours[decay[binding.paths[0]]].add(key)
    assert ours[True] == set(case.meta["adamw_decay"])
    assert ours[False] == set(case.meta["adamw_no_decay"])


def _round_trip(case: Case) -> None:
    """Exported weights equal the file bit for bit and load with strict=True."""
    system = system_of(case)
    exported = to_torch_layout(system.weights(), params_of(case, system))
    assert exported.keys() == case.weights.keys()
    for key, value in case.weights.items():
        assert exported[key].dtype == value.dtype, key
        assert exported[key].shape == value.shape, key
        assert exported[key].tobytes() == value.tobytes(), f"{key} differs"
    reference = FgClipReference(system.hub_config())
    reference.load_state_dict({k: torch.tensor(v) for k, v in exported.items()}, strict=True)


@TRAIN_STEP.check
def weights(case: Case) -> None:
    """Export of the imported weights."""
    _round_trip(case)


@TRAIN_STEP.check
def torch_reference(case: Case) -> None:
    """The PyTorch model that exports are verified against gives the recorded losses too."""
    reference = FgClipReference(hub_config(case))
    reference.load_state_dict({k: torch.tensor(v) for k, v in case.weights.items()})
    ranks = [RankBatch(**{k: torch.tensor(v) for k, v in r.items()}) for r in ranks_of(case)]
    with torch.no_grad():
        terms = reference.losses(ranks)
    for r, rank in enumerate(terms):
        for term, value in rank.items():
            name = f"rank{r}.out.loss_{term}"
            if name in case.io:
                assert_close(name, value.numpy(), case.io[name], case.tolerance("losses"))


def _boxes_by_image(rows: np.ndarray, images: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """[k, 5] rows (image, box) as padded [images, n, 4], and where each row went."""
    owner = rows[:, 0].astype(int)
    count = np.bincount(owner, minlength=images)
    boxes, place, used = np.zeros((images, max(count), 4), np.float32), [], [0] * images
    for i, box in zip(owner, rows[:, 1:], strict=True):
        boxes[i, used[i]] = box
        place.append((i, used[i]))
        used[i] += 1
    return boxes, place


@functools.lru_cache(maxsize=2)
def inference(case: Case) -> dict[str, np.ndarray]:
    """Our value of every recorded `out.*`, computed in one program."""
    system = system_of(case)
    wanted = [name.removeprefix("out.") for name in case.io if name.startswith("out.")]
    assert wanted, f"{case.id}: nothing recorded"

    def everything(params: Any, io: dict[str, Any]) -> dict[str, Any]:
        def call(method: str, *args: Any, **kwargs: Any) -> Any:
            return system.model.apply({"params": params}, *args, method=method, **kwargs)

        def image(name: str = "in.pixel_values") -> Any:
            return io[name].transpose(0, 2, 3, 1)

        def boxes() -> Any:
            padded, place = _boxes_by_image(case.io["in.box_info"], len(case.io["in.pixel_values"]))
            found = call("box_features", image(), jnp.asarray(padded), cells=True)
            return jnp.stack([found[at] for at in place])

        def logits() -> Any:
            a = normalise(call("image_features", image()))
            b = normalise(call("text_features", io["in.text_short"]))
            return jnp.exp(params["logit_scale"]) * a @ b.T

        long = {"positions": "long", "projection": "long"}
        ours = {
            "vision_hidden_penultimate": lambda: call("vision_hidden", image())[0],
            "vision_last_hidden_state": lambda: call("vision_hidden", image())[1],
            "vision_pooled": lambda: call("vision_hidden", image())[2],
            "nonnative_last_hidden_state": lambda: call(
                "vision_hidden", image("in.pixel_values_nonnative")
            )[1],
            "nonnative_pooled": lambda: call("vision_hidden", image("in.pixel_values_nonnative"))[
                2
            ],
            "image_features": lambda: call("image_features", image()),
            "text_features_short": lambda: call("text_features", io["in.text_short"]),
            "text_features_long": lambda: call("text_features", io["in.text_long"], **long),
            "text_features_shortpos_longproj": lambda: call(
                "text_features", io["in.text_short"], projection="long"
            ),
            "text_long_last_hidden_state": lambda: call(
                "text_hidden", io["in.text_long"], positions="long"
            )[0][:, : case.shapes["out.text_long_last_hidden_state"][1]],
            "text_long_pooled": lambda: call("text_hidden", io["in.text_long"], positions="long")[
                1
            ],
            "dense_features": lambda: call("dense_features", image()).reshape(
                case.shapes["out.dense_features"]
            ),
            "roi_features": boxes,
            "logits_per_image": logits,
            "probs": lambda: jax.nn.softmax(logits(), axis=-1),
        }
        unknown = sorted(set(wanted) - set(ours))
        assert not unknown, f"{case.id}: no rule for recorded outputs {unknown}"
        return {name: ours[name]() for name in wanted}

    inputs = {
        k: v.astype(np.int32) if v.dtype == np.int64 else v
        for k, v in case.io.items()
        if k.startswith("in.")
    }
    return jax.tree.map(np.asarray, jax.jit(everything)(params_of(case, system), inputs))


@INFERENCE.check
def features(case: Case) -> None:
    """Every recorded output of the feature API and the hidden states behind it."""
    for name, ours in inference(case).items():
        recorded = f"out.{name}"
        assert_close(recorded, ours, case.io[recorded], case.tolerance("activations"))


@INFERENCE.check
def named_functions(case: Case) -> None:
    """The functions that protocols and exports call give the recorded features."""
    system = system_of(case)
    params, io, functions = params_of(case, system), case.io, system.functions()
    image = jnp.asarray(io["in.pixel_values"].transpose(0, 2, 3, 1))
    tolerance = case.tolerance("activations")
    for name, tensor in (
        ("image_features", image),
        ("text_features_short", jnp.asarray(io["in.text_short"], jnp.int32)),
        ("text_features_long", jnp.asarray(io["in.text_long"], jnp.int32)),
    ):
        if f"out.{name}" in io:
            ours = jax.jit(functions[name])(params, tensor)
            assert_close(name, ours, io[f"out.{name}"], tolerance)


@INFERENCE.check
def inference_weights(case: Case) -> None:
    """Export of the imported weights."""
    _round_trip(case)


@INIT_FROM_CLIP.check
def stretched(case: Case) -> None:
    """CLIP's tables and projection become FG-CLIP's."""
    io, tolerance = case.io, case.tolerance()
    keep = case.meta["config"]["text"]["keep_len"]
    table = jnp.asarray(io["in.position_embedding"])
    for name in ("ori", "res"):
        expected = io[f"out.position_embedding_{name}"]
        assert_close(name, stretch_positions(table, keep, len(expected)), expected, tolerance)


@INIT_FROM_CLIP.check
def completed_import(case: Case) -> None:
    """The same through `complete_import`, as on reading a plain CLIP file."""
    io, tolerance = case.io, case.tolerance()
    system = system_of(case)
    params = partitioning.unbox(jax.jit(system.init)(jax.random.key(0)))
    params["text_tower"]["position_embedding"] = jnp.asarray(io["in.position_embedding"])
    params["text_projection"]["kernel"] = jnp.asarray(io["in.text_projection"].T)
    done = to_torch_layout(system.weights(), system.from_openai(params))
    embeddings = "text_model.embeddings.position_embedding"
    for key, name in (
        (f"{embeddings}_ori.weight", "out.position_embedding_ori"),
        (f"{embeddings}_res.weight", "out.position_embedding_res"),
        ("text_filip_projection.weight", "out.text_filip_projection"),
    ):
        assert_close(key, done[key], io[name], tolerance)
    assert done[f"{embeddings}.weight"].tobytes() == io["in.position_embedding"].tobytes()
