"""RefTON's recorded loaders: pictures under the official names, read back at the model's sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.tryon import DressCode, InTheWild, TryOnSource, VitonHd
from data_pipelines.tryon.transforms import Frame, pictures
from tests.parity.registry import Case, Kind, assert_close

# Keys of the official collator, and what they are here.
KEYS = {
    "pixel_values": "target",
    "pixel_values_ref": "reference",
    "cond_pixel_values_agnostic": "agnostic",
    "cond_pixel_values_cloth": "garment",
    "cond_pixel_values_dense": "dense",
    "cond_pixel_values_agnostic_mask": "mask",
    "cond_pixel_values_person": "person",
}

LOADERS = Kind(
    "refton",
    "loaders",
    lambda case: {k.partition(".")[0] for k in case.shapes} == {"file", "out"},
)


def write_tree(case: Case, root: Path) -> None:
    """The recorded files and lists, lossless, under their names."""
    for key, pixels in case.io.items():
        if key.startswith("file."):
            path = root / key.removeprefix("file.")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, "PNG")
    for name, rows in case.meta["lists"].items():
        (root / name).write_text("\n".join(r.strip() for r in rows.split(" / ")) + "\n")


def source_of(name: str, root: Path) -> TryOnSource:
    """The source that corresponds to a recorded set, by the words in its name."""
    folders = {p.name.lower(): p for p in root.iterdir()}
    folder = next(p for n, p in folders.items() if n.startswith(name.split("_")[0]))
    pairs = "unpaired" if "unpaired" in name else "paired"
    if name.startswith("viton"):
        split = "train" if (folder / "train").is_dir() else "test"
        return VitonHd(str(folder), split=split, pairs=pairs)
    if name.startswith("dresscode"):
        return DressCode(str(folder), split="train" if "train" in name else "test", pairs=pairs)
    return InTheWild(str(folder))


@LOADERS.check
def same_pixels(case: Case) -> None:
    """Every picture of every set, in order, and nothing besides."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tree(case, root)
        sets = sorted({k.split(".")[1] for k in case.shapes if k.startswith("out.")})
        for name in sets:
            expected = {k.split(".")[2]: v for k, v in case.io.items() if f"out.{name}." in k}
            h, w = expected["cond_pixel_values_cloth"].shape[2:]
            small = expected["pixel_values_ref"].shape[2]
            source = source_of(name, root)
            records = [source[i] for i in range(len(source))]
            fields = case.meta["non_tensor_fields"][name]
            assert [r.extra["file"] for r in records] == fields["index"]
            assert [r.prompt for r in records] == fields["prompts"]
            if "category" in fields:
                assert [r.extra["folder"] for r in records] == fields["category"]
            found = [pictures(r, Frame(h, w, h / small)) for r in records]
            for row, record in zip(found, records, strict=True):
                if record.person is None:  # the official loaders take the target instead
                    row["person"] = row["target"]
            assert set(found[0]) == {KEYS[k] for k in expected}, name
            for key, array in expected.items():
                ours = np.stack([row[KEYS[key]] for row in found]).transpose(0, 3, 1, 2)
                scaled = ours.astype(np.float32) / 127.5 - 1
                assert_close(f"{name}.{key}", scaled, array, case.tolerance())
