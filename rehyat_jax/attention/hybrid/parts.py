"""The parts of hybrid attention: softmax over some keys, sums over other keys, and their merger into one result.

A further way to normalise is a function of a `SoftmaxPart` and a `LinearPart`, like `merge` and `gated_merge`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.product import product

# In "joint" form the linear terms are scaled by at most exp(64): no product with them can then overflow float32, nor
# turn into 0 * inf in a gradient. Only a row whose largest score and log linear mass both lie below -64 is affected.
LOWEST_LINEAR_SHIFT = -64.0


class SoftmaxPart(NamedTuple):
    """Softmax over a set of keys, before its normalisation; float32 (float64 for float64 inputs).

    Attributes:
      values: sum_j exp(s_j - maximum) v_j of the scores s_j = q.k_j / sqrt(head_dim), [..., n, heads, head_dim].
      mass: sum_j exp(s_j - maximum), [..., heads, n].
      maximum: the largest score of every query, [..., heads, n], a constant in differentiation.
    """

    values: jax.Array
    mass: jax.Array
    maximum: jax.Array

    @classmethod
    def of_output(cls, output: jax.Array, log_sum_exp: jax.Array, maximum: jax.Array) -> "SoftmaxPart":
        """The part from what a flash attention returns.

        Args:
          output: softmax attention to the keys, [..., n, heads, head_dim].
          log_sum_exp: log sum_j exp(s_j), [..., heads, n].
          maximum: the largest scores. "joint" and `gated_merge` are right with any constant near `log_sum_exp`.
        """
        maximum = jax.lax.stop_gradient(maximum)
        mass = jnp.exp(log_sum_exp - maximum)
        return cls(output.astype(mass.dtype) * _per_token(mass), mass, maximum)

    @property
    def log_sum_exp(self) -> jax.Array:
        """log sum_j exp(s_j), [..., heads, n]."""
        return self.maximum + jnp.log(self.mass)

    @property
    def output(self) -> jax.Array:
        """Softmax attention to these keys alone, [..., n, heads, head_dim]."""
        return self.values / _per_token(self.mass)


class LinearPart(NamedTuple):
    """Linear attention to a set of keys, before its normalisation; float32 (float64 for float64 inputs).

    Attributes:
      values: sum_j phi_query(q).phi_key(k_j) v_j, [..., n, heads, head_dim].
      mass: sum_j phi_query(q).phi_key(k_j), [..., heads, n]; zero if there are no keys.
    """

    values: jax.Array
    mass: jax.Array


def softmax_part(query: jax.Array, key: jax.Array, value: jax.Array, is_key: jax.Array | None = None) -> SoftmaxPart:
    """Softmax over the keys, with all scores in memory.

    Args:
      query: [..., n, heads, head_dim].
      key, value: [..., m, heads, head_dim].
      is_key: boolean [..., m], False for padding; None without padding. At least one key is none.
    """
    scores = product("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    if is_key is not None:
        scores = jnp.where(is_key[..., None, None, :], scores, -jnp.inf)
    maximum = jnp.max(jax.lax.stop_gradient(scores), axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    values = product("...hqk,...khd->...qhd", weights.astype(value.dtype), value)
    return SoftmaxPart(values, jnp.sum(weights, axis=-1), maximum)


def linear_part(phi_query: jax.Array, sums: LinearState) -> LinearPart:
    """Linear attention to the keys that `sums` [..., heads, features(, head_dim)] holds.

    Args:
      phi_query: non-negative features [..., n, heads, features].
    """
    sums = LinearState(*(leaf.astype(phi_query.dtype) for leaf in sums))
    values = product("...qhf,...hfd->...qhd", phi_query, sums.state)
    return LinearPart(values, product("...qhf,...hf->...hq", phi_query, sums.normalizer))


def merge(softmax: SoftmaxPart, linear: LinearPart, *, stabilizer: str) -> jax.Array:
    """y = (aS + aL) / (nS + nL), ReHyAt's joint normalisation; [..., n, heads, head_dim].

    "row_max" subtracts the largest score from the softmax branch only, as printed in the paper. "joint" subtracts the
    same constant from both branches. That does not change their ratio, so it can be a constant in the gradient too. The
    choice must include the linear mass: otherwise linear terms would overflow where all scores are far below zero.
    """
    if stabilizer == "row_max":
        return (softmax.values + linear.values) / _per_token(softmax.mass + linear.mass)
    # Without linear mass, log 0 is -inf. The maximum ignores it, and nothing here is differentiated.
    shift = jnp.maximum(softmax.maximum, jnp.log(jax.lax.stop_gradient(linear.mass)))
    softmax_scale = jnp.exp(softmax.maximum - shift)
    linear_scale = jnp.exp(-jnp.maximum(shift, LOWEST_LINEAR_SHIFT))
    mass = softmax_scale * softmax.mass + linear_scale * linear.mass
    values = _per_token(softmax_scale) * softmax.values + _per_token(linear_scale) * linear.values
    return values / _per_token(mass)


def gated_merge(softmax: SoftmaxPart, linear: LinearPart, gate: jax.Array) -> jax.Array:
    """Two branches, each normalised by itself: (1 - gate) softmax + gate linear; [..., n, heads, head_dim].

    Args:
      gate: [heads]. Where there is no linear mass, it counts as zero.
    """
    has_keys = linear.mass > 0
    branch = linear.values / _per_token(jnp.where(has_keys, linear.mass, 1))
    gate = jnp.where(has_keys, gate[:, None], 0)
    return softmax.output + _per_token(gate) * (branch - softmax.output)


def _per_token(statistic: jax.Array) -> jax.Array:
    """[..., heads, n] -> [..., n, heads, 1]."""
    return jnp.swapaxes(statistic, -1, -2)[..., None]
