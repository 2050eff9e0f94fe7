"""Joint normalisation of any flash attention's output with the linear branch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.linear_products import read_sums
from rehyat_jax.attention.hybrid.parts import LOWEST_LINEAR_SHIFT
from rehyat_jax.attention.hybrid.state import LinearState

# A power of two rounds nothing: scores keep their float32 digits. A larger one brings the log-sum-exp closer to the
# maximum: here at most log(6240) / 2**16 = 0.00013 above it, where all keys of a Wan window tie. But kernels round
# scale * max before they subtract it, and exp2 of that rounding must stay in range. It does for |score| up to 10**4.
_INVERSE_TEMPERATURE = 2.0**16


def merged_forward(
    flash_attention: Callable[..., tuple[jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_keys: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The forward of `WindowKernels`, made from a flash attention.

    `flash_attention` has the arguments and results of `cudnn_forward`. The only statistic that the joint normalisation
    needs of the softmax branch is the log-sum-exp. "row_max" also needs the row's maximum, from a second pass
    (`_row_max`).
    """
    scale = query.shape[-1] ** -0.5
    softmax_output, softmax_log_sum_exp = flash_attention(query, key, value, num_keys, scale)
    linear_values, linear_mass = read_sums(phi_query, linear)
    linear_mass = jnp.swapaxes(linear_mass, 1, 2)

    # Softmax weights are relative to exp(shift), linear ones are multiplied by linear_scale: as in window.py.
    if stabilizer == "row_max":
        shift, linear_scale = _row_max(flash_attention, query, key, value, num_keys, scale), 1.0
    else:
        shift = jnp.maximum(softmax_log_sum_exp, jnp.log(linear_mass))
        linear_scale = jnp.exp(-jnp.maximum(shift, LOWEST_LINEAR_SHIFT))
    softmax_mass = jnp.exp(softmax_log_sum_exp - shift)
    mass = softmax_mass + linear_scale * linear_mass
    linear_weight = linear_scale / mass

    per_token = lambda statistic: jnp.swapaxes(statistic, 1, 2)[..., None]
    output = per_token(softmax_mass / mass) * softmax_output + per_token(linear_weight) * linear_values
    return output.astype(query.dtype), shift + jnp.log(mass), linear_weight


def _row_max(flash_attention, query, key, value, num_keys, scale) -> jax.Array:
    """Every row's largest score [n, heads, queries], as the log-sum-exp at a low temperature.

    A flash attention returns the sum of a row's weights, not their maximum. Scores themselves would be gigabytes.
    """
    _, log_sum_exp = flash_attention(query, key, value, num_keys, _INVERSE_TEMPERATURE * scale)
    return log_sum_exp / _INVERSE_TEMPERATURE
