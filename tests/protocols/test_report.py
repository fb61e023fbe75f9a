"""Results on disk, and the page made of them."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.protocols.base import EvalResult, Metric, Panel
from train import charts
from train.exits import UserError
from train.report import metric_label, picture_uri, write_report
from train.results import load_results, save_result

VOID = {"meta", "br", "img", "link", "hr", "input"}


def png(color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, "PNG")
    return out.getvalue()


def result(name: str = "scenes_retrieval_short", value: float = 0.4, **fields) -> EvalResult:
    return EvalResult(
        protocol=name,
        metrics={"t2i_r1": Metric(value, 1 / 512, None), "i2t_r5": Metric(0.5, 5 / 512, 0.7)},
        settings={"context": 77, "templates": ("a {}",), "root": Path("data"), "comparable": True},
        records=512,
        seconds=3.25,
        counts={"records_seen": 513, "records_dropped_missing_file": 1},
        **fields,
    )


def test_results_round_trip(tmp_path: Path) -> None:
    panels = (Panel("Grid", "look", png()), Panel("Text", "only", html="<b>x</b>"))
    path = save_result(result(panels=panels, notes=("a note",)), tmp_path, 100)
    assert path == tmp_path / "eval" / "100.json"
    save_result(result("other"), tmp_path, 100)
    save_result(result(), tmp_path, 0)
    loaded = load_results(tmp_path)
    assert list(loaded) == [0, 100]
    assert set(loaded[100]) == {"scenes_retrieval_short", "other"}
    again = loaded[100]["scenes_retrieval_short"]
    assert again.metrics == result().metrics
    assert again.panels == panels
    assert again.notes == ("a note",)
    assert again.settings == {
        "context": 77,
        "templates": ["a {}"],
        "root": "data",
        "comparable": True,
    }
    assert (tmp_path / "eval/100/scenes_retrieval_short/0.png").read_bytes() == png()


def test_saving_again_replaces(tmp_path: Path) -> None:
    three = tuple(Panel(str(n), "", png()) for n in range(3))
    save_result(result(value=0.1, panels=three), tmp_path, 5)
    save_result(result(value=0.2, panels=three[:1]), tmp_path, 5)
    found = load_results(tmp_path)[5]["scenes_retrieval_short"]
    assert found.metrics["t2i_r1"].value == 0.2
    assert len(found.panels) == 1
    assert len(list((tmp_path / "eval/5/scenes_retrieval_short").glob("*.png"))) == 1
    save_result(result(value=0.3), tmp_path, 5)
    assert load_results(tmp_path)[5]["scenes_retrieval_short"].panels == ()


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = save_result(result(value=float("nan")), tmp_path, 1)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(load_results(tmp_path)[1]["scenes_retrieval_short"].metrics["t2i_r1"].value)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_names_that_are_no_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protocol name"):
        save_result(result(name), tmp_path, 1)


def test_numpy_settings_are_written(tmp_path: Path) -> None:
    odd = EvalResult("p", {"m": Metric(np.float32(0.5))}, {"n": np.int64(3)}, np.int64(2), 1.0)
    save_result(odd, tmp_path, 1)
    found = load_results(tmp_path)[1]["p"]
    assert found.records == 2
    assert found.settings == {"n": 3}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.tags: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.append(str(value))
            if name in ("src", "srcset", "data"):
                self.loads.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def a_run(folder: Path) -> Path:
    """A run folder as the loop leaves it."""
    document = {
        "recipe": "fgclip/tiny",
        "overrides": ["optim.lr=5e-4"],
        "hash": "0123",
        "experiment": {
            "steps": 200,
            "batch_size": 64,
            "optim": {"name": "adamw", "lr": 5e-4},
            "evaluation": {"protocols": [{"label": "<b>scenes</b>"}]},
        },
    }
    counters = {
        "seen": 12810,
        "used": 12800,
        "quarantine": {"truncated_image": {"records": 3, "met": 10}},
        "repaired": {"box_clipped": 7},
        "cut": {"boxes": 21, "short_tokens": 0},
    }
    summary = {
        "recipe": "fgclip/tiny",
        "status": "finished",
        "step": 200,
        "steps": 200,
        "examples": 12800,
        "training_seconds": 75.0,
        "metrics": {"loss": 1.25, "examples_per_second": 170.0},
        "data": {"source": "scenes"},
        "parameters": {"trained": 4_800_000, "frozen": 0},
        "versions": {"jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu", "devices": 1, "processes": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("recipe", document), ("counters", counters), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = [
        {"step": s, "loss": 5 - s / 50 if s != 100 else None, "lr/train": 1e-4, "eval/x/y": 1.0}
        for s in range(10, 201, 10)
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 210, "lo'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    bad = {
        "step": 3,
        "source": "photos",
        "id": "a<b>.jpg",
        "reason": "truncated_image",
        "detail": "cut & gone",
    }
    (folder / "quarantine.jsonl").write_text(json.dumps(bad) + "\n", encoding="utf-8")
    for step, value in ((0, 0.002), (100, 0.2), (200, 0.41)):
        grid = (Panel("Grid <1>", "what to look for", png()),) if step != 100 else ()
        save_result(result(value=value, panels=grid), folder, step)
    marked = result("dci", notes=("not comparable with the published number: context=77",))
    marked.settings["comparable"] = False
    save_result(marked, folder, 200)
    certificate = {
        "passed": True,
        "bit_equal": True,
        "forward": "compared",
        "relative_errors": {"image_features": 3e-7},
        "tolerance": 1e-4,
    }
    (folder / "export").mkdir()
    (folder / "export" / "verify.json").write_text(json.dumps(certificate))
    return folder


def test_report_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "run"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.name == "report.html"
    assert all(load.startswith("data:image/") for load in page.loads)
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert "prefers-color-scheme: dark" in text
    # Two pictures: the last, and the first folded away.
    assert page.tags["img"] == 2
    assert page.tags["details"] >= 1


def test_report_says_what_happened(tmp_path: Path) -> None:
    page = Page(write_report(a_run(tmp_path / "run")).read_text(encoding="utf-8"))
    for expected in (
        "fgclip/tiny",
        "finished at step 200 of 200",
        "text → image R@1",
        "0.2 %",
        "41.0 %",
        "210",  # times chance: 0.41 * 512
        "70.0 %",  # published
        "not comparable with the published number: context=77",
        "12,810 records were looked at",
        "truncated image",
        "photos:a<b>.jpg — cut & gone",
        "box clipped",
        "image_features",
        "3.00e-07",
        "optim.lr=5e-4",
        "<b>scenes</b>",
        "jax 0.10.2",
        "4.8 M",
        "exported weights for PyTorch",
    ):
        assert expected in page.text, expected
    assert "short tokens" not in page.text  # cut 0 times


def test_report_is_written_again_over_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob(".*.part"))


def test_report_of_a_run_that_only_began(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "has not ended yet" in page.text
    assert page.tags["path"] == 1


def test_report_of_one_evaluation(tmp_path: Path) -> None:
    save_result(result(), tmp_path, 7)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "step 7" in page.text
    assert "first" not in page.text.split("What was learned")[2].split("Settings")[0]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run folder"):
        write_report(tmp_path)


def test_metric_labels() -> None:
    assert metric_label("i2t_r10") == "image → text R@10"
    assert metric_label("region_to_phrase_r1") == "region → phrase R@1"
    assert metric_label("top5") == "top-5"
    assert metric_label("accuracy") == "accuracy"


def test_pictures_keep_their_content_in_the_page() -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((256, 256))
    )
    out = io.BytesIO()
    Image.fromarray(smooth).save(out, "PNG")
    uri = picture_uri(out.getvalue())
    kind, data = uri.removeprefix("data:image/").split(";base64,")
    assert kind in ("webp", "png")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert shown.shape == smooth.shape
    assert np.abs(shown.astype(int) - smooth).mean() < 6


def test_chart_breaks_where_a_value_is_missing() -> None:
    curve = charts.Curve("x", [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 3.0)])
    svg = charts.line_chart(curve)
    (path,) = re.findall(r'<path class="curve" d="([^"]*)"', svg)
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert charts.line_chart(charts.Curve("x", [(1, None)])) == ""


def test_chart_runs_from_left_to_right_and_up() -> None:
    svg = charts.line_chart(charts.Curve("x", [(0, 0.0), (10, 1.0)], chance=0.5, percent=True))
    (path,) = re.findall(r'<path class="curve" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    x1, y1, x2, y2 = (float(v) for v in path)
    assert x2 > x1
    assert y2 < y1
    assert "chance" in svg


def test_many_points_are_thinned_and_smoothed() -> None:
    points = [(float(s), math.sin(s / 50) + (s % 2)) for s in range(5000)]
    thinned = charts.thin(points)
    assert len(thinned) <= 400
    assert thinned[-1][0] == 4999
    smoothed = charts.smooth([(x, y) for x, y in points])
    assert np.std(np.diff([y for _, y in smoothed[400:-400]])) < 0.05
    svg = charts.line_chart(charts.Curve("x", points))
    assert 'class="faint"' in svg
    assert len(svg) < 30_000


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.013, 0.42), (-3.0, 5.0), (0.0, 1e-5), (990.0, 12345.0)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * high <= t <= high * (1 + 1e-9) for t in found)
    step = found[1] - found[0]
    lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(lead - m) for m in (1, 2, 5, 10)) < 1e-6
