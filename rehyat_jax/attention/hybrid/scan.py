"""Recurrent form: one pass over the chunks, carrying a state of constant size."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.inline import with_gain
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
        leaving = LinearState.of(phi_key[:, :split], value[:, :split])
        overlap = LinearState.of(phi_key[:, split:], value[:, split:])
        linear = [seen.past] if causal else [seen.past, future]
        if geometry.linear_window:
            linear += [seen.overlap, leaving, overlap]
        output = attend_window(
            query,
            jnp.concatenate([*_given(seen.anchor_key), seen.overlap_key, key], axis=1),
            jnp.concatenate([*_given(seen.anchor_value), seen.overlap_value, value], axis=1),
            jnp.concatenate(
                [
                    geometry.anchor_keys(seen.chunks[None])[0],
                    jnp.broadcast_to(seen.chunks > 0, seen.overlap_key.shape[1]),
                    is_token,
                ]
            ),
            phi_query,
            LinearState.sum(*linear),
            stabilizer=request.stabilizer,
            branch_gate=request.branch_gate,
        )
        is_first = seen.chunks == 0
        anchors = {} if seen.anchor_key is None else {"anchor_key": key, "anchor_value": value}
        seen = HybridState(
            past=LinearState.sum(seen.past.scaled(log_decay), seen.overlap, leaving),
            overlap=overlap,
            overlap_key=key[:, split:],
            overlap_value=value[:, split:],
            chunks=seen.chunks + 1,
            **{
                name: jnp.where(is_first, tokens[:, : getattr(seen, name).shape[1]], getattr(seen, name))
                for name, tokens in anchors.items()
            },
        )
        return seen, output

    log_decay = request.chunk_log_decay
    arrays = (request.query, request.key, request.value, request.phi_query)
    query, key, value, phi_query = map(geometry.split, arrays)
    phi_key = geometry.split(with_gain(request.phi_key, request.key_gain()))
    future = None
    if not causal:
        future_phi_key = geometry.split(with_gain(request.phi_key, request.key_gain(future=True)))
        future = _future_states(future_phi_key, value, request.later, log_decay)
    chunks = (query, key, value, phi_query, phi_key, geometry.is_token(request.num_frames), future)
    final_state, outputs = jax.lax.scan(step, request.start, chunks)
    return geometry.join(outputs), final_state


def _given(tokens: jax.Array | None) -> list[jax.Array]:
    return [] if tokens is None else [tokens]


def _future_states(
    phi_key: jax.Array, value: jax.Array, later: LinearState | None, log_decay: jax.Array | None
) -> LinearState:
    """The sums over all chunks after each chunk, plus `later`; leaves [chunks, batch, ...], like the arrays.

    Never subtract the window from the total: cancellation could make a normalizer negative.
    """

    def step(later: LinearState, chunk) -> tuple[LinearState, LinearState]:
        return LinearState.sum(later.scaled(log_decay), LinearState.of(*chunk)), later

    if later is None:
        later = jax.tree.map(jnp.zeros_like, LinearState.of(phi_key[0], value[0]))
    return jax.lax.scan(step, later, (phi_key, value), reverse=True)[1]


BACKEND = Backend("scan", run)
