"""Tokenisation: anchors, paths and neighbours, exact."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.graphs.tokenise import TokenSpec, sample_anchors, tokenise
from tests.parity import stargraph_common as common
from tests.parity.registry import Case, Kind, Tolerance, assert_close

TOKENS = Kind("stargraph", "tokens", lambda case: "tok.anchor_entity" in case.shapes)
REAL = Kind(
    "stargraph",
    "real_tokens",
    lambda case: any(name.endswith("anchor_entity_rowsum") for name in case.shapes),
)
EXACT = Tolerance()


@TOKENS.check
def sampled_anchors(case: Case) -> None:
    """Anchor set in the official row order, sampled anchors, their paths, how many there are."""
    io, spec = case.io, common.token_spec(case.meta["config"])
    sample = sample_anchors(io["original_train_triples"], len(io["tok.anchor_entity"]), spec)
    order = io["tok.anchor_set_iteration_order"]
    assert_close("anchor rows", sample.anchor_order, order, EXACT)
    assert_close("anchors", sample.anchors, io["tok.anchor_entity"], EXACT)
    assert_close("paths", sample.paths, io["tok.anchor_path_rel"], EXACT)
    assert_close("sampled", (sample.anchors >= 0).sum(1), io["tok.n_sampled"], EXACT)


@TOKENS.check
def buffers(case: Case) -> None:
    """The graph's tables as the model holds them."""
    io, spec = case.io, common.token_spec(case.meta["config"])
    tokens = tokenise(io["original_train_triples"], len(io["tok.anchor_entity"]), spec)
    expected = {
        n: io[f"buffer.{n}"] for n in ("hashes", "path_ids", "nodes") if f"buffer.{n}" in io
    }
    found = {k.removeprefix("graph/"): v for k, v in tokens.constants().items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_close(name, found[name], array, EXACT)


@TOKENS.check
def type_ids(case: Case) -> None:
    """Kinds of tokens; the official model has the buffer only with attention layers."""
    model = common.system(case)
    if "buffer.type_ids" in case.io:
        expected = case.io["buffer.type_ids"]
        assert_close("type_ids", np.asarray(model.encoder.token_kinds), expected, EXACT)
    else:
        assert model.encoder.layers == 0


def _prefixes(case: Case) -> list[str]:
    return [
        n.removesuffix("anchor_entity_rowsum")
        for n in case.shapes
        if n.endswith("_rowsum") and "anchor_entity" in n
    ]


@REAL.check
def consistent(case: Case) -> None:
    """What the recorded result says about itself: counts, ranges, padding last."""
    for prefix in _prefixes(case):
        stats = case.meta["stats"][prefix.removesuffix(".")]
        anchors, paths = (case.io[f"{prefix}{n}_first1000"] for n in ("anchor_entity", "path_ids"))
        known = case.io[f"{prefix}anchors_sorted"]
        assert len(known) == stats["n_anchors"]
        assert np.isin(anchors[anchors >= 0], known).all()
        assert int(paths.max()) <= stats["path_table_rows"] - 1
        padded = anchors < 0
        assert (padded[:, 1:] >= padded[:, :-1]).all()
        assert (paths[padded] == stats["path_table_rows"] - 1).all()


@REAL.check
def real_graph(case: Case) -> None:
    """Every token of the real graph, where its triples are at hand (see `fb15k237_triples`)."""
    data = common.fb15k237_triples()
    if data is None:
        pytest.skip(common.NO_TRIPLES)
    for prefix in _prefixes(case):
        io, stats = case.io, case.meta["stats"][prefix.removesuffix(".")]
        entities = len(io[f"{prefix}anchor_entity_rowsum"])
        skip = float(prefix.removeprefix("skip").removesuffix("."))
        count = io[f"{prefix}anchor_entity_first1000"].shape[1]
        spec = TokenSpec(anchor_size=1.0, skip_ratio=skip, anchors=count)
        sample = sample_anchors(data["train"], entities, spec)
        tokens = tokenise(data["train"], entities, spec)
        assert tokens.path_ids is not None
        assert tokens.hashes is not None
        assert tokens.paths + 1 == stats["path_table_rows"]
        head = slice(0, 1000)
        known = io[f"{prefix}anchors_sorted"]
        assert_close("anchor set", np.sort(sample.anchor_order), known, EXACT)
        anchors = io[f"{prefix}anchor_entity_first1000"]
        assert_close("anchors", sample.anchors[head], anchors, EXACT)
        assert_close("paths", tokens.path_ids[head], io[f"{prefix}path_ids_first1000"], EXACT)
        row_sums = io[f"{prefix}anchor_entity_rowsum"]
        assert_close("anchor row sums", sample.anchors.sum(1), row_sums, EXACT)
        row_sums = io[f"{prefix}path_ids_rowsum"]
        assert_close("path row sums", tokens.path_ids.sum((1, 2)), row_sums, EXACT)
        padding = tokens.hashes == len(sample.anchor_order)
        assert int(padding.sum()) == stats["n_pad_slots"]
        assert int(padding.any(1).sum()) == stats["n_padded_entities"]
