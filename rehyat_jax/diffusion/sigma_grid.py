"""The points at which a sampler evaluates the network: a decreasing grid of sigmas, with a timestep for each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rehyat_jax.diffusion.flow import shift_sigma, sigma_to_timestep


class SigmaGrid(NamedTuple):
    """N sampling steps.

    Attributes:
      sigmas: float64 [N + 1], strictly decreasing within [0, 1]. Step i goes from sigmas[i] to sigmas[i + 1].
      timesteps: float64 [N], the network's input at the start of each step.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray


def wan_grid(steps: int, flow_shift: float) -> SigmaGrid:
    """The grid of Wan2.1's own UniPC sampler: `steps` even steps down from 0.999, shifted, then a last sigma of 0.

    The network sees timesteps truncated to integers while the solver uses the exact sigmas, as upstream does.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    # Wan keeps 0.999 in float32; the last digits decide which timesteps truncate to the integer below.
    largest = float(np.float32(0.999))
    sigmas = shift_sigma(np.linspace(largest, 0.0, steps + 1)[:-1], flow_shift)
    return SigmaGrid(np.append(sigmas, 0.0), np.trunc(sigma_to_timestep(sigmas)))


def explicit_grid(sigmas: Sequence[float]) -> SigmaGrid:
    """A grid through the given sigmas (N + 1 of them, already shifted), with timesteps 1000 sigma, not truncated.

    Raises:
      ValueError: fewer than two sigmas, or not strictly decreasing within [0, 1].
    """
    grid = np.asarray(sigmas, np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not (grid[0] <= 1 and grid[-1] >= 0 and np.all(np.diff(grid) < 0)):
        raise ValueError(f"sigmas must be two or more numbers decreasing strictly within [0, 1], found {sigmas}")
    return SigmaGrid(grid, sigma_to_timestep(grid[:-1]))
