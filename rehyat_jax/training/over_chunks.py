"""The transformer in training, over one chunk of a video after another, as it samples chunk by chunk.

Every chunk reads the states of the finished chunks before it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.models.wan.streaming import PartPositions, apply_part, initial_states, part_positions

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents [B, T, H, W, C], timestep [B]) -> velocity [B, T, H, W, C]."""


def make_apply(config: ml_collections.ConfigDict) -> Callable[[nnx.GraphDef], Callable[..., jax.Array]]:
    """How a student reads the inputs of `noising.NoisyBatch` in training.

    Returns:
      graph definition -> (params, latents, timestep, text, *past) -> velocity. config.teacher_forcing decides between
      `apply_after_chunks` and `apply_model`.
    """
    return apply_after_chunks if config.teacher_forcing else apply_model


def apply_after_chunks(model_def: nnx.GraphDef) -> Callable[..., jax.Array]:
    """Teacher forcing: every chunk of a video after the clean chunks of the real video before it.

    Gradients pass through the states.

    Args:
      model_def: graph definition of a transformer that is causal in every block.

    Returns:
      (params, latents [B, T, H, W, C], timestep [B, T], text [B, L, text_dim], clean latents [B, T, H, W, C]) ->
      velocity [B, T, H, W, C]. Timesteps are equal within chunks.
    """

    def apply(params: Any, latents: jax.Array, timestep: jax.Array, text: jax.Array, clean: jax.Array) -> jax.Array:
        def read(velocity: Velocity, _: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            noisy, timestep, clean = inputs
            return velocity(noisy, timestep[:, 0]), clean

        return over_chunks(model_def, params, text, (latents, timestep, clean), read, learn_states=True)

    return apply


def over_chunks(
    model_def: nnx.GraphDef,
    params: Any,
    text: jax.Array,
    inputs: Any,
    run: Callable[[Velocity, jax.Array, Any], tuple[Any, jax.Array]],
    *,
    learn_states: bool = False,
) -> Any:
    """Runs a function on one chunk of a video after another.

    Args:
      model_def, params: a transformer that is causal in every block.
      text: [B, L, text_dim].
      inputs: arrays [B, T, ...], the first one [B, T, H, W, C]; T need not be a whole number of chunks.
      run: (velocity of the chunk after the finished ones, number of the chunk int32 [], the chunk's frames of inputs)
        -> (results of the same frames, the finished chunk that later ones read).
      learn_states: whether gradients pass through the states.

    Returns:
      The results, joined along frames.
    """
    model = nnx.merge(model_def, params)
    config, (batch, total, height, width, _) = model.config, jax.tree.leaves(inputs)[0].shape
    patch_frames, patch_height, patch_width = config.patch_size
    grid_frames = config.block_forms.chunk_frames
    frames = grid_frames * patch_frames
    before = (total - 1) // frames  # chunks before the last one, which leaves no state
    tokens_per_frame = height // patch_height * (width // patch_width)

    def chunk(states: Any, number: jax.Array, inputs: Any, positions: PartPositions) -> tuple[Any, jax.Array]:
        apply = apply_part(model_def, is_last=True)
        velocity = lambda latents, timestep: apply(params, states, latents, timestep, text, positions)[0]
        return run(velocity, number, inputs)

    def write(states: Any, finished: jax.Array, positions: PartPositions) -> Any:
        arguments = (params, states, finished)
        if not learn_states:
            arguments = jax.lax.stop_gradient(arguments)
        return apply_part(model_def)(*arguments, jnp.zeros(batch), text, positions)[1]

    # For gradients, the device holds what one chunk needs at a time.
    read_chunk, write_states = (jax.checkpoint(function, prevent_cse=False) for function in (chunk, write))

    def advance(states: Any, chunk_inputs: tuple[jax.Array, Any, PartPositions]) -> tuple[Any, Any]:
        number, inputs, positions = chunk_inputs
        results, finished = read_chunk(states, number, inputs, positions)
        return write_states(states, finished, positions), results

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf[:, : before * frames].reshape(batch, before, frames, *leaf.shape[2:]), 1, 0)

    def join(chunks: jax.Array, last: jax.Array) -> jax.Array:
        whole = jnp.moveaxis(chunks, 0, 1).reshape(batch, before * frames, *chunks.shape[3:])
        return jnp.concatenate([whole, last], axis=1)

    states, found = initial_states(config, batch, tokens_per_frame, model.dtype), None
    if before:
        rows = [part_positions(number * grid_frames, grid_frames, config.head_dim) for number in range(before)]
        positions = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        states, found = jax.lax.scan(advance, states, (jnp.arange(before), jax.tree.map(split, inputs), positions))
    rest = jax.tree.map(lambda leaf: leaf[:, before * frames :], inputs)
    end = part_positions(before * grid_frames, total // patch_frames - before * grid_frames, config.head_dim)
    last, _ = chunk(states, jnp.int32(before), rest, end)
    return last if found is None else jax.tree.map(join, found, last)
