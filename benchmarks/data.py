"""Pictures per second through the data pipeline and through a PyTorch DataLoader, side by side.

  python benchmarks/data.py                     # synthetic 640x480 JPEG files
  python benchmarks/data.py --folder photos     # your own

Both sides read the same JPEG files with the same PIL, take the same kind of random crop to a
224x224 square (bicubic) and tokenise the same texts with the same vocabulary into the same arrays;
every repetition runs all rows in turn, figures are medians. Two workloads: "captions" (a short and
a long caption) and "regions" (also four box texts, two with ten hard negatives). Rows:

  jaxmods         this library: uint8 pixels, normalised on the device
  torch float32   as the official code does: pixels to float32 and normalised on the host,
                  transformers' (Rust) tokenizer
  torch uint8     the same without normalisation, the most favourable to PyTorch

By default each side has one thread (rate per core); `--workers N` gives N reader threads to the one
and N worker processes to the other. `cpu` rates divide by processor time instead of wall time: on a
busy machine they are the ones to trust (not shown with workers, whose time they cannot see).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from data_pipelines.bpe_training import train_clip_bpe
from data_pipelines.image_text import ImageTextPipeline, RandomCrop
from data_pipelines.images import CLIP_MEAN, CLIP_STD
from data_pipelines.records import ImageTextRecord, Region
from data_pipelines.sampling import Reading
from data_pipelines.sources import InMemory

SIZE, SHORT, LONG, BATCH = 224, 77, 248, 32
COLORS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "pink", "purple")
THINGS = ("kettle", "cup", "dog", "table", "umbrella", "bench", "bicycle", "window", "sofa", "lamp")


def write_pictures(folder: Path, count: int) -> list[Path]:
    """`count` JPEG files of 640x480 at quality 90: smooth structure with some grain."""
    paths = []
    for i in range(count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape).astype(np.int16), 0, 255)
        path = folder / f"{i:05d}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def make_records(paths: list[Path], regions: bool) -> list[ImageTextRecord]:
    """Records of about 20 and 150 words, with four regions where asked."""
    records = []
    for i, path in enumerate(paths):
        rng = np.random.default_rng(i)

        def phrase(rng: np.random.Generator = rng) -> str:
            return f"a {COLORS[rng.integers(10)]} {THINGS[rng.integers(10)]}"

        boxes = []
        for slot in range(4 if regions else 0):
            text = phrase()
            negatives = tuple(f"a {c} {text.split()[-1]}" for c in COLORS) if slot % 2 else ()
            boxes.append(Region((0.1, 0.1, 0.6, 0.7), text, f"{text} near {phrase()}", negatives))
        short = " next to ".join(phrase() for _ in range(4))
        long = ". ".join(f"{phrase()} stands behind {phrase()} and {phrase()}" for _ in range(12))
        records.append(ImageTextRecord(str(i), path, (short,), long, tuple(boxes)))
    return records


class OfficialStyle(Dataset):
    """The map-style dataset that one writes in PyTorch: PIL, transformers' tokenizer, tensors."""

    def __init__(
        self, records: list[ImageTextRecord], tokenizer: Any, as_float: bool, crop: RandomCrop
    ) -> None:
        self.records, self.tokenizer, self.as_float, self.crop = records, tokenizer, as_float, crop
        self.mean, self.std = torch.from_numpy(CLIP_MEAN), torch.from_numpy(CLIP_STD)

    def __len__(self) -> int:
        return len(self.records)

    def ids(self, texts: list[str], length: int) -> torch.Tensor:
        """Texts as int64 [n, length]."""
        return self.tokenizer(
            texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        picture = Image.open(record.image).convert("RGB")  # type: ignore[arg-type]  # a path here
        w, h = picture.size
        x1, y1, x2, y2 = self.crop.window(np.random.default_rng())
        picture = picture.resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC, box=(x1 * w, y1 * h, x2 * w, y2 * h)
        )
        pixels = torch.from_numpy(np.array(picture))
        if self.as_float:
            pixels = ((pixels.float() / 255 - self.mean) / self.std).permute(2, 0, 1).contiguous()
        out = {
            "image": pixels,
            "text_short": self.ids(["a photo of " + record.short_captions[0]], SHORT)[0],
            "text_long": self.ids([record.long_caption or ""], LONG)[0],
        }
        if record.regions:
            texts = [r.phrase for r in record.regions]
            hard = [t for r in record.regions if r.negatives for t in (r.phrase, *r.negatives)]
            out["box_text"] = self.ids(texts, SHORT)
            out["hard_text"] = self.ids(hard, SHORT)
        return out


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one workload."""

    name: str
    open: Callable[[], Iterator[Any]]


def measure(row: Row, batches: int) -> tuple[float, float]:
    """Pictures per second by wall time and by processor time, after one batch of warm-up."""
    stream = row.open()
    next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    close = getattr(stream, "close", None)
    if close is not None:
        close()
    return batches * BATCH / wall, batches * BATCH / max(cpu, 1e-9)


def workload(paths: list[Path], tokenizer_folder: str, regions: bool, workers: int) -> list[Row]:
    """The rows of one workload."""
    records = make_records(paths, regions)
    crop = RandomCrop(min_area=0.6)
    pipeline = ImageTextPipeline(
        source=InMemory(tuple(records)),
        tokenizer=tokenizer_folder,
        image_size=SIZE,
        max_boxes=4 if regions else 0,
        hard_pack_slots=2 * BATCH if regions else 0,
        hard_pack_images=BATCH if regions else 1,
        augment=dataclasses.replace(crop, min_visible=0.0),
        reading=Reading(threads=max(workers, 1), prefetch=max(workers, 1) if workers else 0),
    )
    rows = [Row("jaxmods", lambda: pipeline.batches(global_batch=BATCH, seed=0))]
    theirs = CLIPTokenizer.from_pretrained(tokenizer_folder)
    for name, as_float in (("torch float32", True), ("torch uint8", False)):
        loader = DataLoader(
            OfficialStyle(records, theirs, as_float, crop),
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
        )
        rows.append(Row(name, lambda loader=loader: iter(_endless(loader))))  # type: ignore[misc]  # bound per row
    return rows


def _endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python benchmarks/data.py --pictures 128 --repeats 5",
    )
    parser.add_argument("--folder", type=Path, help="folder of .jpg files; else synthetic ones")
    parser.add_argument("--pictures", type=int, default=128, help="synthetic files to write")
    parser.add_argument("--batches", type=int, default=6, help=f"of {BATCH}, per repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="0: one thread on each side")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.folder:
            paths = sorted(options.folder.glob("*.jpg"))
            if len(paths) < BATCH:
                parser.error(f"{options.folder}: expected at least {BATCH} .jpg files")
        else:
            paths = write_pictures(folder, options.pictures)
        records = make_records(paths, True)
        texts = [t for r in records for t in (*r.short_captions, r.long_caption or "")]
        train_clip_bpe(texts, 1024).save(folder / "tokenizer")
        facts: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, PIL {PIL.__version__}",
            "workers": options.workers,
            "pictures": len(paths),
        }
        for name, regions in (("captions", False), ("regions", True)):
            rows = workload(paths, str(folder / "tokenizer"), regions, options.workers)
            found: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
            for _ in range(options.repeats):
                for row in rows:
                    found[row.name].append(measure(row, options.batches))
            facts[name] = {
                row: {
                    "per_second": round(statistics.median(w for w, _ in values), 1),
                    "per_cpu_second": round(statistics.median(c for _, c in values), 1),
                }
                for row, values in found.items()
            }
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{facts['machine']}; {facts['pictures']} files, {options.workers} workers")
    for name in ("captions", "regions"):
        ours = facts[name]["jaxmods"]
        columns = ("per_second", "per_cpu_second") if not options.workers else ("per_second",)
        titles = "".join(f"{c.replace('_', ' '):>16}{'ratio':>8}" for c in columns)
        print(f"\n{name:16}{titles}")
        for row, values in facts[name].items():
            cells = (f"{values[c]:16.1f}{ours[c] / values[c]:8.2f}" for c in columns)
            print(f"{row:16}{''.join(cells)}")


if __name__ == "__main__":
    main()
