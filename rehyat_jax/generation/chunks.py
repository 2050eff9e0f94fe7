"""Sampling chunk by chunk: a chunk of frames is finished before the next one begins.

All steps of the solver run on one chunk, which reads the attention states of the finished chunks before it. Then the
model reads the finished chunk once, clean and at timestep 0, and its keys and values enter the states. The device holds
one chunk and the states of all blocks, whatever the length of the video. The first chunk is there after a fraction of
the time of a video.

The model must be causal in every block, and trained with a noise level for every chunk (`config.noise_by_chunk`): it
sees clean chunks before a noisy one. The order is that of CausVid (arXiv 2412.07772) and Self Forcing (arXiv
2506.08009). They keep keys and values of a window of frames; here, the states sum up all earlier ones.
"""

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.attention.hybrid.state import HybridState
from rehyat_jax.diffusion.flow import add_noise
from rehyat_jax.diffusion.samplers import (
    Coefficients,
    Sampler,
    SolverState,
    coefficient_table,
    initial_state,
    solver_step,
    with_fresh_noise,
)
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.parts import Part, Video, check_part_memory, velocity_fn, video_in_parts
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import PartPositions, apply_part, check_causal, initial_states

Array = jax.Array


def chunk_by_chunk(
    model: WanTransformer,
    text: Array,
    negative_text: Array,
    noise: np.ndarray,
    *,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
    sampler: Sampler = "unipc",
    before: np.ndarray | None = None,
    longest: int | None = None,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """The latents of a video, chunk by chunk, each as soon as it is finished.

    Args:
      model: causal hybrid attention in every block, trained with a noise level for every chunk.
      text, negative_text: embedded prompts [B, L, text_dim].
      noise: [B, T, H, W, C] float32 in the host's memory, see `host_noise`. With `before`, T counts its frames too.
      steps, guidance_scale, flow_shift, sampler: see `generate`; every chunk takes all steps.
      before: latents [B, T0, H, W, C] of the video to continue, or of its last frames, without noise; T0 < T. The model
        reads each of their chunks once. If they end within a chunk, that chunk sees them at its own noise level, as in
        `stream_latents`.
      longest: see `part_positions`.
      progress: show the chunks' rate and remaining time, and the time to the first new chunk.

    Yields:
      [B, chunk, H, W, C] float32 in the host's memory; the last one may be shorter. The given frames come first.

    Raises:
      InputError: a block is not causal, `before` does not fit `noise`, or memory is too small.
    """
    check_causal(model.config, "sampling chunk by chunk")
    how = dict(guidance_scale=guidance_scale, before=before, part_chunks=1, longest=longest)
    video = video_in_parts(model, text, negative_text, noise, **how)
    given = noise[:, :0] if before is None else before
    table = coefficient_table(wan_grid(steps, flow_shift), sampler, noise.dtype)
    states = initial_states(video.config, video.evaluated, video.tokens_per_frame, video.dtype)
    begin, is_first = time.monotonic(), True
    with tqdm(video.parts, desc="sampling", unit="chunk", disable=not progress) as bar:
        for chunk in bar:
            latents = given[:, chunk.frames]
            if latents.shape[1] < noise[:, chunk.frames].shape[1]:
                latents = _solved(video, chunk, states, noise[:, chunk.frames], latents, table)
                if is_first:
                    jax.block_until_ready(latents)
                    bar.set_postfix_str(f"first chunk after {time.monotonic() - begin:.1f} s", refresh=False)
                    is_first = False
            if not chunk.is_last:
                arguments = (video.params, states, latents, chunk.positions, video.conditions)
                check_part_memory(chunk_state, video, chunk, video.graphdef, *arguments)
                # The device runs while the caller uses the chunk.
                states = chunk_state(video.graphdef, *arguments)
            yield np.asarray(latents)


def sample_by_chunk(model: WanTransformer, text: Array, negative_text: Array, noise: np.ndarray, **how: Any) -> Any:
    """The latents [B, T, H, W, C] of all chunks of `chunk_by_chunk`, which has the same arguments."""
    return np.concatenate(list(chunk_by_chunk(model, text, negative_text, noise, **how)), axis=1)


def _solved(
    video: Video, chunk: Part, states: HybridState, noise: np.ndarray, given: np.ndarray, table: Coefficients
) -> Array:
    """The latents of a chunk, of which the first frames may be given."""
    state, known = initial_state(jnp.asarray(noise)), given.shape[1]
    for index in range(len(table.sigma)):
        step = Coefficients(*(column[index] for column in table))
        if known:
            noisy = add_noise(given, noise[:, :known], step.sigma)
            state = state._replace(latents=_begun(state.latents, noisy))
        arguments = (video.graphdef, video.params, states, state, step, chunk.positions, video.conditions)
        if index == 0:
            check_part_memory(chunk_step, video, chunk, *arguments)
        state = chunk_step(*arguments)
        if step.fresh:
            state = state._replace(latents=with_fresh_noise(state.latents, jnp.asarray(noise), index, step.fresh))
    return _begun(state.latents, given) if known else state.latents


def _begun(latents: Array, given: Any) -> Array:
    """The latents [B, T, H, W, C], whose first frames are given."""
    return jnp.concatenate([jnp.asarray(given), latents[:, given.shape[1] :]], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def chunk_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    states: HybridState,
    before: SolverState,
    step: Coefficients,
    positions: PartPositions,
    conditions: tuple[Array, ...],
) -> SolverState:
    """One step of the solver for one chunk, after those in `states`."""

    def model(latents: Array, timestep: Array, text: Array) -> Array:
        # As the last part of a video, a chunk leaves no state.
        return apply_part(graphdef, is_last=True)(params, states, latents, timestep, text, positions)[0]

    return solver_step(velocity_fn(model, conditions), before, step)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def chunk_state(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    states: HybridState,
    latents: Array,
    positions: PartPositions,
    conditions: tuple[Array, ...],
) -> HybridState:
    """The states after a finished chunk [B, T, H, W, C], for each text."""
    text = jnp.concatenate(conditions[:2])
    latents = jnp.concatenate([latents] * (len(text) // len(latents)))
    timestep = jnp.zeros(len(text), jnp.float32)
    return apply_part(graphdef)(params, states, latents, timestep, text, positions)[1]
