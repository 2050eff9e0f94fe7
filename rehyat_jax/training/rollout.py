"""The videos that a student makes in training, as it will make them with the sampler "renoise".

A student makes a video as a whole, or chunk by chunk: every chunk after states of the finished chunks before it. The
latter is Self Forcing (arXiv 2506.08009), with the states of hybrid attention in place of a cache of keys and values. A
student then learns from what its own mistakes in earlier chunks lead to.

A video is made without gradients. The gradient is that of the last evaluation of every frame. None passes through the
states. The feature maps of keys enter there, so they only learn where linear attention also reads the window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.diffusion import flow
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training.over_chunks import Velocity, over_chunks
from rehyat_jax.training.step import Batch

SIMULATED_STEP = "simulated_step"
"""Name scope of the conditional in `solve`: half of its executions evaluate the student, on average."""


class Rollout(NamedTuple):
    """How a student makes videos.

    Attributes:
      simulate: (parameters, shape [B, T, H, W, C], text [B, L, text_dim], key, step int32 []) -> (noisy latents that
        the step reads, the clean latents that it predicts), all steps before it made.
      velocity: (parameters, batch) -> the velocity of batch["noisy"] at batch["timestep"] [B], with batch["text"]. The
        finished chunks before each are those of batch["finished"], clean latents. A student of whole videos ignores it.
    """

    simulate: Callable[..., tuple[jax.Array, jax.Array]]
    velocity: Callable[[Any, Batch], jax.Array]


def whole_videos(model_def: nnx.GraphDef, *, steps: int, flow_shift: float) -> Rollout:
    """Every step for the complete video. The sampler has `steps` steps on `wan_grid`."""
    apply = apply_model(model_def)

    def simulate(
        params: Any, shape: tuple[int, ...], text: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        velocity = lambda latents, timestep: apply(params, latents, timestep, text)
        return solve(velocity, shape, key, step, steps=steps, flow_shift=flow_shift)

    return Rollout(simulate, lambda params, batch: apply(params, batch["noisy"], batch["timestep"], batch["text"]))


def chunk_by_chunk(model_def: nnx.GraphDef, *, steps: int, flow_shift: float) -> Rollout:
    """All steps for one chunk, then for the next one, as `rehyat_jax.generation.chunks` samples."""

    def simulate(
        params: Any, shape: tuple[int, ...], text: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def make(velocity: Velocity, chunk: jax.Array, like: jax.Array) -> tuple[Any, jax.Array]:
            chunk_key = jax.random.fold_in(key, chunk)
            made = solve(velocity, like.shape, chunk_key, step, steps=steps, flow_shift=flow_shift)
            return made, made[1]

        # XLA drops the zeros, of which only the shapes are read.
        return over_chunks(model_def, params, text, jnp.zeros(shape), make)

    def velocity(params: Any, batch: Batch) -> jax.Array:
        def read(velocity: Velocity, _: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            noisy, finished = inputs
            return velocity(noisy, batch["timestep"]), finished

        return over_chunks(model_def, params, batch["text"], (batch["noisy"], batch["finished"]), read)

    return Rollout(simulate, velocity)


def solve(
    velocity: Velocity, shape: tuple[int, ...], key: jax.Array, last: jax.Array, *, steps: int, flow_shift: float
) -> tuple[jax.Array, jax.Array]:
    """Samples with "renoise" up to step `last`; the result is that of `Rollout.simulate`."""
    grid = wan_grid(steps, flow_shift)
    sigmas, timesteps = (jnp.asarray(values, jnp.float32) for values in grid)
    noise = lambda step: jax.random.normal(jax.random.fold_in(key, step), shape)

    def clean(step: jax.Array, latents: jax.Array) -> jax.Array:
        return flow.predict_clean(latents, velocity(latents, jnp.full(shape[0], timesteps[step])), sigmas[step])

    def advance(latents: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        further = lambda: flow.add_noise(clean(step, latents), noise(step + 1), sigmas[step + 1])
        with jax.named_scope(SIMULATED_STEP):
            return jax.lax.cond(step < last, further, lambda: latents), None

    # A fixed number of steps, of which the last ones do nothing: `rehyat_jax.plan` knows what such a loop costs.
    latents, _ = jax.lax.scan(advance, noise(0), jnp.arange(steps - 1))
    return latents, clean(last, latents)
