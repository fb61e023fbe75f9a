"""Flash attention on TPU: the splash kernel of `jax.experimental.pallas.ops.tpu`.

What is added around the library's kernel: lengths and head width padded to its tiles, padding and
segments as one segment mask, grouped heads, and one call per device of the active mesh. Batch and
heads are split as the rules say. Where the rules split "seq" (context parallelism) every device
keeps its own queries and sees all keys and values, which are gathered over that axis; their
gradients are summed back over it.

Off the TPU the same kernel runs in Pallas' interpreter: slow, for tests.

Shape legend: B batch, H query heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmods import partitioning

# Keys from which the kernel is chosen by itself. At 577 tokens (ViT-L/14@336) the fp32 scores that
# plain attention moves through HBM cost more than its products; at 197 and 248 tokens the padding
# and the kernel's start per head cost as much as they save. `docs/preflight.md` has the figures.
AUTO_FROM = 512

_LANES = 128  # lengths are multiples of this
_BLOCKS = (768, 640, 512, 384, 256)  # tiles, the largest whose backward fits into VMEM first
_WIDTH_STEP = 8  # head width: multiples of the sublane
_PADDING = -(2**31)  # segment of padded tokens


def target_platform() -> str:
    """Platform that the program being traced is for: that of the active mesh, else the default.

    Compiling ahead of time for a TPU happens on a CPU, so the default backend would be wrong.
    """
    active = partitioning.active()
    return jax.default_backend() if active is None else active[0].devices.flat[0].platform


def pays(queries: int, keys: int) -> bool:
    """Whether automatic choice takes this kernel: on TPU, from `AUTO_FROM` keys and a tile of
    queries on.

    A program for several devices needs the active mesh (the kernel is not partitioned by the
    compiler), so without one the answer is no unless there is one device.
    """
    if target_platform() != "tpu" or keys < AUTO_FROM or queries < _LANES:
        return False
    return partitioning.active() is not None or jax.device_count() == 1


def supports(
    queries: int, keys: int, *, causal: bool, masked: bool, biased: bool = False
) -> str | None:
    """None when the kernel can do it, else the reason why not."""
    if masked:
        return "it takes segments but no explicit mask"
    if biased:
        return "it takes no bias"
    if causal and queries > keys:
        return f"causal needs at least as many keys as queries, found {keys} and {queries}"
    return None


def flash_attention(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    *,
    causal: bool,
    scale: float,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + masks) v by the splash kernel; differentiable.

    Args:
      q_BHTD, k_BKSD, v_BKSD: K divides H.
      causal: query t sees keys up to t + S - T; needs S >= T.
      scale: factor of the scores.
      q_segments, kv_segments: int [B, T] and [B, S]; a query sees keys of its own segment only.
        A query that sees no key gets a finite value without meaning.

    Returns:
      [B, H, T, D] in the dtype of `v`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    batch, heads, queries, width = q_BHTD.shape
    keys = k_BKSD.shape[2]
    active = partitioning.active()
    mesh = active[0] if active is not None and active[0].size > 1 else None
    head_shards, query_shards = _shards(batch, heads)
    if heads != k_BKSD.shape[1] and k_BKSD.shape[1] % head_shards:
        # Fewer key heads than devices along the head axis: every device gets copies of its own.
        group = heads // k_BKSD.shape[1]
        k_BKSD, v_BKSD = (jnp.repeat(x, group, axis=1) for x in (k_BKSD, v_BKSD))

    block_q, block_k = _block(math.ceil(queries / query_shards)), _block(keys)
    pad_q = -queries % (block_q * query_shards)
    pad_k = -keys % block_k
    # Padded keys lie in the future of every real query, so causal masks hide them already. Padded
    # queries may see anything: they are cut off, and no gradient comes back into them.
    if pad_k and not causal and q_segments is None:
        q_segments = jnp.zeros((batch, queries), jnp.int32)
        kv_segments = jnp.zeros((batch, keys), jnp.int32)
    pad_d = -width % _WIDTH_STEP
    q = _pad(q_BHTD * jnp.asarray(scale, q_BHTD.dtype), pad_q, pad_d)
    k, v = _pad(k_BKSD, pad_k, pad_d), _pad(v_BKSD, pad_k, -v_BKSD.shape[3] % _WIDTH_STEP)
    segments: tuple[jax.Array, ...] = ()
    if q_segments is not None and kv_segments is not None:
        segments = tuple(
            jnp.pad(s.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=_PADDING)
            for s, pad in ((q_segments, pad_q), (kv_segments, pad_k))
        )

    if causal:  # the mask differs from device to device along the queries
        mask = masks.MultiHeadMask(
            [
                masks.CausalMask(
                    (q.shape[2], k.shape[2]), offset=keys - queries, shard_count=query_shards
                )
            ]
            * heads
        )
        mask_shards = (head_shards, query_shards)
    else:
        local = (q.shape[2] // query_shards, k.shape[2])
        mask = masks.MultiHeadMask([masks.FullMask(local)] * (heads // head_shards))
        mask_shards = (1, 1)
    kernel = splash.make_splash_mha(
        mask=mask,
        head_shards=mask_shards[0],
        q_seq_shards=mask_shards[1],
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        interpret=target_platform() != "tpu",
    )

    def call(
        kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array
    ) -> jax.Array:
        if not segments:
            return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
        return jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=splash.SegmentIds(*ids)))(
            q, k, v, *segments
        )

    if mesh is not None and active is not None:
        wide = partitioning.spec_for(q.shape, ("batch", "heads", "seq", None), mesh, active[1])
        rows, columns, tokens = wide[0], wide[1], wide[2]
        spec = PartitionSpec
        mask_spec = spec(columns, tokens) if causal else spec(None, None)
        call = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(
                kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, mask_spec)),
                wide,
                spec(rows, columns),
                spec(rows, columns),
                *((spec(rows, tokens), spec(rows)) if segments else ()),
            ),
            out_specs=wide,
            check_vma=False,
        )
    out = call(kernel, q, k, v, *segments)
    return out[:, :, :queries, : v_BKSD.shape[3]].astype(v_BKSD.dtype)


def _shards(batch: int, heads: int) -> tuple[int, int]:
    """Devices along the head axis and along the query axis of the active mesh."""
    active = partitioning.active()
    if active is None or active[0].size == 1:
        return 1, 1
    mesh, rules = active
    # A length that every mesh axis divides: queries are padded until they can be split.
    spec = partitioning.spec_for(
        (batch, heads, mesh.size, 1), ("batch", "heads", "seq", None), mesh, rules
    )

    def size(entry: Any) -> int:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return math.prod(mesh.shape[name] for name in names)

    return size(spec[1]), size(spec[2])


def _block(length: int) -> int:
    """Tile that wastes least on padding; the larger one of equals."""
    if length <= _LANES:
        return _LANES
    return min(_BLOCKS, key=lambda block: (-length % block, -block))


def _pad(x: jax.Array, length: int, width: int) -> jax.Array:
    """[B, H, T + length, D + width], with zeros."""
    if not length and not width:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, width)))
