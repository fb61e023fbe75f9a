"""FG-CLIP in plain PyTorch under the official key names: what exports are verified against.

It follows the official code (branch v1.0, `fgclip/model/clip_strc`) step by step, without its
dependence on a process group: the losses take the batches of all data-parallel ranks at once.
Needs torch; nothing else in the library imports this module at load time.

Shape legend:
  b images of a rank   n boxes per image   M hard negatives   T tokens   D width   P projection
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxmods.backbones.clip import LOGIT_SCALE_INIT
from jaxmods.systems.fgclip import hub


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        b, t, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, t, self.heads, -1).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), is_causal=causal
        )
        return self.out_proj(mixed.transpose(1, 2).reshape(b, t, d))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.self_attn = _Attention(width, heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = _Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), self.causal)
        return x + self.mlp(self.layer_norm2(x))

    def without_attention(self, x: Tensor) -> Tensor:
        attn = self.self_attn
        x = x + attn.out_proj(attn.v_proj(self.layer_norm1(x)))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, hidden, causal) for _ in range(layers))

    def before_last(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class _VisionEmbeddings(nn.Module):
    def __init__(self, width: int, grid: int, patch: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(1 + grid * grid, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Vision(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        self.embeddings = _VisionEmbeddings(c.width, c.grid, c.patch_size)
        self.pre_layrnorm = nn.LayerNorm(c.width)
        self.encoder = _Encoder(c.width, c.layers, c.heads, c.mlp, causal=False)
        self.post_layernorm = nn.LayerNorm(c.width)

    def trunk(self, pixels: Tensor) -> Tensor:
        return self.encoder.before_last(self.pre_layrnorm(self.embeddings(pixels)))

    def pooled(self, trunk: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder.layers[-1](trunk)[:, 0])

    def dense(self, trunk: Tensor) -> Tensor:
        layer: Any = self.encoder.layers[-1]
        return self.post_layernorm(layer.without_attention(trunk)[:, 1:])


class _TextEmbeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.context_short, c.width)
        self.position_embedding_res = nn.Embedding(c.context_long, c.width)
        self.position_embedding_ori = nn.Embedding(c.context_long, c.width)
        early = torch.zeros(c.context_long, 1)
        early[: c.keep] = 1
        self.register_buffer("early", early, persistent=False)
        self.early: Tensor

    def forward(self, ids: Tensor, long: bool) -> Tensor:
        tokens = self.token_embedding(ids)
        if not long:
            return tokens + self.position_embedding.weight[: ids.shape[1]]
        ori = self.position_embedding_ori.weight * self.early
        res = self.position_embedding_res.weight * (1 - self.early)
        return tokens + (ori + res)[: ids.shape[1]]


class _Text(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        self.eos = c.eos_id
        self.embeddings = _TextEmbeddings(c)
        self.encoder = _Encoder(c.width, c.layers, c.heads, c.mlp, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.width)

    def forward(self, ids: Tensor, long: bool) -> Tensor:
        x = self.encoder.before_last(self.embeddings(ids, long))
        x = self.final_layer_norm(self.encoder.layers[-1](x))
        end = (ids == self.eos).int().argmax(dim=-1)
        return x[torch.arange(len(ids)), end]


@dataclasses.dataclass
class RankBatch:
    """Inputs of one data-parallel rank, in the layout of the official collator.

    image [b, 3, S, S] float; text_short, text_long int64 [b, L]; box_infos [n b, 4] fractions;
    box_texts [n b, L]; box_nums [b]; hard_infos [n b, 4], the first hard_nums[i] of each image
    count; hard_texts [(1 + M) sum(hard_nums), L], positive first.
    """

    image: Tensor
    text_short: Tensor
    text_long: Tensor
    box_infos: Tensor
    box_texts: Tensor
    box_nums: Tensor
    hard_infos: Tensor
    hard_texts: Tensor
    hard_nums: Tensor


class FgClipReference(nn.Module):
    """The model; `config` is a `config.json` (see `jaxmods.systems.fgclip.hub`)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vision, text, projection = hub.sizes(config)
        self.vision_model = _Vision(vision)
        self.text_model = _Text(text)
        self.visual_projection = nn.Linear(vision.width, projection, bias=False)
        self.text_projection = nn.Linear(text.width, projection, bias=False)
        self.text_filip_projection = nn.Linear(text.width, projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.logit_scale_finegraind = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.logit_scale_hardneg = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))

    # Features: none is normalised -----------------------------------------------------------

    def image_features(self, pixels: Tensor) -> Tensor:
        """[b, 3, S, S] -> [b, P]."""
        return self.visual_projection(self.vision_model.pooled(self.vision_model.trunk(pixels)))

    def text_features_short(self, ids: Tensor) -> Tensor:
        """[r, L] -> [r, P]."""
        return self.text_projection(self.text_model(ids, long=False))

    def text_features_long(self, ids: Tensor) -> Tensor:
        """[r, L] -> [r, P]."""
        return self.text_filip_projection(self.text_model(ids, long=True))

    def dense_features(self, pixels: Tensor) -> Tensor:
        """[b, 3, S, S] -> [b, G, G, P]."""
        return self._dense(self.vision_model.trunk(pixels))

    def box_features(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """[b, 3, S, S] and [b, n, 4] as fractions -> [b, n, P]."""
        dense = self.dense_features(pixels)
        owner = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
        flat = roi_align(dense, boxes.reshape(-1, 4) * dense.shape[1], owner)
        return flat.reshape(*boxes.shape[:2], -1)

    def _dense(self, trunk: Tensor) -> Tensor:
        tokens = self.visual_projection(self.vision_model.dense(trunk))
        grid = int(tokens.shape[1] ** 0.5)
        return tokens.reshape(len(tokens), grid, grid, -1)

    # Losses ------------------------------------------------------------------------------------

    def losses(self, ranks: Sequence[RankBatch]) -> list[dict[str, Tensor]]:
        """Unweighted terms "long", "short", "region", "hard" of each rank (empty ones are 0)."""
        images, shorts, longs, local = [], [], [], []
        for rank in ranks:
            trunk = self.vision_model.trunk(rank.image)
            images.append(_unit(self.visual_projection(self.vision_model.pooled(trunk))))
            shorts.append(_unit(self.text_features_short(rank.text_short)))
            longs.append(_unit(self.text_features_long(rank.text_long)))
            dense = self._dense(trunk)
            local.append({"region": self._region(dense, rank), "hard": self._hard(dense, rank)})
        scale, start, terms = self.logit_scale.exp(), 0, []
        for image, short, long, own in zip(images, shorts, longs, local, strict=True):
            target = torch.arange(start, start + len(image))
            start += len(image)
            both: dict[str, Tensor] = {}
            for name, text, texts in (("long", long, longs), ("short", short, shorts)):
                by_image = scale * image @ torch.cat(texts).T
                by_text = scale * text @ torch.cat(images).T
                both[name] = (
                    functional.cross_entropy(by_image, target)
                    + functional.cross_entropy(by_text, target)
                ) / 2
            terms.append(both | own)
        return terms

    def loss(self, ranks: Sequence[RankBatch], weights: Mapping[str, float]) -> Tensor:
        """Mean over ranks of the weighted sum of the terms."""
        terms = self.losses(ranks)
        return sum(
            (weights[name] * term[name] for term in terms for name in term), torch.zeros(())
        ) / len(terms)

    def _region(self, dense: Tensor, rank: RankBatch) -> Tensor:
        owner, index = _first_of_each(rank.box_nums, len(rank.box_infos) // len(rank.image))
        if not len(index):
            return torch.zeros(())
        boxes = rank.box_infos[index] * dense.shape[1]
        box = _unit(roi_align(dense, boxes, owner))
        text = _unit(self.text_features_short(rank.box_texts[index]))
        logits = self.logit_scale_finegraind.exp() * box @ text.T
        target = torch.arange(len(index))
        return (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        ) / 2

    def _hard(self, dense: Tensor, rank: RankBatch) -> Tensor:
        owner, index = _first_of_each(rank.hard_nums, len(rank.hard_infos) // len(rank.image))
        if not len(index):
            return torch.zeros(())
        boxes = rank.hard_infos[index] * dense.shape[1]
        box = _unit(roi_align(dense, boxes, owner))
        text = _unit(self.text_features_short(rank.hard_texts)).reshape(
            len(index), -1, box.shape[1]
        )
        logits = self.logit_scale_hardneg.exp() * torch.einsum("kp,kmp->km", box, text)
        return functional.cross_entropy(logits, torch.zeros(len(index), dtype=torch.long))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _first_of_each(counts: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(image, row) of the first counts[i] slots of every image."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rows = [i * slots + j for i, n in enumerate(counts.tolist()) for j in range(n)]
    return owner, torch.tensor(rows, dtype=torch.long)


def roi_align(features: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
    """torchvision's RoIAlign to one vector (aligned, adaptive sampling), box by box.

    Args:
      features: [b, G, G, P]. boxes: [k, 4] in cells. owner: [k] image of each box.

    Returns:
      [k, P].
    """
    size = features.shape[1]
    result = []
    for box, image in zip(boxes.float() - 0.5, owner.tolist(), strict=True):
        x1, y1, x2, y2 = box
        height, width = y2 - y1, x2 - x1
        rows, columns = max(int(torch.ceil(height)), 0), max(int(torch.ceil(width)), 0)
        if rows * columns == 0:
            result.append(features.new_zeros(features.shape[-1]))
            continue
        ys = y1 + (torch.arange(rows) + 0.5) * height / rows
        xs = x1 + (torch.arange(columns) + 0.5) * width / columns
        by, bx = _bilinear(ys, size), _bilinear(xs, size)
        total = torch.einsum("ig,jh,ghp->p", by, bx, features[image])
        result.append(total / (rows * columns))
    return torch.stack(result)


def _bilinear(at: Tensor, size: int) -> Tensor:
    """Interpolation weights [samples, size]; samples beyond -1..size weigh nothing."""
    inside = ((at >= -1) & (at <= size)).float()
    at = at.clamp(min=0)
    low = at.floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = torch.where(low >= size - 1, torch.zeros_like(at), at - low)
    weights = torch.zeros(len(at), size)
    rows = torch.arange(len(at))
    weights.index_put_((rows, low.long()), 1 - share, accumulate=True)
    weights.index_put_((rows, high.long()), share, accumulate=True)
    return weights * inside[:, None]
