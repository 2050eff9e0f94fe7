"""Hybrid attention by its definition. Every other implementation is tested against this function."""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.product import product


def run(request: Request) -> tuple[jax.Array, None]:
    """ReHyAt's joint normalisation, y = (aS + aL) / (nS + nL), written with dense [tokens, tokens] weights."""
    weights = sum(normalised_weights(request))
    return product("bhqk,bkhd->bqhd", weights, request.value).astype(request.query.dtype), None


def normalised_weights(request: Request) -> tuple[jax.Array, jax.Array]:
    """The softmax and the linear weights [batch, heads, queries, keys], which together sum to one over the keys."""
    softmax, linear = _weights(request)
    softmax_mass, linear_mass = (weights.sum(axis=-1, keepdims=True) for weights in (softmax, linear))
    if request.branch_gate is None:
        return softmax / (softmax_mass + linear_mass), linear / (softmax_mass + linear_mass)
    gate = jnp.where(linear_mass > 0, request.branch_gate[:, None, None], 0)
    return (1 - gate) * softmax / softmax_mass, gate * linear / jnp.where(linear_mass > 0, linear_mass, 1)


def _weights(request: Request) -> tuple[jax.Array, jax.Array]:
    """The softmax and the linear weights before normalisation.

    The softmax keys weigh exp(q.k / sqrt(head_dim) - c), the linear keys phi_query.phi_key, with decay times the power
    of it that is their distance from the window. "row_max": c is the row's largest score in its window. "joint": c = 0,
    literally, so float32 overflows at scores of 88: use float64.
    """
    query, geometry = request.query, request.geometry
    of_tokens = lambda of_frames: np.kron(of_frames, np.ones([geometry.tokens_per_frame] * 2, of_frames.dtype))
    softmax_keys, linear_keys = map(of_tokens, geometry.key_masks(causal=request.causal))
    scores = product("bqhd,bkhd->bhqk", query, request.key) / query.shape[-1] ** 0.5
    scores = jnp.where(softmax_keys, scores, -jnp.inf)
    c = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)) if request.stabilizer == "row_max" else 0
    similarity = product("bqhf,bkhf->bhqk", request.phi_query, request.phi_key)
    if request.log_decay is not None:
        distance = of_tokens(geometry.window_distance()).clip(0)
        similarity = similarity * jnp.exp(distance * request.log_decay[:, None, None])
    return jnp.exp(scores - c), jnp.where(linear_keys, similarity, 0)


BACKEND = Backend("reference", run, keeps_state=False)
