"""The transformer's linear layers: cut over the mesh, with sums over tokens in float32, and gated at a block's end."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from rehyat_jax.attention.differentiation import with_backward
from rehyat_jax.models.lora import Lora, LoraConfig
from rehyat_jax.models.modulation import times_gate
from rehyat_jax.parallel.mesh import axis_size


class Linear(nnx.Linear):
    """x W + b, whose bias gets its gradient from a sum over tokens in float32, which is not rounded then.

    With an adapter, `lora`, its product is added to x W.

    Differentiated by JAX, a bias that was cast to bfloat16 is summed in bfloat16, by however many partial sums the
    compiler makes. Of `nnx.Linear`'s options those of `linear` are there.
    """

    lora: Lora | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = self._operands(x)
        product = jnp.dot(x, kernel, precision=self.precision)
        if self.lora is not None:
            product = product + self.lora(x)
        return _add_bias(product, self.bias[...])

    def gated(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """The result [B, N, out], rounded to the compute dtype, times a gate, see `modulation`; float32."""
        if self.lora is not None or gate.ndim == 4 or x.shape[1] < self.in_features * axis_size("context"):
            # With an adapter, kernel and gate are frozen: they have no gradient that could share a product. With few
            # tokens, or a gate for every frame, a product [in, out] for all that share a gate would cost more than it
            # saves.
            return times_gate(self(x).astype(gate.dtype), gate)
        return _gated(self.precision)(*self._operands(x), self.bias[...], gate)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    *,
    kernel_init: nnx.Initializer = nnx.initializers.xavier_uniform(),  # noqa: B008
    bias_init: nnx.Initializer = nnx.initializers.zeros,
    dtype: jnp.dtype | None = None,
    param_dtype: jnp.dtype = jnp.float32,
    precision: jax.lax.Precision | None = None,
    lora: LoraConfig | None = None,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer whose kernel [in, out] is cut along these mesh axes (see `parallel.sharding`).

    Args:
      dtype: in which it computes; None is that of its input.
      param_dtype: dtype of its parameters.
      lora: its adapter; None for a layer without one.
    """
    # Along fsdp, what is small is whole everywhere.
    bias_axes = (None if axes[1] == "fsdp" else axes[1],)
    layer = Linear(
        in_features,
        out_features,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        rngs=rngs,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": bias_axes},
    )
    if lora is not None:
        options = dict(param_dtype=param_dtype, precision=precision)
        layer.lora = Lora(lora, in_features, out_features, axes, **options, rngs=rngs)
    return layer


@jax.custom_jvp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype)


@_add_bias.defjvp
def _add_bias_jvp(inputs, tangents):
    dx, dbias = tangents
    # Added in float32, for the transpose to sum the bias's gradient in float32.
    dy = dx.astype(jnp.promote_types(dx.dtype, dbias.dtype)) + jnp.broadcast_to(dbias, dx.shape)
    return _add_bias(*inputs), dy.astype(dx.dtype)


def _gated_backward(inputs, cotangent, *, precision):
    x, kernel, bias, gate = inputs
    dx = jnp.dot((cotangent * gate).astype(x.dtype), kernel.T, precision=precision)
    # Parts of a video on several devices count as videos: their products are summed once, with the gate in them.
    parts = lambda y: rearrange(y, "b (part n) d -> b part n d", part=axis_size("context"))
    products = jnp.einsum(
        "bpni,bpno->bpio",
        parts(x),
        parts(cotangent).astype(x.dtype),
        precision=precision,
        preferred_element_type=gate.dtype,
    )
    sums = cotangent.sum(1)
    dkernel = (products * gate[:, None]).sum((0, 1)).astype(kernel.dtype)
    dgate = (products * kernel.astype(gate.dtype)).sum((1, 2)) + sums * bias.astype(gate.dtype)
    return dx, dkernel, (sums * gate[:, 0]).sum(0).astype(bias.dtype), dgate[:, None]


@functools.cache
def _gated(precision: Any) -> Callable[..., jax.Array]:
    """(x, W, b, gate) -> (x W + b) * gate, whose backward pass does not compute x W + b again.

    JAX would sum dy * (x W + b) over tokens for the gate's gradient. A block that keeps only its input would then
    compute that product once more: a fifth of a hybrid block's forward pass. With G = x^T dy of each video,

        dW = sum over videos of G * gate      dgate = sum over rows of G * W, + b * (sum of dy over tokens)

    so the product that W's gradient takes anyway gives the gate's as well.
    """

    @with_backward(functools.partial(_gated_backward, precision=precision))
    def gated(x, kernel, bias, gate):
        product = jnp.dot(x, kernel, precision=precision)
        return (product + bias.astype(x.dtype)).astype(gate.dtype) * gate

    return gated
