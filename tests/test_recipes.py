"""Every recipe is whole: it resolves, and its batches are its system's; the small ones are run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.scenes import Scenes
from jaxmods.partitioning import MeshShape, make_mesh
from tests.command import ROOT, jaxmods
from train.canonical import canonical
from train.cli import main
from train.recipes import all_recipes, resolve
from train.state import make_plan

REAL_COCO = ROOT.parent / "shared" / "data" / "coco_mini"


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipe_has_shapes_labels_and_an_optimiser(name: str) -> None:
    experiment = resolve(name, ()).experiment
    plan = make_plan(experiment, make_mesh(MeshShape(), jax.devices()[:1]))
    assert plan.groups
    spec = experiment.system.batch_spec(experiment.batch_size)
    assert all(all(side >= 0 for side in array.shape) for array in spec.values())
    json.dumps(canonical(experiment))


@pytest.mark.parametrize("name", ["fgclip/tiny", "refton/tiny", "stargraph/tiny"])
def test_batches_are_those_of_the_system(name: str) -> None:
    experiment = resolve(name, ()).experiment
    spec = experiment.system.batch_spec(experiment.batch_size)
    batch = next(iter(experiment.data.batches(global_batch=experiment.batch_size, seed=0)))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.arrays.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    assert len(batch.info.record_ids) == experiment.batch_size


def write_coco(root: Path, split: str, start: int, count: int) -> None:
    """Scenes as a folder in COCO's layout."""
    images, captions, boxes, categories = [], [], [], {}
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for n, record in enumerate(Scenes(start=start, count=count, image_size=80, short_captions=5)):
        name = f"{n + 1:012d}.jpg"
        Image.fromarray(record.image).save(root / split / name)
        images.append({"id": n + 1, "file_name": name, "width": 80, "height": 80})
        captions += [
            {"id": 5 * n + k, "image_id": n + 1, "caption": text}
            for k, text in enumerate(record.short_captions)
        ]
        for region in record.regions:
            x1, y1, x2, y2 = (80 * v for v in region.box)
            category = categories.setdefault(region.label, len(categories) + 1)
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": n + 1,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    named = [{"id": i, "name": name, "supercategory": "thing"} for name, i in categories.items()]
    for kind, rows, more in (
        ("captions", captions, {}),
        ("instances", boxes, {"categories": named}),
    ):
        content = {"images": images, "annotations": rows, **more}
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_coco_mini_runs_end_to_end(tmp_path: Path) -> None:
    """On the real photographs where they are at hand, else on a folder of the same layout."""
    root = REAL_COCO
    if not root.is_dir():
        root = tmp_path / "coco"
        write_coco(root, "train2017", 0, 24)
        write_coco(root, "val2017", 10**6, 12)
    work, folder = tmp_path / "run", tmp_path / "hf"
    settings = ["--set", f"data.root={root}", "steps=6", "checkpoint.every=3"]
    summary = jaxmods("fit", "fgclip/coco_mini", "--workdir", str(work), *settings)
    assert summary["step"] == 6
    results = json.loads((work / "eval" / "6.json").read_text())["results"]
    names = {r["protocol"] for r in results}
    assert {"coco_train2017_retrieval_short", "coco_val2017_regions"} <= names
    assert (work / "report.html").read_text().count("data:image/") >= 4
    jaxmods(
        "export",
        "fgclip/coco_mini",
        "--from",
        str(work),
        "--to",
        str(folder),
        "--verify",
        *settings,
    )
    assert json.loads((folder / "verify.json").read_text())["forward"] == "compared"


@pytest.mark.slow
def test_tiny_learns(tmp_path: Path) -> None:
    """A fifth of the demo's steps: regions and long captions are found many times above chance."""
    work = tmp_path / "run"
    settings = ["--set", "steps=300", "evaluation.at_start=false"]
    jaxmods("fit", "fgclip/tiny", "--no-report", "--workdir", str(work), *settings)
    results = json.loads((work / "eval" / "300.json").read_text())["results"]
    metrics = {r["protocol"]: r["metrics"] for r in results}
    for protocol, name in (
        ("scenes_regions", "phrase_to_region_r1"),
        ("scenes_retrieval_long", "t2i_r1"),
    ):
        metric = metrics[protocol][name]
        assert metric["value"] > 10 * metric["chance"], (protocol, metric)
    accuracy = metrics["scenes_hard_negatives"]["accuracy"]
    assert accuracy["value"] > 2 * accuracy["chance"]


def test_own_data_in_one_jsonl_is_drawn_back(tmp_path: Path, capsys) -> None:
    rows = []
    for n, record in enumerate(Scenes(count=6, image_size=48)):
        Image.fromarray(record.image).save(tmp_path / f"{n}.png")
        regions = [{"box": list(r.box), "phrase": r.phrase} for r in record.regions]
        rows.append(
            {"image": f"{n}.png", "captions": list(record.short_captions), "regions": regions}
        )
    rows[5]["image"] = "gone.png"
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    code = main(
        [
            *["data", "inspect", "fgclip/finetune", "--json", "--out"],
            str(tmp_path / "look"),
            "--set",
            f"data.path={path}",
            "weights=scene",
        ]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    text = json.dumps(report)
    assert "missing_file" in text
    sheet = next((tmp_path / "look").glob("*.png"))
    assert np.asarray(Image.open(sheet)).std() > 0
