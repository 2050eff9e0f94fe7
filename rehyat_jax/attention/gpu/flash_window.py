"""A chunk's window by a flash attention that knows nothing of linear attention: the merge, and its gradient.

Both directions are exact. Forward, a flash attention returns its output o_S and log-sum-exp L_S, which is all that the
joint normalisation needs of the softmax branch. Backward, let L be the joint log-sum-exp (of the softmax weights and
the linear mass) and o the joint output: with P = exp(s - L) and delta = sum(do * o),

    dS = P * (do.v - delta),   dv = P^T do

is just what a flash attention's backward computes when it is given (o, L) for its own (o_S, L_S). So the log-sum-exp
is never differentiated.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rehyat_jax.attention.product import product
from rehyat_jax.attention.state import LinearState
from rehyat_jax.attention.window import _LOWEST_LINEAR_SHIFT


class FlashAttention(NamedTuple):
    """Softmax attention to the first num_keys of the keys, in two directions that share a log-sum-exp.

    Arrays are query [n, queries, heads, head_dim], key and value [n, keys, heads, head_dim], num_keys int32 [n],
    log_sum_exp [n, heads, queries] (of scale * q.k, float32, or float64 for float64 inputs).

    Attributes:
      forward: (query, key, value, num_keys, scale) -> (output, log_sum_exp).
      backward: (query, key, value, num_keys, output, log_sum_exp, cotangent, scale) -> cotangents of query, key and
        value, for whatever output and log_sum_exp are given. It may leave anything finite for keys that are padding.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def attend_window_by_flash(
    flash: FlashAttention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_keys: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
) -> jax.Array:
    """y = (aS + aL) / (nS + nL) (ReHyAt's joint normalisation): an `AttendWindow` once `flash` is given.

    "row_max" costs a second forward pass of the flash attention, see `_row_max`; "joint" does not.
    """
    batch, chunks = query.shape[:2]
    num_keys = jnp.broadcast_to(num_keys, (batch, chunks))
    arrays = (query, key, value, num_keys, phi_query, *linear)
    output = _attend(flash, stabilizer, *(array.reshape(batch * chunks, *array.shape[2:]) for array in arrays))
    return output.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(flash, stabilizer, query, key, value, num_keys, phi_query, state, normalizer):
    return _attend_forward(flash, stabilizer, query, key, value, num_keys, phi_query, state, normalizer)[0]


def _attend_forward(flash, stabilizer, query, key, value, num_keys, phi_query, state, normalizer):
    softmax_output, softmax_log_sum_exp = flash.forward(query, key, value, num_keys, _scale(query))
    linear_values = product("nqhf,nhfd->nqhd", phi_query, state.astype(phi_query.dtype))
    linear_mass = product("nqhf,nhf->nhq", phi_query, normalizer.astype(phi_query.dtype))

    # exp(-shift) is taken out of the softmax weights, linear_scale multiplies the linear ones: see window.py.
    if stabilizer == "row_max":
        shift, linear_scale = _row_max(flash, query, key, value, num_keys), 1.0
    else:
        shift = jnp.maximum(softmax_log_sum_exp, jnp.log(linear_mass))
        linear_scale = jnp.exp(-jnp.maximum(shift, _LOWEST_LINEAR_SHIFT))
    softmax_mass = jnp.exp(softmax_log_sum_exp - shift)
    mass = softmax_mass + linear_scale * linear_mass
    linear_scale = linear_scale / mass
    log_sum_exp = shift + jnp.log(mass)

    output = _rows(softmax_mass / mass) * softmax_output + _rows(linear_scale) * linear_values
    output = output.astype(query.dtype)
    return output, (query, key, value, num_keys, phi_query, state, normalizer, output, log_sum_exp, linear_scale)


def _attend_backward(flash, stabilizer, residuals, cotangent):
    query, key, value, num_keys, phi_query, state, normalizer, output, log_sum_exp, linear_scale = residuals
    # The compiler drops this call where only the features learn: nothing else here reads it.
    d_query, d_key, d_value = flash.backward(query, key, value, num_keys, output, log_sum_exp, cotangent, _scale(query))
    d_values = (_rows(linear_scale) * cotangent).astype(phi_query.dtype)
    d_mass = -linear_scale * product("nqhd,nqhd->nhq", cotangent, output)
    d_phi_query = product("nqhd,nhfd->nqhf", d_values, state.astype(phi_query.dtype))
    d_phi_query += _rows(d_mass) * normalizer[:, None]
    d_state = product("nqhf,nqhd->nhfd", phi_query, d_values)
    d_normalizer = product("nqhf,nhq->nhf", phi_query, d_mass)
    return d_query, d_key, d_value, None, d_phi_query.astype(phi_query.dtype), d_state, d_normalizer


_attend.defvjp(_attend_forward, _attend_backward)


# A power of two, so that it rounds nothing: scores keep their float32 digits. The larger, the closer is the log-sum-exp
# to the maximum: at most log(6240) / 2**16 = 0.00013 above it, where all keys of a Wan window tie. But kernels round
# scale * max before they subtract it, and exp2 of that rounding must stay in range: so for |score| up to 10**4.
_INVERSE_TEMPERATURE = 2.0**16


def _row_max(flash, query, key, value, num_keys) -> jax.Array:
    """Every row's largest score [n, heads, queries], as the log-sum-exp at a low temperature.

    A flash attention returns the sum of a row's weights, not their maximum. Scores themselves would be gigabytes.
    """
    _, log_sum_exp = flash.forward(query, key, value, num_keys, _INVERSE_TEMPERATURE * _scale(query))
    return log_sum_exp / _INVERSE_TEMPERATURE


def _scale(query: jax.Array) -> float:
    return query.shape[-1] ** -0.5


def _rows(statistic: jax.Array) -> jax.Array:
    """[n, heads, queries] -> [n, queries, heads, 1]."""
    return jnp.swapaxes(statistic, 1, 2)[..., None]
