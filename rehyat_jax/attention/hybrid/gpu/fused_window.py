"""A chunk's window by fused kernels: any forward kernel is trainable by the backward of a plain flash attention.

Let L be the joint log-sum-exp of a row (of its softmax weights and its linear mass) and o the joint output. Let
P = exp(s - L) and delta = sum(do * o). Then the softmax branch's gradient,

    dS = P * (do.v - delta),   dv = P^T do,

is what a flash attention's backward computes if it is given (o, L) as its own output and log-sum-exp. It needs no
knowledge of the linear branch, and no log-sum-exp is differentiated. Let w be the weight that a row gives to its linear
branch, y = sum(P v) + w aL. The remaining gradients are small products:

    dphi_query = (w do) s^T - w delta z,   ds = phi_query^T (w do),   dz = -phi_query^T (w delta).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.linear_products import read_sums_backward
from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.product import product
from rehyat_jax.attention.residuals import kept


class WindowKernels(NamedTuple):
    """The forward and the backward of a fused window, for n windows at once.

    The arrays are:

    - query [n, queries, heads, head_dim], key and value [n, keys, heads, head_dim];
    - num_keys int32 [n]: the other keys of a window are padding;
    - phi_query [n, queries, heads, features];
    - linear: the sums over the keys outside the window;
    - statistics of a row: [n, heads, queries], float32 or float64.

    Attributes:
      forward: (query, key, value, num_keys, phi_query, linear, stabilizer=...) -> (output, log_sum_exp, linear_weight):
        the joint output, L and w above.
      backward: (query, key, value, num_keys, output, log_sum_exp, cotangent) -> cotangents of query, key and value, for
        any given output and log_sum_exp. The cotangents of padding keys may be anything.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def attend_window_fused(
    kernels: WindowKernels,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_keys: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
) -> jax.Array:
    """y = (aS + aL) / (nS + nL), ReHyAt's joint normalisation: an `AttendWindow` of chunks.py, given `kernels`."""
    batch, chunks = query.shape[:2]
    num_keys = jnp.broadcast_to(num_keys, (batch, chunks))
    arrays = (query, key, value, num_keys, phi_query, *linear)
    output = _attend(kernels, stabilizer, *(array.reshape(batch * chunks, *array.shape[2:]) for array in arrays))
    return output.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, stabilizer, query, key, value, num_keys, phi_query, state, normalizer):
    return _attend_forward(kernels, stabilizer, query, key, value, num_keys, phi_query, state, normalizer)[0]


def _attend_forward(kernels, stabilizer, query, key, value, num_keys, phi_query, state, normalizer):
    inputs = (query, key, value, num_keys, phi_query)
    results = kept(kernels.forward(*inputs, LinearState(state, normalizer), stabilizer=stabilizer))
    return results[0], (*inputs, state, normalizer, *results)


def _attend_backward(kernels, stabilizer, residuals, cotangent):
    query, key, value, num_keys, phi_query, state, normalizer, output, log_sum_exp, linear_weight = residuals
    # The compiler drops this call where only the features learn: nothing else here reads its results.
    d_query, d_key, d_value = kernels.backward(query, key, value, num_keys, output, log_sum_exp, cotangent)

    weight = jnp.swapaxes(linear_weight, 1, 2)
    delta = product("nqhd,nqhd->nqh", cotangent, output)
    d_phi_query, d_linear = read_sums_backward(
        phi_query, LinearState(state, normalizer), LinearState(weight[..., None] * cotangent, -weight * delta)
    )
    return d_query, d_key, d_value, None, d_phi_query, *d_linear


_attend.defvjp(_attend_forward, _attend_backward)
