"""Measurements of a model before it samples: the ranges of its inputs, for 8 bits, and the lengths of its residuals.

The model samples a short video without guidance, with the negative prompt, from noise of a fixed seed. So a calibration
depends on the model and the options of sampling, and neither on the prompts of a run nor on their order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.diffusion.samplers import (
    Coefficients,
    Sampler,
    SolverState,
    coefficient_table,
    initial_state,
    solver_step,
)
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.quantized import input_ranges
from rehyat_jax.models.wan.residual import apply_with_residual, magnitude_ratio
from rehyat_jax.parallel.mesh import BATCH, axis_size

Array = jax.Array

FRAMES = 6
"""Latent frames of the short video, at least; they make complete chunks."""

LEVELS = 10
"""Noise levels at which ranges are measured."""

_SEED = 0


def calibrated_ranges(
    model: WanTransformer, negative_text: Array, latent_shape: tuple[int, ...], flow_shift: float
) -> dict[str, Array]:
    """The largest inputs of a model's layers over its way from noise to data; see `input_ranges`.

    Args:
      model: not quantised.
      negative_text: the embedded negative prompt [L, text_dim].
      latent_shape: (T, H, W, C) of the videos to sample.
      flow_shift: of the noise levels.
    """
    graphdef, params = nnx.split(model)
    table = coefficient_table(wan_grid(LEVELS, flow_shift), "euler")
    return _ranges(graphdef, params, table, *_inputs(model.config, negative_text, latent_shape))


@functools.partial(jax.jit, static_argnums=0)
def _ranges(
    graphdef: nnx.GraphDef, params: nnx.State, table: Coefficients, noise: Array, text: Array
) -> dict[str, Array]:
    def advance(state: SolverState, step: Coefficients) -> tuple[SolverState, dict[str, Array]]:
        found: dict[str, Array] = {}

        def velocity(latents: Array, timestep: Array) -> Array:
            velocity, ranges = input_ranges(nnx.merge(graphdef, params), latents, timestep, text)
            found.update(ranges)
            return velocity

        return solver_step(velocity, state, step), found

    _, ranges = jax.lax.scan(advance, initial_state(noise), table)
    return jax.tree.map(lambda x: x.max(0), ranges)


def residual_ratios(
    model: WanTransformer,
    negative_text: Array,
    latent_shape: tuple[int, ...],
    *,
    steps: int,
    flow_shift: float,
    sampler: Sampler,
) -> np.ndarray:
    """The ratio of the lengths of the residuals of every step and of the one before; see `magnitude_ratio`.

    Args:
      model: the model that samples.
      negative_text, latent_shape: see `calibrated_ranges`.
      steps, flow_shift, sampler: of the samples. New noise of "renoise" is left out.

    Returns:
      float32 [steps], the first of which is 1.
    """
    graphdef, params = nnx.split(model)
    table = coefficient_table(wan_grid(steps, flow_shift), sampler)
    inputs = _inputs(model.config, negative_text, latent_shape)
    return np.asarray(_ratios(graphdef, params, table, *inputs))


@functools.partial(jax.jit, static_argnums=0)
def _ratios(graphdef: nnx.GraphDef, params: nnx.State, table: Coefficients, noise: Array, text: Array) -> Array:
    apply = functools.partial(apply_with_residual(graphdef), params)

    def advance(carry: tuple[SolverState, Array], step: Coefficients) -> tuple[tuple[SolverState, Array], Array]:
        state, before = carry
        residuals = []

        def velocity(latents: Array, timestep: Array) -> Array:
            velocity, residual = apply(latents, timestep, text)
            residuals.append(residual)
            return velocity

        state = solver_step(velocity, state, step)
        return (state, residuals[0]), magnitude_ratio(residuals[0], before)

    shape = jax.eval_shape(apply, noise, jnp.zeros(len(noise)), text)[1]
    _, ratios = jax.lax.scan(advance, (initial_state(noise), jnp.zeros(shape.shape, shape.dtype)), table)
    return ratios.at[0].set(1)


def _inputs(config: WanConfig, negative_text: Array, latent_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(noise [B, T, H, W, C], text [B, L, text_dim]) of one video, as often as the mesh in use shards a batch."""
    chunk = config.block_forms.chunk_frames * config.patch_size[0]
    frames, *rest = latent_shape
    noise = host_noise(_SEED, [0], (min(frames, -(-FRAMES // chunk) * chunk), *rest))
    copies = math.prod(map(axis_size, BATCH))
    repeated = lambda x: jnp.asarray(np.concatenate([x] * copies))
    return repeated(noise), repeated(np.asarray(negative_text)[None])
