"""Sampling of videos of any length: the device holds a part of the video, so its memory does not depend on the length.

The host holds the latents of the complete video and the solver's history. See `rehyat_jax.models.wan.streaming` for the
two ways through a model's parts and blocks:

- Causal hybrid attention in every block: every part goes through all blocks. The device holds the states of all blocks.
- Bidirectional hybrid attention: every block goes through all parts. The host also holds the tokens of the complete
  video between two blocks.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.diffusion.samplers import (
    Coefficients,
    Sampler,
    SolverState,
    coefficient_table,
    solver_step,
)
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.noise import fresh_host_noise
from rehyat_jax.generation.parts import Part, Video, check_part_memory, velocity_fn, video_in_parts
from rehyat_jax.models.wan.modeling import Conditions, WanTransformer
from rehyat_jax.models.wan.streaming import (
    PartPositions,
    apply_block,
    apply_part,
    check_streams,
    embed_part,
    initial_state,
    initial_states,
    is_causal,
)
from rehyat_jax.parallel.memory import check_host_memory

Array = jax.Array

PART_CHUNKS = 4
"""Chunks of every block's form in a part. Smaller parts spend more time on copies of states and the overlap's sums;
docs/sampling.md has figures."""


def stream_latents(
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
    part_chunks: int = PART_CHUNKS,
    longest: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """`generate_latents` for videos of any length, with memory on the device for one part.

    The result is that of `generate_latents`, to rounding. With `before`, it continues an existing video: at every step
    the model sees the given frames at the step's noise level, and their noise never changes. This is the replacement
    method (Song et al., arXiv 2011.13456; Ho et al., arXiv 2204.03458). It needs no training, because the model sees
    one noise level in all frames, as in training. `rehyat_jax.generation.chunks` gives clean frames at timestep 0 to a
    model that was trained with a noise level for every chunk.

    Args:
      model: hybrid attention in every block. If all blocks are causal, the video goes through the model part by part,
        otherwise layer by layer.
      text, negative_text: embedded prompts [B, L, text_dim].
      noise: [B, T, H, W, C] float32 in the host's memory, see `host_noise`. With `before`, T counts its frames too.
      steps, guidance_scale, flow_shift, sampler: see `generate`.
      before: latents [B, T0, H, W, C] of the video to continue, or of its last frames, without noise; T0 < T. The model
        reads all of them at every step. Whole chunks of frames waste no computation.
      part_chunks: chunks of every block's form in a part. Fewer of them need less memory and more time.
      longest: see `part_positions`. Parts have no more frames, but at least a chunk.
      progress: show the parts' rate and remaining time.

    Returns:
      [B, T, H, W, C] float32 in the host's memory. It begins with `before`.

    Raises:
      InputError: a block's attention cannot be computed part by part, `before` does not fit `noise`, or memory is too
        small.
    """
    config = model.config
    check_streams(config)
    how = dict(guidance_scale=guidance_scale, before=before, part_chunks=part_chunks, longest=longest)
    video = video_in_parts(model, text, negative_text, noise, **how)
    advance, runs = _part_by_part, len(video.parts)
    if not is_causal(config):
        advance, runs = _layer_by_layer, len(video.parts) * (config.num_layers + 2)
        _check_host_memory(video)
    table = coefficient_table(wan_grid(steps, flow_shift), sampler, noise.dtype)
    # The solver's history of the complete video, in the host's memory.
    history = SolverState(noise.copy(), *(np.zeros_like(noise) for _ in range(3)))

    with tqdm(total=steps * runs, desc="sampling", unit="part", disable=not progress) as bar:
        for index in range(steps):
            step = Coefficients(*(column[index] for column in table))
            if before is not None:
                # `add_noise` in the host's memory.
                given = (1 - step.sigma) * before + step.sigma * noise[:, : before.shape[1]]
                history.latents[:, : before.shape[1]] = given
            check = check_part_memory if index == 0 else _no_check
            for part, after in zip(video.parts, advance(video, history, step, check, bar), strict=True):
                for array, values in zip(history, after, strict=True):
                    array[:, part.frames] = values
            if step.fresh:
                history.latents[...] += step.fresh * fresh_host_noise(noise, index)
    if before is not None:
        history.latents[:, : before.shape[1]] = before
    return history.latents


def _part_by_part(
    video: Video, history: SolverState, step: Coefficients, check: Callable[..., None], bar: tqdm
) -> Iterator[SolverState]:
    """One step of the solver; yields the solver's state after it for every part."""

    def run() -> Iterator[SolverState]:
        states = initial_states(video.config, video.evaluated, video.tokens_per_frame, video.dtype)
        for part in video.parts:
            arguments = (states, _of_part(history, part), step, part.positions, video.conditions)
            arguments = (video.graphdef, part.is_last, video.params, *arguments)
            check(part_step, video, part, *arguments)
            after, states = part_step(*arguments)
            yield after
            bar.update()

    return _on_host(run())


def _layer_by_layer(
    video: Video, history: SolverState, step: Coefficients, check: Callable[..., None], bar: tqdm
) -> Iterator[SolverState]:
    """`_part_by_part` for blocks that also read later parts."""
    graphdef, params, parts = video.graphdef, video.params, video.parts
    conditions = _conditions(graphdef, params, step.timestep, video.conditions)

    def embed() -> Iterator[tuple[Array, LinearState]]:
        for part in parts:
            latents = history.latents[:, part.frames]
            yield _embed(graphdef, video.evaluated, params, latents, part.positions, conditions)
            bar.update()

    def run(block: int, later: list[LinearState]) -> Iterator[tuple[Array, LinearState]]:
        state = initial_state(video.config, video.evaluated, video.tokens_per_frame, video.dtype)
        for part, x, sums in zip(parts, tokens, later, strict=True):
            arguments = (np.int32(block), x, state, sums, part.positions, conditions)
            arguments = (graphdef, part.grid, part.is_last, params, *arguments)
            if block == 0:
                check(block_step, video, part, *arguments)
            *result, state = block_step(*arguments)
            yield tuple(result)
            bar.update()

    def solve() -> Iterator[SolverState]:
        for part, x in zip(parts, tokens, strict=True):
            before = _of_part(history, part)
            yield _solve(graphdef, part.grid, params, x, before, step, conditions, video.conditions)
            bar.update()

    tokens, sums = map(list, zip(*_on_host(embed()), strict=True))
    for block in range(video.config.num_layers):
        for index, result in enumerate(_on_host(run(block, _sums_after(sums)))):
            tokens[index], sums[index] = result
    return _on_host(solve())


def _on_host(results: Iterable[Any]) -> Iterator[Any]:
    """The results in the host's memory. The device computes the next one while the host fetches one."""
    running = None
    for result in results:
        if running is not None:
            yield jax.device_get(running)
        running = result
    yield jax.device_get(running)


def _sums_after(sums: list[LinearState]) -> list[LinearState]:
    """The sums over the parts after each part."""
    after = [LinearState(*map(np.zeros_like, sums[-1]))]
    for own in sums[:0:-1]:
        after.append(LinearState.sum(after[-1], own))
    return after[::-1]


def _of_part(history: SolverState, part: Part) -> SolverState:
    return SolverState(*(array[:, part.frames] for array in history))


def _check_host_memory(video: Video) -> None:
    """Raises InputError if the host cannot hold the tokens and the sums of all parts, and the solver's history."""
    config, sizes = video.config, (video.evaluated, video.tokens_per_frame, video.dtype)
    state = jax.eval_shape(lambda: initial_state(video.config, *sizes))
    of_part = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in state.past)
    frames = sum(part.grid[0] for part in video.parts)
    tokens = video.evaluated * frames * video.tokens_per_frame * config.width * jnp.dtype(video.dtype).itemsize
    latents = 4 * 4 * math.prod(video.shape)
    check_host_memory(
        tokens + len(video.parts) * of_part + latents,
        f"a bidirectional model's tokens of {video.shape[0]} videos, {video.shape[1]} latent frames of "
        f"{video.shape[2]}x{video.shape[3]}",
        "sample fewer, shorter or smaller videos, or train a student with config.hybrid.causal=True",
    )


def _no_check(*arguments: Any) -> None:
    pass


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def part_step(
    graphdef: nnx.GraphDef,
    is_last: bool,
    params: nnx.State,
    states: HybridState,
    before: SolverState,
    step: Coefficients,
    positions: PartPositions,
    conditions: tuple[Array, ...],
) -> tuple[SolverState, HybridState]:
    """One step of the solver for one part, and the attention states after it."""
    after: list[HybridState] = []

    def model(latents: Array, timestep: Array, text: Array) -> Array:
        velocity, new = apply_part(graphdef, is_last=is_last)(params, states, latents, timestep, text, positions)
        after.append(new)
        return velocity

    return solver_step(velocity_fn(model, conditions), before, step), after[0]


@functools.partial(jax.jit, static_argnums=0)
def _conditions(
    graphdef: nnx.GraphDef, params: nnx.State, timestep: Array, conditions: tuple[Array, ...]
) -> Conditions:
    texts = jnp.concatenate(conditions[:2])
    return nnx.merge(graphdef, params).conditions(jnp.broadcast_to(timestep, len(texts)), texts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(
    graphdef: nnx.GraphDef,
    evaluated: int,
    params: nnx.State,
    latents: Array,
    positions: PartPositions,
    conditions: Conditions,
) -> tuple[Array, LinearState]:
    """A part's tokens, and the sums over its keys in the first block."""
    latents = jnp.concatenate([latents] * (evaluated // len(latents)))
    return embed_part(graphdef)(params, latents, positions, conditions)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def block_step(
    graphdef: nnx.GraphDef,
    grid: tuple[int, int, int],
    is_last: bool,
    params: nnx.State,
    block: Array,
    x: Array,
    state: HybridState,
    later: LinearState,
    positions: PartPositions,
    conditions: Conditions,
) -> tuple[Array, LinearState, HybridState]:
    """A part's tokens after a block, the sums over its keys in the next block, and the block's state."""
    run = apply_block(graphdef, grid, is_last=is_last)
    x, state, sums = run(params, block, x, state, later, positions, conditions)
    return x, sums, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(
    graphdef: nnx.GraphDef,
    grid: tuple[int, int, int],
    params: nnx.State,
    x: Array,
    before: SolverState,
    step: Coefficients,
    conditions: Conditions,
    texts: tuple[Array, ...],
) -> SolverState:
    """One step of the solver for one part, from its tokens after the last block."""
    velocity = nnx.merge(graphdef, params).velocity(x, conditions, grid)
    return solver_step(velocity_fn(lambda *_: velocity, texts), before, step)
