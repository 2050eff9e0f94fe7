"""Recurrent form: one pass over the chunks, carrying a state of constant size."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.hybrid.window import attend_window


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """Scans over chunks: attend to the window and the state, then fold in the frames that leave the window.

    The bidirectional form takes the sums over all later chunks from a scan in reverse.
    """
    geometry, causal = request.geometry, request.causal
    split = geometry.overlap_start

    def step(seen: HybridState, chunk) -> tuple[HybridState, jax.Array]:
        query, key, value, phi_query, phi_key, is_token, future = chunk
        output = attend_window(
            query,
            jnp.concatenate([seen.overlap_key, key], axis=1),
            jnp.concatenate([seen.overlap_value, value], axis=1),
            jnp.concatenate([jnp.broadcast_to(seen.chunks > 0, seen.overlap_key.shape[1]), is_token]),
            phi_query,
            seen.past if causal else LinearState.sum(seen.past, future),
            stabilizer=request.stabilizer,
        )
        leaving = LinearState.of(phi_key[:, :split], value[:, :split])
        seen = HybridState(
            past=LinearState.sum(seen.past, seen.overlap, leaving),
            overlap=LinearState.of(phi_key[:, split:], value[:, split:]),
            overlap_key=key[:, split:],
            overlap_value=value[:, split:],
            chunks=seen.chunks + 1,
        )
        return seen, output

    arrays = (request.query, request.key, request.value, request.phi_query, request.phi_key)
    query, key, value, phi_query, phi_key = map(geometry.split, arrays)
    future = None if causal else _future_states(phi_key, value, request.later)
    chunks = (query, key, value, phi_query, phi_key, geometry.is_token(request.num_frames), future)
    final_state, outputs = jax.lax.scan(step, request.start, chunks)
    return geometry.join(outputs), final_state


def _future_states(phi_key: jax.Array, value: jax.Array, later: LinearState | None) -> LinearState:
    """The sums over all chunks after each chunk, plus `later`; leaves [chunks, batch, ...], like the arrays.

    Never subtract the window from the total: cancellation could make a normalizer negative.
    """

    def step(later: LinearState, chunk) -> tuple[LinearState, LinearState]:
        return LinearState.sum(later, LinearState.of(*chunk)), later

    if later is None:
        later = jax.tree.map(jnp.zeros_like, LinearState.of(phi_key[0], value[0]))
    return jax.lax.scan(step, later, (phi_key, value), reverse=True)[1]


BACKEND = Backend("scan", run)
