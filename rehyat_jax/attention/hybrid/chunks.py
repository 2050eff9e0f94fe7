"""All chunks of a video as a batch: the softmax window and the linear state that each chunk's queries read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.hybrid.backend import Request
from rehyat_jax.attention.hybrid.linear_products import sum_keys
from rehyat_jax.attention.hybrid.state import HybridState, LinearState

# attend(query, key, value, num_keys, phi_query, linear, stabilizer=...) -> output; see `attend_chunks`.
AttendWindow = Callable[..., jax.Array]


def attend_chunks(attend: AttendWindow, request: Request) -> tuple[jax.Array, HybridState]:
    """Hybrid attention by any function that attends to windows.

    Args:
      attend: function that returns the result of every query, in the shape of query. It is called once, with
        - query [batch, chunks, n, heads, head_dim];
        - key and value [batch, chunks, w, heads, head_dim];
        - num_keys int32 [chunks]: only that many keys at the start of a window are not padding;
        - phi_query [batch, chunks, n, heads, features];
        - linear, the sums over each chunk's linear keys: LinearState of [batch, chunks, heads, features(, head_dim)].
      request: a request with its features computed.

    Returns: the output and the state after the last chunk (meaningless if that chunk is ragged).
    """
    geometry, initial_state = request.geometry, request.start
    split = lambda tokens: jnp.moveaxis(geometry.split(tokens), 0, 1)
    leaving = sum_keys(split(geometry.delay(request.phi_key)), split(geometry.delay(request.value)))
    arrays = (request.query, request.key, request.value, request.phi_query, request.phi_key)
    query, key, value, phi_query, phi_key = map(split, arrays)
    overlap_start, chunk = geometry.overlap_start, np.arange(geometry.num_chunks)

    linear = _past_states(initial_state, leaving)
    if not request.causal:
        # Never subtract the window from the total: cancellation could make a normalizer negative.
        future = jax.tree.map(lambda sums: _select(chunk > chunk[:, None], sums), sum_keys(phi_key, value))
        linear = LinearState.sum(linear, future)
    if request.later is not None:
        linear = jax.tree.map(lambda sums, after: sums + after[:, None], linear, request.later)

    overlap_tokens = initial_state.overlap_key.shape[1]
    chunk_tokens = geometry.chunk_tokens(request.num_frames)
    num_keys = chunk_tokens + overlap_tokens * (initial_state.chunks + chunk > 0).astype(np.int32)
    output = attend(
        query,
        _windows(key, initial_state.overlap_key, overlap_start, chunk_tokens),
        _windows(value, initial_state.overlap_value, overlap_start, chunk_tokens),
        num_keys,
        phi_query,
        linear,
        stabilizer=request.stabilizer,
    )
    final_state = HybridState(
        past=LinearState.sum(initial_state.past, initial_state.overlap, jax.tree.map(lambda s: s.sum(axis=1), leaving)),
        overlap=sum_keys(phi_key[:, -1, overlap_start:], value[:, -1, overlap_start:]),
        overlap_key=key[:, -1, overlap_start:],
        overlap_value=value[:, -1, overlap_start:],
        chunks=initial_state.chunks + geometry.num_chunks,
    )
    return geometry.join(jnp.moveaxis(output, 1, 0)), final_state


def _windows(chunks: jax.Array, initial_overlap: jax.Array, overlap_start: int, chunk_tokens: jax.Array) -> jax.Array:
    """Each chunk's tokens, then its overlap, then padding: [batch, chunks, n, ...] -> [batch, chunks, w, ...].

    In this order the keys of a window always come first, so no mask is needed. The first chunk of a video has no
    overlap, and one chunk may hold fewer tokens (`chunk_tokens`, [chunks]).
    """
    overlaps = jnp.concatenate([initial_overlap[:, None], chunks[:, :-1, overlap_start:]], axis=1)
    windows = jnp.concatenate([chunks, overlaps], axis=2)
    if isinstance(chunk_tokens, np.ndarray) and np.all(chunk_tokens == chunks.shape[2]):
        return windows
    chunk_tokens = jnp.asarray(chunk_tokens)
    ragged = jnp.argmin(chunk_tokens)  # or the first, if all are complete
    take = lambda array: jax.lax.dynamic_index_in_dim(array, ragged, axis=1, keepdims=False)
    window = jax.lax.dynamic_update_slice_in_dim(take(windows), take(overlaps), chunk_tokens[ragged], axis=1)
    return jax.lax.dynamic_update_index_in_dim(windows, window, ragged, axis=1)


def _past_states(initial_state: HybridState, leaving: LinearState) -> LinearState:
    """The sums over all frames before each chunk's window; leaves [batch, chunks, ...].

    `leaving` holds the sums over the frames that leave the softmax window after each chunk. It excludes the initial
    overlap, which leaves with the first chunk.
    """

    def past(initial_past, initial_overlap, leaving):
        later = jnp.broadcast_to((initial_past + initial_overlap)[:, None], leaving[:, 1:].shape)
        chunk = np.arange(leaving.shape[1])
        return jnp.concatenate([initial_past[:, None], later], axis=1) + _select(chunk < chunk[:, None], leaving)

    return jax.tree.map(past, initial_state.past, initial_state.overlap, leaving)


def _select(selection: np.ndarray, chunks: jax.Array) -> jax.Array:
    """Sums the chunks that the boolean [readers, chunks] selects: [batch, chunks, ...] -> [batch, readers, ...].

    XLA would lower a cumulative sum to a quadratic reduce-window. This small product only adds, so it needs full
    precision.
    """
    selection = selection.astype(chunks.dtype)
    return jnp.einsum("rc,bc...->br...", selection, chunks, precision=jax.lax.Precision.HIGHEST)
