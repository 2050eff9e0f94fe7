"""The transformer with a noise level for every latent frame; tests/test_wan_parity.py compares it with diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import TINY, tiny_batch, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

FORM = HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=FeatureMapConfig(features=16))
HYBRID = TINY.replace(hybrid_blocks="all", hybrid=FORM)
LEVELS = jnp.array([[0.0, 0.0, 300.0, 300.0, 999.0], [500.0, 500.0, 20.0, 20.0, 7.0]])


def velocity_and_gradients(graphdef, params, batch, timestep):
    cotangent = np.random.default_rng(4).standard_normal(batch["latents"].shape)

    def loss(params):
        velocity = apply_model(graphdef)(params, batch["latents"], timestep, batch["text"])
        return (velocity * cotangent).sum(), velocity

    gradients, velocity = jax.jit(jax.grad(loss, has_aux=True))(params)
    return velocity, gradients


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.float64(ours) - np.float64(theirs)) / np.linalg.norm(np.float64(theirs))
        assert error < tolerance


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TINY.replace(num_layers=2, hybrid_blocks=(1,), hybrid=FORM), dict(scan_layers=False)),
        (HYBRID, dict(remat="block")),
        (HYBRID, dict(dtype=jnp.bfloat16)),
    ],
    ids=["mixed unrolled", "hybrid", "bfloat16"],
)
def test_frames_of_one_level_are_a_video_of_that_level(config, options):
    graphdef, params = tiny_model(config, **options)
    # 16 tokens a frame are more than the width: then the gates of videos have a backward pass of their own.
    batch = tiny_batch()
    batch["latents"] = np.random.default_rng(0).standard_normal((2, 5, 8, 8, 4), np.float32)
    timestep = jnp.array([700.0, 30.0])
    expected = velocity_and_gradients(graphdef, params, batch, timestep)
    found = velocity_and_gradients(graphdef, params, batch, jnp.repeat(timestep[:, None], 5, axis=1))
    # The sums of gates' gradients have another order; bfloat16 rounds their terms.
    tolerance = 2e-2 if "dtype" in options else 2e-5
    assert_close(found[0], expected[0], tolerance)
    assert_close(found[1], expected[1], tolerance)


def test_a_frame_without_attention_depends_on_its_own_level_alone():
    graphdef, params = tiny_model(TINY)
    batch = tiny_batch()
    apart = lambda inputs, _: (jnp.zeros_like(inputs.value), None)
    run = jax.jit(
        lambda timestep: nnx.merge(graphdef, params).forward(batch["latents"], timestep, batch["text"], apart, {})[0]
    )
    changed = np.abs(run(LEVELS) - run(LEVELS.at[0, 2].set(17.0))).max((2, 3, 4))
    assert changed[0, 2] > 0.1
    changed[0, 2] = 0
    np.testing.assert_array_equal(changed, 0)


def test_levels_of_frames_on_a_mesh():
    """5 frames along 4 devices are padded to 8 frames."""
    graphdef, params = tiny_model(HYBRID, attention_implementation="xla")
    batch = tiny_batch()
    expected = velocity_and_gradients(graphdef, params, batch, LEVELS)
    with jax.set_mesh(make_mesh(dict(zip(AXES, (1, 1, 4, 1), strict=True)), jax.devices()[:4])):
        found = velocity_and_gradients(graphdef, params, batch, LEVELS)
    assert_close(found, expected, 2e-5)


def test_a_frame_of_patches_has_the_level_of_its_frames():
    config = TINY.replace(patch_size=(2, 2, 2))
    graphdef, params = tiny_model(config)
    batch = tiny_batch(frames=5)
    run = jax.jit(lambda levels: nnx.merge(graphdef, params)(batch["latents"], levels, batch["text"]))
    levels = jnp.array([[30.0, 30.0, 500.0, 500.0, 9.0]] * 2)
    assert run(levels).shape[1] == 4
    # The fifth frame fills no patch.
    np.testing.assert_array_equal(run(levels), run(levels.at[:, 4].set(999.0)))
    assert np.abs(run(levels) - run(levels.at[:, 2:4].set(999.0))).max() > 0.1
