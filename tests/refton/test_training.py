"""A run from a base folder: adapters train on a frozen bf16 base, checkpoints hold them alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.refton import pipeline
from data_pipelines.scenes.try_on import TryOnScenes
from jaxmods.systems.refton.weights import save_pipeline
from tests.refton.tiny import SYSTEM, random_params
from train.experiment import Checkpointing, Experiment, Init, Optim, Precision
from train.interchange import import_weights
from train.loop import fit

SOURCE = TryOnScenes(count=8, height=32, width=24)


def experiment(weights: Path) -> Experiment:
    return Experiment(
        system=SYSTEM,
        data=pipeline(SYSTEM, SOURCE),
        batch_size=8,
        steps=2,
        optim=Optim(lr=1e-2, schedule="constant", weight_decay=1e-4, clip_norm=1.0),
        precision=Precision(frozen="bfloat16", compute="bfloat16"),
        checkpoint=Checkpointing(every=2),
        init=Init(weights=str(weights)),
    )


@pytest.mark.slow
def test_only_adapters_change_and_are_saved(tmp_path: Path) -> None:
    save_pipeline(SYSTEM, random_params(SYSTEM), tmp_path / "base")
    recipe = experiment(tmp_path / "base")
    result = fit(recipe, tmp_path / "run", quiet=True)
    base = import_weights(SYSTEM, tmp_path / "base", dtype="bfloat16")
    for name, tree in result.state.frozen.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
        jax.tree.map(np.testing.assert_array_equal, tree, base[name])
    assert set(result.state.trained) == {"lora"}
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.trained)} == {jnp.dtype("float32")}
    # b was zero: every adapter has moved.
    changed = jax.tree_util.tree_leaves_with_path(result.state.trained)
    assert all(np.any(leaf) for path, leaf in changed if path[-1].key == "b")

    def size(folder: Path) -> int:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

    # The base is kept once, checkpoints hold three copies of the adapters and nothing like it.
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state.trained))
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state.frozen))
    assert size(tmp_path / "run" / "frozen") > 0.5 * frozen
    names = {p.name for p in (tmp_path / "run" / "checkpoints" / "2").iterdir()}
    assert "trained" in names
    assert not any("frozen" in name for name in names)
    assert adapters < frozen / 10

    again = fit(recipe, tmp_path / "run", quiet=True)
    assert again.step == 2
    jax.tree.map(np.testing.assert_array_equal, again.state.state, result.state.state)
    jax.tree.map(np.testing.assert_array_equal, again.state.trained, result.state.trained)
