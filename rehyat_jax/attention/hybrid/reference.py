"""Hybrid attention by its definition. Every other implementation is tested against this function."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.product import product


def run(request: Request) -> tuple[jax.Array, None]:
    """ReHyAt's joint normalisation, y = (aS + aL) / (nS + nL), written with dense [tokens, tokens] weights."""
    softmax, linear = _weights(request)
    weights = softmax + linear
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return product("bhqk,bkhd->bqhd", weights, request.value).astype(request.query.dtype), None


def normalised_weights(request: Request) -> tuple[jax.Array, jax.Array]:
    """The softmax and the linear weights [batch, heads, queries, keys], which together sum to one over the keys."""
    softmax, linear = _weights(request)
    total = (softmax + linear).sum(axis=-1, keepdims=True)
    return softmax / total, linear / total


def _weights(request: Request) -> tuple[jax.Array, jax.Array]:
    """The softmax and the linear weights before normalisation.

    The softmax keys weigh exp(q.k / sqrt(head_dim) - c), the linear keys phi_query.phi_key. "row_max": c is the row's
    largest score in its window. "joint": c = 0, literally, so float32 overflows at scores of 88: use float64.
    """
    query, geometry = request.query, request.geometry
    softmax_keys, linear_keys = (
        mask.repeat(geometry.tokens_per_frame, axis=0).repeat(geometry.tokens_per_frame, axis=1)
        for mask in geometry.key_masks(causal=request.causal)
    )
    scores = product("bqhd,bkhd->bhqk", query, request.key) / query.shape[-1] ** 0.5
    scores = jnp.where(softmax_keys, scores, -jnp.inf)
    c = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)) if request.stabilizer == "row_max" else 0
    similarity = product("bqhf,bkhf->bhqk", request.phi_query, request.phi_key)
    return jnp.exp(scores - c), jnp.where(linear_keys, similarity, 0)


BACKEND = Backend("reference", run, keeps_state=False)
