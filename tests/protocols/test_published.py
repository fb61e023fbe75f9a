"""Published protocols on synthetic sets of the published layout."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import pytest

from data_pipelines.batch import DataError
from data_pipelines.protocols import PROTOCOLS, IncomparableError, PublishedProtocol
from data_pipelines.protocols.layouts import ImageNet, ShareGpt4v, Urban1k, below, first_rows
from data_pipelines.protocols.prompts import OPENAI_TEMPLATES, imagenet_classes
from data_pipelines.protocols.published import MODELS, NOT_COMPARABLE, PUBLISHED, table
from tests.protocols import layouts
from tests.protocols.toy import NAMES, Toy, Words


def make(name: str, root: Path, **fields) -> PublishedProtocol:
    """A protocol at toy sizes: 16 px pictures, or 64 for quarters."""
    size = 64 if any(w in name for w in ("boxes", "fgovd")) else 16
    options = {"image_size": size, "batch_size": 4, "text_batch_size": 16, **fields}
    return PROTOCOLS[name](root=str(root), tokenizer=Words(), **options)


def values(result) -> dict[str, float]:
    return {k: m.value for k, m in result.metrics.items()}


RETRIEVAL = {
    "coco": (layouts.coco_captions, "text_features_short", 77),
    "flickr30k": (layouts.flickr30k, "text_features_short", 77),
    "sharegpt4v_1k": (layouts.sharegpt4v, "text_features_long", 248),
    "dci": (layouts.dci, "text_features_long", 248),
    "urban1k": (layouts.urban1k, "text_features_long", 248),
}


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_sets(name: str, tmp_path: Path) -> None:
    write, function, length = RETRIEVAL[name]
    write(tmp_path)
    toy = Toy()
    protocol = make(name, tmp_path)
    result = protocol.run(toy.functions())
    assert result.protocol == name == protocol.name
    assert result.records == 8
    assert values(result)["i2t_r1"] == 1.0
    assert values(result)["t2i_r1"] == 1.0
    assert set(toy.calls) == {"image_features", function} == set(protocol.requires())
    assert toy.calls[function] == {((16, length),)}
    captions = 5 if function.endswith("short") else 1
    assert result.counts["captions"] == 8 * captions
    assert result.settings["context"] == length
    assert result.settings["root"] == str(tmp_path)
    # Eight of the published number of pictures: said, and not comparable.
    assert result.settings["comparable"] is False
    assert any(n.startswith(NOT_COMPARABLE) and "8 records" in n for n in result.notes)


def test_coco_missing_picture_is_counted(tmp_path: Path) -> None:
    layouts.coco_captions(tmp_path)
    result = make("coco", tmp_path).run(Toy().functions())
    assert result.counts["records_dropped_missing_file"] == 1
    assert result.counts["records_seen"] == 9


def test_coco_records_are_in_order_of_id_with_five_captions(tmp_path: Path) -> None:
    layouts.coco_captions(tmp_path)
    source = make("coco", tmp_path).source()
    assert [r.id for r in source.records] == ["7", *(str(139 + 10 * n) for n in range(8))]
    assert source[1].short_captions[0] == "A red picture, number 0.\n"
    assert {len(r.short_captions) for r in source.records[1:]} == {5}


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    layouts.flickr30k(tmp_path / "here")
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "flickr30k-images").rename(tmp_path / "there" / "flickr30k-images")
    protocol = make("flickr30k", tmp_path / "here", images=str(tmp_path / "there"))
    assert protocol.run(Toy().functions()).records == 8


def test_coco_boxes_take_every_annotation(tmp_path: Path) -> None:
    layouts.coco_instances(tmp_path)
    result = make("coco_boxes", tmp_path).run(Toy().functions(), panels=True)
    assert result.counts["regions"] == 9
    # The box without area has a zero vector, equal scores everywhere: class 0, which is right.
    assert values(result) == {"top1": 1.0, "top5": 1.0}
    assert result.metrics["top1"].chance == pytest.approx(1 / 8)
    assert result.counts["classes"] == 8
    assert result.settings["templates"] == 80
    assert result.records == 2


def test_lvis_boxes_by_folder(tmp_path: Path) -> None:
    layouts.lvis(tmp_path)
    result = make("lvis_boxes", tmp_path).run(Toy().functions())
    assert result.counts["regions"] == 4
    assert result.counts["source_listed"] == 2
    assert result.counts["source_not_in_folder"] == 1
    assert values(result)["top1"] == 1.0
    everything = make("lvis_boxes", tmp_path, folders="all")
    assert everything.run(Toy().functions()).counts["regions"] == 8
    names = tuple(everything.reader.names.values())
    assert names[0] == "red thing (toy)"


def test_lvis_refuses_ids_with_gaps(tmp_path: Path) -> None:
    layouts.lvis(tmp_path)
    path = tmp_path / "lvis_v1_val.json"
    content = json.loads(path.read_text())
    content["categories"].pop(2)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"expected category ids 1\.\.7"):
        make("lvis_boxes", tmp_path).run(Toy().functions())


@pytest.mark.parametrize("subset", ["hard", "medium", "easy", "trivial"])
def test_fgovd(subset: str, tmp_path: Path) -> None:
    layouts.fgovd(tmp_path)
    toy = Toy()
    result = make(f"fgovd_{subset}", tmp_path).run(toy.functions(), panels=True)
    assert result.protocol == f"fgovd_{subset}"
    assert values(result) == {"accuracy": 1.0}
    assert result.counts["regions"] == 8
    # Each picture is encoded once for all its rows.
    assert result.records == 2
    assert result.counts["texts"] == 8 + 2 * (2 + 3 + 4 + 5)
    assert result.metrics["accuracy"].chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 4)


def test_fgovd_damaged_line_is_named(tmp_path: Path) -> None:
    layouts.fgovd(tmp_path)
    path = tmp_path / "h_attributes_llava.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40]]))
    with pytest.raises(DataError, match=r"h_attributes_llava\.jsonl, line 2"):
        make("fgovd_hard", tmp_path).run(Toy().functions())


def _by_class(toy: Toy, labels: dict[str, int], classes: Path):
    """Text features such that the class `label` looks like the picture in its folder."""
    functions = toy.functions()
    tokens = Words()
    names = [name for _, name in imagenet_classes(str(classes))]
    color = {names[label]: NAMES[n] for n, label in enumerate(labels.values())}
    renamed = {tokens.tokens(name)[0]: color[name] for name in color}

    def text(ids):
        ids = ids.copy()
        for id_, name in renamed.items():
            ids[ids == id_] = tokens.ids[name]
        return toy.text("text_features_short", ids)

    functions["text_features_short"] = text
    return functions, tokens


@pytest.mark.parametrize("wnids", [True, False])
def test_imagenet_folders(wnids: bool, tmp_path: Path) -> None:
    labels = layouts.imagenet(tmp_path, wnids)
    source = ImageNet(str(tmp_path), classes=str(tmp_path / "classes.txt"))
    assert {r.id.split("/")[0]: r.extra["label"] for r in source.records} == labels
    assert len(source) == 5
    functions, tokens = _by_class(Toy(), labels, tmp_path / "classes.txt")
    name = "imagenet" if wnids else "imagenet_v2"
    protocol = dataclasses.replace(make(name, tmp_path), tokenizer=tokens, templates=("{}",))
    protocol = dataclasses.replace(protocol, allow_incomparable=True, text_batch_size=256)
    result = protocol.run(functions)
    # The grey picture is not of its class's colour.
    assert result.records == 5
    assert result.metrics["top1"].value == pytest.approx(4 / 5)
    assert result.metrics["top1"].chance == pytest.approx(1 / 1000)


def test_imagenet_without_class_folders(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path, True)
    (tmp_path / "other" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match="named by wnid"):
        len(ImageNet(str(tmp_path / "other"), classes=str(tmp_path / "classes.txt")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "expected a file"),
        (lambda lines: [*lines[:3], "tench", *lines[4:]], "line 4"),
        (lambda lines: lines[:-1], "found 999 lines"),
        (lambda lines: lines[::-1], "not sorted"),
    ],
)
def test_class_file_that_cannot_be_used(damage, message: str, tmp_path: Path) -> None:
    layouts.imagenet(tmp_path, True)
    path = tmp_path / "classes.txt"
    if damage is None:
        path.unlink()
    else:
        path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        PROTOCOLS["imagenet"](root=str(tmp_path), tokenizer=Words(), model="fgclip/base").check()


def test_other_class_names_are_not_comparable(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path, True)
    protocol = PROTOCOLS["imagenet"](root=str(tmp_path), tokenizer=Words(), model="fgclip/base")
    with pytest.raises(IncomparableError, match="names in"):
        protocol.check()


def test_templates() -> None:
    assert len(OPENAI_TEMPLATES) == 80
    assert len(set(OPENAI_TEMPLATES)) == 80
    assert all(t.count("{}") == 1 for t in OPENAI_TEMPLATES)
    # Of the set that CLIP's authors published, order apart.
    digest = hashlib.sha256("\n".join(sorted(OPENAI_TEMPLATES)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def test_every_published_value_belongs_to_a_protocol_and_a_model() -> None:
    assert set(PUBLISHED) <= set(PROTOCOLS)
    for by_model in PUBLISHED.values():
        assert set(by_model) == set(MODELS)
        for numbers in by_model.values():
            assert all(0 < v < 1 for v in numbers.values())


def test_the_table_in_the_docs_is_the_one_that_the_command_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert table() in page.read_text(encoding="utf-8")


def published(name: str, tmp_path: Path, **fields) -> PublishedProtocol:
    return PROTOCOLS[name](root=str(tmp_path), tokenizer=Words(), **fields)


def test_sizes_follow_from_model_and_protocol(tmp_path: Path) -> None:
    dci = published("dci", tmp_path, model="fgclip/large")
    dci.check()
    assert dci.picture_size() == 336
    assert dci.text_length() == 248
    coco = published("coco", tmp_path, model="fgclip/base")
    coco.check()
    assert coco.picture_size() == 224
    assert coco.text_length() == 77


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("dci", {"model": "fgclip/large", "context": 77}, "defined at 248 tokens.*would be cut"),
        ("dci", {"image_size": 224, "context": 77}, "defined at 248 tokens"),
        ("dci", {"model": "fgclip/large", "image_size": 224}, "published at 336 px"),
        ("coco", {"model": "fgclip/large", "image_size": 224}, "Set image_size=336"),
        ("coco", {"model": "fgclip/base", "context": 248}, "defined at 77 tokens"),
        ("coco", {"model": "fgclip/base", "limit": 100}, "fewer candidates"),
        ("imagenet", {"model": "fgclip/base", "templates": ("a {}",)}, "80 prompt templates"),
    ],
)
def test_incomparable_settings_are_refused(
    name: str, fields: dict, message: str, tmp_path: Path
) -> None:
    if name == "imagenet":
        layouts.imagenet(tmp_path, True)
    protocol = published(name, tmp_path, **fields)
    with pytest.raises(IncomparableError, match=message):
        protocol.check()
    # Before anything else is read: the folder holds class names at the most.
    with pytest.raises(IncomparableError, match="allow_incomparable=True"):
        protocol.run(Toy().functions())
    dataclasses.replace(protocol, allow_incomparable=True).check()


def test_allowed_deviation_marks_the_result(tmp_path: Path) -> None:
    layouts.dci(tmp_path)
    protocol = make("dci", tmp_path, model="fgclip/large", context=77, allow_incomparable=True)
    result = protocol.run(Toy().functions())
    marked = [n for n in result.notes if n.startswith(NOT_COMPARABLE)]
    assert any("context=77" in n for n in marked)
    assert any("image_size=16" in n for n in marked)
    assert result.settings["comparable"] is False
    assert result.settings["context"] == 77
    # The paper's value stays beside ours; the mark says how to read it.
    assert result.metrics["t2i_r1"].published == 0.661
    assert result.metrics["t2i_r5"].published is None


def test_a_whole_set_at_the_published_settings_is_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.fgovd(tmp_path)
    protocol = published(
        "fgovd_easy", tmp_path, model="fgclip/base", batch_size=2, text_batch_size=16
    )
    monkeypatch.setattr(type(protocol), "expected", lambda self: ("regions", 8))
    result = protocol.run(Toy().functions())
    assert result.settings["comparable"] is True
    assert not result.notes
    assert result.metrics["accuracy"].published == 0.687


def test_unknown_model_and_missing_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected image_size"):
        published("coco", tmp_path).check()
    with pytest.raises(ValueError, match="expected model in"):
        published("coco", tmp_path, model="fgclip/huge").check()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_wrong_root_says_what_was_expected(name: str, tmp_path: Path) -> None:
    (tmp_path / "something_else").mkdir()
    with pytest.raises(DataError, match="expected"):
        make(name, tmp_path).run(Toy().functions())


def test_first_rows_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"n": n, "text": "[},]\n" * 20} for n in range(50)]
    path.write_text(json.dumps(rows)[:-1200] + "...the rest is damaged", encoding="utf-8")
    read = functools.partial(first_rows, path, what="rows", block=64)
    assert read(count=5) == rows[:5]
    with pytest.raises(DataError, match="ends within row"):
        read(count=50)
    path.write_text("[]")
    assert read(count=5) == []
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON array"):
        read(count=1)


def test_sharegpt_reads_only_as_many_rows_as_asked(tmp_path: Path) -> None:
    layouts.sharegpt4v(tmp_path)
    source = ShareGpt4v(str(tmp_path), rows=3)
    assert len(source) == 3
    assert source[2].long_caption == 'The "sheet" is blue.\nNothing ] else.'


def test_urban1k_order_and_first_line(tmp_path: Path) -> None:
    layouts.urban1k(tmp_path)
    source = Urban1k(str(tmp_path))
    assert [r.id for r in source.records] == [str(n) for n in range(4, 12)]
    assert source[0].long_caption == "A red street."


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    assert below(tmp_path, "val2017/a.jpg") == tmp_path / "val2017" / "a.jpg"
    for name in ("/etc/passwd", "../secret.jpg"):
        with pytest.raises(DataError, match="below"):
            below(tmp_path, name)
