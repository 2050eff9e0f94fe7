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
    leaving = LinearState.of(geometry.split(geometry.delay(phi_key)), geometry.split(geometry.delay(value)))
    query, key, value, phi_query, phi_key = map(geometry.split, (query, key, value, phi_query, phi_key))
    split, chunk = geometry.overlap_start, np.arange(geometry.num_chunks)

    def windows(chunks: jax.Array, initial_overlap: jax.Array) -> jax.Array:
        overlaps = jnp.concatenate([initial_overlap[None], chunks[:-1, :, split:]])
        return jnp.concatenate([overlaps, chunks], axis=2)

    linear = _past_states(initial_state, leaving)
    if not causal:
        # Never the total minus the window: that cancels, and a normalizer could come out negative.
        future = jax.tree.map(lambda leaf: _select(chunk > chunk[:, None], leaf), LinearState.of(phi_key, value))
        linear = LinearState.sum(linear, future)

    overlap_tokens = initial_state.overlap_key.shape[1]
    has_overlap = jnp.broadcast_to((initial_state.chunks + chunk > 0)[:, None], (chunk.size, overlap_tokens))
    output = attend_window(
        query,
        windows(key, initial_state.overlap_key),
        windows(value, initial_state.overlap_value),
        jnp.concatenate([has_overlap, geometry.is_token()], axis=1)[:, None],
        phi_query,
        linear,
        stabilizer=stabilizer,
    )
    all_leaving = jax.tree.map(lambda leaf: leaf.sum(axis=0), leaving)
    final_state = HybridState(
        past=LinearState.sum(initial_state.past, initial_state.overlap, all_leaving),
        overlap=LinearState.of(phi_key[-1, :, split:], value[-1, :, split:]),
        overlap_key=key[-1, :, split:],
        overlap_value=value[-1, :, split:],
        chunks=initial_state.chunks + geometry.num_chunks,
    )
    return geometry.join(output), final_state


def _past_states(initial_state: HybridState, leaving: LinearState) -> LinearState:
    """The sums over all frames before each chunk's window; leaves [chunks, batch, ...].

    `leaving` are the sums over the frames that leave the softmax window when a chunk is done, but for the initial
    overlap, which leaves with the first chunk.
    """

    def past(initial_past, initial_overlap, leaving):
        later = jnp.broadcast_to(initial_past + initial_overlap, (leaving.shape[0] - 1, *initial_past.shape))
        chunk = np.arange(leaving.shape[0])
        return jnp.concatenate([initial_past[None], later]) + _select(chunk < chunk[:, None], leaving)

    return jax.tree.map(past, initial_state.past, initial_state.overlap, leaving)


def _select(selection: np.ndarray, chunks: jax.Array) -> jax.Array:
    """Sums the chunks that the boolean [readers, chunks] selects: [chunks, ...] -> [readers, ...].

    XLA lowers a cumulative sum to a quadratic reduce-window. This small product only adds, hence the full precision.
    """
    selection = selection.astype(chunks.dtype)
    return jnp.einsum("rc,c...->r...", selection, chunks, precision=jax.lax.Precision.HIGHEST)
