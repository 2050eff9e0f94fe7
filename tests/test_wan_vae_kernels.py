"""The Pallas kernels of Wan's VAE, interpreted, against XLA's convolutions; and their compilation for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import error_ratio, tpu_kernels_as_xla
from flax import nnx
from test_wan_vae import random_small_vae
from test_wan_vae_frames import mesh_of
from tpu_topologies import TOPOLOGIES, compiled_for_tpu

from rehyat_jax.attention.platform import interpreted_tpu
from rehyat_jax.models.wan_vae import places, vae
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.convolutions import causal_step, doubled, first_caches, halved
from rehyat_jax.models.wan_vae.modeling import WanAutoencoder
from rehyat_jax.models.wan_vae.places import Places
from rehyat_jax.models.wan_vae.tpu import rows as row_sizes

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Sums in another order, then rounded to 8 bits: the largest error is a unit of the last place of the largest result.
ROUNDING = 2**-7


@pytest.fixture(autouse=True)
def with_kernels(request, monkeypatch):
    """Kernels on CPUs, except where a test compiles them. Those of a complete model are not simulated, to save time."""
    if "topology" in request.fixturenames:
        yield
        return
    monkeypatch.setattr(places, "KERNELS", ("cpu",))
    with tpu_kernels_as_xla() if "small" in request.fixturenames else interpreted_tpu():
        yield


def without_kernels(function):
    """`function`, traced with XLA's convolutions."""

    @functools.wraps(function)
    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "KERNELS", ())
            return function(*arguments)

    return run


def random(*shape, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def causal_arguments(batch, frames, height, width, inside, outside, *, norm, residual, shortcut=False):
    """Arguments of `causal`, without the last."""
    pixels = random(batch, frames, height, width, inside), random(batch, 2, height, width, inside, seed=1)
    kernel = random(3, 3, 3, inside, outside, dtype=jnp.float32, seed=2) / np.sqrt(27 * inside)
    vector = lambda size, seed: random(size, dtype=jnp.float32, seed=seed)
    scale = vector(inside, 3) if norm else None
    added = random(batch, frames, height, width, inside if shortcut else outside, seed=5) if residual else None
    matrix = (random(1, 1, 1, inside, outside, dtype=jnp.float32, seed=6), vector(outside, 7)) if shortcut else None
    return *pixels, kernel, vector(outside, 4), scale, added, matrix


def causal(x, past, kernel, bias, scale, residual, shortcut, only_last):
    """y and the past of the next step, without padding channels."""
    places = Places.of(x.shape[0], *x.shape[2:4])
    caches = first_caches(x, places).at[..., : x.shape[-1]].set(past)
    y, after = causal_step(x, caches, kernel, bias, scale, residual, shortcut, only_last, places)
    return y, after[..., : x.shape[-1]]


def assert_close(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        theirs = np.asarray(theirs, np.float32)
        assert np.abs(np.asarray(ours, np.float32) - theirs).max() <= ROUNDING * np.abs(theirs).max()


# Blocks of 10 rows, of 3 and of 1. 16 columns fill registers, and 128 planes; 5 and 20 don't. 3 channels are planes, at
# either side. Groups of 8 outputs are packed, of 128 aligned.
CAUSAL = [
    ((2, 2, 11, 5, 3, 8), dict(norm=True, residual=True, shortcut=True), True),
    ((1, 4, 16, 20, 8, 3), dict(norm=True, residual=False), True),
    ((2, 1, 8, 128, 8, 3), dict(norm=True, residual=False), False),
    ((1, 1, 20, 16, 8, 8), dict(norm=True, residual=True), False),
    ((2, 4, 6, 5, 12, 8), dict(norm=False, residual=True), False),
    ((1, 2, 11, 5, 5, 128), dict(norm=True, residual=False), True),
    ((1, 4, 3, 18, 130, 8), dict(norm=True, residual=True, shortcut=True), True),
]


@pytest.mark.parametrize("sizes, options, only_last", CAUSAL, ids=str)
def test_causal_convolutions_are_those_of_xla(sizes, options, only_last, monkeypatch):
    monkeypatch.setattr(row_sizes, "_MOST_ROWS", 3 if sizes[2] == 6 else 10)
    arguments = *causal_arguments(*sizes, **options), jnp.array(only_last)
    assert_close(jax.jit(causal)(*arguments), without_kernels(jax.jit(lambda *x: causal(*x)))(*arguments))


@pytest.mark.parametrize("resample", [doubled, halved])
@pytest.mark.parametrize("sizes", [(2, 2, 6, 6, 8, 96), (1, 1, 22, 32, 12, 3)], ids=str)
def test_changes_of_resolution_are_those_of_xla(resample, sizes):
    batch, frames, height, width, inside, outside = sizes
    kernel = random(3, 3, inside, outside, dtype=jnp.float32, seed=2) / np.sqrt(9 * inside)
    arguments = random(batch, frames, height, width, inside), kernel, random(outside, dtype=jnp.float32, seed=4)
    run = lambda x, *others: resample(x, *others, Places.of(batch, height, width))
    assert_close(jax.jit(run)(*arguments), without_kernels(jax.jit(lambda *x: run(*x)))(*arguments))


# The batch on two devices and rows on two others, or every row on a device of its own, along two axes.
@pytest.mark.parametrize("sizes, batch, height", [((1, 2, 1, 2), 2, 4), ((1, 1, 2, 2), 1, 4)], ids=str)
def test_devices_exchange_the_rows_of_their_neighbours(sizes, batch, height):
    arguments = *causal_arguments(batch, 2, height, 5, 8, 4, norm=True, residual=True), jnp.array(True)
    kernel = random(3, 3, 8, 4, dtype=jnp.float32, seed=2)

    def run(x, *others):
        places = Places.of(batch, height, 5)
        scaled = doubled(x, kernel, others[2], places)
        return causal(x, *others), scaled, halved(scaled[..., :4], kernel[:, :, :4], others[2], places)

    expected = without_kernels(jax.jit(run))(*arguments)
    with jax.set_mesh(mesh_of(*sizes)):
        assert_close(jax.jit(lambda *x: run(*x))(*arguments), expected)


def test_derivatives_are_those_of_xla():
    # Kernels have no derivatives, so JAX must find those of XLA's form.
    arguments = *causal_arguments(1, 1, 3, 5, 8, 4, norm=True, residual=True, shortcut=True), jnp.array(False)

    def gradients(*arguments):
        loss = lambda *floats: jnp.square(causal(*floats, arguments[-1])[0].astype(jnp.float32)).sum()
        return jax.grad(loss, argnums=range(7))(*arguments[:-1])

    found, expected = jax.jit(gradients)(*arguments), without_kernels(jax.jit(lambda *x: gradients(*x)))(*arguments)
    # The cotangents are the results, which are rounded to 8 bits.
    ratios = jax.tree.map(lambda *pair: error_ratio(*(np.asarray(x, np.float32) for x in pair)), found, expected)
    assert max(jax.tree.leaves(ratios)) < ROUNDING


@pytest.fixture(scope="module")
def small():
    """A VAE with random parameters that computes in bfloat16; time and space change by 2."""
    config = WanVaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    make = lambda: WanAutoencoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return random_small_vae(graphdef, nnx.to_pure_dict(state))


def test_streams_run_through_kernels(small):
    latents, video = random(1, 2, 3, 4, 16, dtype=jnp.float32), random(1, 3, 6, 8, 3, dtype=jnp.float32)

    def forget():
        for function in (vae.decode_stream, vae.encode_stream, vae._initial_state):
            function.clear_cache()

    def coded():
        forget()
        first, state = small.decode_chunk(latents[:, :1])
        return first, small.decode_chunk(latents[:, 1:], state)[0], small.encode(video)

    expected = without_kernels(coded)()
    with jax.set_mesh(mesh_of(1, 1, 2, 1)):  # one row of latents is padding
        found = coded()
    forget()
    for ours, theirs in zip(found, expected, strict=True):
        # About ten layers round to 8 bits, in two ways.
        assert 0 < error_ratio(ours, theirs) < 8 * ROUNDING


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernels_compile_for_every_generation(topology):
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    height, width, kernel = 16, 104, functools.partial(array, 3, 3, dtype=jnp.float32)

    def run(x, past, residual, scale, bias, only_last, *kernels):
        places = Places.of(1, height, width)
        shortcut = kernels[0][:1, :1, :1], bias
        y, after = causal_step(x, past, kernels[0], bias, scale, residual, shortcut, only_last, places)
        image, later = causal_step(y, past, kernels[1], bias[:3], scale, None, None, only_last, places)
        begun, last = causal_step(image, past[..., :3], kernels[2], bias, None, None, None, only_last, places)
        scaled = halved(doubled(begun, kernels[3], bias, places), kernels[3], bias, places)
        return after, later, last, scaled

    pixels = array(1, 2, height, width, 96), array(1, 2, height, width, 128), array(1, 2, height, width, 96)
    vectors = [array(96, dtype=jnp.float32)] * 2
    kernels = kernel(3, 96, 96), kernel(3, 96, 3), kernel(3, 3, 96), kernel(96, 96)
    compiled = compiled_for_tpu(topology, run, *pixels, *vectors, array(dtype=bool), *kernels, quickly=True)
    assert compiled.as_text().count('"tpu_custom_call"') == 5
