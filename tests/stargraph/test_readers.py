"""Readers of triples: what they accept, what they count, what they refuse and how they say it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.graphs.triples import (
    FolderTriples,
    IntegerTriples,
    OgbWikikg2,
    TextTriples,
    inspect,
)

TRAIN = "b\tlikes\ta\na\tlikes\tc\nc\tknows\tc\na\tlikes\tc\n"
VALID = "a\tlikes\tb\nz\tlikes\ta\n"
TEST = "c\tknows\ta\na\thates\tb\n\n"


def write(folder: Path, train: str = TRAIN, valid: str = VALID, test: str = TEST) -> str:
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_text_triples_number_sorted_names_of_train(tmp_path: Path) -> None:
    graph = TextTriples(write(tmp_path)).read()
    assert graph.entity_names == ("a", "b", "c")
    assert graph.relation_names == ("knows", "likes")
    assert graph.train.tolist() == [[1, 1, 0], [0, 1, 2], [2, 0, 2], [0, 1, 2]]
    assert graph.valid.tolist() == [[0, 1, 1]]
    assert graph.test.tolist() == [[2, 0, 0]]
    assert inspect(graph) == {
        "train_duplicates": 1,
        "train_self_loops": 1,
        "isolated_entities": 0,
        "valid_unknown_entity": 1,
        "test_unknown_relation": 1,
        "test_blank_lines": 1,
    }


def test_numbering_of_all_entities_keeps_unseen_ones_as_isolated(tmp_path: Path) -> None:
    graph = TextTriples(write(tmp_path), "all").read()
    assert graph.entity_names == ("a", "b", "c", "z")
    assert graph.valid.tolist() == [[0, 1, 1], [3, 1, 0]]
    assert inspect(graph)["isolated_entities"] == 1


def test_malformed_line_is_named_with_its_number(tmp_path: Path) -> None:
    folder = write(tmp_path, train="a\tr\tb\nb\tr\nc\tr\ta\n")
    with pytest.raises(
        DataError, match=r"train\.txt:2: expected head, relation and tail.*2 fields"
    ):
        TextTriples(folder).read()


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, valid="\n\n")
    with pytest.raises(DataError, match=r"valid\.txt: expected triples, found an empty file"):
        TextTriples(folder).read()
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"valid\.txt: missing"):
        TextTriples(folder).read()
    with pytest.raises(DataError, match=r"expected train\.txt"):
        FolderTriples(str(tmp_path / "nowhere")).fingerprint()


def test_undecodable_text_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"a\tr\tb\n\xff\xfe\tr\tb\n")
    with pytest.raises(DataError, match="UTF-8"):
        TextTriples(folder).read()


def test_integer_triples_agree_with_text(tmp_path: Path) -> None:
    graph = TextTriples(write(tmp_path), "all").read()
    folder = tmp_path / "ids"
    folder.mkdir()
    np.savez(folder / "triples.npz", train=graph.train, valid=graph.valid, test=graph.test)
    with gzip.open(folder / "entities.txt.gz", "wt") as file:
        file.write("\n".join(graph.entity_names) + "\n")
    read = IntegerTriples(str(folder)).read()
    assert read.entities == 3
    assert read.entity_names == ("a", "b", "c")
    assert read.valid.tolist() == [[0, 1, 1]]
    assert read.counts == {"valid_unknown_entity": 1}
    assert FolderTriples(str(folder)).read().train.tolist() == graph.train.tolist()


def test_integer_triples_of_wrong_shape_are_refused(tmp_path: Path) -> None:
    ok = np.zeros((2, 3), np.int32)
    np.savez(tmp_path / "triples.npz", train=ok, valid=ok[:, :2], test=ok)
    with pytest.raises(
        DataError, match=r"expected valid as integers \[n, 3\], found int32 \(2, 2\)"
    ):
        IntegerTriples(str(tmp_path)).read()
    np.savez(tmp_path / "triples.npz", train=ok, valid=ok)
    with pytest.raises(DataError, match="expected arrays train, valid, test"):
        IntegerTriples(str(tmp_path)).read()


def write_ogb(root: Path, *, train_npz: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    train = np.stack([rng.integers(0, n, 30) for n in (12, 4, 12)], 1)
    split, raw = root / "split" / "time", root / "raw"
    split.mkdir(parents=True)
    raw.mkdir()
    if train_npz:
        np.savez(split / "train.npz", head=train[:, 0], relation=train[:, 1], tail=train[:, 2])
    else:
        for name, columns in (("edge", [0, 2]), ("edge_reltype", [1])):
            with gzip.open(raw / f"{name}.csv.gz", "wt") as file:
                np.savetxt(file, train[:, columns], fmt="%d", delimiter=",")
    with gzip.open(raw / "num-node-list.csv.gz", "wt") as file:
        file.write("15\n")
    for name in ("valid", "test"):
        part = rng.integers(0, 4, (5, 3))
        np.savez(
            split / f"{name}.npz",
            head=part[:, 0],
            relation=part[:, 1],
            tail=part[:, 2],
            head_neg=rng.integers(0, 15, (5, 7)),
            tail_neg=rng.integers(0, 15, (5, 7)),
        )
    return train


@pytest.mark.parametrize("train_npz", [True, False])
def test_ogb_layout(tmp_path: Path, train_npz: bool) -> None:
    train = write_ogb(tmp_path, train_npz=train_npz)
    graph = OgbWikikg2(str(tmp_path)).read()
    assert graph.entities == 15
    assert graph.relations == 4
    assert np.array_equal(graph.train, train)
    given = graph.negatives("test")
    assert given is not None
    assert [g.shape for g in given] == [(5, 7), (5, 7)]


def test_ogb_pickles_are_not_opened(tmp_path: Path) -> None:
    write_ogb(tmp_path, train_npz=True)
    path = tmp_path / "split" / "time" / "valid.npz"
    path.rename(path.with_suffix(".pt"))
    with pytest.raises(DataError, match="pickle"):
        OgbWikikg2(str(tmp_path)).read()
