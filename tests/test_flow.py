"""The flow's path, its time axis, and the distribution of noise levels in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rehyat_jax.diffusion import flow

CLEAN, NOISE = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, 4, 5))
SIGMA = jnp.array([0.0, 0.3, 1.0])


def test_path_starts_at_data_and_ends_at_noise():
    noisy = flow.add_noise(CLEAN, NOISE, SIGMA)
    np.testing.assert_array_equal(noisy[0], CLEAN[0])
    np.testing.assert_array_equal(noisy[2], NOISE[2])


def test_velocity_is_the_derivative_of_the_path():
    _, derivative = jax.jvp(lambda sigma: flow.add_noise(CLEAN, NOISE, sigma), (SIGMA,), (jnp.ones(3),))
    # The same subtraction, fused differently: rounding of values up to 8.
    np.testing.assert_allclose(flow.velocity_target(CLEAN, NOISE), derivative, rtol=0, atol=1e-6)


def test_clean_latents_are_recovered_from_the_true_velocity():
    noisy, velocity = flow.add_noise(CLEAN, NOISE, SIGMA), flow.velocity_target(CLEAN, NOISE)
    # A few roundings of values up to 8.
    np.testing.assert_allclose(flow.predict_clean(noisy, velocity, SIGMA), CLEAN, rtol=0, atol=2e-6)


def test_timestep_runs_to_1000():
    np.testing.assert_array_equal(flow.sigma_to_timestep(np.array([0.0, 0.25, 1.0])), [0, 250, 1000])


@pytest.mark.parametrize("shift", (1.0, 3.0, 8.0))
def test_shift_multiplies_the_ratio_of_noise_to_signal(shift):
    sigma = np.array([0.1, 0.5, 0.9])
    shifted = flow.shift_sigma(sigma, shift)
    # The definition of the shift: sigma / (1 - sigma) grows by the factor. Float64 rounding.
    np.testing.assert_allclose(shifted / (1 - shifted), shift * sigma / (1 - sigma), rtol=1e-12)
    np.testing.assert_array_equal(flow.shift_sigma(np.array([0.0, 1.0]), shift), [0, 1])


@pytest.mark.parametrize("shift", (1.0, 5.0))
@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        ("uniform", scipy.stats.uniform.cdf),
        ("logit_normal", lambda sigma: scipy.stats.norm.cdf(np.log(sigma / (1 - sigma)))),
    ],
)
def test_training_sigmas_follow_their_distribution_before_the_shift(distribution, cdf, shift):
    sigmas = flow.sample_sigmas(jax.random.key(1), 20_000, distribution=distribution, shift=shift)
    assert sigmas.shape == (20_000,) and sigmas.dtype == jnp.float32
    unshifted = flow.shift_sigma(np.asarray(sigmas, np.float64), 1 / shift)
    # Kolmogorov-Smirnov distance: below 1.63 / sqrt(20,000) = 0.0115 in 99% of draws; the key is fixed.
    assert scipy.stats.kstest(unshifted, cdf).statistic < 0.0115


def test_loss_is_computed_in_float32():
    velocity, target = CLEAN.astype(jnp.bfloat16), NOISE.astype(jnp.bfloat16)
    loss = flow.flow_matching_loss(velocity, target)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    expected = np.mean((np.asarray(velocity, np.float64) - np.asarray(target, np.float64)) ** 2)
    # float32 sums of 480 terms; bfloat16 arithmetic would be off by 1e-3.
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="flow_shift must be positive, found -1"):
        flow.shift_sigma(0.5, -1.0)
    with pytest.raises(ValueError, match="found 'normal'"):
        flow.sample_sigmas(jax.random.key(0), 2, distribution="normal", shift=1.0)
