"""The transformer's linear layers against their formulas: gates, and sums over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rehyat_jax.models.linear import linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gated_layer_has_the_gradients_of_its_formula(dtype):
    layer = linear(24, 40, ("fsdp", "tensor"), dtype=dtype, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1))
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (3, 50, 24))
    gate, cotangent = (
        jax.random.normal(jax.random.key(2), (3, 1, 40)),
        jax.random.normal(jax.random.key(3), (3, 50, 40)),
    )

    def gradients(apply, precision):
        numbers = jax.tree.map(lambda leaf: leaf.astype(precision), (params, x, gate))
        loss = lambda *arguments: (apply(*arguments) * cotangent.astype(dtype)).astype(jnp.float32).sum()
        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2))(*numbers))

    plain = lambda params, x, gate: (x @ params["kernel"][...] + params["bias"][...]) * gate
    wanted = gradients(plain, jnp.float32)
    found = gradients(lambda params, x, gate: nnx.merge(graphdef, params).gated(x.astype(dtype), gate), jnp.float32)
    for got, expected in zip(found, wanted, strict=True):
        assert _relative_error(got, expected) < 8 * float(jnp.finfo(dtype).eps)


def test_a_gated_layer_that_keeps_its_input_alone_is_not_computed_again():
    layer = linear(24, 40, ("fsdp", "tensor"), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    block = jax.checkpoint(lambda params, x, gate: nnx.merge(graphdef, params).gated(jnp.tanh(x), gate))
    loss = lambda *arguments: block(*arguments).sum()
    shapes = params, jax.ShapeDtypeStruct((2, 50, 24), jnp.float32), jax.ShapeDtypeStruct((2, 1, 40), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    assert compiled.as_text().count(" dot(") == 2  # the gradients of x and of W with the gate's


def test_biases_in_bfloat16_get_exact_sums_over_tokens():
    layer = linear(4, 3, ("fsdp", "tensor"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    cotangent = 1 + jax.random.normal(jax.random.key(0), (1, 2**15, 3)).astype(jnp.bfloat16)
    graphdef, params = nnx.split(layer)
    x = jnp.zeros((1, 2**15, 4), jnp.bfloat16)
    (gradient,) = jax.vjp(lambda params: nnx.merge(graphdef, params)(x), params)[1](cotangent)
    exact = np.asarray(cotangent, np.float64).sum((0, 1))
    np.testing.assert_allclose(gradient["bias"][...], exact, rtol=1e-5)


def _relative_error(found, expected):
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
