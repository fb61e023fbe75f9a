"""Attention: one entry point, interchangeable implementations.

Shape legend:
  B batch   H query heads   K key/value heads (K divides H)   T queries   S keys   D head width

Arrays are heads-first (`q_BHTD`): it is the layout of the TPU kernels, and on a CPU the one in
which both products are plain batched matrix products without a transpose.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxmods.nn import flash_tpu

Implementation = Literal["auto", "xla", "flash", "cudnn"]


def attention(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(scale * q k^T + bias + masks) v, with scores and softmax in float32.

    Args:
      q_BHTD: queries. k_BKSD, v_BKSD: keys and values; K may be smaller than H (grouped heads).
      causal: query t sees keys up to t + S - T (the last query sees all).
      mask: bool, broadcastable to [B, H, T, S]; False hides a key. "flash" takes only one that is
        the same for all heads and queries, [B or 1, 1, 1, S].
      bias: float, broadcastable to [B, H, T, S], added to the scaled scores (relative positions).
        Only "xla" and "cudnn" take one.
      q_segments, kv_segments: int [B, T] and [B, S]; a query sees keys of its own segment only.
      scale: factor of the scores; default D^-0.5.
      implementation: "xla" plain products; "flash" the Pallas kernel for TPU (elsewhere it is
        interpreted, for tests); "cudnn" the fused kernel for GPU (half precision); "auto" takes
        flash where the program is for a TPU, there is no explicit mask or bias, and the sequence
        is long enough to pay (`flash_tpu.AUTO_FROM` keys), and xla otherwise.

    Returns:
      [B, H, T, D] in the dtype of `v`. A query that sees no key gets the mean of all values
      (under "flash": some finite value).

    Raises:
      ValueError: shapes that do not fit together, or a mask or bias given to "flash".
    """
    batch, heads, queries, width = q_BHTD.shape
    kv_heads, keys = k_BKSD.shape[1], k_BKSD.shape[2]
    if k_BKSD.shape != (batch, kv_heads, keys, width) or v_BKSD.shape[:3] != k_BKSD.shape[:3]:
        raise ValueError(
            f"attention: expected k and v [B, K, S, D] for q {q_BHTD.shape}, "
            f"found k {k_BKSD.shape} and v {v_BKSD.shape}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"attention: expected the {heads} query heads to be a multiple of the key heads, "
            f"found {kv_heads}"
        )
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: give q_segments and kv_segments together, or neither")
    scale = width**-0.5 if scale is None else scale
    # A mask of keys alone is two segments: the kernel can do that.
    of_keys = mask is not None and q_segments is None and mask.shape[1:] == (1, 1, keys)
    masked = mask is not None and not of_keys
    refusal = flash_tpu.supports(
        queries, keys, causal=causal, masked=masked, biased=bias is not None
    )
    if implementation == "flash" and refusal:
        raise ValueError(
            f"attention: the flash kernel cannot do this, {refusal}; "
            'express the mask as segments or use implementation="xla"'
        )
    if implementation == "auto":
        implementation = "flash" if refusal is None and flash_tpu.pays(queries, keys) else "xla"

    with jax.named_scope("attention"):  # preflight counts the products inside apart
        if implementation == "flash":
            if mask is not None:
                q_segments = jnp.zeros((batch, queries), jnp.int32)
                hidden = jnp.where(mask[:, 0, 0], 0, 1).astype(jnp.int32)
                kv_segments = jnp.broadcast_to(hidden, (batch, keys))
            return flash_tpu.flash_attention(
                q_BHTD,
                k_BKSD,
                v_BKSD,
                causal=causal,
                scale=scale,
                q_segments=q_segments,
                kv_segments=kv_segments,
            )
        if heads != kv_heads:
            k_BKSD = jnp.repeat(k_BKSD, heads // kv_heads, axis=1)
            v_BKSD = jnp.repeat(v_BKSD, heads // kv_heads, axis=1)
        if implementation == "cudnn":
            return _cudnn(
                q_BHTD, k_BKSD, v_BKSD, mask, bias, q_segments, kv_segments, causal, scale
            )
        visible = _visible(mask, q_segments, kv_segments, causal, queries, keys)
        return _xla(q_BHTD, k_BKSD, v_BKSD, visible, bias, scale)


def _visible(
    mask: jax.Array | None,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    queries: int,
    keys: int,
) -> jax.Array | None:
    """All masks as one bool array broadcastable to [B, H, T, S]; None when every key is seen."""
    visible = mask
    if causal:
        t = jnp.arange(queries)[:, None] + (keys - queries)
        seen = (t >= jnp.arange(keys)[None, :])[None, None]
        visible = seen if visible is None else visible & seen
    if q_segments is not None and kv_segments is not None:
        same = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]
        visible = same if visible is None else visible & same
    return visible


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    scores = jnp.einsum(
        "BHTD,BHSD->BHTS", q * jnp.asarray(scale, q.dtype), k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BHTS,BHSD->BHTD", weights, v)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    visible = _visible(mask, q_segments, kv_segments, False, q.shape[2], k.shape[2])
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if bias is None else bias.astype(q.dtype),
        mask=visible,
        is_causal=causal,
        scale=scale,
        implementation="cudnn",
    )
    return out.transpose(0, 2, 1, 3)
