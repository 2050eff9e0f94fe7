"""The kernel that attends to the softmax window and to the state of the keys outside it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.tpu.gain import gain_rows
from rehyat_jax.attention.hybrid.tpu.states import has_linear_keys
from rehyat_jax.attention.hybrid.tpu.tiling import Tiling, is_key
from rehyat_jax.attention.tpu.blocks import FEATURE_ROWS, NT, HeadBlocks, dot, for_tiles
from rehyat_jax.attention.tpu.kernel_call import (
    call_kernel,
    new_rows,
    per_head,
    row_blocks,
    scalars,
    state_block,
    token_blocks,
)
from rehyat_jax.attention.tpu.score_tiles import add_keys, clear_sums, fits_fixed_shift, new_sums, score_scale

# Columns in one stretch of code.
STRETCH = 1536


def needs_running_maximum(
    query_squares: jax.Array, key_squares: jax.Array, head_dim: int, tiling: Tiling, *, continues: bool
) -> jax.Array:
    """1 where a chunk's scores may be too large to be exponentiated without a shift, int32 [batch, heads, chunks].

    Args:
      query_squares: largest squared norm of every frame's queries, [batch, heads, frames].
      key_squares: the same of keys; with `continues` they begin with the anchors and the first chunk's overlap.
    """
    geometry = tiling.geometry
    place = np.arange(key_squares.shape[2])
    frame = place - (geometry.anchor_frames + geometry.overlap_frames if continues else 0)
    chunk = np.arange(geometry.num_chunks)[:, None]
    is_anchor = place < geometry.anchor_frames
    of_part = ~is_anchor if continues else np.ones_like(is_anchor)
    in_chunk = of_part & (frame >= chunk * geometry.chunk_frames) & (frame < (chunk + 1) * geometry.chunk_frames)
    in_overlap = (
        of_part
        & (frame < chunk * geometry.chunk_frames)
        & (frame >= chunk * geometry.chunk_frames - geometry.overlap_frames)
    )
    largest = lambda squares, frames: jnp.where(frames, squares[:, :, None], 0).max(axis=-1)
    query_frames = in_chunk[:, -query_squares.shape[2] :]
    key_frames = in_chunk | in_overlap | is_anchor
    fits = fits_fixed_shift(largest(query_squares, query_frames), largest(key_squares, key_frames), head_dim)
    return jnp.where(fits, 0, 1).astype(jnp.int32)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    features: InlineFeatures | None,
    states: jax.Array | None,
    is_running: jax.Array,
    tiling: Tiling,
    *,
    causal: bool,
    stabilizer: str,
    missing_frames: jax.Array | None,
    anchors: jax.Array | None = None,
    has_own_keys: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Attention to the window and to the state of the queries' chunk, jointly normalised.

    Args:
      query: [batch, tokens, heads, head_dim].
      key, value: the same; if missing_frames is given, with the anchors and the overlap_frames before the first chunk
        in front.
      features: phi_query; None for attention to the window alone.
      states: states of every chunk, float32 [chunks, batch, heads, state_rows, features]; not read where
        `has_linear_keys` is false.
      is_running: int32 [batch, heads, chunks], 1 where the exponents of a chunk are relative to a running maximum.
      missing_frames: number of frames at the start and at the end of each chunk's window that are not keys, int32
        [2, chunks].
      anchors: number of anchors that each chunk attends to in addition to its window, int32 [chunks]; None without
        anchors. They are the first frames of the keys.
      has_own_keys: False for one chunk whose only keys are those of the overlap before it, all of which are there.

    Returns:
      (output; the joint log-sum-exp, base 2; with "row_max" the stabilizer c, base 2, else None), the last two
      [batch, heads, query blocks, 1, query_block].
    """
    batch, _, heads, head_dim = query.shape
    geometry, scale = tiling.geometry, score_scale(head_dim)
    parts = tiling.key_blocks_per_frame
    anchor_steps = geometry.anchor_frames * parts
    window_frames = geometry.overlap_frames + (geometry.chunk_frames if has_own_keys else 0)
    steps = anchor_steps + window_frames * parts
    num_key_blocks = key.shape[1] // tiling.key_block
    window = functools.partial(window_block, tiling=tiling, continues=missing_frames is not None)

    # `//` would spend instructions on negative numbers.
    chunk_of = lambda block: jax.lax.div(block, tiling.query_blocks_per_chunk)

    def kernel(inputs, outputs, scratch):
        block, step = pl.program_id(2), pl.program_id(3)
        chunk = chunk_of(block)
        key_block = window(chunk, step)
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        source = inputs.get("source", query)
        maximum, total, sums = scratch["maximum"], scratch["total"], scratch["sums"]
        row_max = scratch.get("row_max")

        def for_queries(condition, width, body):
            """`for_tiles` over the block's queries; the last block of a ragged video has fewer."""
            is_last_block = block == tiling.num_query_blocks - 1
            rows = {tiling.query_block: ~is_last_block, tiling.last_query_block: is_last_block}
            if len(rows) == 1:
                rows = {tiling.query_block: True}
            for length, is_length in rows.items():
                run = functools.partial(for_tiles, length, width, STRETCH // width, body)
                pl.when(condition & is_length)(run)

        @pl.when(step == 0)
        def _():
            clear_sums(scratch)

        valid = None
        if tiling.is_padded:
            valid = lambda low, high: is_key(jax.lax.rem(key_block, parts), low, high - low, tiling)

        def add_window(tiles, *, running: bool):
            add_keys(query, key, value, scratch, tiles, tiling.key_tiles(), scale=scale, running=running, valid=valid)

        is_key_block = (key_block >= 0) & (key_block < num_key_blocks)
        if missing_frames is not None and has_own_keys:
            is_key_block &= is_in_window(step - anchor_steps, chunk, inputs["missing_frames"], tiling)
        if anchors is not None:
            is_anchor = step < inputs["anchors"][chunk] * parts
            is_key_block = jnp.where(step < anchor_steps, is_anchor, is_key_block)
        is_running = inputs["is_running"][0, chunk] == 1

        @pl.when(is_key_block & ~is_running)
        def _():
            maximum[...] = jnp.zeros_like(maximum)

        add_fixed, add_running = (functools.partial(add_window, running=running) for running in (False, True))
        for_queries(is_key_block & ~is_running, tiling.fixed_columns, add_fixed)
        for_queries(is_key_block & is_running, tiling.running_columns, add_running)

        def write(columns, shift, tile_total, tile_sums):
            outputs["output"][columns, :] = (tile_sums / tile_total).T.astype(query.dtype)
            outputs["log_sum_exp"][:, columns] = shift + jnp.log2(tile_total)
            if row_max is not None:
                outputs["stabilizer"][:, columns] = row_max[:, columns] * scale

        def finish_without_state(tiles):
            for tile in tiles:
                columns = pl.ds(*tile)
                write(columns, maximum[:, columns] * scale, total[:, columns], sums[:, columns])

        def finish(tiles):
            weights = tuple(matrix[...] for matrix in inputs["weights"])
            # All features first: the next tile's products overlap with the arithmetic of the tile before.
            phis = [features.function(source[pl.ds(*tile), :], *weights) for tile in tiles]
            for tile, phi in zip(tiles, phis, strict=True):
                columns = pl.ds(*tile)
                linear = dot(inputs["states"][...].astype(phi.dtype), phi, NT)
                if features.gain is not None:
                    linear = linear * inputs["gain"][:, columns]
                linear_sums, linear_total = linear[:head_dim], linear[head_dim : head_dim + 1]
                shift, tile_total, tile_sums = maximum[:, columns] * scale, total[:, columns], sums[:, columns]
                if row_max is not None:
                    weight = jnp.exp2(row_max[:, columns] * scale - shift)
                else:
                    # Relative to max(shift, 0), so that neither part overflows; without linear mass, to the window's.
                    common = jnp.where(linear_total > 0, jnp.maximum(shift, 0), shift)
                    shrink = jnp.exp2(shift - common)
                    tile_total, tile_sums = tile_total * shrink, tile_sums * shrink
                    weight = jnp.where(linear_total > 0, jnp.exp2(-common), 0)
                    shift = common
                write(columns, shift, tile_total + linear_total * weight, tile_sums + linear_sums * weight)

        is_last = step == steps - 1
        has_state = has_linear_keys(chunk, tiling, causal=causal, continues=missing_frames is not None)

        if features is None:
            for_queries(is_last, FEATURE_ROWS, finish_without_state)
        else:
            for_queries(is_last & has_state, FEATURE_ROWS, finish)
            for_queries(is_last & ~has_state, FEATURE_ROWS, finish_without_state)

    queries = lambda block, step: block
    keys = lambda block, step: jnp.clip(window(chunk_of(block), step), 0, num_key_blocks - 1)
    output = HeadBlocks.of(query)
    row = new_rows(batch, heads, tiling.num_query_blocks, tiling.query_block, queries)
    is_row_max = stabilizer == "row_max"
    readout: dict[str, Any] = {}
    if features is not None:
        gain = None if features.gain is None else query_gain_rows(features.gain, tiling)
        readout = {
            "source": None if features.of_own_tokens else token_blocks(features.source, tiling.query_block, queries),
            "weights": per_head(features.weights),
            "gain": None if gain is None else row_blocks(gain, tiling.query_block, queries),
            "states": state_block(states, lambda block, step: chunk_of(block)),
        }
    results = call_kernel(
        "hybrid_attend",
        kernel,
        (batch, heads, tiling.num_query_blocks, steps),
        {
            "query": token_blocks(query, tiling.query_block, queries),
            "key": token_blocks(key, tiling.key_block, keys),
            "value": token_blocks(value, tiling.key_block, keys),
            **readout,
            "is_running": (
                is_running[:, :, None],
                pl.BlockSpec(
                    (None, None, 1, geometry.num_chunks), lambda b, h, *_: (b, h, 0, 0), memory_space=pltpu.SMEM
                ),
            ),
            "missing_frames": scalars(missing_frames),
            "anchors": scalars(anchors),
        },
        {"output": (output.shape, output.spec(tiling.query_block, queries)), "log_sum_exp": row}
        | ({"stabilizer": row} if is_row_max else {}),
        new_sums(head_dim, tiling.query_block, row_max=is_row_max),
        parallel=3,
    )
    return output.unview(results["output"]), results["log_sum_exp"], results.get("stabilizer")


def query_gain_rows(gain: jax.Array, tiling: Tiling) -> jax.Array:
    """The gains of queries, like the statistics that `attend` returns."""
    return gain_rows(gain, tiling.num_query_blocks, tiling.query_block)


def window_block(chunk: jax.Array, step: jax.Array, *, tiling: Tiling, continues: bool) -> jax.Array:
    """The key block of a chunk's step, among all key blocks; out of range where there is none.

    The first steps are those of the anchors, which are the first keys. The window's steps follow. With `continues`, the
    overlap of the first chunk lies between the anchors and the chunk's own keys.
    """
    geometry, parts = tiling.geometry, tiling.key_blocks_per_frame
    before = geometry.anchor_frames if continues else -geometry.overlap_frames
    in_window = (chunk * geometry.chunk_frames + before) * parts + step - geometry.anchor_frames * parts
    return jnp.where(step < geometry.anchor_frames * parts, step, in_window) if geometry.anchor_frames else in_window


def is_in_window(step: jax.Array, chunk: jax.Array, missing_frames: jax.Array, tiling: Tiling) -> jax.Array:
    """True if the `step`-th key block of a chunk's window is of a frame that is not missing; see `attend`."""
    geometry, parts = tiling.geometry, tiling.key_blocks_per_frame
    first = missing_frames[0, chunk] * parts
    end = (geometry.overlap_frames + geometry.chunk_frames - missing_frames[1, chunk]) * parts
    return (step >= first) & (step < end)
