"""Forward mode against reverse mode, finite differences and JAX's own rules; and reverse mode through forward mode."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import STABILIZERS, assert_close, attention, make_arrays
from flax import nnx

from rehyat_jax import FeatureMapConfig, HybridConfig, WanConfig, WanTransformer
from rehyat_jax.attention import FeatureMap
from rehyat_jax.attention.differentiation import with_backward
from rehyat_jax.models.linear import linear
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.parallel.sharding import gathered

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Compiling is nearly all that these tests cost. Without XLA's emitters of fused loops it takes a third of the time.
OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later versions have no such option
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=OPTIONS)

# In float32: 2e-7 where measured.
SAME_INNER_PRODUCT = 1e-5

# In float64, with steps of 1e-5: 2e-10 where measured, from the step's square and from rounding.
FINITE_DIFFERENCE = 1e-8


def random_like(tree, seed):
    """A tree of normal numbers in the shapes and dtypes of another."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def assert_same_inner_product(*pairs):
    """Two pairs of trees have one inner product. Its scale is that of a sum of such terms with random signs."""
    products = []
    for left, right in pairs:
        leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        terms = [(np.asarray(a, np.float64) * np.asarray(b, np.float64)).ravel() for a, b in leaves]
        products.append(np.concatenate(terms))
    first, second = (terms.sum() for terms in products)
    assert first != 0
    assert abs(first - second) < SAME_INNER_PRODUCT * sum(np.linalg.norm(terms) for terms in products)


def assert_modes_agree(function, *arguments):
    """<cotangent, J tangent> == <J^T cotangent, tangent>."""
    tangents, cotangent = random_like(arguments, 1), random_like(jax.eval_shape(function, *arguments), 2)

    @jit
    def both_modes(arguments, tangents, cotangent):
        return jax.jvp(function, arguments, tangents)[1], jax.vjp(function, *arguments)[1](cotangent)

    pushed, pulled = both_modes(arguments, tangents, cotangent)
    assert_same_inner_product((cotangent, pushed), (pulled, tangents))


def central_difference(function, arguments, tangents):
    moved = lambda step: jax.tree.map(lambda x, direction: x + step * direction, arguments, tangents)
    return jax.tree.map(lambda above, below: (above - below) / 2e-5, function(*moved(1e-5)), function(*moved(-1e-5)))


def assert_tangent_is_a_finite_difference(function, *arguments):
    """In float64."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), arguments)
        tangents = random_like(arguments, 1)
        both = lambda *both: (jax.jvp(function, *both)[1], central_difference(function, *both))
        assert_close(*jit(both)(arguments, tangents), FINITE_DIFFERENCE)


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


def with_random_parameters(make):
    """The graph definition of what `make` makes, and parameters of which none is zero, as many are at first."""
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    return graphdef, random_like(nnx.to_pure_dict(abstract), 0)


def make_layer():
    return with_random_parameters(lambda: linear(6, 5, ("fsdp", "tensor"), rngs=nnx.Rngs(0)))


def applied(graphdef, params, x, gate=None):
    layer = nnx.merge(graphdef, params)
    return layer(x) if gate is None else layer.gated(x, gate)


def layer_cases():
    x = random_like(jnp.zeros((2, 9, 6)), 3)
    return {"plain": (x,), "gated": (x, random_like(jnp.zeros((2, 1, 5)), 4))}


@pytest.mark.parametrize("case", ["plain", "gated"])
def test_linear_layers(case):
    graphdef, params = make_layer()
    assert_modes_agree(functools.partial(applied, graphdef), params, *layer_cases()[case])
    assert_tangent_is_a_finite_difference(functools.partial(applied, graphdef), params, *layer_cases()[case])


def test_layers_whose_parameters_are_sharded():
    layer = linear(6, 4, ("fsdp", "tensor"), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = layer_cases()["plain"][0]
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=2, context=1, tensor=2), jax.devices()[:4])):
        assert_modes_agree(lambda params, x: nnx.merge(graphdef, gathered(params, x.dtype))(x), params, x)


def test_a_gated_layers_second_derivatives_are_those_of_its_formula():
    """Reverse mode through forward mode, with nothing held constant, in float64."""
    graphdef, params = make_layer()
    formula = lambda params, x, gate: (x @ params["kernel"] + params["bias"]) * gate
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, *layer_cases()["gated"]))
        directions, cotangent = random_like(arguments, 1), random_like(arguments[1][..., :5], 2)

        def gradients(function):
            loss = lambda *both: (jax.jvp(function, *both)[1] * cotangent).sum()
            return jit(jax.grad(loss, (0, 1)))(arguments, directions)

        assert_close(gradients(functools.partial(applied, graphdef)), gradients(formula), 1e-13)


@pytest.mark.parametrize("fields", [dict(), dict(output_activation="softplus"), dict(kind="hedgehog")], ids=str)
def test_feature_maps(fields):
    config = FeatureMapConfig(features=6, **fields)
    make = lambda: FeatureMap(config, heads=2, head_dim=4, rngs=nnx.Rngs(0))
    graphdef, params = with_random_parameters(make)
    x = random_like(jnp.zeros((2, 5, 2, 4)), 3)
    function = lambda params, x: nnx.merge(graphdef, params)(x)
    assert_modes_agree(function, params, x)
    assert_tangent_is_a_finite_difference(function, params, x)


# Ragged, of several chunks with an overlap: (frames, tokens_per_frame, chunk_frames, overlap_frames).
FORM = (5, 2, 2, 1)


@pytest.mark.parametrize(
    "implementation, causal, stabilizer", list(itertools.product(["scan", "xla"], [True, False], STABILIZERS))
)
def test_hybrid_attention(implementation, causal, stabilizer):
    """A stabilizer is a constant in forward mode too. With "row_max" the result depends on it, so that only the
    definition's tangent is right. With "joint" it does not, and a finite difference is right too."""
    attend, definition = (attention(FORM, causal, stabilizer, name) for name in (implementation, "reference"))
    with jax.enable_x64(True):
        arrays = make_arrays(*FORM[:2])
        tangents, cotangent = random_like(arrays, 1), random_like(arrays[0], 2)

        @jit
        def run(arrays, tangents, cotangent):
            pushed, expected = (jax.jvp(function, arrays, tangents)[1] for function in (attend, definition))
            difference = central_difference(attend, arrays, tangents) if stabilizer == "joint" else None
            return pushed, expected, difference, jax.vjp(attend, *arrays)[1](cotangent)

        pushed, expected, difference, pulled = run(arrays, tangents, cotangent)
    assert_close(pushed, expected, 1e-12)
    assert_same_inner_product((cotangent, pushed), (pulled, tangents))
    if difference is not None:
        assert_close(pushed, difference, FINITE_DIFFERENCE)


LATENTS = (1, 3, 8, 6, 4)  # 36 tokens, more than any kernel has rows: fewer would not use the gated product

TEACHER = WanConfig(
    num_heads=2,
    head_dim=8,
    ffn_dim=24,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=6,
    text_length=3,
    freq_dim=8,
)
STUDENT = TEACHER.replace(
    hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2, feature_map=FeatureMapConfig(features=8))
)
MODELS = {
    "half scan": (STUDENT.replace(hybrid_blocks=(1,)), "scan"),
    "scan": (STUDENT, "scan"),
    "xla": (STUDENT, "xla"),
}


def make_model(name, remat="none", dtype=jnp.float32):
    """(params, latents, timestep, text) -> velocity, and such arguments."""
    config, implementation = MODELS[name]
    make = lambda: WanTransformer(
        config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat, attention_implementation=implementation
    )
    graphdef, params = with_random_parameters(make)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    text = random_like(jnp.zeros((1, 3, 6)), 6)
    return apply_model(graphdef), (params, random_like(jnp.zeros(LATENTS), 7), jnp.array([400.0]), text)


@functools.cache
def slope(name, dtype):
    """The velocity's derivative along the flow."""
    apply, (params, *inputs, text) = make_model(name, dtype=dtype)

    def push(params, text, *both):
        return jax.jvp(lambda latents, timestep: apply(params, latents, timestep, text), *both)[1]

    return np.asarray(jit(push)(params, text, inputs, [random_like(inputs[0], 1), jnp.array([1000.0])]))


@pytest.mark.parametrize("name", ["scan", "xla"])
def test_models_in_bfloat16_have_nearly_the_tangents_of_float32(name):
    found, expected = slope(name, jnp.bfloat16), slope("xla", jnp.float32)
    # Two blocks of a dozen roundings to 8 bits each; 0.006 where measured.
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("name, remat", [("half scan", "block"), ("xla", "none")])
def test_mean_flow_is_trained_through_forward_mode(name, remat):
    """One pass of forward mode gives the velocity u and its slope du/dt (arXiv 2505.13447).

    The loss |u - t|^2 has a target t that holds the slope as a constant. So its gradient, by reverse mode, and any
    tangent have the inner product 2 <u - t, J tangent>, J being forward mode's.
    """
    apply, arguments = make_model(name, remat)
    tangents = random_like(arguments, 1)
    direction = random_like(arguments[1], 2)

    def mean_flow(params, latents, timestep, text):
        moving = lambda latents, time: apply(params, latents, 1000 * time, text)
        u, slope = jax.jvp(moving, (latents, timestep / 1000), (direction, jnp.ones(1)))
        error = u - jax.lax.stop_gradient(direction - 0.3 * slope)
        return jnp.square(error).sum(), (error, slope)

    @jit
    def both_modes(arguments, tangents):
        gradients, aux = jax.grad(mean_flow, (0, 1, 2, 3), has_aux=True)(*arguments)
        return gradients, *aux, jax.jvp(apply, arguments, tangents)[1]

    gradients, error, slope, pushed = both_modes(arguments, tangents)
    assert_same_inner_product((gradients, tangents), (2 * error, pushed))
    assert np.abs(slope).max() > 0.1
