"""The states of chunks whose queries read the frames of the window too, from the kernel's running sums."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.tpu.arrays import added


def window_states(
    geometry: ChunkGeometry, causal: bool, return_state: bool, sums: jax.Array, given: dict[str, jax.Array]
) -> jax.Array:
    """The states that the chunks' queries read; with return_state, then the sums before the next chunk's window.

    This is linear in the arrays, so the gradient needs only their shapes.

    Args:
      sums: float32 [chunks, batch, heads, rows, features], over the frames up to each chunk's end. With return_state,
        the last chunk has two: up to the beginning of the last overlap, and up to its end. They are undefined where
        they hold no frame in addition to the one before.
      given: optionally sums [batch, heads, rows, features]: "past", over the frames before the first chunk's window,
        "overlap", over its overlap, and "later", over the frames after the last chunk.
    """
    states, count = sums, geometry.num_chunks
    if return_state:
        last = sums[count if geometry.overlap_frames else count - 1]
        states = jnp.concatenate([sums[: count - 1], last[None]])
    if not causal:
        states = jnp.broadcast_to(states[-1], states.shape)
    if return_state:
        # If the overlap is the complete last chunk, the frames before it end with the chunk before.
        end = count if geometry.overlap_frames < geometry.chunk_frames else count - 1
        past = sums[end - 1] if end else jnp.zeros_like(sums[0])
        states = jnp.concatenate([states, past[None]])
    if "past" in given:
        states += given["past"] + given["overlap"]
    if "later" in given:
        states = added(states, jnp.broadcast_to(given["later"], (count, *states.shape[1:])))
    return states
