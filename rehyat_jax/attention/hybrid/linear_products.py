"""The linear branch's matrix products, in which z is one more column of s: the state of values that are all one.

As products of its own, z's sums, reads and their gradients would make XLA's GPU compiler copy all features to float32,
four times the bytes of a query. Operands are of the features' or values' dtype, sums are float32 (float64 for float64).
"""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.differentiation import with_backward
from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.product import product


def _sum_keys_backward(inputs, cotangent):
    phi_key, value = inputs
    d_sums, values = _join(*cotangent), _join(value, jnp.ones_like(value[..., 0]))
    d_phi_key = product("...nhd,...hfd->...nhf", values, d_sums.astype(value.dtype)).astype(phi_key.dtype)
    d_value = product("...nhf,...hfd->...nhd", phi_key, cotangent.state.astype(phi_key.dtype)).astype(value.dtype)
    return d_phi_key, d_value


def sum_keys(phi_key: jax.Array, value: jax.Array) -> LinearState:
    """`LinearState.of`: the sums over the tokens of phi_key [..., tokens, heads, features] and value.

    The backward pass is written by hand: JAX would multiply float32 cotangents, and so features copied to float32.
    """
    if phi_key.shape[-3] == 0:
        return LinearState.of(phi_key, value)
    return _sum_keys(phi_key, value)


@with_backward(_sum_keys_backward)
def _sum_keys(phi_key: jax.Array, value: jax.Array) -> LinearState:
    return _split(product("...nhf,...nhd->...hfd", phi_key, _join(value, jnp.ones_like(value[..., 0]))))


def read_sums(phi_query: jax.Array, linear: LinearState) -> LinearState:
    """What queries read: phi_query.s [..., tokens, heads, head_dim] and phi_query.z [..., tokens, heads]."""
    return _split(product("...nhf,...hfd->...nhd", phi_query, _join(*linear).astype(phi_query.dtype)))


def read_sums_backward(phi_query: jax.Array, linear: LinearState, cotangent: LinearState):
    """Cotangents of phi_query and linear, given those of what `read_sums` returned."""
    d_reads = _join(*cotangent).astype(phi_query.dtype)
    d_phi_query = product("...nhd,...hfd->...nhf", d_reads, _join(*linear).astype(phi_query.dtype))
    d_linear = _split(product("...nhf,...nhd->...hfd", phi_query, d_reads))
    return d_phi_query.astype(phi_query.dtype), d_linear


def _join(matrix: jax.Array, column: jax.Array) -> jax.Array:
    """[..., d] and [...] -> [..., d + 8], zeros at the end: matrix units like multiples of 8."""
    joined = jnp.concatenate([matrix, column[..., None]], axis=-1)
    return jnp.pad(joined, [(0, 0)] * column.ndim + [(0, 7)])


def _split(joined: jax.Array) -> LinearState:
    """The matrix and the column of `_join`."""
    return LinearState(joined[..., :-8], joined[..., -8])
