"""Arrays as the TPU kernels take them: padded frames, rows of sums, and the states of single chunks."""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.hybrid.tpu.states import state_rows


def missing_frames(geometry: ChunkGeometry, has_past: jax.Array, num_frames: jax.Array | None) -> jax.Array:
    """The number of missing frames at the start and at the end of each chunk's window, int32 [2, chunks].

    They are the overlap of the first chunk if there is no past, and the padding at the end of the last one.
    """
    chunk = np.arange(geometry.num_chunks)
    at_start = jnp.where((chunk == 0) & ~has_past, geometry.overlap_frames, 0)
    at_end = geometry.chunk_frames - geometry.chunk_tokens(num_frames) // geometry.tokens_per_frame
    return jnp.stack([at_start, at_end]).astype(jnp.int32)


def with_first(states: jax.Array, count: int, value: jax.Array | float) -> jax.Array:
    """`states.at[:count].set(value)`, without its indices.

    They are an array without elements if these are all states. jaxlib 0.11 crashes on a shard_map with such an input.
    """
    count = min(count, states.shape[0])
    first = jnp.broadcast_to(jnp.asarray(value, states.dtype), (count, *states.shape[1:]))
    return jax.lax.dynamic_update_slice_in_dim(states, first, 0, axis=0)


def added(states: jax.Array, sums: jax.Array) -> jax.Array:
    """`states` plus sums over later keys for the first of them. A state after the last chunk holds only the past."""
    missing = states.shape[0] - sums.shape[0]
    return states + jnp.pad(sums, [(0, missing)] + [(0, 0)] * (sums.ndim - 1))


def frame_squares(tokens: jax.Array, tokens_per_frame: int) -> jax.Array:
    """The largest squared norm of every frame, float32 [batch, heads, frames]."""
    squares = jnp.sum(jnp.square(tokens.astype(jnp.float32)), axis=-1)
    return jnp.moveaxis(squares.reshape(tokens.shape[0], -1, tokens_per_frame, tokens.shape[2]).max(axis=2), -1, 1)


def sum_rows(sums: LinearState) -> jax.Array:
    """State and normalizer as the kernels hold them, [batch, heads, state_rows, features]."""
    head_dim = sums.state.shape[-1]
    rows = jnp.concatenate([jnp.swapaxes(sums.state, -1, -2), sums.normalizer[..., None, :]], axis=-2)
    return jnp.pad(rows, [(0, 0)] * 2 + [(0, state_rows(head_dim) - head_dim - 1), (0, 0)])


def sums_of_rows(rows: jax.Array) -> LinearState:
    head_dim = rows.shape[-2] - state_rows(0)
    return LinearState(state=jnp.swapaxes(rows[..., :head_dim, :], -1, -2), normalizer=rows[..., head_dim, :])


def pad_frames(tokens: jax.Array, tokens_per_frame: int, padded: int) -> jax.Array:
    """Appends zeros to every frame of [batch, tokens, heads, width]."""
    if tokens_per_frame == padded:
        return tokens
    batch, _, *rest = tokens.shape
    frames = tokens.reshape(batch, -1, tokens_per_frame, *rest)
    frames = jnp.pad(frames, [(0, 0), (0, 0), (0, padded - tokens_per_frame)] + [(0, 0)] * len(rest))
    return frames.reshape(batch, -1, *rest)


def drop_padding(tokens: jax.Array, tokens_per_frame: int, padded: int) -> jax.Array:
    if tokens_per_frame == padded:
        return tokens
    batch, _, *rest = tokens.shape
    return tokens.reshape(batch, -1, padded, *rest)[:, :, :tokens_per_frame].reshape(batch, -1, *rest)
