"""Hybrid attention of a video that is sharded along time: complete chunks on each device, and a small exchange.

A device needs two sums of constant size from the devices before it, and its first chunk's overlap from its neighbour.
This is LASP-2's exchange of states (arXiv 2502.07563) with a halo. The bytes moved do not depend on the video's length.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import InlineFeatures, with_gain
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
    stabilizer: str = "row_max",
    anchor_frames: int = 0,
    linear_window: bool = False,
    log_decay: jax.Array | None = None,
    branch_gate: jax.Array | None = None,
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
    frames = tokens // tokens_per_frame
    geometry = ChunkGeometry(frames, tokens_per_frame, chunk_frames, overlap_frames, anchor_frames, linear_window)
    index, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    last = (num_frames - 1) // geometry.num_frames  # the device with the last frame; later devices hold only padding
    is_padded = num_frames < devices * geometry.num_frames
    real_frames = None
    if is_padded:
        # Devices after `last` treat their padding as frames; no other device reads their results.
        last_frames = num_frames - last * geometry.num_frames
        real_frames = jnp.where(index == last, last_frames, geometry.num_frames).astype(jnp.int32)

    # ---------------------------------------------------------------------------------------------------- exchange
    request = Request(
        *(query, key, value, phi_query, phi_key, geometry),
        causal=causal,
        stabilizer=stabilizer,
        log_decay=log_decay,
        branch_gate=branch_gate,
    )
    backend = choose_backend(request, implementation)

    def sums(exponents: np.ndarray) -> tuple[LinearState, LinearState]:
        """Sums over the frames before the last overlap_frames, and over all frames."""
        gained = with_gain(phi_key, request.gain(exponents, index == 0))
        return backend.video_sums(gained, value, geometry, None if causal else real_frames)

    # Distances to the window of the next device's first chunk; the overlap's, to the window after that.
    frame, window = np.arange(frames), frames - overlap_frames
    before_overlap, total = sums(np.where(frame < window, window, window + chunk_frames) - 1 - frame)
    to_next = lambda tree: jax.tree.map(
        lambda leaf: jax.lax.ppermute(leaf, axis, [(n, n + 1) for n in range(devices - 1)]), tree
    )
    device = jnp.arange(devices)
    left, totals = to_next(before_overlap), jax.lax.all_gather(total, axis)
    overlap = jax.tree.map(jnp.subtract, _sum_of(totals, device == index - 1), left)
    if log_decay is None:
        past = LinearState.sum(_sum_of(totals, device < index - 1), left)
    else:
        befores = jax.lax.all_gather(before_overlap, axis)
        overlaps = jax.tree.map(jnp.subtract, totals, befores)
        distance = frames * (index - 1 - device)
        past = LinearState.sum(
            _sum_of(befores, device < index, distance * log_decay[:, None]),
            _sum_of(overlaps, device < index - 1, (distance - chunk_frames) * log_decay[:, None]),
        )
    anchors: dict[str, jax.Array] = {}
    if anchor_frames:
        first = lambda tokens: jax.lax.psum(
            jnp.where(index == 0, cut(tokens, 0, anchor_frames * tokens_per_frame), 0), axis
        )
        anchors = {"anchor_key": first(key), "anchor_value": first(value)}
    initial_state = HybridState(
        past=past,
        overlap=overlap,
        overlap_key=to_next(cut(key, tokens - overlap_frames * tokens_per_frame, tokens)),
        overlap_value=to_next(cut(value, tokens - overlap_frames * tokens_per_frame, tokens)),
        chunks=index * geometry.num_chunks,
        **anchors,
    )
    later = None
    if not causal:
        is_later = (device > index) & (device <= last)
        if log_decay is None:
            later = _sum_of(totals, is_later)
        else:
            futures = jax.lax.all_gather(sums(frame)[1], axis)
            later = _sum_of(futures, is_later, frames * (device - index - 1) * log_decay[:, None])

    # --------------------------------------------------------------------------------------------------- attention
    here = dict(initial_state=initial_state, later=later, num_frames=real_frames)
    output, _ = backend(dataclasses.replace(request, **here))
    if is_padded:
        frames = num_frames - index * geometry.num_frames
        output = with_heads(without_padding(flat(output), geometry, frames), query.shape[2])
    return output


def _sum_of(parts: LinearState, chosen: jax.Array, log_factor: jax.Array | None = None) -> LinearState:
    """The sum of the parts [devices, ...] that `chosen`, bool [devices], selects. A product would round on TPUs.

    Args:
      log_factor: [heads, devices], the logarithm of what multiplies each part; None for zero.
    """
    if log_factor is not None:
        scale = jnp.exp(jnp.where(chosen, log_factor, 0)).T[:, None]  # [devices, 1, heads]
        parts = LinearState(parts.state * scale[..., None, None], parts.normalizer * scale[..., None])
    select = lambda part: jnp.where(jnp.expand_dims(chosen, range(1, part.ndim)), part, 0).sum(axis=0)
    return jax.tree.map(select, parts)
