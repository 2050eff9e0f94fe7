"""Guidance, and sampling with a small transformer of random weights between the demo's text encoder and codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rehyat_jax.diffusion.samplers import sample
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.generate import generate, generate_latents, latent_shape
from rehyat_jax.generation.guidance import guided_velocity
from rehyat_jax.generation.noise import initial_noise
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer

CONFIG = WanConfig(num_heads=1, head_dim=12, ffn_dim=16, num_layers=1, text_dim=64, text_length=8, freq_dim=16)
SHAPE = (2, 2, 2, 16)
"""Latents of two frames of 8x8 pixels."""


@pytest.fixture(scope="module")
def model():
    """Every parameter random: fresh models have a head of zeros, whose velocity depends on nothing."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    return nnx.merge(graphdef, params)


def run(model, prompts, noise, **options):
    options = {"steps": 3, "guidance_scale": 2.0, **options}
    return generate(model, SpaceToDepth(), WordVectors(), prompts, noise, **options)


def test_guidance_extrapolates_in_one_doubled_batch():
    calls = []

    def model(latents, timestep, text):
        calls.append((latents.shape, timestep))
        return text.mean((1, 2))[:, None, None, None, None] * jnp.ones_like(latents)

    text, negative_text = jnp.stack([jnp.full((8, 4), 3.0)] * 2), jnp.stack([jnp.full((8, 4), 1.0)] * 2)
    velocity = guided_velocity(model, text, negative_text, 5.0)(jnp.zeros((2, *SHAPE)), jnp.array([7.0, 9.0]))
    np.testing.assert_array_equal(velocity, np.full((2, *SHAPE), 1 + 5 * (3 - 1)))
    [(shape, timestep)] = calls
    assert shape == (4, *SHAPE)
    np.testing.assert_array_equal(timestep, [7, 9, 7, 9])


def test_guidance_takes_differences_in_float32():
    def model(latents, timestep, text):
        return (1 + text[:, :, 0, None, None]).astype(jnp.bfloat16)

    text, negative_text = jnp.full((1, 1, 1), 2**-7), jnp.zeros((1, 1, 1))
    velocity = guided_velocity(model, text, negative_text, 1.5)(jnp.zeros((1, 1, 1, 1)), jnp.zeros(1))
    # Exact in float32; bfloat16 has no number between 1 + 2^-7 and 1 + 2^-6.
    assert velocity.dtype == jnp.float32 and float(velocity[0, 0, 0, 0]) == 1 + 1.5 * 2**-7


def test_generated_latents_solve_the_guided_flow(model):
    """The loop of compiled steps against the scan, with the same network and grid."""
    noise = initial_noise(0, 2, SHAPE)
    text, negative_text = jnp.asarray(WordVectors()(["a seven", "a two"])), jnp.zeros((2, 8, 64))
    actual = generate_latents(model, text, negative_text, noise, steps=4, guidance_scale=3.0, flow_shift=5.0)
    expected = sample(guided_velocity(model, text, negative_text, 3.0), noise, wan_grid(4, 5.0))
    assert float(jnp.abs(actual - noise).max()) > 1
    # float32 rounding, through a random network with derivatives of order ten.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_videos_have_the_codecs_size_and_range(model):
    videos = run(model, ["a seven", "a two"], initial_noise(0, 2, SHAPE))
    assert videos.shape == (2, 2, 8, 8, 3) and videos.dtype == jnp.float32
    assert float(videos.min()) >= 0 and float(videos.max()) <= 1


def test_prompts_and_negative_prompt_change_the_video(model):
    noise = initial_noise(0, 1, SHAPE)
    video = run(model, ["a seven"], noise)
    for other in (run(model, ["a two"], noise), run(model, ["a seven"], noise, negative_prompt="a two")):
        assert float(jnp.abs(video - other).max()) > 0.01


def test_guidance_scale_1_ignores_the_negative_prompt(model):
    noise = initial_noise(0, 1, SHAPE)
    without = run(model, ["a seven"], noise, guidance_scale=1.0)
    np.testing.assert_array_equal(without, run(model, ["a seven"], noise, guidance_scale=1.0, negative_prompt="a two"))
    # The limit of guidance: the same velocity, from a batch of two and an extrapolation of zero; float32 rounding.
    nearly = run(model, ["a seven"], noise, guidance_scale=1.0 + 1e-6)
    np.testing.assert_allclose(without, nearly, rtol=0, atol=1e-4)


def test_a_video_does_not_depend_on_its_batch(model):
    prompts = ["a seven", "a two"]
    together = run(model, prompts, initial_noise(5, 2, SHAPE))
    alone = run(model, prompts[:1], initial_noise(5, 1, SHAPE))
    # Matrix products of another batch size round differently.
    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=1e-4)


def test_noise_is_standard_normal_and_independent_between_videos_and_seeds():
    noise, again = (np.asarray(initial_noise(seed, 2, (20, 8, 8, 16))) for seed in (3, 4))
    # 40,960 draws: the standard errors are 0.005 and 0.0035; five of them.
    assert abs(noise.mean()) < 0.025 and abs(noise.std() - 1) < 0.018
    for other in (noise[1], again[0]):
        # 20,480 pairs: a standard error of 0.007.
        assert abs(np.corrcoef(noise[0].ravel(), other.ravel())[0, 1]) < 0.035


def test_a_step_is_compiled_once_per_shape(model):
    traced = []

    class Traced(nnx.Module):
        """Notes every trace of the network inside it."""

        def __init__(self):
            self.network = model

        def __call__(self, latents, timestep, text):
            traced.append(latents.shape)
            return self.network(latents, timestep, text)

    wrapped = Traced()
    for seed, options in ((0, {}), (1, {"steps": 5}), (2, {"guidance_scale": 4.0, "flow_shift": 3.0})):
        run(wrapped, ["a seven"], initial_noise(seed, 1, SHAPE), **options)
        run(wrapped, ["a seven"], initial_noise(seed, 1, SHAPE), sampler="euler", **options)
    assert traced == [(2, *SHAPE)]
    # Without guidance the batch is not doubled.
    run(wrapped, ["a seven"], initial_noise(0, 1, SHAPE), guidance_scale=1.0)
    assert traced == [(2, *SHAPE), (1, *SHAPE)]


def test_sizes_that_do_not_fit_are_explained():
    codec = SpaceToDepth()
    assert latent_shape(CONFIG, codec, 21, 24, 32) == (21, 6, 8, 16)
    with pytest.raises(InputError, match=r"height 28: expected a latent height .* patch size 2, found 7; .* 8$"):
        latent_shape(CONFIG, codec, 21, 28, 32)
    with pytest.raises(InputError, match="multiples of 4"):
        latent_shape(CONFIG, codec, 21, 24, 30)
    with pytest.raises(InputError, match="in_channels 48, but its codec SpaceToDepth makes latents of 16"):
        latent_shape(CONFIG.replace(in_channels=48), codec, 21, 24, 24)


def test_noise_of_a_wrong_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"velocity must have the latents' shape .* found \(1, 2, 2, 2, 16\)"):
        run(model, ["a seven"], initial_noise(0, 1, (2, 3, 2, 16)), guidance_scale=1.0)
    with pytest.raises(ValueError, match="latents must be"):
        run(model, ["a seven"], initial_noise(0, 1, SHAPE)[0])
    with pytest.raises(ValueError, match="text must be"):
        run(model, ["a seven", "a two"], initial_noise(0, 1, SHAPE))
