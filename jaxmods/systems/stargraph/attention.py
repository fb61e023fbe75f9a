"""Reduced self-attention: small queries and keys, the tokens themselves as values.

Spec `stargraph`, section 2.2 (official `transfile.py`, `ReducedAttentionLayer`). The backward pass
is written out: it keeps the attention weights and nothing else, and asks for every product in the
layout in which both factors are contiguous.

Shape legend: E entities, L tokens, H heads, C query/key width, V value width (width / H).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmods.systems.stargraph.dropout import Seed, dropout

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Seed | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_EHLC: jax.Array, k_EHLC: jax.Array, v_EHLV: jax.Array, seed: Seed | None, rate: float
) -> jax.Array:
    """dropout(softmax(q k^T / sqrt(C))) v, no mask, softmax in fp32; returns [E, H, L, V]."""
    return _forward(q_EHLC, k_EHLC, v_EHLV, seed, rate)[0]


def _weights(q_EHLC: jax.Array, k_EHLC: jax.Array) -> jax.Array:
    logits = jnp.einsum("ehqc,ehkc->ehqk", q_EHLC, k_EHLC).astype(jnp.float32)
    return jax.nn.softmax(logits * q_EHLC.shape[-1] ** -0.5, axis=-1)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seed: Seed | None, rate: float
) -> tuple[jax.Array, _Residuals]:
    weights = _weights(q, k).astype(v.dtype)
    out = jnp.einsum("ehqk,ehkv->ehqv", dropout(weights, seed, rate), v)
    return out, (q, k, v, weights, seed)


def _backward(
    rate: float, saved: _Residuals, grad_EHLV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, seed = saved
    dv = _contract_queries(dropout(weights, seed, rate), grad_EHLV)
    dweights = dropout(jnp.einsum("ehqv,ehkv->ehqk", grad_EHLV, v), seed, rate)
    w, dw = weights.astype(jnp.float32), dweights.astype(jnp.float32)
    dlogits = w * (dw - jnp.sum(w * dw, -1, keepdims=True)) * q.shape[-1] ** -0.5
    dlogits = dlogits.astype(q.dtype)
    dq = jnp.einsum("ehqk,ehkc->ehqc", dlogits, k)
    return dq, _contract_queries(dlogits, q), dv, None


def _contract_queries(a_EHQK: jax.Array, b_EHQV: jax.Array) -> jax.Array:
    """sum over queries: [E, H, K, V]. The barrier keeps the transposition out of the product,
    where it would cost several times as much."""
    return jnp.einsum(
        "ehkq,ehqv->ehkv", jax.lax.optimization_barrier(a_EHQK.swapaxes(-1, -2)), b_EHQV
    )


attend.defvjp(_forward, _backward)
