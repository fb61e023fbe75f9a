"""What the StarGraph kinds share: the system of a case, its parameters, its tolerances."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.graphs.tokenise import TokenSpec
from jaxmods.partitioning import unbox
from jaxmods.systems.stargraph.model import EncoderConfig
from jaxmods.systems.stargraph.system import StarGraph
from jaxmods.weights import import_params, memory_reader
from tests.parity.registry import Case, Tolerance

REAL_GRAPH = "triples.npz"


def part_tolerance(case: Case, *words: str) -> Tolerance:
    """The clause of the case's tolerance ("a rtol x atol y ; b ...") that names one of `words`."""
    clauses = re.split(r"[;]|, (?=[a-z])", str(case.meta["tolerance"]))
    for word in words:
        for clause in clauses:
            if word in clause:
                match = re.search(r"within (\d[\d.e-]*)", clause)
                if match:
                    return Tolerance(atol=float(match.group(1)))
                return Tolerance.parse(clause)
    raise KeyError(f"{case.id}: no tolerance for {words} in {case.meta['tolerance']!r}")


def option(case: Case, config_name: str, meta_name: str) -> Any:
    """A value that is in `config` in one kind of case and beside it in another."""
    return case.meta["config"].get(config_name, case.meta.get(meta_name))


def token_spec(config: dict[str, Any]) -> TokenSpec:
    """What the official command line asks the tokeniser for."""
    return TokenSpec(
        anchor_size=config["anchor_size"],
        skip_ratio=config["anchor_skip_ratio"],
        anchors=config["sample_anchors"],
        neighbours=config["sample_neighbors"],
        center=config["sample_center"],
        paths=config["use_anchor_path"],
        shared=config["anchor_share_embedding"],
    )


def system(case: Case, *, dropout: float = 0.0) -> StarGraph:
    """The system with the options and sizes of the case."""
    config, weights = case.meta["config"], case.weights
    shared = config["anchor_share_embedding"]
    tables = [n for n in ("hashes", "nodes") if n in weights]
    encoder = EncoderConfig(
        width=config["hidden_dim"],
        anchors=0 if shared else weights["anchor_embedding.weight"].shape[0] - 1,
        anchors_per_entity=config["sample_anchors"],
        paths=weights["path_embeddings.weight"].shape[0] - 1 if config["use_anchor_path"] else 0,
        center=config["sample_center"],
        neighbours=config["sample_neighbors"],
        node_width=config["node_dim"],
        share_anchors=shared,
        type_embedding=config["add_type_embedding"],
        layers=config["attn_layers_num"],
        mlp_ratio=config["mlp_ratio"],
        head_width=config["head_dim"],
        merge=config["merge_strategy"],
        dropout=dropout,
    )
    adversarial = config["negative_adversarial_sampling"]
    temperature = option(case, "adversarial_temperature", "adversarial_temperature")
    return StarGraph(
        entities=weights[tables[0]].shape[0],
        relations=weights["relation_embedding.weight"].shape[0],
        encoder=encoder,
        score={"TripleRE": "triplere", "PairRE": "pairre"}[config["model"]],
        gamma=option(case, "gamma", "gamma"),
        offset=option(case, "triplere_u", "u"),
        temperature=temperature if adversarial else None,
        negatives=config["negative_sample_size"],
    )


def abstract(model: StarGraph) -> Any:
    """Shapes of the parameters."""
    return unbox(jax.eval_shape(model.init, jax.random.key(0)))


def params(case: Case, model: StarGraph) -> dict[str, Any]:
    """The case's weights as parameters."""
    reader = memory_reader(case.weights)
    return import_params(reader, model.weights(), abstract(model), dtype="abstract").params


NO_TRIPLES = (
    "needs the real FB15k-237 triples: set JAXMODS_FB15K237 to their folder, or put them in "
    "shared/data/fb15k-237 beside the repository"
)


def fb15k237_triples() -> dict[str, np.ndarray] | None:
    """The real splits (all of them, official ids first), or None where they are not at hand.

    Looked for in the folder `JAXMODS_FB15K237`, then in `shared/data/fb15k-237` beside the
    repository.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "fb15k-237"
    folder = Path(os.environ.get("JAXMODS_FB15K237", beside))
    path = folder / REAL_GRAPH
    if not path.exists():
        return None
    with np.load(path) as file:
        return {name: file[name] for name in ("train", "valid", "test")}
