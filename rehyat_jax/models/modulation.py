"""Shifts, scales and gates of tokens [B, N, D], which depend on the noise level.

They are [B, 1, D] if all frames of a video have one level, and [B, T, 1, D] if each of its T frames has its own. Tokens
are frame-major: those of one frame are adjacent.
"""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.product import accumulation_dtype


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """LayerNorm(x) (1 + scale) + shift, float32 [B, N, D].

    The norm has no parameters and the biased variance. Mean and mean of squares are computed together, as in Flax's
    LayerNorm. The mean of squared distances would take one more pass over memory. The error is 1e-7 times
    mean^2 / variance.
    """
    shape, x = x.shape, x.astype(accumulation_dtype(x.dtype))
    mean, squares = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    normed = (x - mean) * jax.lax.rsqrt(jnp.maximum(squares - jnp.square(mean), 0) + eps)
    return (_by_frame(normed, scale) * (1 + scale) + shift).reshape(shape)


def times_gate(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x times gate, [B, N, D]."""
    return (_by_frame(x, gate) * gate).reshape(x.shape)


def _by_frame(x: jax.Array, values: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, T, N / T, D] if every frame has its own values.

    Repeated to [B, N, D] instead, the values would be kept at that size for the backward pass.
    """
    return x if values.ndim == 3 else x.reshape(*values.shape[:2], -1, x.shape[-1])
