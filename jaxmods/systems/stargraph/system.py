"""StarGraph as a `System`: knowledge-graph link prediction from an incomplete two-hop subgraph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.objectives.negative_sampling import negative_sampling_loss
from jaxmods.partitioning import constrain
from jaxmods.system import FROZEN, TRAIN, ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.systems.stargraph import scores
from jaxmods.systems.stargraph.chunks import sum_of_parts
from jaxmods.systems.stargraph.dropout import Seed, fold, make_seed
from jaxmods.systems.stargraph.model import EPSILON, Encoder, EncoderConfig, rows
from jaxmods.systems.stargraph.objective import occurrence_vectors, triple_scores
from jaxmods.systems.stargraph.weights import stargraph_map
from jaxmods.weights import WeightMap

GRAPH = "graph"


@dataclasses.dataclass(frozen=True)
class StarGraph(System):
    """Sizes and options (official command-line names in brackets).

    The tables of the graph (`graph/*`: which anchors, paths and neighbours make up an entity) are
    frozen integer parameters: they come from the data at a fresh start and travel with the weights
    afterwards.

    Attributes:
      entities, relations: N and R; R counts inverse relations where the data adds them.
      encoder: sizes of the entity encoder.
      score: "triplere" or "pairre" (`model`).
      gamma: margin (`gamma`).
      offset: u of TripleRE' (`triplere_u`).
      temperature: of self-adversarial weights (`adversarial_temperature`); None: uniform weights
        (`negative_adversarial_sampling` off).
      negatives: per triple (`negative_sample_size`).
      distinct: 0: every occurrence of an entity is encoded with its own dropout, as the official
        code does. More: the batch lists at most this many distinct entities, each encoded once;
        equal with dropout off, otherwise dropout is shared by the occurrences in a step.
      encode_chunk: entities encoded at a time in training, about as many as stay in a cache; 0 for
        all at once. Without `distinct` the gradient of so many is taken before the next are
        encoded; with it, the results of matrix products are kept for the backward pass.
      row_multiple: rows of tables are rounded up to this, so that a mesh can split them; the data
        must be tokenised with the same number.
    """

    entities: int = 14505
    relations: int = 237
    encoder: EncoderConfig = EncoderConfig()  # noqa: RUF009 - frozen, so one instance serves all
    score: scores.Score = "triplere"
    gamma: float = 6.0
    offset: float = 1.0
    temperature: float | None = 2.0
    negatives: int = 64
    distinct: int = 0
    encode_chunk: int = 0
    row_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("entities", "relations", "negatives", "row_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"StarGraph.{name}: expected 1 or more, found {getattr(self, name)}"
                )
        if self.encode_chunk < 0 or self.distinct < 0:
            raise ValueError(
                "StarGraph.encode_chunk, distinct: expected 0 or more, found "
                f"{self.encode_chunk}, {self.distinct}"
            )

    @property
    def embedding_range(self) -> float:
        """Half-width of the initial uniform distribution of all tables."""
        return (self.gamma + EPSILON) / self.encoder.width

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """`positive` [B, 3] (head, relation, tail), `negative` [B, N] entities, `weight` [B],
        `mode` [B] (0: negatives replace the tail, 1: the head). Where `distinct` > 0, entities in
        `positive` and `negative` are positions in `entities` [distinct]."""
        b = global_batch
        spec = {
            "positive": ArraySpec((b, 3), "int32", ("batch", None)),
            "negative": ArraySpec((b, self.negatives), "int32", ("batch", None)),
            "weight": ArraySpec((b,), "float32", ("batch",)),
            "mode": ArraySpec((b,), "int32", ("batch",)),
        }
        if self.distinct:
            spec["entities"] = ArraySpec((self.distinct,), "int32", ("batch",))
        return spec

    def init(self, rng: jax.Array) -> Params:
        """Official initialisation: tables uniform in ±(gamma + 2) / D, linear layers as PyTorch's.

        The graph's tables are zeros here; `Pipeline.constants` (or a checkpoint) fills them.
        """
        encoder_rng, relation_rng = jax.random.split(rng)
        variables = self._encoder().init(encoder_rng, jnp.zeros((1,), jnp.int32))["params"]
        graph = {k.removeprefix("graph_"): v for k, v in variables.items() if _is_graph(k)}
        encoder = {k: v for k, v in variables.items() if not _is_graph(k)}
        limit, width = self.embedding_range, scores.relation_width(self.score, self.encoder.width)
        relation = jax.random.uniform(relation_rng, (self.relations, width), jnp.float32)
        return {
            GRAPH: graph,
            "encoder": encoder,
            "relation_embedding": nn.LogicallyPartitioned(
                (2 * relation - 1) * limit, (None, "embed")
            ),
            "gamma": jnp.full((1,), self.gamma, jnp.float32),
            "embedding_range": jnp.full((1,), limit, jnp.float32),
        }

    def labels(self, params: Params) -> dict[str, Any]:
        """Everything trains but the graph's tables and the two constants."""
        frozen = (GRAPH, "gamma", "embedding_range")
        return {
            name: jax.tree.map(lambda _, label=FROZEN if name in frozen else TRAIN: label, tree)
            for name, tree in params.items()
        }

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        """Negative-sampling loss of a batch laid out as `batch_spec` says."""
        del step
        seed = make_seed(rng) if self.encoder.dropout else None
        if self.encode_chunk and not self.distinct:
            loss, sums = self._loss_in_parts(params, batch, seed)
        else:
            loss, sums = self._loss(params, batch, seed, jnp.sum(batch["weight"]))
        count, negatives = batch["negative"].shape
        metrics = {
            "positive_loss": sums["positive_loss"],
            "negative_loss": sums["negative_loss"],
            "positive_score": sums["positive_score"] / count,
            "negative_score": sums["negative_score"] / (count * negatives),
        }
        return LossOutput(loss, metrics, state)

    def _loss(
        self, params: Params, batch: Batch, seed: Seed | None, total: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a batch, or its share of a larger one with weights adding up to `total`; sums of
        scores. `batch["counts"]`, where it is there, is 0 for triples that are only padding."""
        positive_B3, negative_BN, mode = batch["positive"], batch["negative"], batch["mode"]
        if self.distinct:
            table_UD = self._training_encoder(params, seed)(batch["entities"])
            head, tail = table_UD[positive_B3[:, 0]], table_UD[positive_B3[:, 2]]
            negative = table_UD[negative_BN]
        else:
            encode = functools.partial(self._encode, params, seed=seed)
            head, tail, negative = occurrence_vectors(encode, positive_B3, negative_BN)
        terms = self.relation_terms(params, positive_B3[:, 1])
        positive_B, negative_score_BN = triple_scores(terms, head, tail, negative, mode)
        out = negative_sampling_loss(
            positive_B, negative_score_BN, batch["weight"], self.temperature, total=total
        )
        counts_B = batch.get("counts", jnp.ones_like(positive_B))
        sums = {
            "positive_loss": out.positive,
            "negative_loss": out.negative,
            "positive_score": jnp.sum(counts_B * positive_B),
            "negative_score": jnp.sum(counts_B[:, None] * negative_score_BN),
        }
        return out.loss, sums

    def _loss_in_parts(
        self, params: Params, batch: Batch, seed: Seed | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`_loss` of a batch, a few triples at a time, gradients included."""
        size = batch["weight"].shape[0]
        each, count = _even(size, max(1, self.encode_chunk // (self.negatives + 2)))

        def split(x: jax.Array) -> jax.Array:
            """[B, ...] -> [parts, triples, ...]; the triples of a part lie `parts` apart, so that
            a batch split over devices stays where it is."""
            x = jnp.pad(x, [(0, count * each - size), *[(0, 0)] * (x.ndim - 1)])
            x = x.reshape(each, count, *x.shape[1:])
            return constrain(x, ("batch", *(None,) * (x.ndim - 1))).swapaxes(0, 1)

        parts = jax.tree.map(split, {**batch, "counts": jnp.ones(size, jnp.float32)})
        constants = {
            GRAPH: params[GRAPH],
            "seed": seed,
            "total": jnp.sum(batch["weight"]),
        }

        def contribution(
            params: Params, constants: Any, part: tuple[Batch, jax.Array]
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            triples, number = part
            site = None if constants["seed"] is None else fold(constants["seed"], number)
            whole = {**params, GRAPH: constants[GRAPH]}
            return self._loss(whole, triples, site, constants["total"])

        floating = {k: v for k, v in params.items() if k != GRAPH}
        return sum_of_parts(contribution, floating, constants, (parts, jnp.arange(count)))

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Inference, dropout off. B rows each; entity and relation ids are int32.

        encode(params, ids [B]) -> [B, D]             entity vectors before normalisation
        entity_vectors(params, ids [B]) -> [B, D]     normalised, fp32: rows of a candidate table
        relation_terms(params, ids [B])               `scores.Terms`: what ranks candidates
        score_triples(params, triples [B, 3]) -> [B]
        score_candidates(params, known [B], relation [B], mode [B], candidates [B, C]) -> [B, C]
        """
        return {
            "encode": self.encode,
            "entity_vectors": self.entity_vectors,
            "relation_terms": self.relation_terms,
            "score_triples": self.score_triples,
            "score_candidates": self.score_candidates,
        }

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """Inputs of `entity_vectors` and `score_candidates` (one candidate per query)."""
        ids = ArraySpec((batch_size,), "int32", ("batch",))
        return {
            "entity_vectors": {"ids": ids},
            "score_candidates": {
                "known": ids,
                "relation": ids,
                "mode": ids,
                "candidates": ArraySpec((batch_size, 1), "int32", ("batch", None)),
            },
        }

    def encode(self, params: Params, ids: jax.Array) -> jax.Array:
        """Vectors [B, D] of entities `ids` [B] before normalisation."""
        return self._encode(params, ids, None)

    def entity_vectors(self, params: Params, ids: jax.Array) -> jax.Array:
        """Normalised fp32 vectors [B, D] of entities `ids` [B]."""
        return scores.normalise(self.encode(params, ids))

    def relation_terms(self, params: Params, ids: jax.Array) -> scores.Terms:
        """What relations `ids` [B] contribute to a score, and the margin."""
        vectors = params["relation_embedding"][ids]
        return scores.terms(self.score, vectors, self.offset, params["gamma"])

    def score_triples(self, params: Params, triples: jax.Array) -> jax.Array:
        """Scores [B] of triples [B, 3]."""
        mode = jnp.zeros(triples.shape[0], jnp.int32)
        known, relation, answer = triples[:, 0], triples[:, 1], triples[:, 2:3]
        return self.score_candidates(params, known, relation, mode, answer)[:, 0]

    def score_candidates(
        self,
        params: Params,
        known: jax.Array,
        relation: jax.Array,
        mode: jax.Array,
        candidates: jax.Array,
    ) -> jax.Array:
        """Scores [B, C] of each query's own `candidates` [B, C].

        Args:
          known: int32 [B], the head where `mode` is 0 (the tail is asked for), else the tail.
          relation, mode: int32 [B].
        """
        b, c = candidates.shape
        ids = jnp.concatenate([known[:, None], candidates], 1)
        vectors = self.entity_vectors(params, ids.reshape(-1)).reshape(b, c + 1, -1)
        query = scores.query(self.relation_terms(params, relation), vectors[:, 0], mode)
        return scores.score_candidates(query, vectors[:, 1:])

    def weights(self) -> WeightMap:
        """The map of the official state dict."""
        return stargraph_map(self.encoder, self.entities, self.row_multiple)

    def hub_config(self) -> dict[str, Any]:
        """The official `config.json`: the arguments that shape the model."""
        e = self.encoder
        return {
            "model": {"triplere": "TripleRE", "pairre": "PairRE"}[self.score],
            "hidden_dim": e.width,
            "gamma": self.gamma,
            "triplere_u": self.offset,
            "negative_sample_size": self.negatives,
            "negative_adversarial_sampling": self.temperature is not None,
            "adversarial_temperature": 1.0 if self.temperature is None else self.temperature,
            "drop": e.dropout,
            "sample_anchors": e.anchors_per_entity,
            "use_anchor_path": e.paths > 0,
            "sample_neighbors": e.neighbours,
            "sample_center": e.center,
            "node_dim": e.node_width,
            "merge_strategy": e.merge,
            "attn_layers_num": e.layers,
            "mlp_ratio": e.mlp_ratio,
            "head_dim": e.head_width,
            "add_type_embedding": e.type_embedding,
            "anchor_share_embedding": e.share_anchors,
            "nentity": self.entities,
            "nrelation": self.relations,
        }

    def check_constants(self, constants: Mapping[str, np.ndarray]) -> None:
        """Whether the tables of a graph fit these sizes.

        Raises:
          ValueError: naming every field that has to change, and to what.
        """
        expected = {f"{GRAPH}/{name}": value for name, value in self._tables().items()}
        problems = [f"{path}: missing, tokenise with it" for path in expected.keys() - constants]
        for path, array in constants.items():
            if path not in expected:
                problems.append(f"{path}: this system has no such table, tokenise without it")
                continue
            shape, field, padding = expected[path]
            if array.shape != shape:
                problems.append(
                    f"{path}: expected shape {shape}, found {array.shape}; set system.entities to "
                    "the entities of the graph, row_multiple and the tokens per entity alike in "
                    "system and data"
                )
                continue
            found = _padding_id(array)
            if field == "entities":  # ids of entities: padded or not, the limit is known
                found = padding if found <= padding else found
            if found != padding:
                problems.append(
                    f"{path}: expected padding id {padding} (system.{field}), found {found}; "
                    f"set system.{field}={found}"
                )
        if problems:
            raise ValueError(f"StarGraph: the graph does not fit: {'; '.join(sorted(problems))}")

    def flops_per_example(self) -> float | None:
        """FLOPs of the dense layers, forward and backward, for all encodings of a triple."""
        e = self.encoder
        per_token = 2.0 * e.layers * e.width * (2 * 8 * e.query_width + 2 * e.mlp_ratio * e.width)
        return 3.0 * per_token * e.tokens * (self.negatives + 2)

    def _encoder(self) -> Encoder:
        return Encoder(self.encoder, self.entities, self.embedding_range, self.row_multiple)

    def _encode(
        self,
        params: Params,
        ids: jax.Array,
        seed: Seed | None,
        capture: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        graph = {f"graph_{k}": v for k, v in params[GRAPH].items()}
        variables = {"params": {**params["encoder"], **graph}}
        vectors: Any = self._encoder().apply(variables, ids, seed, capture)
        return vectors

    def _training_encoder(
        self, params: Params, seed: Seed | None
    ) -> Callable[[jax.Array], jax.Array]:
        if not self.encode_chunk:
            return lambda ids: self._encode(params, ids, seed)

        def chunked(ids: jax.Array) -> jax.Array:
            each, count = _even(ids.shape[0], self.encode_chunk)
            padded = jnp.pad(ids, (0, count * each - ids.shape[0]))
            parts = padded.reshape(count, each)

            # Products are kept for the backward pass, what lies between them is computed again.
            @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
            def one(part: jax.Array, number: jax.Array) -> jax.Array:
                site = None if seed is None else fold(seed, number)
                return self._encode(params, part, site)

            vectors = jax.lax.map(lambda x: one(*x), (parts, jnp.arange(count)))
            return vectors.reshape(-1, vectors.shape[-1])[: ids.shape[0]]

        return chunked

    def _tables(self) -> dict[str, tuple[tuple[int, ...], str, int]]:
        """By name: shape, the field that sets its padding id, the padding id."""
        e, count = self.encoder, rows(self.entities, self.row_multiple)
        tables: dict[str, tuple[tuple[int, ...], str, int]] = {}
        if e.anchors_per_entity:
            size = (
                ("entities", self.entities) if e.share_anchors else ("encoder.anchors", e.anchors)
            )
            tables["hashes"] = ((count, e.anchors_per_entity), *size)
        if e.paths:
            tables["path_ids"] = ((count, e.anchors_per_entity, 2), "encoder.paths", e.paths)
        if e.nodes:
            tables["nodes"] = ((count, e.nodes), "entities", self.entities)
        return tables


def _even(size: int, limit: int) -> tuple[int, int]:
    """How many in each of how many parts, so that no part exceeds `limit` and little is padded."""
    count = -(-size // limit)
    return -(-size // count), count


def _padding_id(array: np.ndarray) -> int:
    """The padding id of a table: its largest id, or one more where nothing is padded.

    Padding fills the end of a row, so the largest id is no padding where another follows it. Paths
    [N, A, 2] are padded at hop 0 of one hop: there the largest id always counts as padding.
    """
    largest = int(array.max(initial=0))
    if array.ndim != 2:
        return largest
    padded = array == largest
    ends_rows = bool((padded[:, 1:] | ~padded[:, :-1]).all())
    return largest if ends_rows else largest + 1


def _is_graph(name: str) -> bool:
    return name.startswith("graph_")
