"""A plain PyTorch StarGraph, written from the spec: the other side of the speed comparison, and an
independent float64 check of recorded results. Parameters carry the official state-dict keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

HEADS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What shapes the model besides the shapes of its weights."""

    score: str
    gamma: float
    offset: float
    temperature: float | None
    head_width: int
    layers: int
    merge: str = "mean_pooling"
    dropout: float = 0.0
    types: bool = False


class StarGraphTorch(nn.Module):
    """Encoder, score and loss over official weights.

    Args:
      weights: official state dict as arrays. Integer tensors become buffers.
      dtype: of the floating parameters.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], options: Options, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.options = options
        self.table: dict[str, torch.Tensor] = {}
        for name, array in weights.items():
            tensor = torch.tensor(np.asarray(array))
            if tensor.is_floating_point():
                fixed = name in ("gamma", "embedding_range")
                value = nn.Parameter(tensor.to(dtype), requires_grad=not fixed)
                self.register_parameter(name.replace(".", "/"), value)
                self.table[name] = value
            else:
                self.table[name] = tensor.long()
        if "node_embedding.weight" in weights and self._shared(weights):
            self.table["anchor_embedding.weight"] = self.table["node_embedding.weight"]

    @staticmethod
    def _shared(weights: Mapping[str, np.ndarray]) -> bool:
        anchor, node = weights.get("anchor_embedding.weight"), weights["node_embedding.weight"]
        return anchor is not None and np.array_equal(anchor, node)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """[E] -> [E, D], every occurrence with its own dropout in training."""
        o, t = self.options, self.table
        parts = []
        if "nodes" in t:
            nodes = t["node_embedding.weight"][t["nodes"][ids]]
            if "node_before_attn.weight" in t:
                nodes = F.linear(nodes, t["node_before_attn.weight"], t["node_before_attn.bias"])
            parts.append(nodes)
        if "hashes" in t:
            anchors = F.embedding(t["hashes"][ids], t["anchor_embedding.weight"])
            if "path_ids" in t:
                path = F.embedding(t["path_ids"][ids], t["path_embeddings.weight"])
                for hop in range(2):
                    scale, shift = path[:, :, hop].chunk(2, -1)
                    anchors = anchors * (scale + 1) + shift
            parts.append(anchors)
        x = torch.cat(parts, 1)
        if o.types:
            x = x + t["type_embedding.weight"][t["type_ids"]]
        for i in range(o.layers):
            x = x + self._attention(x, i)
            x = x + self._mlp(x, i)
        if o.merge == "mean_pooling":
            return x.mean(1)
        hidden = F.linear(x.flatten(1), t["set_enc.0.weight"], t["set_enc.0.bias"])
        hidden = torch.relu(F.dropout(hidden, o.dropout, self.training))
        return F.linear(hidden, t["set_enc.3.weight"], t["set_enc.3.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.table[f"{name}.weight"], self.table[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def _attention(self, x: torch.Tensor, i: int) -> torch.Tensor:
        e, length, width = x.shape
        y = self._norm(x, f"attn_layers.{i}.norm1")
        qk = F.linear(y, self.table[f"attn_layers.{i}.attn.qk.weight"])
        q, k = qk.reshape(e, length, 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        weights = F.dropout(weights, self.options.dropout, self.training)
        v = y.reshape(e, length, HEADS, -1).transpose(1, 2)
        return (weights @ v).transpose(1, 2).reshape(e, length, width)

    def _mlp(self, x: torch.Tensor, i: int) -> torch.Tensor:
        t, name, rate = self.table, f"attn_layers.{i}.mlp", self.options.dropout
        y = self._norm(x, f"attn_layers.{i}.norm2")
        y = F.gelu(F.linear(y, t[f"{name}.linear1.weight"], t[f"{name}.linear1.bias"]))
        y = F.dropout(y, rate, self.training)
        y = F.linear(y, t[f"{name}.linear2.weight"], t[f"{name}.linear2.bias"])
        return F.dropout(y, rate, self.training)

    def score(self, head: torch.Tensor, relation: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """Scores of head [B, 1 or C], relation [B, 1], tail [B, 1 or C] ids."""
        shape_h, shape_t = head.shape, tail.shape
        h = F.normalize(self.encode(head.flatten()).view(*shape_h, -1), 2, -1)
        t = F.normalize(self.encode(tail.flatten()).view(*shape_t, -1), 2, -1)
        r = self.table["relation_embedding.weight"][relation]
        if self.options.score == "triplere":
            r_h, r_m, r_t = r.chunk(3, -1)
            u = self.options.offset
            gap = h * (u * r_h + 1) - t * (u * r_t + 1) + r_m
        else:
            r_h, r_t = r.chunk(2, -1)
            gap = h * r_h - t * r_t + h - t
        return self.options.gamma - gap.abs().sum(-1)

    def loss(
        self,
        head: torch.Tensor,
        relation: torch.Tensor,
        tail: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """The training loss; column 0 of the longer side is the positive."""
        scores = self.score(head, relation, tail)
        positive, negative = scores[:, 0], scores[:, 1:]
        if self.options.temperature is None:
            wrong = F.logsigmoid(-negative).mean(1)
        else:
            share = (negative * self.options.temperature).softmax(1).detach()
            wrong = (share * F.logsigmoid(-negative)).sum(1)
        terms = F.logsigmoid(positive) + wrong
        return -(weight * terms).sum() / weight.sum() / 2


def adam(model: StarGraphTorch, lr: float) -> torch.optim.Adam:
    """The official optimiser."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
