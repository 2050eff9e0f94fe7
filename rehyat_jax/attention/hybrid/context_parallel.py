"""Hybrid attention of a video that is sharded along time: complete chunks on each device, and a small exchange.

A device needs two sums of constant size from the devices before it, and its first chunk's overlap from its neighbour.
This is LASP-2's exchange of states (arXiv 2502.07563) with a halo. The bytes moved do not depend on the video's length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.flat_tokens import cut, flat, with_heads
from rehyat_jax.attention.hybrid.backend import Request, choose_backend
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry, without_padding
from rehyat_jax.attention.hybrid.state import HybridState, LinearState


def padded_frames(num_frames: int, chunk_frames: int, devices: int) -> int:
    """The smallest number of frames, at least num_frames, that gives all devices the same number of complete chunks.

    One device needs no padding.
    """
    if devices == 1:
        return num_frames
    chunks = -(-num_frames // chunk_frames)
    return -(-chunks // devices) * devices * chunk_frames


def hybrid_attention_in_parts(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    *,
    axis: str,
    num_frames: int,
    tokens_per_frame: int,
    chunk_frames: int,
    overlap_frames: int,
    causal: bool,
    stabilizer: str,
    implementation: str | None = None,
) -> jax.Array:
    """One device's part of `hybrid_attention`. All devices along the mesh axis `axis` call it in `shard_map`.

    Args:
      query, key, value, phi_query, phi_key: this device's tokens: complete chunks, the same number on every device.
      num_frames: frames of the video; further frames on the devices (`padded_frames`) are padding.
      others: see `hybrid_attention`.

    Returns: y for this device's tokens, zero for padding.
    """
    tokens = query.shape[1]
    geometry = ChunkGeometry(tokens // tokens_per_frame, tokens_per_frame, chunk_frames, overlap_frames)
    index, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    last = (num_frames - 1) // geometry.num_frames  # the device with the last frame; later devices hold only padding
    is_padded = num_frames < devices * geometry.num_frames
    real_frames = None
    if is_padded:
        # Devices after `last` treat their padding as frames; no other device reads their results.
        last_frames = num_frames - last * geometry.num_frames
        real_frames = jnp.where(index == last, last_frames, geometry.num_frames).astype(jnp.int32)

    # ---------------------------------------------------------------------------------------------------- exchange
    request = Request(query, key, value, phi_query, phi_key, geometry, causal=causal, stabilizer=stabilizer)
    backend = choose_backend(request, implementation)
    before_overlap, total = backend.video_sums(phi_key, value, geometry, None if causal else real_frames)
    to_next = lambda tree: jax.tree.map(
        lambda leaf: jax.lax.ppermute(leaf, axis, [(n, n + 1) for n in range(devices - 1)]), tree
    )
    totals = jax.lax.all_gather(total, axis)
    device = jnp.arange(devices)

    def sum_over(chosen: jax.Array) -> LinearState:
        return jax.tree.map(lambda sums: _sum_of(sums, chosen), totals)

    left = to_next(before_overlap)
    initial_state = HybridState(
        past=LinearState.sum(sum_over(device < index - 1), left),
        overlap=jax.tree.map(jnp.subtract, sum_over(device == index - 1), left),
        overlap_key=to_next(cut(key, tokens - overlap_frames * tokens_per_frame, tokens)),
        overlap_value=to_next(cut(value, tokens - overlap_frames * tokens_per_frame, tokens)),
        chunks=index * geometry.num_chunks,
    )
    later = None if causal else sum_over((device > index) & (device <= last))

    # --------------------------------------------------------------------------------------------------- attention
    here = dict(initial_state=initial_state, later=later, num_frames=real_frames)
    output, _ = backend(dataclasses.replace(request, **here))
    if is_padded:
        frames = num_frames - index * geometry.num_frames
        output = with_heads(without_padding(flat(output), geometry, frames), query.shape[2])
    return output


def _sum_of(parts: jax.Array, chosen: jax.Array) -> jax.Array:
    """The sum of the `parts` [devices, ...] that `chosen`, bool [devices], selects. A product would round on TPUs."""
    return jnp.where(jnp.expand_dims(chosen, range(1, parts.ndim)), parts, 0).sum(axis=0)
