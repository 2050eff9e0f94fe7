"""ReHyAt's feature map (section 3; open details decided here): a network per head, then powers.

The network has `num_layers` linear layers without biases (grouped 1x1 convolutions, groups = heads). All have
`features` columns. `hidden_activation` follows every layer but the last: "gelu" (tanh form), "silu" or "relu".
`output_activation` follows the last: "relu", "softplus" or "elu_plus_one". All of these are non-negative, so
denominators are positive by construction. The output is split into `degree` equal parts, and part i is raised to the
power i. With 256 features, two layers add about 2.4M parameters to a block of Wan2.1 1.3B, the published count.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.features.matrix_product import matrix_product

# He's gain: an activation halves the second moment of its input.
INITIALIZER = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))

# The tanh form of GELU is x (1 + tanh(a x + b x^3)) / 2.
_GELU_LINEAR = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    """As `jax.nn.gelu`, in fewer operations, and keeping no more than x and the gate for the backward pass.

    What is kept of a tile of tokens does not fit into registers. Writing and reading again the many arrays that JAX
    would keep left a TPU's matrix units waiting.
    """
    return x * _gelu_gate(x)


def _gelu_gate(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.tanh(x * (_GELU_CUBIC * (x * x) + _GELU_LINEAR)) + 0.5


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (d_x,) = primals, tangents
    gate = _gelu_gate(x)
    # Not with x * x: the compiler would keep that of the gate.
    gate_slope = gate * (1 - gate) * ((6 * _GELU_CUBIC * x) * x + 2 * _GELU_LINEAR)
    return x * gate, (gate + x * gate_slope) * d_x


HIDDEN_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
OUTPUT_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
}


def problem(config: Any) -> str | None:
    """The first field with a wrong value."""
    if config.num_layers < 1:
        return f"num_layers must be at least 1, found {config.num_layers}"
    if config.degree < 1 or config.features % config.degree:
        return (
            f"features ({config.features}) must be a multiple of feature_map.degree ({config.degree}), and the degree "
            f"at least 1"
        )
    activations = (("hidden_activation", HIDDEN_ACTIVATIONS), ("output_activation", OUTPUT_ACTIVATIONS))
    for field, allowed in activations:
        if getattr(config, field) not in allowed:
            return f"{field} must be one of {tuple(allowed)}, found {getattr(config, field)!r}"
    return None


def kernel_shapes(config: Any, head_dim: int) -> list[tuple[int, int]]:
    """One matrix for each layer."""
    return [(config.features if layer else head_dim, config.features) for layer in range(config.num_layers)]


def divisor(config: Any) -> float:
    """Makes phi_query.phi_key a mean over features, whatever their number."""
    return config.features**0.5


def apply(config: Any, x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """[tokens, head_dim] -> [tokens, features]."""
    hidden = x
    for kernel in kernels[:-1]:
        hidden = matrix_product(hidden, kernel)
        hidden = HIDDEN_ACTIVATIONS[config.hidden_activation](hidden).astype(x.dtype)
    output = matrix_product(hidden, kernels[-1])
    parts = jnp.split(OUTPUT_ACTIVATIONS[config.output_activation](output), config.degree, axis=-1)
    return jnp.concatenate([part**power for power, part in enumerate(parts, start=1)], axis=-1)
