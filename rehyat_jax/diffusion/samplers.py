"""Euler, UniPC and renoising as one multistep loop over a table of coefficients.

All samplers work with the predicted clean latents m_i = x_i - sigma_i v(x_i). In that form every update is a weighted
sum of a few earlier states and predictions. The weights depend only on the sigma grid. They are computed once, in
float64, and the loop over steps compiles once.

UniPC (arXiv 2302.04867) has order 2 and B(h) = e^h - 1 ("bh2"), as in Wan2.1. A step evaluates the network at the
predicted x_i, corrects x_i with the result (UniC), and then predicts x_{i+1} (UniP). The first and the last step are of
order 1.

"renoise" is for models of few steps: it goes from the predicted clean latents back to the next noise level with new
noise, x_{i+1} = (1 - sigma) m_i + sigma noise (consistency models, arXiv 2303.01469, algorithm 1; DMD2, arXiv
2405.14867). A video's new noise is a function of its initial noise, which therefore still decides the video.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.diffusion.flow import predict_clean
from rehyat_jax.diffusion.sigma_grid import SigmaGrid

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]
"""(latents [B, ...], timestep [B]) -> velocity [B, ...]."""
Sampler = Literal["unipc", "euler", "renoise"]


class Coefficients(NamedTuple):
    """The figures of a step that `solver_step` needs; with a leading axis [N], the complete table.

    Attributes:
      sigma, timestep: scalars at the start of the step.
      corrector: [5] weights of x_i predicted, x_{i-1} corrected, m_{i-2}, m_{i-1}, m_i in the corrected x_i.
      predictor: [3] weights of x_i corrected, m_{i-1}, m_i in the predicted x_{i+1}.
      fresh: scalar weight of new noise in x_{i+1}, see `with_fresh_noise`.
    """

    sigma: Array
    timestep: Array
    corrector: Array
    predictor: Array
    fresh: Array


class SolverState(NamedTuple):
    """The inputs of step i, each [B, ...]: x_i predicted, x_{i-1} corrected, m_{i-1} and m_{i-2}."""

    latents: Array
    corrected: Array
    clean: Array
    older_clean: Array


def sample(velocity_fn: VelocityFn, noise: Array, grid: SigmaGrid, *, sampler: Sampler = "unipc") -> Array:
    """Integrates the flow from noise to data in one compiled scan.

    Args:
      velocity_fn: the network, with text and guidance already bound.
      noise: [B, ...] float32 (or float64), the latents at grid.sigmas[0].
      grid: where to evaluate, see `rehyat_jax.diffusion.sigma_grid`.
      sampler: "unipc", "euler" or "renoise".

    Returns:
      The latents at grid.sigmas[-1], in the shape and dtype of `noise`.
    """

    def body(state: SolverState, numbered: tuple[Array, Coefficients]) -> tuple[SolverState, None]:
        number, step = numbered
        state = solver_step(velocity_fn, state, step)
        if sampler == "renoise":
            state = state._replace(latents=with_fresh_noise(state.latents, noise, number, step.fresh))
        return state, None

    table = coefficient_table(grid, sampler, noise.dtype)
    state, _ = jax.lax.scan(body, initial_state(noise), (jnp.arange(len(grid.timesteps)), table))
    return state.latents


def fresh_noise(noise: Array, number: Array | int) -> Array:
    """New standard normal noise for step `number`; example i's depends on the first value of noise[i] and on its shape.

    Args:
      noise: [B, ...], the initial noise.
      number: of the step, from 0.
    """
    seeds = jax.lax.bitcast_convert_type(noise.reshape(len(noise), -1)[:, 0].astype(jnp.float32), jnp.uint32)

    def draw(seed: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), number)
        return jax.random.normal(key, noise.shape[1:], noise.dtype)

    return jax.vmap(draw)(seeds)


@jax.jit
def with_fresh_noise(latents: Array, noise: Array, number: Array | int, weight: Array | float) -> Array:
    """The latents [B, ...] after step `number` of "renoise", from those of `solver_step`; `weight` is the step's
    `fresh`, and `noise` the initial noise."""
    return latents + weight * fresh_noise(noise, number)


def initial_state(noise: Array) -> SolverState:
    """The state before the first step; the missing history has weight zero there.

    Raises:
      ValueError: `noise` has less precision than float32, too little to accumulate tens of steps.
    """
    if noise.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"noise must be float32 or float64, found {noise.dtype}; only the network may run in bfloat16")
    nothing = jnp.zeros_like(noise)
    return SolverState(latents=noise, corrected=nothing, clean=nothing, older_clean=nothing)


def solver_step(velocity_fn: VelocityFn, state: SolverState, step: Coefficients) -> SolverState:
    """One evaluation of the network, the correction of the current latents, and the prediction of the next."""
    timestep = jnp.broadcast_to(step.timestep, state.latents.shape[:1])
    velocity = velocity_fn(state.latents, timestep)
    if velocity.shape != state.latents.shape:
        raise ValueError(f"the velocity must have the latents' shape {state.latents.shape}, found {velocity.shape}")
    clean = predict_clean(state.latents, velocity, step.sigma)
    corrected = _weighted_sum(step.corrector, state.latents, state.corrected, state.older_clean, state.clean, clean)
    latents = _weighted_sum(step.predictor, corrected, state.clean, clean)
    return SolverState(latents=latents, corrected=corrected, clean=clean, older_clean=state.clean)


def coefficient_table(grid: SigmaGrid, sampler: Sampler, dtype: jnp.dtype = jnp.float32) -> Coefficients:
    """All steps' coefficients as numpy arrays of `dtype`, rounded from float64.

    Raises:
      ValueError: an unknown sampler, or a grid for UniPC that starts at sigma = 1.
    """
    weights = {"euler": _euler_weights, "unipc": _unipc_weights, "renoise": _renoise_weights}
    if sampler not in weights:
        raise ValueError(f"sampler must be one of {sorted(weights)}, found {sampler!r}")
    corrector, predictor = weights[sampler](grid.sigmas)
    fresh = grid.sigmas[1:] if sampler == "renoise" else np.zeros(len(grid.timesteps))
    table = Coefficients(grid.sigmas[:-1], grid.timesteps, corrector, predictor, fresh)
    return Coefficients(*(column.astype(dtype) for column in table))


def _euler_weights(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x + (sigma_next - sigma) v, rewritten with v = (x - m) / sigma; no correction."""
    ratio = sigmas[1:] / sigmas[:-1]
    keep = np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (len(ratio), 1))
    return keep, np.stack([ratio, np.zeros_like(ratio), 1 - ratio], axis=1)


def _renoise_weights(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 - sigma_next) m, without the noise; no correction."""
    keep, predictor = _euler_weights(sigmas)
    return keep, np.stack([*np.zeros((2, len(predictor))), 1 - sigmas[1:]], axis=1)


def _unipc_weights(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UniPC-2 in the data prediction form, for alpha = 1 - sigma.

    A step from s to t solves x_t = (sigma_t / sigma_s) x_s + E (m_s + sum of rho_k D_k), where
    E = alpha_t (1 - e^-h) = 1 - sigma_t / sigma_s, h is the step in lambda = log(alpha / sigma), and D_k are the
    differences (m_k - m_s) / r_k at the relative distances r_k = (lambda_k - lambda_s) / h.
    """
    if sigmas[0] >= 1:
        raise ValueError(f"UniPC needs sigmas below 1, found {sigmas[0]}; start the grid at 1 - 1e-6, say")
    # No lambda for the last sigma: it may be 0, where lambda is infinite, and the order-1 step there needs none.
    log_snr = np.log1p(-sigmas[:-1]) - np.log(sigmas[:-1])
    # An order-1 UniP step is an Euler step.
    corrector, predictor = _euler_weights(sigmas)
    steps = len(log_snr)
    for i in range(1, steps):
        # UniC from x_{i-1} to x_i, of the order with which x_i was predicted.
        ratio = sigmas[i] / sigmas[i - 1]
        if i == 1:
            older, new = 0.0, 0.5
        else:
            h = log_snr[i] - log_snr[i - 1]
            r = (log_snr[i - 2] - log_snr[i - 1]) / h
            rho_older, new = _unic_rhos(h, r)
            older = rho_older / r
        corrector[i] = 0.0, ratio, (1 - ratio) * older, (1 - ratio) * (1 - older - new), (1 - ratio) * new
    for i in range(1, steps - 1):
        # UniP from x_i to x_{i+1}; UniPC fixes rho = 1/2 for this order.
        ratio = sigmas[i + 1] / sigmas[i]
        r = (log_snr[i - 1] - log_snr[i]) / (log_snr[i + 1] - log_snr[i])
        predictor[i] = ratio, (1 - ratio) * 0.5 / r, (1 - ratio) * (1 - 0.5 / r)
    return corrector, predictor


def _unic_rhos(h: float, r: float) -> tuple[float, float]:
    """The weights of D at distance r and of D at the new point (distance 1): UniPC eq. (5) for p = 2, B(h) = e^-h - 1.

    They solve rho_r + rho_1 = b_1 and r rho_r + rho_1 = b_2.
    """
    b_h = np.expm1(-h)
    phi_2 = b_h / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / b_h, 2 * phi_3 / b_h
    rho_r = (b_1 - b_2) / (1 - r)
    return rho_r, b_1 - rho_r


def _weighted_sum(weights: Array, *terms: Array) -> Array:
    return sum(weights[k] * term for k, term in enumerate(terms))
