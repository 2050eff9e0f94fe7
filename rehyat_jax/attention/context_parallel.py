"""Hybrid attention of a video cut along time over devices: whole chunks each, and a small exchange.

What a device needs of those before it is the overlap of its first chunk, from its neighbour, and two sums of constant
size: LASP-2's exchange of states (arXiv 2502.07563), with a halo. Bytes moved do not depend on the video's length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rehyat_jax.attention.api import attend_from
from rehyat_jax.attention.geometry import ChunkGeometry
from rehyat_jax.attention.inline_features import InlineFeatures
from rehyat_jax.attention.state import HybridState, LinearState
from rehyat_jax.attention.video_sums import video_sums


def padded_frames(num_frames: int, chunk_frames: int, devices: int) -> int:
    """The least number of frames, at least num_frames, that gives all devices the same number of whole chunks."""
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
    implementation: str,
) -> jax.Array:
    """One device's part of `hybrid_attention`, to be called by all devices along the mesh axis `axis` in `shard_map`.

    Args:
      query, key, value, phi_query, phi_key: this device's tokens, whole chunks, as many as every other device's.
      num_frames: frames of the video; what the devices hold beyond them (`padded_frames`) is padding.
      others: as `hybrid_attention`'s.

    Returns: y for this device's tokens, zero for padding.
    """
    tokens = query.shape[1]
    geometry = ChunkGeometry(tokens // tokens_per_frame, tokens_per_frame, chunk_frames, overlap_frames)
    index, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    last = (num_frames - 1) // geometry.num_frames  # the device with the last frame; padding alone is beyond it
    last_tokens = (num_frames - last * geometry.num_frames) * tokens_per_frame

    def first(count: int) -> tuple[ChunkGeometry, tuple]:
        """Geometry and arrays of this device's first `count` tokens."""
        part = dataclasses.replace(geometry, num_frames=count // tokens_per_frame)
        return part, _first_tokens((query, key, value, phi_query, phi_key), count)

    # ------------------------------------------------------------------------------------------------ sums of each
    def sums(count: int) -> tuple[LinearState, LinearState]:
        part, (_, _, value, _, phi_key) = first(count)
        return video_sums(phi_key, value, part, implementation=implementation)

    if causal or last_tokens == tokens:
        before_overlap, total = sums(tokens)  # nobody reads what padding adds
    else:
        before_overlap, total = jax.lax.cond(index == last, lambda: sums(last_tokens), lambda: sums(tokens))

    # ---------------------------------------------------------------------------------------------------- exchange
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
        overlap_key=to_next(key[:, tokens - overlap_frames * tokens_per_frame :]),
        overlap_value=to_next(value[:, tokens - overlap_frames * tokens_per_frame :]),
        chunks=index * geometry.num_chunks,
    )
    later = None if causal else sum_over((device > index) & (device <= last))

    # -------------------------------------------------------------------------------------------------- attention
    def attend(count: int) -> jax.Array:
        part, arrays = first(count)
        output, _ = attend_from(
            initial_state,
            *arrays,
            part,
            causal=causal,
            stabilizer=stabilizer,
            implementation=implementation,
            later=later,
        )
        return jnp.pad(output, [(0, 0), (0, tokens - count), (0, 0), (0, 0)])

    if last == devices - 1 and last_tokens == tokens:
        return attend(tokens)
    kinds = [lambda: attend(tokens), lambda: attend(last_tokens), lambda: jnp.zeros_like(query)]
    return jax.lax.switch(1 + jnp.sign(index - last), kinds)


def _sum_of(parts: jax.Array, chosen: jax.Array) -> jax.Array:
    """The sum of those `parts` [devices, ...] that are chosen, bool [devices]. (A product would round on TPUs.)"""
    return jnp.where(jnp.expand_dims(chosen, range(1, parts.ndim)), parts, 0).sum(axis=0)


def _first_tokens(arrays: tuple[jax.Array | InlineFeatures, ...], count: int) -> tuple:
    """The first `count` tokens of arrays and features; features of one of the arrays are features of its part."""
    if count == arrays[0].shape[1]:
        return arrays
    parts = {id(array): array[:, :count] for array in arrays if not isinstance(array, InlineFeatures)}

    def part(array: jax.Array | InlineFeatures) -> jax.Array | InlineFeatures:
        if not isinstance(array, InlineFeatures):
            return parts[id(array)]
        source = parts.get(id(array.source))
        return dataclasses.replace(array, source=array.source[:, :count] if source is None else source)

    return tuple(map(part, arrays))
