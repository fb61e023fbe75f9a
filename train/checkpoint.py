"""Checkpoints (Orbax): a run's state with its JSON, and folders of parameters alone.

A run folder holds

    checkpoints/<step>/{trained,ema,train,info}   all that changes, and the facts that belong to it
    frozen/                                       parameters that never change, written once

Restoring always targets the shapes and shardings of the abstract state of the present run, never
what was stored, so a run continues on another number of devices. A digest of every tensor is saved
and compared, because the storage format itself lets a flipped bit through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

from jaxmods.system import Params
from train.exits import UserError
from train.experiment import Checkpointing
from train.peers import current, leads
from train.state import Plan, TrainState, flatten, merge, unflatten

LOG = logging.getLogger("train")
T = TypeVar("T")

FOLDER = "checkpoints"
FROZEN_FOLDER = "frozen"
_TENSORS = "params"
_FACTS = "params.json"
_SEPARATOR = "/"
_INFO, _DIGESTS, _FORMAT = "info", "digests", "format"

FORMAT = 1  # of what is written here; raised when an older reader would misunderstand it


def to_flat(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by a readable path, independent of the classes of its nodes."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator=_SEPARATOR): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def from_flat(flat: dict[str, Any], like: Any) -> Any:
    """The reverse of `to_flat`, with the structure of `like`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(k, simple=True, separator=_SEPARATOR) for k, _ in paths]
    return jax.tree.unflatten(structure, [flat[name] for name in names])


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored run: its state and the JSON saved with it. `skipped` are unreadable steps."""

    step: int
    state: TrainState
    info: dict[str, Any]
    skipped: tuple[int, ...] = ()


class Checkpoints:
    """The checkpoints of one run folder. `read_only` leaves a run that is under way alone."""

    def __init__(self, workdir: Path, policy: Checkpointing, *, read_only: bool = False) -> None:
        self._folder = workdir.absolute() / FOLDER
        self._frozen = workdir.absolute() / FROZEN_FOLDER
        self._policy, self._read_only = policy, read_only
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = self._policy
        rules: list[keeping.PreservationPolicy] = [keeping.LatestN(policy.keep)]
        if policy.keep_period:
            rules.append(keeping.EveryNSteps(policy.keep_period))
        if policy.keep_best:
            name = policy.keep_best
            rules.append(
                keeping.BestN(
                    get_metric_fn=lambda metrics: metrics[name],
                    reverse=policy.best == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keeping.AnyPreservationPolicy(rules),
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
        )
        handlers: dict[str, ocp.CheckpointHandler] = {
            item: ocp.StandardCheckpointHandler() for item in ("trained", "ema", "train")
        }
        handlers["info"] = ocp.JsonCheckpointHandler()
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def begin(self, state: TrainState) -> None:
        """Before the first step of a new run: write what will never change."""
        if state.frozen:
            save_params(self._frozen, state.frozen, {"step": 0})

    def save(
        self, state: TrainState, info: dict[str, Any], best: dict[str, float] | None = None
    ) -> None:
        """Begin to save; returns when the arrays are copied, the writing goes on behind.

        Args:
          info: JSON saved with the arrays.
          best: evaluation metrics of exactly this step, `protocol/metric`, for `keep_best`.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        name = self._policy.keep_best
        metrics = {name: best[name]} if name and best and name in best else None
        info = json.loads(json.dumps(info))  # written later: nothing of the caller's may be in it
        flat = _items(state)
        items = {k: ocp.args.StandardSave(v) for k, v in flat.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **items,
                info=ocp.args.JsonSave({_FORMAT: FORMAT, _INFO: info, _DIGESTS: digests(flat)}),
            ),
            metrics=metrics,
            force=True,
        )

    def wait(self) -> None:
        """Block until what was begun is on the disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release."""
        self._manager.close()

    def restore(self, plan: Plan) -> Restored | None:
        """The newest readable checkpoint, placed for `plan`; None when there is none at all.

        An unreadable checkpoint is said in the log, and the one before it is tried.

        Raises:
          UserError: there are checkpoints but none can be read, or one is of another model.
        """
        return self._newest(lambda step, skipped: self._restore_step(step, plan, skipped))

    def restore_params(self, plan: Plan, *, frozen: bool = True) -> tuple[Params, int] | None:
        """Parameters alone of the newest readable checkpoint (the moving average where there is
        one), placed for `plan`, and their step. Nothing of the optimiser is read, and without
        `frozen` only what trains."""
        return self._newest(lambda step, _: (self._restore_params(step, plan, frozen), step))

    def _newest(self, read: Callable[[int, tuple[int, ...]], T]) -> T | None:
        skipped: list[int] = []
        self.wait()
        for step in _same_on_all(list(reversed(self.steps()))):
            try:
                return read(step, tuple(skipped))
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file raises, in any library below
                reason = str(error).strip().splitlines()[0][:300] if str(error) else ""
                LOG.warning(
                    "checkpoint %d cannot be read (%s: %s); trying the one before it",
                    step,
                    type(error).__name__,
                    reason,
                )
                skipped.append(step)
        if skipped:
            raise UserError(
                f"{self._folder}: none of the checkpoints {sorted(skipped)} can be read; restore "
                "the folder from a copy, or start in another workdir"
            )
        return None

    def set_aside(self, steps: tuple[int, ...]) -> None:
        """Move unreadable checkpoints to `checkpoints/unreadable-<step>`, so that their steps can
        be saved again."""
        if not steps:
            return
        self._manager.close()
        for step in steps if leads() else ():
            place = self._folder / f"unreadable-{step}"
            if place.exists():
                shutil.rmtree(place)
            (self._folder / str(step)).rename(place)
        if (peers := current()) is not None:
            peers.wait()
        self._manager = self._open()

    def _restore_step(self, step: int, plan: Plan, skipped: tuple[int, ...]) -> Restored:
        target = plan.abstract_sharded()
        info, read = self._read(step, _items(target))
        train = read["train"]
        state = TrainState(
            trained=_nested(read["trained"]),
            frozen=self._read_frozen(target),
            opt_state=from_flat(_part(train, "opt_state"), target.opt_state),
            state=from_flat(_part(train, "state"), target.state),
            step=train["step"],
            rng=train["rng"],
            ema=_nested(read["ema"]) if target.ema else {},
        )
        return Restored(step, state, info[_INFO], skipped)

    def _restore_params(self, step: int, plan: Plan, frozen: bool) -> Params:
        target = plan.abstract_sharded()
        item = "ema" if target.ema else "trained"
        _, read = self._read(step, {item: _items(target)[item]})
        trained = _nested(read[item])
        return merge(trained, self._read_frozen(target)) if frozen else trained

    def _read(
        self, step: int, wanted: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The JSON of a checkpoint and the wanted items, compared with their digests."""
        with all_or_none(f"checkpoint {step}"):
            folder = self._folder / str(step)
            info = _read_item(ocp.JsonCheckpointHandler, folder / "info", ocp.args.JsonRestore())
            found = info.get(_FORMAT, FORMAT)
            if found > FORMAT:
                raise UserError(
                    f"checkpoint {step} of {self._folder} was written by a newer version of "
                    f"jaxmods: expected format {FORMAT} or older, found {found}; update jaxmods, "
                    "or give another --workdir"
                )
            read = {}
            for item, flat in wanted.items():
                _compare(
                    flat, _stored(folder / item), f"checkpoint {step} of {self._folder}, {item}"
                )
                read[item] = _read_item(
                    ocp.StandardCheckpointHandler, folder / item, ocp.args.StandardRestore(flat)
                )
        for item in wanted:
            _check_digests(read[item], info[_DIGESTS][item])
        return info, read

    def _read_frozen(self, target: TrainState) -> Params:
        return load_params(self._frozen, target.frozen) if target.frozen else {}


def _same_on_all(steps: list[int]) -> list[int]:
    """The list of process 0: others may see a shared folder as it was a moment ago."""
    peers = current()
    return steps if peers is None else json.loads(peers.share(json.dumps(steps)))


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """The body ends well on all processes or on none: one that cannot read its part of a damaged
    checkpoint must not leave the others waiting for it.

    Raises:
      DamagedError: where the body went well, but not on another process.
    """
    peers = current()
    if peers is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except UserError:
        raise  # ends the job, and is told to the others by itself
    except Exception as error:  # whatever a damaged file raises
        failure = error
    trouble = peers.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    first = next(((i, text) for i, text in enumerate(trouble) if text is not None), None)
    if first is not None:
        raise DamagedError(f"{what} on process {peers.members[first[0]]}: {first[1]}")


def _alone() -> ocp.options.MultiprocessingOptions:
    """Reading without waiting for other processes, see `all_or_none`."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _read_item(
    handler: Callable[..., Any], folder: Path, args: ocp.args.CheckpointArgs
) -> dict[str, Any]:
    """An item of a checkpoint."""
    options = _alone()
    with ocp.Checkpointer(
        handler(multiprocessing_options=options), multiprocessing_options=options
    ) as reader:
        return reader.restore(folder, args=args)


def _stored(folder: Path) -> Any:
    """Names and shapes of an item of a checkpoint."""
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    try:
        return handler.metadata(folder)
    finally:
        handler.close()


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """What is saved for a state, or asked for by an abstract one: flat trees by item."""
    train = {"step": state.step, "rng": state.rng}
    for name in ("opt_state", "state"):
        train.update({f"{name}:{k}": v for k, v in to_flat(getattr(state, name)).items()})
    items = {"trained": _flat_params(state.trained), "train": train}
    if state.ema:
        items["ema"] = _flat_params(state.ema)
    return items


def _part(flat: dict[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}:"
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def _flat_params(params: Params) -> dict[str, Any]:
    return {_SEPARATOR.join(path): leaf for path, leaf in flatten(params).items()}


def _nested(flat: dict[str, Any]) -> Params:
    return unflatten({tuple(k.split(_SEPARATOR)): v for k, v in flat.items()})


def _compare(expected: dict[str, Any], stored: Any, where: str) -> None:
    """Raise UserError when stored names or shapes are not those of the present model."""
    tree = getattr(stored, "tree", stored)
    problems = [f"missing {n}" for n in expected if n not in tree]
    problems += [f"unexpected {n}" for n in tree if n not in expected]
    problems += [
        f"{n}: expected {tuple(expected[n].shape)}, found {tuple(tree[n].shape)}"
        for n in expected
        if n in tree and tuple(tree[n].shape) != tuple(expected[n].shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{where}: stored tensors are not those of this recipe: {'; '.join(problems[:5])}{more}"
        )


class DamagedError(RuntimeError):
    """Stored tensors are not those that were saved."""


@jax.jit
def _digest(leaves: list[jax.Array]) -> list[jax.Array]:
    """uint32 per tensor: sum of its words, each times an odd number that depends on its place.

    Whole-number arithmetic modulo 2^32, so the result does not depend on how a tensor is split
    over devices, and one changed word always changes it.
    """

    def one(x: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
        if x.dtype == jnp.bool_ or width is None:
            x, width = x.astype(jnp.uint32), jnp.uint32
        words = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def digests(flat: dict[str, Any]) -> dict[str, Any]:
    """Digest of every tensor of a flat tree (or of a dict of flat trees)."""
    leaves, structure = jax.tree.flatten(flat)
    return jax.tree.unflatten(structure, [int(x) for x in jax.device_get(_digest(leaves))])


def _check_digests(flat: dict[str, Any], saved: dict[str, int]) -> None:
    """Raise DamagedError naming tensors that differ from what was saved."""
    found = digests(flat)
    wrong = [name for name, value in found.items() if value != saved[name]]
    if wrong:
        raise DamagedError(f"damaged: {', '.join(wrong[:5])}")


def save_params(folder: Path, params: Params, facts: dict[str, Any]) -> None:
    """Write parameters alone to `folder` (created; parameters that are there are replaced).

    Args:
      params: nested dict of arrays (host or sharded).
      facts: JSON written beside them as `params.json` (recipe, source, step, ...).
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    flat = _flat_params(params)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / _TENSORS, flat, force=True)
    sums = digests(flat)
    if jax.process_index() == 0:
        text = json.dumps({**facts, _DIGESTS: sums}, indent=1, ensure_ascii=False)
        (folder / _FACTS).write_text(text + "\n", encoding="utf-8")


def load_params(folder: Path, like: Params | None = None) -> Params:
    """Parameters written by `save_params`.

    Args:
      like: nested dict of ShapeDtypeStructs (with shardings, where wanted) that says what to
        load and where to put it; None loads everything as NumPy arrays.

    Raises:
      UserError: no parameters there, or other names or shapes than `like`.
    """
    folder = Path(folder).absolute()
    if not (folder / _TENSORS).is_dir():
        raise UserError(f"{folder}: expected a folder of parameters ({_TENSORS}/), found none")
    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(folder / _TENSORS).item_metadata
        if like is None:
            flat = {
                name: jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=_first_device())
                for name, entry in stored.tree.items()
            }
            read = reader.restore(folder / _TENSORS, flat)
        else:
            flat = _flat_params(like)
            _compare(flat, stored, str(folder))
            read = reader.restore(folder / _TENSORS, flat)
    saved = _read_json(folder / _FACTS).get(_DIGESTS, {})
    unchanged = {k: v for k, v in read.items() if v.dtype == stored.tree[k].dtype and k in saved}
    try:
        _check_digests(unchanged, saved)
    except DamagedError as error:
        raise UserError(f"{folder}: {error}; write the folder again") from error
    return _nested({k: np.asarray(v) for k, v in read.items()} if like is None else read)


def is_params_folder(folder: Path) -> bool:
    """Whether `save_params` wrote here."""
    return (Path(folder) / _TENSORS).is_dir()


def read_facts(folder: Path) -> dict[str, Any]:
    """The JSON beside parameters written by `save_params`; empty when there is none."""
    facts = _read_json(Path(folder) / _FACTS)
    facts.pop(_DIGESTS, None)
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_run_params(workdir: Path, plan: Plan, *, frozen: bool = True) -> tuple[Params, int]:
    """Parameters of the newest checkpoint of a run, for evaluation or export, and their step.

    The moving average is used where the run keeps one. Without `frozen` only what trains is read.
    """
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir}: expected a run folder with {FOLDER}/, found none")
    checkpoints = Checkpoints(workdir, plan.experiment.checkpoint, read_only=True)
    try:
        found = checkpoints.restore_params(plan, frozen=frozen)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"{workdir}: no checkpoint yet; train first (jaxmods fit)")
    return found


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
