"""The matrix product of feature maps, which Pallas can lower and whose gradient multiplies 16-bit cotangents."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.differentiation import with_backward


def _contracted(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    accumulation_dtype = jnp.promote_types(left.dtype, jnp.float32)
    contraction = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contraction, preferred_element_type=accumulation_dtype)


def _backward(operands, cotangent):
    left, right = operands
    cotangent = cotangent.astype(left.dtype)
    d_left, d_right = _contracted(cotangent, right, 1, 1), _contracted(left, cotangent, 0, 0)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


@with_backward(_backward, in_kernels=True)
def matrix_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """The matrix product, as `product.product` but free of what Pallas cannot lower.

    The backward pass is written by hand. JAX would multiply float32 cotangents, which TPUs round to bfloat16 in the
    end, but write, read and load into their matrix units at twice the bytes.
    """
    return _contracted(left, right, 1, 0)
