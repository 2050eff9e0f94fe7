"""Matrix products that accumulate in float32, whatever the dtype of their operands."""

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of scores, weights and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, accumulated and returned in float32 (float64 for float64 operands).

    Operands of 16 bits go to the matrix units unchanged. XLA's CPU backend lacks such a product for some layouts
    ("Unsupported element type for DotThunk"), so on CPUs they are widened first. That changes no result: the product of
    two 16-bit numbers is exact in float32. The choice depends on the platform that a program is lowered for, not on the
    machine that lowers it.
    """
    dtype = accumulation_dtype(jnp.promote_types(left.dtype, right.dtype))
    direct = lambda left, right: jnp.einsum(subscripts, left, right, preferred_element_type=dtype)
    if left.dtype.itemsize > 2 and right.dtype.itemsize > 2:
        return direct(left, right)
    widened = lambda left, right: direct(left.astype(dtype), right.astype(dtype))
    return jax.lax.platform_dependent(left, right, cpu=widened, default=direct)
