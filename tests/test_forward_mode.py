"""Forward mode against reverse mode, finite differences and JAX's own rules; and reverse mode through forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import assert_close

from rehyat_jax.attention.differentiation import with_backward


def random_like(tree, seed):
    """A tree of normal numbers in the shapes and dtypes of another."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


# Its backward pass is three times as large as JAX's, to show which of the two runs.
@with_backward(lambda inputs, cotangent: (3 * inputs[1] * cotangent, 3 * inputs[0] * cotangent))
def _times(x, y):
    return x * y


def test_reverse_mode_runs_the_given_backward_pass_and_forward_mode_does_not():
    x, y, dx, dy = 2.0, 5.0, 7.0, 11.0
    assert jax.grad(_times, (0, 1))(x, y) == (3 * y, 3 * x)
    assert jax.jvp(_times, (x, y), (dx, dy)) == (x * y, dx * y + x * dy)
    result, push = jax.linearize(_times, x, y)
    assert (result, push(dx, dy)) == (x * y, dx * y + x * dy)
    assert jax.linear_transpose(lambda dx: jax.jvp(_times, (x, y), (dx, 0.0))[1], x)(1.0) == (3 * y,)


def test_zero_tangents_cost_nothing():
    operations = jax.make_jaxpr(lambda x, y, dx: jax.jvp(lambda x: _times(x, y), (x,), (dx,))[1])(2.0, 5.0, 7.0)
    (equation,) = (e for e in operations.eqns if e.primitive.name == "linear_map")
    assert len(equation.invars) == 3  # x and y, and one tangent


def test_reverse_mode_through_forward_mode_runs_the_given_backward_pass_for_each():
    # The gradients of (x y, dx y) by x, y and dx. Those of x y and that by dx are three times as large; that of dx y by
    # y is JAX's own.
    x, y, dx = 2.0, 5.0, 7.0
    push = lambda x, y, dx: jax.jvp(lambda x: _times(x, y), (x,), (dx,))
    assert jax.grad(lambda *arguments: push(*arguments)[0], (0, 1, 2))(x, y, dx) == (3 * y, 3 * x, 0)
    assert jax.grad(lambda *arguments: push(*arguments)[1], (0, 1, 2))(x, y, dx) == (0, dx, 3 * y)
    assert jax.jvp(push, (x, y, dx), (1.0, 10.0, 100.0))[1] == (1 * y + 10 * x, 100 * y + 10 * dx)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 1), (1, 0)], ids=str)
def test_batches_are_differentiated_as_their_examples(axes):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size={None: (4,), 0: (3, 4), 1: (4, 3)}[axis]), jnp.float32) for axis in axes)
    rows = lambda array, axis: array if axis != 1 else array.T
    plain = lambda x, y: rows(x, axes[0]) * rows(y, axes[1])
    batched = jax.vmap(_times, axes)
    tangents, cotangent = random_like((x, y), 1), random_like(plain(x, y), 2)
    assert_close(jax.jvp(batched, (x, y), tangents), jax.jvp(plain, (x, y), tangents), 1e-6)
    wanted = jax.tree.map(lambda g: 3 * g, jax.vjp(plain, x, y)[1](cotangent))
    assert_close(jax.vjp(batched, x, y)[1](cotangent), wanted, 1e-6)
    # Tangents alone may be batched too.
    directions = random_like(jnp.stack([x] * 5), 3)
    found = jax.vmap(lambda dx: jax.jvp(batched, (x, y), (dx, y))[1])(directions)
    assert_close(found, jax.vmap(lambda dx: jax.jvp(plain, (x, y), (dx, y))[1])(directions), 1e-6)
