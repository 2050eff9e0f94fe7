"""Linear attention alone, as in SANA-Video: sums over keys and one readout, without any softmax."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.inline import InlineFeatures, as_array
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry, without_padding
from rehyat_jax.attention.hybrid.linear_products import read_sums, sum_keys
from rehyat_jax.attention.hybrid.state import LinearState


def linear_attention(
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    *,
    tokens_per_frame: int,
    chunk_frames: int,
    causal: bool,
    past: LinearState | None = None,
    later: LinearState | None = None,
    axis: str | None = None,
    num_frames: int | None = None,
) -> tuple[jax.Array, LinearState]:
    """y = phi_query sum phi_key v^T / phi_query sum phi_key, zero where the denominator is.

    Args:
      value: [batch, tokens, heads, head_dim], tokens frame-major.
      phi_query, phi_key: non-negative features [batch, tokens, heads, features], or `InlineFeatures`.
      tokens_per_frame: tokens of one latent frame.
      chunk_frames: Tc. Causal attention of a chunk reads the keys of this chunk and of all before.
      causal: False to read all keys.
      past, later: sums over the frames before and after these; None for zero.
      axis: mesh axis along which complete chunks are sharded, inside `shard_map`; None if they are not.
      num_frames: frames of the video that are not padding; None for all. The result of padding is zero.

    Returns:
      (y in the dtype of `value`, `past` with the sums over these frames).
    """
    phi_query, phi_key = as_array(phi_query), as_array(phi_key)
    frames = value.shape[1] // tokens_per_frame
    geometry = ChunkGeometry(frames, tokens_per_frame, chunk_frames, 0)
    here = None
    if num_frames is not None:
        here = num_frames - (0 if axis is None else jax.lax.axis_index(axis) * frames)
        phi_key = without_padding(phi_key, geometry, here)
    total = sum_keys(phi_key, value)
    before = [sums for sums in (past,) if sums is not None]
    if axis is not None:
        totals, device = jax.lax.all_gather(total, axis), jnp.arange(jax.lax.axis_size(axis))
        is_read = device < jax.lax.axis_index(axis) if causal else device != jax.lax.axis_index(axis)
        select = lambda leaf: jnp.where(jnp.expand_dims(is_read, range(1, leaf.ndim)), leaf, 0).sum(axis=0)
        before.append(jax.tree.map(select, totals))
    if causal:
        # A chunk attends to itself: its sums are added before it reads.
        def step(seen: LinearState, chunk) -> tuple[LinearState, LinearState]:
            phi_query, phi_key, value = chunk
            seen = LinearState.sum(seen, sum_keys(phi_key, value))
            return seen, read_sums(phi_query, seen)

        start = LinearState.sum(jax.tree.map(jnp.zeros_like, total), *before)
        chunks = tuple(map(geometry.split, (phi_query, phi_key, value)))
        reads = jax.tree.map(geometry.join, jax.lax.scan(step, start, chunks)[1])
    else:
        after = [sums for sums in (later,) if sums is not None]
        reads = read_sums(phi_query, LinearState.sum(total, *before, *after))
    mass = reads.normalizer[..., None]
    y = (reads.state / jnp.where(mass > 0, mass, 1)).astype(value.dtype)
    seen = LinearState.sum(total, *([] if past is None else [past]))
    return without_padding(y, geometry, here), seen
