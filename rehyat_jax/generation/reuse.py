"""Steps of the solver that reuse a part of an earlier step: the difference that guidance makes, or all blocks.

Both are approximations, off by default; docs/cheaper_sampling.md has their cost in quality.

- **Guidance.** The guided velocity is c + (s - 1) d, where c is the velocity with the prompt, d its difference to that
  with the negative prompt, and s the guidance scale. d changes slowly, so it is evaluated at every k-th step, and
  reused in between. FasterCache (arXiv 2410.19355) also weighs its frequencies by the step; that is left out here.
- **Blocks.** MagCache (arXiv 2506.09045) reuses the transformer's residual, see `models.wan.residual`. The mean length
  of residuals changes from step to step by nearly the same ratio for all prompts. So the ratios are measured once, and
  decide before sampling begins which steps are skipped.

The choice of steps never depends on a video, so a video does not depend on its batch.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from rehyat_jax.diffusion.samplers import Coefficients, SolverState, solver_step
from rehyat_jax.generation.guidance import guided_difference
from rehyat_jax.generation.parts import velocity_fn
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.models.wan.residual import apply_residual, apply_with_residual

Array = jax.Array

RETAINED = 0.2
"""The part of the steps, from the first one, that is never skipped: MagCache's own value."""

MOST_SKIPPED = 2
"""Most steps that are skipped in a row: MagCache's own value for quality."""

Call = tuple[Any, tuple[Any, ...]]
"""A jitted function and its arguments, the static one first."""


class GuidanceReuse:
    """Evaluates the negative prompt at every `every`-th step only. One object samples one batch."""

    def __init__(
        self, graphdef: nnx.GraphDef, params: nnx.State, conditions: tuple[Array, Array, Array | float], every: int
    ):
        self._model, self._conditions, self._every = (graphdef, params), conditions, every
        self._difference: Array | None = None

    def call(self, index: int, state: SolverState, step: Coefficients) -> Call:
        """The program of step `index`, and its arguments."""
        text, _, guidance_scale = self._conditions
        if index % self._every == 0:
            return _guided_step, (*self._model, state, step, *self._conditions)
        return _reguided_step, (*self._model, state, step, text, guidance_scale, self._difference)

    def after(self, result: Any) -> SolverState:
        """The solver's state in a program's result."""
        state, self._difference = result
        return state


class BlockReuse:
    """Leaves out the blocks at the steps `skipped`. One object samples one batch."""

    def __init__(self, graphdef: nnx.GraphDef, params: nnx.State, conditions: tuple[Any, ...], skipped: Sequence[bool]):
        self._model, self._conditions, self._skipped = (graphdef, params), conditions, skipped
        self._residual: Array | None = None

    def call(self, index: int, state: SolverState, step: Coefficients) -> Call:
        """See `GuidanceReuse.call`."""
        arguments = (*self._model, state, step, self._conditions)
        return (_residual_step, (*arguments, self._residual)) if self._skipped[index] else (_kept_step, arguments)

    def after(self, result: Any) -> SolverState:
        """See `GuidanceReuse.after`."""
        state, self._residual = result
        return state


def skipped_steps(ratios: np.ndarray, threshold: float) -> list[bool]:
    """Which steps reuse a residual: MagCache's rule.

    The residual that is reused was right at an earlier step. At the n-th step after it, its length is wrong by
    |1 - product of n ratios|. A step is skipped if the sum of these errors since that step stays below the threshold,
    and no more than `MOST_SKIPPED` are skipped in a row.

    Args:
      ratios: [steps] of `calibration.residual_ratios`.
      threshold: 0 skips none; users of MagCache take 0.06 to 0.24 for Wan2.1.
    """
    skipped = []
    in_a_row, product, error = 0, 1.0, 0.0
    for index, ratio in enumerate(ratios):
        in_a_row, product = in_a_row + 1, product * float(ratio)
        error += abs(1 - product)
        is_skipped = index >= max(1, RETAINED * len(ratios)) and error < threshold and in_a_row <= MOST_SKIPPED
        if not is_skipped:
            in_a_row, product, error = 0, 1.0, 0.0
        skipped.append(is_skipped)
    return skipped


@functools.partial(jax.jit, static_argnums=0)
def _guided_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: SolverState,
    step: Coefficients,
    text: Array,
    negative_text: Array,
    guidance_scale: Array,
) -> tuple[SolverState, Array]:
    """One step with guidance, and the difference that it made, [B, T, H, W, C]."""
    model = functools.partial(apply_model(graphdef), params)
    differences = []

    def velocity(latents: Array, timestep: Array) -> Array:
        velocity, difference = guided_difference(model, text, negative_text, guidance_scale)(latents, timestep)
        differences.append(difference)
        return velocity

    return solver_step(velocity, state, step), differences[0]


@functools.partial(jax.jit, static_argnums=0)
def _reguided_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: SolverState,
    step: Coefficients,
    text: Array,
    guidance_scale: Array,
    difference: Array,
) -> tuple[SolverState, Array]:
    """One step with the difference of an earlier one."""
    model = functools.partial(apply_model(graphdef), params)
    velocity = lambda latents, timestep: model(latents, timestep, text) + (guidance_scale - 1) * difference
    return solver_step(velocity, state, step), difference


@functools.partial(jax.jit, static_argnums=0)
def _kept_step(
    graphdef: nnx.GraphDef, params: nnx.State, state: SolverState, step: Coefficients, conditions: tuple[Any, ...]
) -> tuple[SolverState, Array]:
    """One step, and its residual for each text."""
    residuals = []

    def model(latents: Array, timestep: Array, text: Array) -> Array:
        velocity, residual = apply_with_residual(graphdef)(params, latents, timestep, text)
        residuals.append(residual)
        return velocity

    return solver_step(velocity_fn(model, conditions), state, step), residuals[0]


@functools.partial(jax.jit, static_argnums=0)
def _residual_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: SolverState,
    step: Coefficients,
    conditions: tuple[Any, ...],
    residual: Array,
) -> tuple[SolverState, Array]:
    """One step without the blocks."""
    model = lambda *inputs: apply_residual(graphdef)(params, *inputs, residual)
    return solver_step(velocity_fn(model, conditions), state, step), residual
