"""The transformer's residual: what all blocks together add to the tokens, kept to stand for the blocks in other steps.

In neighbouring steps of the solver, residuals are nearly the same. A step that reuses one computes embedders and head
only (MagCache, arXiv 2506.09045).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.product import accumulation_dtype


def apply_with_residual(graphdef: nnx.GraphDef) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`apply_model` that also returns the residual.

    Returns:
      (params, latents, timestep, text) -> (velocity, residual [B, N, D] in the compute dtype).
    """

    def apply(params: Any, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        embedded = model.embedded(latents, timestep, text)
        x, _ = model.run_blocks(embedded, model.attend, model.per_block_attention())
        return model.velocity_of(embedded, x), x - embedded.x

    return apply


def apply_residual(graphdef: nnx.GraphDef) -> Callable[..., jax.Array]:
    """`apply_model` without its blocks.

    Returns:
      (params, latents, timestep, text, residual) -> velocity.
    """

    def apply(params: Any, latents: jax.Array, timestep: jax.Array, text: jax.Array, residual: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        embedded = model.embedded(latents, timestep, text)
        return model.velocity_of(embedded, embedded.x + residual)

    return apply


def magnitude_ratio(residual: jax.Array, before: jax.Array) -> jax.Array:
    """The mean over tokens of |residual| / |before|, the residuals [B, N, D] of two steps; float32 scalar.

    Tokens whose residual was zero do not count; padding has such ones.
    """
    length = lambda x: jnp.linalg.norm(x.astype(accumulation_dtype(x.dtype)), axis=-1)
    now, then = length(residual), length(before)
    counts = then > 0
    return jnp.where(counts, now / jnp.where(counts, then, 1), 0).sum() / jnp.maximum(counts.sum(), 1)
