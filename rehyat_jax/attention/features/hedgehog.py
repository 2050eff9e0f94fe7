"""Hedgehog's feature map (Zhang et al. 2024, arXiv 2402.04347): softmax over the features of x W and of -x W.

Both halves sum to one, so a feature is bounded, and a sharp query has few large ones, as a row of softmax attention
does. W begins as the identity.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.matrix_product import matrix_product


def problem(config: Any) -> str | None:
    """The two halves need an even number of features."""
    if config.features < 2 or config.features % 2:
        return f'features must be even for kind "hedgehog", found {config.features}'
    return None


def kernel_shapes(config: Any, head_dim: int) -> list[tuple[int, int]]:
    """One matrix: half of the features are of x W, the other half of -x W."""
    return [(head_dim, config.features // 2)]


def initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The identity for every head, cut or padded with zeros where the matrix is not square."""
    del key
    return jnp.broadcast_to(jnp.eye(shape[-2], shape[-1], dtype=dtype), shape)


def divisor(config: Any) -> float:
    """Makes phi_query.phi_key one where all features of a half are equal."""
    return 2 / config.features**0.5


def apply(config: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[tokens, head_dim] -> [tokens, features]."""
    del config
    scores = matrix_product(x, kernel)
    return jnp.concatenate([_softmax(scores), _softmax(-scores)], axis=-1)


def _softmax(scores: jax.Array) -> jax.Array:
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return weights / weights.sum(axis=-1, keepdims=True)
