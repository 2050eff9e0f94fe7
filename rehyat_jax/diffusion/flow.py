"""Rectified flow: the straight path between data and noise, the velocity along it, and its time axis.

The path is x = (1 - sigma) x0 + sigma noise with sigma in [0, 1]; the network predicts v = dx/dsigma = noise - x0
(flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003; Wan2.1's training target). sigma = 0 is data.
"""

from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Sigma = TypeVar("Sigma", float, np.ndarray, Array)
SigmaDistribution = Literal["uniform", "logit_normal"]

NUM_TRAIN_TIMESTEPS = 1000
"""The network reads sigma as a timestep in 0..1000."""


def sigma_to_timestep(sigma: Sigma) -> Sigma:
    """timestep = 1000 sigma."""
    return NUM_TRAIN_TIMESTEPS * sigma


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Moves sigmas towards the noise: shift sigma / (1 + (shift - 1) sigma) (SD3, arXiv 2403.03206, eq. 23).

    0 and 1 stay where they are. Larger videos need a larger shift, because they carry more redundant signal at the
    same sigma. Works on Python floats, numpy and jax arrays of any shape.
    """
    if shift <= 0:
        raise ValueError(f"flow_shift must be positive, found {shift}; 1 leaves the sigmas as they are")
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Array, noise: Array, sigma: Array) -> Array:
    """The point of the path at `sigma`: (1 - sigma) clean + sigma noise.

    Args:
      clean, noise: [B, ...].
      sigma: [B], one per example; [B, T], one per frame of clean [B, T, ...]; or a scalar.
    """
    sigma = _broadcastable(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Array, noise: Array) -> Array:
    """The network's target anywhere on the path: noise - clean."""
    return noise - clean


def predict_clean(noisy: Array, velocity: Array, sigma: Array) -> Array:
    """The end of the straight line through `noisy` [B, ...]: x0 = x - sigma v, with sigma as in `add_noise`."""
    return noisy - _broadcastable(sigma, noisy) * velocity


def sample_sigmas(key: Array, batch: int, *, distribution: SigmaDistribution, shift: float) -> Array:
    """Draws the noise level of every training example.

    Args:
      key: a jax random key.
      batch: B.
      distribution: "uniform" in [0, 1), or "logit_normal", the sigmoid of a standard normal (SD3 section 3.1), which
        favours the middle of the path.
      shift: the flow shift, applied after the draw so that training sees the levels at which sampling evaluates.

    Returns:
      float32 [B].
    """
    if distribution == "uniform":
        sigma = jax.random.uniform(key, (batch,), jnp.float32)
    elif distribution == "logit_normal":
        sigma = jax.nn.sigmoid(jax.random.normal(key, (batch,), jnp.float32))
    else:
        raise ValueError(f'distribution of sigma must be "uniform" or "logit_normal", found {distribution!r}')
    return shift_sigma(sigma, shift)


def flow_matching_loss(velocity: Array, target: Array, frames: Array | None = None) -> Array:
    """Mean squared error over all elements of the two [B, ...] arrays of any dtype, a float32 scalar.

    Args:
      velocity, target: [B, ...], or [B, T, ...] with `frames`.
      frames: boolean [B, T], the frames of which this is the mean; None for all. There must be one.
    """
    squares = jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32))
    if frames is None:
        return jnp.mean(squares)
    of_frame = squares.mean(range(2, squares.ndim))
    return jnp.where(frames, of_frame, 0).sum() / frames.sum()


def _broadcastable(sigma: Array, latents: Array) -> Array:
    """sigma [], [B] or [B, T] -> broadcastable against latents [B, ...], in their dtype."""
    sigma = jnp.asarray(sigma, latents.dtype)
    return sigma if sigma.ndim == 0 else sigma.reshape(*sigma.shape, *[1] * (latents.ndim - sigma.ndim))
