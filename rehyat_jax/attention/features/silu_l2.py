"""SiLU of x W, shifted to be non-negative and divided by its L2 norm: a bounded map without exponentials of sums.

SiLU with an L2 norm is the map of several gated linear attentions, which have no denominator. Here features enter a
denominator, so SiLU's minimum is subtracted first. W begins as He's initialisation.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.matrix_product import matrix_product
from rehyat_jax.attention.features.mlp import INITIALIZER

__all__ = ["INITIALIZER", "apply", "divisor", "kernel_shapes", "problem"]

# -min SiLU, rounded up.
_SHIFT = 0.27847

# Keeps the norm of features that are all zero away from zero.
_SMALLEST_SQUARE = 1e-12


def problem(config: Any) -> str | None:
    """Any number of features will do."""
    return None if config.features >= 1 else f"features must be at least 1, found {config.features}"


def kernel_shapes(config: Any, head_dim: int) -> list[tuple[int, int]]:
    """One matrix."""
    return [(head_dim, config.features)]


def divisor(config: Any) -> float:
    """None is needed: phi_query.phi_key is a cosine."""
    del config
    return 1.0


def apply(config: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[tokens, head_dim] -> [tokens, features]."""
    del config
    features = jax.nn.silu(matrix_product(x, kernel)) + _SHIFT
    return features * jax.lax.rsqrt(jnp.sum(features * features, axis=-1, keepdims=True) + _SMALLEST_SQUARE)
