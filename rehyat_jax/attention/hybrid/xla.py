"""Parallel form: all chunks at once, as a batch, for training."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.chunks import attend_chunks
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.hybrid.window import attend_window


def _attend(query, key, value, num_keys, phi_query, linear: LinearState, **options) -> jax.Array:
    is_key = jnp.arange(key.shape[2]) < num_keys[:, None]
    return attend_window(query, key, value, is_key, phi_query, linear, **options)


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """Batches the windows of all chunks. A 0/1 matrix product sums the linear keys of each."""
    return attend_chunks(_attend, request)


BACKEND = Backend("xla", run)
