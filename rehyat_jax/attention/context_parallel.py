"""Hybrid attention of a video cut along time over devices: whole chunks each, and a small exchange.

What a device needs of those before it is the overlap of its first chunk, from its neighbour, and two sums of constant
size: LASP-2's exchange of states (arXiv 2502.07563), with a halo. Bytes moved do not depend on the video's length.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rehyat_jax.attention.api import attend_from
from rehyat_jax.attention.flat_tokens import cut, flat, with_heads
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

    first_tokens = _first_tokens_of(query, key, value, phi_query, phi_key)

    def first(count: int) -> tuple[ChunkGeometry, tuple]:
        """Geometry and arrays of this device's first `count` tokens."""
        part = dataclasses.replace(geometry, num_frames=count // tokens_per_frame)
        return part, first_tokens(count)

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
        overlap_key=to_next(cut(key, tokens - overlap_frames * tokens_per_frame, tokens)),
        overlap_value=to_next(cut(value, tokens - overlap_frames * tokens_per_frame, tokens)),
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
        return jnp.pad(flat(output), [(0, 0), (0, tokens - count), (0, 0)])

    if last == devices - 1 and last_tokens == tokens:
        output = attend(tokens)
    else:
        kinds = [lambda: attend(tokens), lambda: attend(last_tokens), lambda: jnp.zeros_like(flat(query))]
        output = jax.lax.switch(1 + jnp.sign(index - last), kinds)
    return with_heads(output, query.shape[2])


def _sum_of(parts: jax.Array, chosen: jax.Array) -> jax.Array:
    """The sum of those `parts` [devices, ...] that are chosen, bool [devices]. (A product would round on TPUs.)"""
    return jnp.where(jnp.expand_dims(chosen, range(1, parts.ndim)), parts, 0).sum(axis=0)


def _first_tokens_of(*arrays: jax.Array | InlineFeatures) -> Callable[[int], tuple]:
    """A function from a count to that many first tokens of arrays and features.

    Features of one of the arrays are features of its part.
    """
    of_tokens = lambda array: array.source if isinstance(array, InlineFeatures) else array
    # Made here: what a branch of a conditional takes in has a layout of its own.
    views = {id(of_tokens(array)): flat(of_tokens(array)) for array in arrays}

    def first_tokens(count: int) -> tuple:
        heads = of_tokens(arrays[0]).shape[2]
        parts = {name: with_heads(view[:, :count], heads) for name, view in views.items()}
        part = lambda array: parts[id(of_tokens(array))]
        return tuple(
            dataclasses.replace(array, source=part(array)) if isinstance(array, InlineFeatures) else part(array)
            for array in arrays
        )

    return first_tokens
