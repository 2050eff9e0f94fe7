"""Parallel form: all chunks at once, as a batch, for training."""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.geometry import ChunkGeometry
from rehyat_jax.attention.state import HybridState, LinearState
from rehyat_jax.attention.window import attend_window


def hybrid_attention_xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array,
    phi_key: jax.Array,
    geometry: ChunkGeometry,
    *,
    causal: bool,
    stabilizer: str,
    initial_state: HybridState,
) -> tuple[jax.Array, HybridState]:
    """Batches the chunks' windows, and sums each chunk's linear keys by a 0/1 matrix product over the chunks' own sums.

    Returns the output and the state after the last chunk (meaningless if that chunk is ragged).
    """
    query, key, value, phi_query, phi_key = map(geometry.split, (query, key, value, phi_query, phi_key))
    chunk, (chunk_tokens, split) = np.arange(geometry.num_chunks), (key.shape[2], geometry.overlap_start)

    def windows(chunks: jax.Array, initial_overlap: jax.Array) -> jax.Array:
        overlaps = jnp.concatenate([initial_overlap[None], chunks[:-1, :, split:]])
        return jnp.concatenate([overlaps, chunks], axis=2)

    def leaving(windows: jax.Array) -> jax.Array:
        return windows[:, :, :chunk_tokens]  # all of a window but the next chunk's overlap

    key_windows = windows(key, initial_state.overlap_key)
    value_windows = windows(value, initial_state.overlap_value)
    # No features for the initial overlap: its sums are known.
    phi_key_windows = windows(phi_key, jnp.zeros_like(phi_key[0, :, split:]))
    past = _past_states(initial_state, LinearState.of(leaving(phi_key_windows), leaving(value_windows)))
    linear = jax.tree.map(lambda leaf: leaf[:-1], past)
    if not causal:
        # Never the total minus the window: that cancels, and a normalizer could come out negative.
        future = jax.tree.map(lambda leaf: _select(chunk > chunk[:, None], leaf), LinearState.of(phi_key, value))
        linear = LinearState.sum(linear, future)

    has_overlap = jnp.broadcast_to((initial_state.chunks + chunk > 0)[:, None], (chunk.size, chunk_tokens - split))
    is_key = jnp.concatenate([has_overlap, geometry.is_token()], axis=1)[:, None]
    output = attend_window(query, key_windows, value_windows, is_key, phi_query, linear, stabilizer=stabilizer)
    final_state = HybridState(
        past=jax.tree.map(lambda leaf: leaf[-1], past),
        overlap=LinearState.of(phi_key[-1, :, split:], value[-1, :, split:]),
        overlap_key=key[-1, :, split:],
        overlap_value=value[-1, :, split:],
        chunks=initial_state.chunks + geometry.num_chunks,
    )
    return geometry.join(output), final_state


def _past_states(initial_state: HybridState, leaving: LinearState) -> LinearState:
    """The sums over all frames before each chunk's window and, last, before that of the chunk that would follow.

    `leaving` [chunks, batch, ...] are the sums over the frames that leave the window when a chunk is done.
    """

    def past(initial_past, initial_overlap, leaving):
        carried = [initial_past[None], jnp.broadcast_to(initial_past + initial_overlap, leaving.shape)]
        chunk = np.arange(leaving.shape[0])
        return jnp.concatenate(carried) + _select(chunk < np.arange(chunk.size + 1)[:, None], leaving)

    return jax.tree.map(past, initial_state.past, initial_state.overlap, leaving)


def _select(selection: np.ndarray, chunks: jax.Array) -> jax.Array:
    """Sums the chunks selected by the boolean [readers, chunks]: [chunks, ...] -> [readers, ...].

    XLA lowers a cumulative sum to a quadratic reduce-window. This small product only adds, hence the full precision.
    """
    selection = selection.astype(chunks.dtype)
    return jnp.einsum("rc,c...->r...", selection, chunks, precision=jax.lax.Precision.HIGHEST)
