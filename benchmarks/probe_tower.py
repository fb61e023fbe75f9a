"""What a linear probe reads from the vision tower of a tiny IAA.

    python benchmarks/probe_tower.py runs/iaa_tiny_start [runs/iaa_tiny_hf ...]

For every folder of weights: 4,000 scenes of one to three objects; the features that the projector
gets, at the patch of the middle of the nearest object. Ridge regression on three quarters of the
scenes, one output per value; the share of the others in which the right value has the largest.
Beside it the share of the most frequent value. `column` and `row` are of a patch drawn at random:
the mean distance, in patches, of a linear reading of its place (2.0 for always saying the middle).
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import numpy as np

from configs.iaa import FEW, TINY
from data_pipelines.scenes import render, sample_scene
from data_pipelines.scenes.graph import SceneObject
from data_pipelines.scenes.source import HELD_OUT
from jaxmods.systems.iaa import Iaa
from train.interchange import read_params

SCENES, RIDGE, BLOCK = 4000, 10.0, 100
ATTRIBUTES = ("colour", "texture", "size", "kind")


def scenes(side: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Pictures uint8 [n, S, S, 3], and the nearest object of each."""
    drawn = [sample_scene(0, HELD_OUT + index, objects=FEW) for index in range(SCENES)]
    return np.stack([render(s, side).image for s in drawn]), [s.objects[-1] for s in drawn]


def features(system: Iaa, folder: Path, pictures: np.ndarray) -> np.ndarray:
    """What the projector gets: float32 [n, N, F]."""
    params = read_params(system, folder)
    of = jax.jit(functools.partial(system.model.apply, method="features"))
    blocks = [pictures[at : at + BLOCK, None] for at in range(0, len(pictures), BLOCK)]
    return np.concatenate([np.asarray(of({"params": params}, block)) for block in blocks])


def read(given: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a linear map learnt on three quarters says of the rest, and what is wanted there."""
    scaled = (given - given.mean(0)) / (given.std(0) + 1e-6)
    scaled = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    cut = 3 * len(given) // 4
    x, y = scaled[:cut], wanted[:cut]
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    return scaled[cut:] @ weights, wanted[cut:]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    assert TINY.vision is not None
    side = TINY.vision.image_size
    across = side // TINY.vision.patch_size
    pictures, things = scenes(side)
    middles = [across * int(across * t.y) + int(across * t.x) for t in things]
    anywhere = np.random.default_rng(0).integers(0, across**2, len(things))
    every = np.arange(len(things))
    one_hot = {}
    for attribute in ATTRIBUTES:
        names, numbers = np.unique([getattr(t, attribute) for t in things], return_inverse=True)
        one_hot[attribute] = np.eye(len(names))[numbers]
    for folder in folders:
        found = features(TINY, folder, pictures)
        for attribute, wanted in one_hot.items():
            said, truth = read(found[every, middles], wanted)
            right = np.mean(said.argmax(1) == truth.argmax(1))
            print(f"{folder}: {attribute} {right:.1%} (most frequent {truth.mean(0).max():.1%})")
        for name, place in (("column", anywhere % across), ("row", anywhere // across)):
            said, truth = read(found[every, anywhere], place[:, None].astype(float))
            print(f"{folder}: {name} missed by {np.abs(said - truth).mean():.2f} patches")


if __name__ == "__main__":
    main()
