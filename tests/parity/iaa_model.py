"""IAA's model against the official classes: activations, logits, loss, gradients, decoding.

Everything is read off a case: sizes, insertion layers, projector, prompts and their limits.
Official batches take one picture per row in the order of a running counter (a row of text takes
one, too); here every row has its own pictures.

Both branches have the same shapes, so where a compilation is expensive it is shared: the grounding
branch runs in the place of the general one.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.conversation.splice import IMAGE, Spliced, splice
from jaxmods.backbones.clip import VisionConfig
from jaxmods.backbones.llama import Context, DecoderLayer, LlamaConfig, rope_of
from jaxmods.generation import Limits, stream
from jaxmods.systems.iaa import Iaa
from jaxmods.systems.iaa.layers import plan
from jaxmods.weights import export_tensors, import_params, memory_reader
from tests.parity.registry import Case, Kind, assert_close

STACK = Kind("iaa", "stack", lambda case: "mm.logits" in case.shapes)
WORKFLOWS = {"mm": "MM", "g": "G"}


@functools.lru_cache(maxsize=4)
def system(case: Case) -> Iaa:
    """The system with the sizes of a case."""
    config, fixed = case.meta["config"], case.meta["fixed"]
    text, vision = config["text"], config["vision"]
    return Iaa(
        llama=LlamaConfig(
            vocab_size=text["vocab"],
            width=text["hidden"],
            layers=text["layers"],
            heads=text["heads"],
            kv_heads=text["kv"],
            head_dim=text["hidden"] // text["heads"],
            mlp=text["inter"],
            epsilon=fixed["rms_norm_eps"],
            rope_theta=text["theta"],
        ),
        vision=VisionConfig(
            width=vision["hidden"],
            layers=vision["layers"],
            heads=vision["heads"],
            mlp=vision["inter"],
            image_size=vision["image"],
            patch_size=vision["patch"],
        ),
        insert_after=tuple(fixed["insertion_after_layers"]),
        projector=fixed["mm_projector_type"],
        select_layer=fixed["mm_vision_select_layer"],
        select_feature=fixed["mm_vision_select_feature"],
        # Gradients of the case were taken with CLIP alone frozen.
        trains=("projector", "insertion", "embedding", "norm", "head", "base"),
    )


@functools.lru_cache(maxsize=4)
def params(case: Case) -> dict[str, Any]:
    """The case's weights through the map, nothing missing."""
    model = system(case)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    found, missing = import_params(memory_reader(case.weights), model.weights(), abstract)
    assert missing == frozenset()
    return found


def pixels(images: np.ndarray) -> jnp.ndarray:
    """[n, 3, S, S] -> [n, 1, S, S, 3]."""
    return jnp.asarray(images.transpose(0, 2, 3, 1)[:, None])


@functools.lru_cache(maxsize=4)
def batch(case: Case) -> tuple[dict[str, jax.Array], list[Spliced]]:
    """The recorded batch as our pipeline would lay it out."""
    ids, labels, mask = (case.io[f"in.{n}"] for n in ("input_ids", "labels", "attention_mask"))
    images = case.io["in.images"].transpose(0, 2, 3, 1)
    taken = [max(1, int((row == IMAGE).sum())) for row in ids]
    starts = np.cumsum([0, *taken])
    places = np.zeros((len(ids), max(taken), *images.shape[1:]), np.float32)
    for row, (start, count) in enumerate(zip(starts, taken, strict=False)):
        places[row, :count] = images[start : start + count]
    model, length = system(case), case.shapes["mm.inputs_embeds"][1]
    rows = [
        splice(i[: m.sum()], la[: m.sum()], model.image_tokens, length)
        for i, la, m in zip(ids, labels, mask, strict=True)
    ]
    return {
        "image": jnp.asarray(places),
        **{
            k: jnp.asarray(np.stack([getattr(r, k) for r in rows]))
            for k in ("ids", "slot", "labels")
        },
        "valid": jnp.asarray(np.stack([r.valid for r in rows])),
    }, rows


def apply(case: Case, *args: Any, method: str, tree: Any = None) -> Any:
    model = system(case)
    with jax.default_matmul_precision("highest"):
        return model.model.apply(
            {"params": params(case) if tree is None else tree}, *args, method=method
        )


@STACK.check
def weights_go_and_come_back(case: Case) -> None:
    """Every official key, bit for bit."""
    tensors = export_tensors(params(case), system(case).weights())
    assert set(tensors) == set(case.weights)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.all(), case.weights[key], err_msg=key)


@STACK.check
def pictures_are_spliced(case: Case) -> None:
    """Layout on the host: mask and labels."""
    arrays, rows = batch(case)
    np.testing.assert_array_equal(arrays["valid"], case.io["spliced.attention_mask"])
    valid = np.asarray(arrays["valid"])
    np.testing.assert_array_equal(
        np.asarray(arrays["labels"])[valid], case.io["spliced.labels"][valid]
    )
    assert [r.length for r in rows] == case.io["spliced.attention_mask"].sum(1).tolist()


@STACK.check
def activations(case: Case) -> None:
    """Image features, projections, inputs, final states and logits of both branches.

    Inputs at padding are zero here; officially those of padding tokens are their embeddings.
    """
    arrays, _ = batch(case)
    valid = np.asarray(arrays["valid"])
    close = case.tolerance("activations")
    features = apply(case, arrays["image"], method="features")
    taken = np.asarray(features).reshape(-1, *case.shapes["vision.features"][1:])
    if len(taken) == len(case.io["vision.features"]):  # every row takes one picture
        assert_close("vision.features", taken, case.io["vision.features"], close)
    for name, branch in WORKFLOWS.items():
        projected = apply(case, features, branch, method="project")
        shape = case.shapes[f"{name}.projected"]
        if projected.size == np.prod(shape):
            assert_close(
                f"{name}.projected",
                np.asarray(projected).reshape(shape),
                case.io[f"{name}.projected"],
                close,
            )
        x = apply(
            case, arrays["ids"], arrays["slot"], arrays["valid"], features, branch, method="embed"
        )
        inputs = case.io[f"{name}.inputs_embeds"]
        assert_close(f"{name}.inputs_embeds", np.asarray(x)[valid], inputs[valid], close)
        assert not np.any(np.asarray(x)[~valid])
        states = apply(case, x, branch, method="states")
        final = case.io[f"{name}.hidden_final"]
        assert_close(f"{name}.hidden_final", np.asarray(states)[valid], final[valid], close)
        logits = np.asarray(states @ apply(case, branch, method="head"))
        assert_close(
            f"{name}.logits",
            logits[valid],
            case.io[f"{name}.logits"][valid],
            case.tolerance("logits"),
        )


@STACK.check
def residual_stream(case: Case) -> None:
    """What enters base layers, with one decoder layer applied after the other."""
    arrays, _ = batch(case)
    valid = np.asarray(arrays["valid"])
    model, tree = system(case), params(case)
    context = Context(rope_of(jnp.arange(valid.shape[1])[None], model.llama))

    @jax.jit
    def layer(stack: Any, number: Any, x: jax.Array) -> Any:
        own = jax.tree.map(lambda leaf: leaf[number], stack)
        return DecoderLayer(model.llama).apply({"params": own}, x, context)

    for name, branch in WORKFLOWS.items():
        x = jnp.asarray(case.io[f"{name}.inputs_embeds"])
        for number in range(model.llama.layers):
            key = f"{name}.hidden_in.{number}"
            if key in case.shapes:
                close = case.tolerance("activations")
                assert_close(key, np.asarray(x)[valid], case.io[key][valid], close)
            with jax.default_matmul_precision("highest"):
                x = layer(tree["base"]["layers"], number, x)
                if number in model.insert_after:
                    x = layer(tree[branch]["layers"], model.insert_after.index(number), x)


@STACK.check
def text_workflow(case: Case) -> None:
    """Logits of the untouched base."""
    ids = jnp.asarray(case.io["text.input_ids"].astype(np.int32))
    states = apply(case, ids, method="text_states")
    logits = states @ apply(case, "Text", method="head")
    assert_close("text.logits", logits, case.io["text.logits"], case.tolerance("logits"))


def _rel_l2(case: Case) -> float:
    found = re.search(r"rel-L2\s+([\d.e-]+)", str(case.meta["tolerance"]["grads"]))
    assert found, case.meta["tolerance"]["grads"]
    return float(found.group(1))


@STACK.check
def loss_and_gradients(case: Case) -> None:
    """Loss of either branch and every recorded gradient, those of the base included."""
    arrays, _ = batch(case)
    model, limit = system(case), _rel_l2(case)

    @jax.jit
    def gradients(tree: Any) -> Any:
        def loss(tree: Any) -> Any:
            return model.loss(tree, {}, arrays, jax.random.key(0), jnp.int32(0)).loss

        return jax.value_and_grad(loss)(tree)

    for name, branch in WORKFLOWS.items():
        with jax.default_matmul_precision("highest"):
            value, grads = gradients(in_place(case, branch))
        assert_close(f"{name}.loss", value, case.io[f"{name}.loss"], case.tolerance("loss"))
        if branch == "G":
            grads = {**grads, "MM": grads["G"], "G": grads["MM"]}
        ours = export_tensors(grads, model.weights())
        for key in (k for k in case.shapes if k.startswith(f"{name}.grad.")):
            found, expected = ours[key.split(".grad.")[1]].all(), case.io[key]
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error <= limit, f"{key}: relative error {error:.2e}, allowed {limit:g}"


def in_place(case: Case, branch: str) -> dict[str, Any]:
    """The parameters with `branch` where "MM" is looked for (and the other where "G" is)."""
    tree = params(case)
    return tree if branch == "MM" else {**tree, "MM": tree["G"], "G": tree["MM"]}


@STACK.check
def decoding(case: Case) -> None:
    """Greedy continuations token by token, with the logits of every step; the prompts of a workflow
    are one ragged batch."""
    model = system(case)
    runs: dict[str, list[str]] = {}
    for name in sorted({k.split(".")[1] for k in case.shapes if k.startswith("gen.")}):
        runs.setdefault(case.meta["task"][name], []).append(name)
    names = [name for some in runs.values() for name in some]
    longest = max(_row(case, name).length for name in names)
    rows = max(map(len, runs.values()))
    most = max(case.meta["max_new_tokens"].values())
    programs = _programs(model, longest + most)
    for task, some in runs.items():
        filled = some + some[:1] * (rows - len(some))  # one shape for all workflows
        spliced = [_row(case, name, longest) for name in filled]
        ids, slot = (
            jnp.asarray(np.stack([getattr(r, k) for r in spliced])) for k in ("ids", "slot")
        )
        length = jnp.asarray([r.length for r in spliced])
        with jax.default_matmul_precision("highest"):
            if task == "Text":
                tree = params(case)["base"]
                logits, state = programs["text_prefill"](tree, ids, length)
                step = functools.partial(programs["text_step"], tree)
            else:
                tree = in_place(case, task)
                images = np.concatenate([case.io[f"gen.{name}.images"] for name in filled])
                logits, state = programs["prefill"](tree, pixels(images), ids, slot, length)
                step = functools.partial(programs["step"], tree)
            seen = [np.asarray(logits)]

            def noted(tokens: Any, state: Any, step: Any = step, seen: Any = seen) -> Any:
                logits, state = step(tokens, state)
                seen.append(np.asarray(logits))
                return logits, state

            tokens = np.stack(list(stream(noted, logits, state, Limits(most))), axis=1)
        for row, name in enumerate(some):
            eos = case.meta["gen_eos"]
            ends = np.isin(tokens[row], eos.get(name, eos["default"]))
            limit = case.meta["max_new_tokens"][name]
            stop = min(limit, int(np.argmax(ends)) + 1 if ends.any() else limit)
            expected = case.io[f"gen.{name}.new_tokens"]
            np.testing.assert_array_equal(tokens[None, row, :stop], expected, err_msg=name)
            assert_close(
                name,
                np.stack(seen, axis=1)[None, row, :stop],
                case.io[f"gen.{name}.logits"],
                case.tolerance("logits"),
            )


def _row(case: Case, name: str, length: int | None = None) -> Spliced:
    """A recorded prompt with its picture spliced in."""
    prompt, tokens = case.io[f"gen.{name}.input_ids"][0], system(case).image_tokens
    whole = len(prompt) + int((prompt == IMAGE).sum()) * (tokens - 1)
    return splice(prompt, None, tokens, length or whole)


def _programs(model: Iaa, capacity: int) -> dict[str, Any]:
    """Prefill and step of the branches (in the place of "MM") and of the base."""
    base = model.base

    def text_prefill(tree: Any, ids: Any, length: Any) -> Any:
        return base.apply({"params": tree}, ids, length, capacity=capacity, method="prefill")

    def text_step(tree: Any, tokens: Any, state: Any) -> Any:
        return base.apply({"params": tree}, tokens, state, method="decode_step")

    return {
        "prefill": jax.jit(functools.partial(model.prefill, "MM", capacity=capacity)),
        "step": jax.jit(functools.partial(model.decode_step, "MM")),
        "text_prefill": jax.jit(text_prefill),
        "text_step": jax.jit(text_step),
    }


@STACK.check
def few_segments_are_compiled(case: Case) -> None:
    """The plan covers the base once, in order, and puts every insertion in its place."""
    model = system(case)
    groups, rest = plan(model.insert_after, model.llama.layers)
    after, at = [], 0
    for group in groups:
        for count in group.counts * group.repeats:
            at += count
            after.append(at - 1)
    assert at + rest == model.llama.layers
    assert after == [i for i in model.insert_after if i < model.llama.layers]
