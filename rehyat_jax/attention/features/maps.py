"""Feature maps phi_query and phi_key: a small network per head, then powers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.inline import InlineFeatures

# Of the tanh form of GELU, x (1 + tanh(a x + b x^3)) / 2.
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


_HIDDEN_ACTIVATIONS = {"gelu": _gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
_OUTPUT_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
}


@jax.custom_vjp
def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """The matrix product, as `product.product` but free of what Pallas cannot lower.

    Differentiated by hand: JAX would multiply float32 cotangents, which TPUs round to bfloat16 in the end, but write,
    read and load into their matrix units at twice the bytes.
    """
    return _contracted(left, right, 1, 0)


def _contracted(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    accumulation_dtype = jnp.promote_types(left.dtype, jnp.float32)
    contraction = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contraction, preferred_element_type=accumulation_dtype)


def _product_forward(left, right):
    return _product(left, right), (left, right)


def _product_backward(operands, cotangent):
    left, right = operands
    cotangent = cotangent.astype(left.dtype)
    d_left, d_right = _contracted(cotangent, right, 1, 1), _contracted(left, cotangent, 0, 0)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


_product.defvjp(_product_forward, _product_backward)


class HeadwiseLinear(nnx.Module):
    """A linear layer of its own for every head, without bias: a 1x1 convolution with groups = heads."""

    def __init__(self, heads: int, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        # He's gain: an activation halves the second moment of its input.
        initializer = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        kernel = initializer(rngs.params(), (heads, in_features, out_features))
        self.kernel = nnx.Param(kernel, axes=("tensor", None, "fsdp"))  # of the mesh, see `parallel.sharding`


@dataclasses.dataclass(frozen=True)
class FeatureFunction:
    """phi of one head (ReHyAt section 3): a network, its output cut into `degree` parts, part i to the power i."""

    config: FeatureMapConfig

    def __call__(self, x: jax.Array, scale: jax.Array, *kernels: jax.Array) -> jax.Array:
        """x [tokens, head_dim], scale [1, 1], kernels [in, out] -> non-negative features [tokens, features].

        Products are in the dtype of x with float32 accumulation, everything between them in float32; the features are
        returned in the dtype of x.
        """
        config = self.config
        hidden = x
        for kernel in kernels[:-1]:
            hidden = _product(hidden, kernel.astype(x.dtype))
            hidden = _HIDDEN_ACTIVATIONS[config.hidden_activation](hidden).astype(x.dtype)
        output = _product(hidden, kernels[-1].astype(x.dtype))
        parts = jnp.split(_OUTPUT_ACTIVATIONS[config.output_activation](output), config.degree, axis=-1)
        powers = jnp.concatenate([part**power for power, part in enumerate(parts, start=1)], axis=-1)
        return (powers * scale.astype(powers.dtype)).astype(x.dtype)


class FeatureMap(nnx.Module):
    """phi_query or phi_key: a `FeatureFunction` with weights of its own for every head.

    Parameters (float32): layer_0.kernel [heads, head_dim, features], layer_i.kernel [heads, features, features] and
    log_scale [heads], zero at first (see `calibration.linear_mass_log_scale`). The features are multiplied by
    exp(log_scale) / sqrt(features), so that phi_query.phi_key is a mean over features whatever their number.
    """

    def __init__(self, config: FeatureMapConfig, *, heads: int, head_dim: int, rngs: nnx.Rngs):
        self.config = config
        for i in range(config.num_layers):
            in_features = head_dim if i == 0 else config.features
            setattr(self, f"layer_{i}", HeadwiseLinear(heads, in_features, config.features, rngs=rngs))
        self.log_scale = nnx.Param(jnp.zeros(heads), axes=("tensor",))

    def inline(self, x: jax.Array) -> InlineFeatures:
        """The features of queries or keys [batch, tokens, heads, head_dim], to be computed by who needs them."""
        scale = jnp.exp(self.log_scale[...]) / self.config.features**0.5
        kernels = (getattr(self, f"layer_{i}").kernel[...] for i in range(self.config.num_layers))
        return InlineFeatures(x, (scale[:, None, None], *kernels), FeatureFunction(self.config))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Queries or keys [batch, tokens, heads, head_dim] -> features [batch, tokens, heads, features]."""
        return self.inline(x).compute()
