"""Map of the official StarGraph state dict (`checkpoint["model_state_dict"]`; spec, section 7)."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmods.systems.stargraph.model import EncoderConfig
from jaxmods.weights import Cast, Entry, Linear, Tie, Transform, WeightMap, lazy
from jaxmods.weights.lazy import Bounds, Lazy, Shape


@dataclasses.dataclass(frozen=True)
class PadRows(Transform):
    """`count` rows ↔ a table with more rows (rounded up for the mesh) that no id refers to."""

    count: int
    fill: int = 0

    def torch_shapes(self, jax_shapes: tuple[Shape, ...], count: int) -> tuple[Shape, ...]:
        del count
        return tuple((self.count, *s[1:]) for s in jax_shapes)

    def to_jax(self, tensors: tuple[Lazy, ...], jax_shapes: tuple[Shape, ...]) -> tuple[Lazy, ...]:
        return tuple(self._pad(t, s) for t, s in zip(tensors, jax_shapes, strict=True))

    def to_torch(self, arrays: tuple[Lazy, ...], count: int) -> tuple[Lazy, ...]:
        del count
        return tuple(a.cut(0, 0, self.count) for a in arrays)

    def _pad(self, tensor: Lazy, shape: Shape) -> Lazy:
        if shape[0] == self.count:
            return tensor
        extra = (shape[0] - self.count, *shape[1:])

        def read(bounds: Bounds) -> np.ndarray:
            return np.full(lazy.extents(bounds), self.fill, tensor.dtype)

        padding = Lazy(extra, tensor.dtype, read, f"padding of {tensor.name}")
        return lazy.concatenate([tensor, padding], 0)


def stargraph_map(encoder: EncoderConfig, entities: int, row_multiple: int) -> WeightMap:
    """Official keys ↔ parameters, for one choice of options."""
    c = encoder
    del row_multiple  # what is padded follows from the shapes

    def ids(name: str, fill: int) -> Entry:
        return Entry(name, f"graph/{name}", Cast("int64", "int32") >> PadRows(entities, fill))

    entries = [
        Entry("gamma", "gamma"),
        Entry("embedding_range", "embedding_range"),
        Entry("relation_embedding.weight", "relation_embedding"),
    ]
    nodes = PadRows(entities + 1)
    anchor = "anchor_embedding.weight"
    if c.anchors_per_entity:
        entries.append(ids("hashes", entities if c.share_anchors else c.anchors))
        if not c.share_anchors:
            entries.append(Entry(anchor, "encoder/anchor_embedding", PadRows(c.anchors + 1)))
    if c.paths:
        entries.append(ids("path_ids", c.paths))
        entries.append(Entry("path_embeddings.weight", "encoder/path_embedding"))
    if c.nodes:
        entries.append(ids("nodes", entities))
        node = "node_embedding.weight"
        tied = c.share_anchors and c.anchors_per_entity
        entries.append(
            Entry((node, anchor), "encoder/node_embedding", Tie() >> nodes)
            if tied
            else Entry(node, "encoder/node_embedding", nodes)
        )
    if c.projects_nodes:
        entries.append(Entry("node_before_attn.weight", "encoder/node_projection_kernel", Linear()))
        entries.append(Entry("node_before_attn.bias", "encoder/node_projection_bias"))
    if c.has_types:
        entries.append(Entry("type_embedding.weight", "encoder/type_embedding"))
    if c.layers:
        block = "attn_layers.{i}."
        entries.append(Entry("type_ids", "graph/type_ids", Cast("int64", "int32")))
        for n in (1, 2):
            entries += [
                Entry(f"{block}norm{n}.weight", f"encoder/norm{n}_scale"),
                Entry(f"{block}norm{n}.bias", f"encoder/norm{n}_bias"),
                Entry(f"{block}mlp.linear{n}.weight", f"encoder/mlp_{n}_kernel", Linear()),
                Entry(f"{block}mlp.linear{n}.bias", f"encoder/mlp_{n}_bias"),
            ]
        entries.append(Entry(f"{block}attn.qk.weight", "encoder/qk_kernel", Linear()))
    if c.merge == "linear_proj":
        for n, official in ((1, 0), (2, 3)):
            entries.append(
                Entry(f"set_enc.{official}.weight", f"encoder/merge_{n}_kernel", Linear())
            )
            entries.append(Entry(f"set_enc.{official}.bias", f"encoder/merge_{n}_bias"))
    return WeightMap(tuple(entries))
