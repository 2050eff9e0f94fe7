"""Sampling of videos of any length: every step goes through the video part by part.

The host holds the latents of the complete video and the solver's history. The device holds one part and the attention
states of all blocks, so its memory does not depend on the length. Only causal hybrid attention in every block allows
this; see `rehyat_jax.models.wan.streaming`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.attention.hybrid.state import HybridState
from rehyat_jax.diffusion.samplers import Coefficients, Sampler, SolverState, coefficient_table, solver_step
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.guidance import guided_velocity
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import PartPositions, apply_part, initial_states, part_positions
from rehyat_jax.parallel.memory import check_step_memory

Array = jax.Array


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
    part_chunks: int = 1,
    longest: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """`generate_latents` for videos of any length, with memory on the device for one part.

    The result is that of `generate_latents`, to rounding.

    Args:
      model: causal hybrid attention in every block.
      text, negative_text: embedded prompts [B, L, text_dim].
      noise: [B, T, H, W, C] float32 in the host's memory, see `host_noise`.
      steps, guidance_scale, flow_shift, sampler: see `generate`.
      part_chunks: chunks of every block's form in a part. More of them read the weights less often, and need more
        memory.
      longest: see `part_positions`.
      progress: show the parts' rate and remaining time.

    Returns:
      [B, T, H, W, C] float32 in the host's memory.

    Raises:
      InputError: a block's attention needs the complete video, or a part does not fit into memory.
    """
    graphdef, params = nnx.split(model)
    config = model.config
    videos, frames, height, width, _ = noise.shape
    patch_frames = config.patch_size[0]
    part_frames = part_chunks * config.block_forms.chunk_frames * patch_frames
    is_guided = guidance_scale != 1
    conditions = (text, negative_text, np.float32(guidance_scale)) if is_guided else (text,)
    tokens = height // config.patch_size[1] * (width // config.patch_size[2])
    begin_states = functools.partial(initial_states, config, videos * (1 + is_guided), tokens, model.dtype)

    parts = [slice(begin, min(begin + part_frames, frames)) for begin in range(0, frames, part_frames)]
    positions = [
        part_positions(p.start // patch_frames, (p.stop - p.start) // patch_frames, config.head_dim, longest=longest)
        for p in parts
    ]
    table = coefficient_table(wan_grid(steps, flow_shift), sampler, noise.dtype)
    # The solver's history of the complete video, in the host's memory.
    history = SolverState(noise.copy(), *(np.zeros_like(noise) for _ in range(3)))

    with tqdm(total=steps * len(parts), desc="sampling", unit="part", disable=not progress) as bar:
        for index in range(steps):
            step = Coefficients(*(column[index] for column in table))
            states, running = begin_states(), None
            for number, part in enumerate(parts):
                before = SolverState(*(array[:, part] for array in history))
                arguments = (params, states, before, step, positions[number], conditions)
                run = functools.partial(part_step, graphdef, number == len(parts) - 1)
                if index == 0 and number in (0, len(parts) - 1):
                    _check_memory(graphdef, number == len(parts) - 1, *arguments)
                after, states = run(*arguments)
                # The device computes this part while the host stores the one before.
                if running is not None:
                    _store(history, *running)
                running = part, after
                bar.update()
            _store(history, *running)
    return history.latents


def _store(history: SolverState, part: slice, after: SolverState) -> None:
    for array, values in zip(history, after, strict=True):
        array[:, part] = values


def _check_memory(graphdef: nnx.GraphDef, is_last: bool, *arguments: Any) -> None:
    before = arguments[2]
    batch, frames, height, width, _ = before.latents.shape
    check_step_memory(
        part_step.lower(graphdef, is_last, *arguments).compile(),
        f"a part of {batch} videos, {frames} latent frames of {height}x{width}",
        "stream fewer chunks at once, or fewer or smaller videos",
    )


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

    if len(conditions) == 1:
        velocity = lambda latents, timestep: model(latents, timestep, *conditions)
    else:
        velocity = guided_velocity(model, *conditions)
    solved = solver_step(velocity, jax.tree.map(jnp.asarray, before), step)
    return solved, after[0]
