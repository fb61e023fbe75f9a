"""Speed of the scene world, on one core: `python benchmarks/scenes.py`; with `--garments` how well
`garment_classifier` tells the garments of the try-on world apart.

Each figure is the median over repetitions of the rate over a block of scenes that was not seen
before; caches of backgrounds are warm, as they are after the first seconds of a run. Wall time is
what counts; the rate by processor time is given beside it, since it does not suffer from other
programs on the machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipelines.protocols.picture_scores import through_file
from data_pipelines.scenes import (
    Scene,
    Scenes,
    long_caption,
    regions,
    render,
    sample_scene,
    short_caption,
)
from data_pipelines.scenes.backgrounds import panorama
from data_pipelines.scenes.garment_classifier import classify
from data_pipelines.scenes.graph import HORIZONS
from data_pipelines.scenes.try_on import TryOnScenes, TryOnViews, sample_try_on
from data_pipelines.scenes.vocabulary import SETTINGS

TARGET = {"record": 300, "try-on record": 200}  # per second and core at 64 pixels


def rate(work: Callable[[int], object], scenes: int, repeats: int) -> tuple[float, float]:
    """Median calls per second by wall time and by processor time, on consecutive indexes."""
    wall, cpu = [], []
    for repeat in range(repeats):
        first = repeat * scenes
        t0, c0 = time.perf_counter(), time.process_time()
        for index in range(first, first + scenes):
            work(index)
        wall.append(scenes / (time.perf_counter() - t0))
        cpu.append(scenes / (time.process_time() - c0))
    return statistics.median(wall), statistics.median(cpu)


def texts(scene: Scene) -> object:
    """All texts of a record."""
    boxes = [thing.box for thing in scene.objects]
    return short_caption(scene), long_caption(scene), regions(scene, boxes)


def picture(graphs: list[Scene], size: int, index: int) -> object:
    """The image of one of the graphs."""
    return render(graphs[index], size).image


def noisy(pixels: np.ndarray, index: int) -> np.ndarray:
    """Gaussian noise of 8 levels."""
    noise = np.random.default_rng(index).normal(0, 8, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def halved(pixels: np.ndarray, index: int) -> np.ndarray:
    """Half the size, and back."""
    del index
    picture, (height, width) = Image.fromarray(pixels), pixels.shape[:2]
    small = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def garments() -> None:
    """Print the classifier's accuracy by picture size and disturbance."""
    changes: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
        "true picture": lambda x, _: x,
        "JPEG": lambda x, _: through_file(x, "jpeg"),
        "noise": noisy,
        "halved": halved,
    }
    print(f"{'accuracy':<12}" + "".join(f"{name:>14}" for name in changes))
    for height, width, count in ((48, 48, 1000), (64, 48, 2000), (96, 72, 1000)):
        right = dict.fromkeys(changes, 0)
        for index in range(count):
            views = TryOnViews(sample_try_on(11, index), height, width)
            for name, change in changes.items():
                found = classify(change(views.target, index), views.region)
                right[name] += found == views.scene.garment.label
        label = f"{height} x {width}"
        print(f"{label:<12}" + "".join(f"{n / count:>14.1%}" for n in right.values()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Scenes per second on one core.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
    parser.add_argument("--scenes", type=int, default=200, help="scenes per repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--garments", action="store_true", help="accuracy of the classifier instead"
    )
    arguments = parser.parse_args()
    if arguments.garments:
        garments()
        return
    scenes, repeats = arguments.scenes, arguments.repeats
    rows: list[tuple[str, int | None, float, float]] = []
    rows.append(("graph", None, *rate(lambda i: sample_scene(1, i), scenes, repeats)))
    graphs = [sample_scene(1, i) for i in range(scenes * repeats)]
    rows.append(("captions and phrases", None, *rate(lambda i: texts(graphs[i]), scenes, repeats)))
    for size in arguments.sizes:
        for setting in SETTINGS:
            for horizon in HORIZONS:
                panorama(setting, horizon, size)
        source = Scenes(seed=1, count=scenes * repeats, image_size=size)
        rows.append(
            ("image", size, *rate(functools.partial(picture, graphs, size), scenes, repeats))
        )
        rows.append(("record", size, *rate(source.__getitem__, scenes, repeats)))
        try_on = TryOnScenes(seed=1, count=scenes * repeats, height=size, width=size * 3 // 4)
        rows.append(("try-on record", size, *rate(try_on.__getitem__, scenes, repeats)))
    if arguments.json:
        print(json.dumps([dict(zip(("what", "size", "wall", "cpu"), row, strict=True))
                          for row in rows]))  # fmt: skip
        return
    print(f"{'per second, median of ' + str(repeats):<36}{'wall':>8}{'cpu':>8}")
    for what, size, wall, cpu in rows:
        columns = size if size is None or what != "try-on record" else size * 3 // 4
        label = what if size is None else f"{what} at {size} x {columns}"
        note = f"   (target {TARGET[what]})" if size == 64 and what in TARGET else ""
        print(f"{label:<36}{wall:>8.0f}{cpu:>8.0f}{note}")
    print("record = graph + image + segmentation + boxes + captions + phrases + negatives")
    print("try-on record = target + person + agnostic + mask + garment + reference + region")


if __name__ == "__main__":
    main()
