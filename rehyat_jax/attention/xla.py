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
    """Batches the chunks' windows, and gives each chunk the sums over its linear keys by a 0/1 matrix product.

    Returns the output and the state after the last chunk (meaningless if that chunk is ragged).
    """
    query, key, value, phi_query, phi_key = map(geometry.split, (query, key, value, phi_query, phi_key))
    split = geometry.overlap_start
    leaving = LinearState.of(phi_key[:, :, :split], value[:, :, :split])
    overlap = LinearState.of(phi_key[:, :, split:], value[:, :, split:])
    states = _linear_states(leaving, overlap, initial_state, causal=causal)

    def windows(initial_overlap: jax.Array, chunks: jax.Array) -> jax.Array:
        overlaps = jnp.concatenate([initial_overlap[:, None], chunks[:, :-1, split:]], axis=1)
        return jnp.concatenate([overlaps, chunks], axis=2)

    has_overlap = initial_state.chunks + np.arange(geometry.num_chunks) > 0
    overlap_shape = (geometry.num_chunks, initial_state.overlap_key.shape[1])
    is_key = jnp.concatenate([jnp.broadcast_to(has_overlap[:, None], overlap_shape), geometry.is_token()], axis=1)
    output = attend_window(
        query,
        windows(initial_state.overlap_key, key),
        windows(initial_state.overlap_value, value),
        is_key,
        phi_query,
        jax.tree.map(lambda leaf: leaf[:, :-1], states),
        stabilizer=stabilizer,
    )
    final_state = HybridState(
        past=jax.tree.map(lambda leaf: leaf[:, -1], states),
        overlap=jax.tree.map(lambda leaf: leaf[:, -1], overlap),
        overlap_key=key[:, -1, split:],
        overlap_value=value[:, -1, split:],
        chunks=initial_state.chunks + geometry.num_chunks,
    )
    return geometry.join(output), final_state


def _linear_states(
    leaving: LinearState, overlap: LinearState, initial_state: HybridState, *, causal: bool
) -> LinearState:
    """The sums over the linear keys of every chunk and of the one that would follow: leaves [batch, chunks + 1, ...].

    `leaving` and `overlap` are the sums over each chunk's first frames and over its last, which stay in the window for
    one chunk more; leaves [batch, chunks, ...]. XLA lowers a cumulative sum to a quadratic reduce-window, so prefixes
    and suffixes are one small matrix product, in full precision because it only adds.
    """
    chunks = leaving.normalizer.shape[1]
    reader, chunk = np.arange(chunks + 1)[:, None], np.arange(chunks)
    after = (chunk > reader) & (not causal)
    selection = np.concatenate(
        [reader >= 0, reader >= 1, (chunk < reader) | after, (chunk < reader - 1) | after], axis=1
    )

    def select(past, seen_overlap, leaving, overlap):
        parts = jnp.concatenate([past[:, None], seen_overlap[:, None], leaving, overlap], axis=1)
        return jnp.einsum("rp,bp...->br...", selection.astype(parts.dtype), parts, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(select, initial_state.past, initial_state.overlap, leaving, overlap)
