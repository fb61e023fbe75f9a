"""Speed of the scene world, on one core: `python benchmarks/scenes.py`.

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
from data_pipelines.scenes.graph import HORIZONS
from data_pipelines.scenes.vocabulary import SETTINGS

TARGET = 300  # records per second and core at 64 pixels


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Scenes per second on one core.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
    parser.add_argument("--scenes", type=int, default=200, help="scenes per repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
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
    if arguments.json:
        print(json.dumps([dict(zip(("what", "size", "wall", "cpu"), row, strict=True))
                          for row in rows]))  # fmt: skip
        return
    print(f"{'per second, median of ' + str(repeats):<36}{'wall':>8}{'cpu':>8}")
    for what, size, wall, cpu in rows:
        label = what if size is None else f"{what} at {size} x {size}"
        note = f"   (target {TARGET})" if (what, size) == ("record", 64) else ""
        print(f"{label:<36}{wall:>8.0f}{cpu:>8.0f}{note}")
    print("record = graph + image + segmentation + boxes + captions + phrases + negatives")


if __name__ == "__main__":
    main()
