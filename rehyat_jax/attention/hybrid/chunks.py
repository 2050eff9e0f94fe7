"""All chunks of a video as a batch: the softmax window and the linear state that each chunk's queries read."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import with_gain
from rehyat_jax.attention.hybrid.backend import Request
from rehyat_jax.attention.hybrid.linear_products import sum_keys
from rehyat_jax.attention.hybrid.parts import SoftmaxPart, gated_merge, linear_part
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
    phi_key = with_gain(request.phi_key, request.key_gain())
    leaving = sum_keys(split(geometry.delay(phi_key)), split(geometry.delay(request.value)))
    arrays = (request.query, request.key, request.value, request.phi_query, phi_key)
    query, key, value, phi_query, phi_key = map(split, arrays)
    overlap_start, chunk, log_decay = geometry.overlap_start, np.arange(geometry.num_chunks), request.chunk_log_decay

    linear, past = _past_states(initial_state, leaving, log_decay)
    if not request.causal:
        # Never subtract the window from the total: cancellation could make a normalizer negative.
        future_phi_key = split(with_gain(request.phi_key, request.key_gain(future=True)))
        future_sums = sum_keys(future_phi_key, value)
        linear = LinearState.sum(linear, _sums_between(future_sums, chunk - chunk[:, None] - 1, log_decay))
    if geometry.linear_window:
        linear = LinearState.sum(
            linear, _window_sums(initial_state, sum_keys(phi_key, value), phi_key, value, overlap_start)
        )
    if request.later is not None:
        after = _decayed(request.later, geometry.num_chunks - 1 - chunk, log_decay)
        linear = LinearState.sum(linear, after)

    overlap_tokens = initial_state.overlap_key.shape[1]
    chunk_tokens = geometry.chunk_tokens(request.num_frames)
    num_keys = chunk_tokens + overlap_tokens * (initial_state.chunks + chunk > 0).astype(np.int32)
    keys = _windows(key, initial_state.overlap_key, overlap_start, chunk_tokens)
    values = _windows(value, initial_state.overlap_value, overlap_start, chunk_tokens)
    anchors: dict[str, jax.Array] = {}
    if initial_state.anchor_key is not None:
        is_first = initial_state.chunks == 0
        for name, tokens in (("anchor_key", key), ("anchor_value", value)):
            before = getattr(initial_state, name)
            anchors[name] = jnp.where(is_first, tokens[:, 0, : before.shape[1]], before)
        is_anchor = geometry.anchor_keys(initial_state.chunks + chunk)
        keys = _with_anchors(keys, anchors["anchor_key"], num_keys)
        values = _with_anchors(values, anchors["anchor_value"], num_keys)
        num_keys = num_keys + is_anchor.sum(axis=1, dtype=np.int32)
    output = attend(
        query,
        keys,
        values,
        num_keys,
        phi_query,
        linear,
        stabilizer=request.stabilizer,
        **({} if request.branch_gate is None else {"branch_gate": request.branch_gate}),
    )
    final_state = HybridState(
        past=past,
        overlap=sum_keys(phi_key[:, -1, overlap_start:], value[:, -1, overlap_start:]),
        overlap_key=key[:, -1, overlap_start:],
        overlap_value=value[:, -1, overlap_start:],
        chunks=initial_state.chunks + geometry.num_chunks,
        **anchors,
    )
    return geometry.join(jnp.moveaxis(output, 1, 0)), final_state


def attend_branches(
    run: Callable[[Request], tuple[jax.Array, HybridState | None]], request: Request
) -> tuple[jax.Array, HybridState]:
    """Two branches that are normalised separately (`branch_gate`): the window by a backend, the linear branch by XLA.

    Args:
      run: runs the backend without a linear branch.
      request: a request with a branch_gate.
    """
    state = request.initial_state
    nothing = jnp.zeros((*request.query.shape[:3], 0), request.query.dtype)
    alone = dataclasses.replace(
        request,
        phi_query=nothing,
        phi_key=nothing,
        causal=True,
        initial_state=None if state is None else state.without_sums(),
        return_state=False,
        later=None,
        log_decay=None,
        branch_gate=None,
    )
    window = jnp.moveaxis(request.geometry.split(run(alone)[0]), 0, 1)

    def attend(query, key, value, num_keys, phi_query, linear, *, stabilizer, branch_gate):
        del key, value, num_keys, stabilizer
        linear_branch = linear_part(phi_query, linear)
        alone = jnp.zeros_like(linear_branch.mass)
        softmax = SoftmaxPart.of_output(window, alone, alone)
        return gated_merge(softmax, linear_branch, branch_gate).astype(query.dtype)

    return attend_chunks(attend, request.with_arrays())


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


def _with_anchors(windows: jax.Array, anchors: jax.Array, num_keys: jax.Array) -> jax.Array:
    """Windows [batch, chunks, w, ...] with room for the anchors [batch, n, ...], which follow each window's keys."""
    room = jnp.pad(windows, [(0, 0), (0, 0), (0, anchors.shape[1])] + [(0, 0)] * (windows.ndim - 3))
    place = jax.vmap(
        lambda window, start: jax.lax.dynamic_update_slice_in_dim(window, anchors, start, axis=1), (1, 0), 1
    )
    return place(room, jnp.asarray(num_keys))


def _past_states(
    initial_state: HybridState, leaving: LinearState, log_decay: jax.Array | None
) -> tuple[LinearState, LinearState]:
    """The sums over all frames before each chunk's window, [batch, chunks, ...]; and those before the next window.

    `leaving` holds the sums over the frames that leave the softmax window after each chunk. It excludes the initial
    overlap, which leaves with the first chunk.
    """
    count = leaving.normalizer.shape[1]
    reader, chunk = np.arange(count + 1), np.arange(count)
    before = LinearState.sum(initial_state.past.scaled(log_decay), initial_state.overlap)
    first = jax.tree.map(lambda leaf: leaf[:, None], initial_state.past)
    later = _decayed(before, reader[1:] - 1, log_decay)
    begun = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, later)
    past = LinearState.sum(begun, _sums_between(leaving, reader[:, None] - chunk - 1, log_decay))
    return jax.tree.map(lambda leaf: leaf[:, :-1], past), jax.tree.map(lambda leaf: leaf[:, -1], past)


def _window_sums(
    initial_state: HybridState, chunks: LinearState, phi_key: jax.Array, value: jax.Array, overlap_start: int
) -> LinearState:
    """The sums over each chunk's window, [batch, chunks, ...]: over its overlap, and `chunks` over its own frames."""
    overlaps = sum_keys(phi_key[:, :-1, overlap_start:], value[:, :-1, overlap_start:])
    begun = jax.tree.map(
        lambda first, later: jnp.concatenate([first[:, None], later], axis=1), initial_state.overlap, overlaps
    )
    return LinearState.sum(begun, chunks)


def _decayed(sums: LinearState, chunks: np.ndarray, log_decay: jax.Array | None) -> LinearState:
    """Sums [batch, ...] after these numbers of chunks, [batch, n, ...]."""
    if log_decay is None:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:, None], (len(leaf), len(chunks), *leaf.shape[1:])), sums
        )
    factor = jnp.exp(chunks[:, None] * log_decay)
    return LinearState(sums.state[:, None] * factor[..., None, None], sums.normalizer[:, None] * factor[..., None])


def _sums_between(sums: LinearState, distance: np.ndarray, log_decay: jax.Array | None) -> LinearState:
    """The sum of the chunks at a distance of 0 or more, decayed by it: [batch, chunks, ...] -> [batch, readers, ...].

    XLA would lower a cumulative sum to a quadratic reduce-window. This small product only adds, so it needs full
    precision.

    Args:
      distance: int [readers, chunks].
    """
    dtype, is_read = sums.state.dtype, distance >= 0
    full = jax.lax.Precision.HIGHEST
    if log_decay is None:
        return jax.tree.map(
            lambda leaf: jnp.einsum("rc,bc...->br...", is_read.astype(dtype), leaf, precision=full), sums
        )
    factor = jnp.where(is_read, jnp.exp(distance.clip(0) * log_decay[:, None, None]), 0)
    return jax.tree.map(lambda leaf: jnp.einsum("hrc,bch...->brh...", factor, leaf, precision=full), sums)
