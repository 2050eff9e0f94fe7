"""Samplers and sigma grids against diffusers' schedulers, exact flows and convergence orders.

The network is replaced by a fixed nonlinear velocity, so that only the solver is under test. In float64 both sides
evaluate the same formulas, and their difference is rounding; in float32 ours is compared with diffusers in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rehyat_jax.diffusion.samplers import coefficient_table, initial_state, sample, solver_step
from rehyat_jax.diffusion.sigma_grid import SigmaGrid, explicit_grid, wan_grid

STEPS = (1, 2, 3, 5, 10, 25, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0)
NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 5))
"""Five axes and a batch, as latents have, channels last."""


def nonlinear_velocity(latents, timestep, xp):
    """Depends on every input in a nonlinear way, with derivatives of order one. `xp` is jnp or torch."""
    timestep = timestep.reshape(-1, 1, 1, 1, 1) / 1000
    return 1.5 * xp.tanh(latents) - 0.7 * xp.sin(3 * timestep) * latents + xp.cos(2 * latents + timestep)


def sample_with_jax(grid, sampler, dtype):
    with jax.enable_x64(dtype == np.float64):
        result = sample(lambda x, t: nonlinear_velocity(x, t, jnp), jnp.asarray(NOISE, dtype), grid, sampler=sampler)
        assert result.dtype == dtype
        return np.asarray(result)


def sample_with_diffusers(scheduler):
    """Runs a scheduler whose grid is set in float64, and returns its sample with the grid it used."""
    # diffusers stores its grids in float32 and derives the coefficients in the grid's precision.
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    latents = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        velocity = nonlinear_velocity(latents, timestep.double().expand(len(latents)), torch)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    grid = SigmaGrid(scheduler.sigmas.numpy(), scheduler.timesteps.double().numpy())
    return latents.numpy(), grid


def diffusers_unipc(steps, shift):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_euler(steps, shift):
    """Wan's grid, given unshifted: this scheduler shifts and appends the final zero itself."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    return scheduler


SCHEDULERS = {"unipc": diffusers_unipc, "euler": diffusers_euler}


@pytest.mark.parametrize("shift", (1.0, 5.0))
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_equals_diffusers_in_float64(steps, shift):
    expected, grid = sample_with_diffusers(diffusers_unipc(steps, shift))
    actual = sample_with_jax(grid, "unipc", np.float64)
    # Rounding of 1e-16 on values up to 5, enlarged by the flow and by differences of nearby lambdas (1e-14 was seen).
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", (3.0, 8.0))
def test_unipc_over_50_steps_of_wans_grid(shift):
    """Wan's own solver is diffusers' UniPC of order 2 with bh2; only its grid differs, which ends at sigma 0."""
    scheduler, grid = diffusers_unipc(50, shift), wan_grid(50, shift)
    scheduler.sigmas = torch.from_numpy(grid.sigmas)
    scheduler.timesteps = torch.from_numpy(grid.timesteps).long()
    expected, used = sample_with_diffusers(scheduler)
    np.testing.assert_array_equal(used.sigmas, grid.sigmas)
    np.testing.assert_array_equal(used.timesteps, grid.timesteps)
    # Rounding, as in the test above. In float32, 50 steps of up to 2.4e-7 each; the target of sampling is 1e-5.
    np.testing.assert_allclose(sample_with_jax(grid, "unipc", np.float64), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sample_with_jax(grid, "unipc", np.float32), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", (1.0, 5.0))
@pytest.mark.parametrize("steps", STEPS)
def test_euler_equals_diffusers(steps, shift):
    expected, grid = sample_with_diffusers(diffusers_euler(steps, shift))
    actual = sample_with_jax(grid, "euler", np.float64)
    # diffusers rounds the latents (values up to 5, so by 2.4e-7) to float32 within every step; ours does not here.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", (1, 3, 50))
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_float32_samples_stay_close_to_diffusers(sampler, steps):
    expected, grid = sample_with_diffusers(SCHEDULERS[sampler](steps, 5.0))
    actual = sample_with_jax(grid, sampler, np.float32)
    # 50 steps of rounding by up to 2.4e-7 (values up to 5); 3e-6 was seen.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_wan_grid_runs_from_shifted_0_999_to_0(steps, shift):
    sigmas, timesteps = wan_grid(steps, shift)
    assert sigmas.shape == (steps + 1,) and timesteps.shape == (steps,)
    # 0.999 in float32 is 1.3e-8 above 0.999.
    assert sigmas[0] == pytest.approx(shift * 0.999 / (1 + (shift - 1) * 0.999), abs=2e-8)
    last = 0.999 / steps
    assert sigmas[-2] == pytest.approx(shift * last / (1 + (shift - 1) * last), abs=2e-8)
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)
    assert timesteps[0] == 999
    np.testing.assert_array_equal(timesteps, timesteps.astype(int))
    assert np.all((timesteps <= 1000 * sigmas[:-1]) & (1000 * sigmas[:-1] < timesteps + 1))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_wan_grid_equals_that_of_diffusers_euler(steps, shift):
    # diffusers rounds to float32 (6e-8), and Wan's 0.999 is 1.3e-8 too large.
    np.testing.assert_allclose(
        wan_grid(steps, shift).sigmas, diffusers_euler(steps, shift).sigmas.numpy(), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_wan_grid_stays_near_that_of_diffusers_unipc(steps, shift):
    ours, theirs = wan_grid(steps, shift).sigmas, diffusers_unipc(steps, shift).sigmas.double().numpy()
    # The unshifted grids run from 0.999 to 0 and from 1 to 0.001: 0.001 apart everywhere. Shifting multiplies that by
    # its derivative, which is at most `shift`; the last sigma is 0 in both.
    difference = theirs - ours
    assert np.all(difference[:-1] > 0) and np.all(difference <= 0.001 * shift + 1e-7)
    assert difference[-1] == 0


@pytest.mark.parametrize(
    ("steps", "shift", "timesteps"),
    [
        (10, 5.0, [999, 978, 952, 920, 882, 833, 768, 681, 555, 356]),
        # In exact arithmetic the second would be 666 and the third 333 only just: float32's 0.999 decides.
        (3, 1.0, [999, 666, 333]),
    ],
)
def test_wan_timesteps_are_those_of_upstream(steps, shift, timesteps):
    """Integers computed with upstream's recipe in torch (FlowUniPCMultistepScheduler.set_timesteps)."""
    np.testing.assert_array_equal(wan_grid(steps, shift).timesteps, timesteps)


@pytest.mark.parametrize("steps", (1, 2, 3, 7))
def test_straight_flow_is_sampled_exactly(steps):
    clean = jnp.full(NOISE.shape, 0.25)
    noise = jnp.asarray(NOISE, jnp.float32)
    for sampler in SCHEDULERS:
        # Starting at sigma = 0.999, the noise must lie on the path there.
        grid = wan_grid(steps, 3.0)
        start = (1 - grid.sigmas[0]) * clean + grid.sigmas[0] * noise
        result = sample(lambda x, t: noise - clean, start, grid, sampler=sampler)
        # float32 rounding of values up to 4, a few times a step.
        np.testing.assert_allclose(result, clean, rtol=0, atol=3e-6)


def integrate(sampler, steps):
    """The smooth flow dx/dsigma = x cos(5 sigma) + sin(3 sigma) from sigma 0.8 to 0.2, in float64."""

    def velocity(latents, timestep):
        sigma = timestep.reshape(-1, 1, 1, 1, 1) / 1000
        return latents * jnp.cos(5 * sigma) + jnp.sin(3 * sigma)

    with jax.enable_x64(True):
        grid = explicit_grid(np.linspace(0.8, 0.2, steps + 1))
        return np.asarray(sample(velocity, jnp.asarray(NOISE), grid, sampler=sampler))


@pytest.mark.parametrize(
    ("sampler", "order"),
    # UniPC predicts its first and last step at order 1, and never corrects the last: order 2 overall.
    [("euler", 1), ("unipc", 2)],
)
def test_error_falls_with_the_order_of_the_sampler(sampler, order):
    exact = integrate("unipc", 4096)
    errors = [np.abs(integrate(sampler, steps) - exact).max() for steps in (32, 64, 128)]
    ratios = np.divide(errors[:-1], errors[1:])
    # At 32 steps the next power of the step size still adds a few percent.
    np.testing.assert_allclose(ratios, 2**order, rtol=0.1)


def test_a_python_loop_over_steps_equals_the_scan():
    grid = wan_grid(4, 3.0)
    state = initial_state(jnp.asarray(NOISE, jnp.float32))
    table = coefficient_table(grid, "unipc")
    for i in range(4):
        state = solver_step(
            lambda x, t: nonlinear_velocity(x, t, jnp), state, jax.tree.map(lambda column, i=i: column[i], table)
        )
    # The same float32 operations, fused differently by the compiler.
    np.testing.assert_allclose(state.latents, sample_with_jax(grid, "unipc", np.float32), rtol=0, atol=2e-6)


def test_bfloat16_velocity_is_accumulated_in_float32():
    def velocity(latents, timestep):
        return nonlinear_velocity(latents, timestep, jnp).astype(jnp.bfloat16)

    result = sample(velocity, jnp.asarray(NOISE, jnp.float32), wan_grid(3, 3.0))
    assert result.dtype == jnp.float32


def test_bad_arguments_are_explained():
    noise = jnp.zeros((1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        wan_grid(0, 3.0)
    with pytest.raises(ValueError, match="flow_shift must be positive, found 0"):
        wan_grid(4, 0.0)
    for sigmas in ([1.0], [0.5, 0.5, 0.0], [0.0, 1.0], [1.5, 0.0], [0.5, -0.1], [0.5, float("nan"), 0.0]):
        with pytest.raises(ValueError, match="decreasing strictly"):
            explicit_grid(sigmas)
    with pytest.raises(ValueError, match=r"sampler must be one of .*found 'ddim'"):
        sample(lambda x, t: x, noise, wan_grid(2, 3.0), sampler="ddim")
    with pytest.raises(ValueError, match="UniPC needs sigmas below 1"):
        sample(lambda x, t: x, noise, explicit_grid([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match="noise must be float32 or float64, found bfloat16"):
        sample(lambda x, t: x, noise.astype(jnp.bfloat16), wan_grid(2, 3.0))
