"""A chunk's softmax window and linear state, merged by one normalisation: the arithmetic shared by all XLA forms."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.product import product


def attend_window(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_key: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
) -> jax.Array:
    """y = (aS + aL) / (nS + nL) for the queries of a chunk (ReHyAt's joint normalisation).

    Args:
      query: [..., n, heads, head_dim].
      key, value: the softmax window, [..., w, heads, head_dim].
      is_key: boolean [..., w], False for padding. Every window holds at least one key.
      phi_query: non-negative features [..., n, heads, features].
      linear: sums over the keys outside the window.

    Returns: [..., n, heads, head_dim] in the dtype of `query`.
    """
    scores = product("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(is_key[..., None, None, :], scores, -jnp.inf)

    linear = LinearState(*(leaf.astype(phi_query.dtype) for leaf in linear))
    linear_values = product("...qhf,...hfd->...qhd", phi_query, linear.state)
    linear_mass = product("...qhf,...hf->...hq", phi_query, linear.normalizer)

    shift, linear_scale = _stabilize(scores, linear_mass, stabilizer)
    weights = jnp.exp(scores - shift[..., None])
    softmax_values = product("...hqk,...khd->...qhd", weights.astype(value.dtype), value)
    mass = jnp.sum(weights, axis=-1) + linear_scale * linear_mass
    values = softmax_values + jnp.swapaxes(linear_scale, -1, -2)[..., None] * linear_values
    return (values / jnp.swapaxes(mass, -1, -2)[..., None]).astype(query.dtype)


# In "joint" form the linear terms are scaled by at most exp(64): no product with them can then overflow float32, nor
# turn into 0 * inf in a gradient. Only a row whose largest score and log linear mass both lie below -64 is affected.
LOWEST_LINEAR_SHIFT = -64.0


def _stabilize(scores: jax.Array, linear_mass: jax.Array, stabilizer: str) -> tuple[jax.Array, jax.Array]:
    """The constant subtracted from the scores of a row, and the factor of its linear terms: both [..., heads, n].

    "row_max" subtracts the largest score from the softmax branch only, as printed in the paper. "joint" subtracts the
    same constant from both branches. That does not change their ratio, so it can be a constant in the gradient too. The
    choice must include the linear mass: otherwise linear terms would overflow where all scores are far below zero.
    """
    row_max = jnp.max(jax.lax.stop_gradient(scores), axis=-1)
    if stabilizer == "row_max":
        return row_max, jnp.ones_like(row_max)
    # Without linear mass, log 0 is -inf. The maximum ignores it, and nothing here is differentiated.
    shift = jnp.maximum(row_max, jnp.log(jax.lax.stop_gradient(linear_mass)))
    return shift, jnp.exp(-jnp.maximum(shift, LOWEST_LINEAR_SHIFT))
