"""The backward kernels.

Let L be the joint log-sum-exp, P = exp(s - L), and delta = sum(dy * y) of the joint y. The gradients of the window are
those of an ordinary flash attention: dS = P (dy.v - delta), dv = P^T dy. Let w = exp(c - L), where the stabilizer c is
a constant. The gradients of the linear branch are

    dphi_query = w (dy S^T - delta z)    dS = sum phi_query (w dy)    dz = -sum phi_query w delta
    dphi_key = V dS^T + dz               dv += phi_key dS

The softmax and the linear branch have separate kernels, so that a stage that trains only feature maps runs only the
linear ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.tpu.forward import is_in_window, query_gain_rows, window_block
from rehyat_jax.attention.hybrid.tpu.gain import column, gain_gradient, gain_of_rows
from rehyat_jax.attention.hybrid.tpu.states import has_linear_keys, state_rows
from rehyat_jax.attention.hybrid.tpu.tiling import Tiling, is_key
from rehyat_jax.attention.tpu.blocks import FEATURE_ROWS, NN, TN, HeadBlocks, dot, for_tiles
from rehyat_jax.attention.tpu.kernel_call import (
    call_kernel,
    new_rows,
    per_head,
    row_blocks,
    scalars,
    state_block,
    token_blocks,
    weight_gradients,
)
from rehyat_jax.attention.tpu.score_tiles import GRADIENT_COLUMNS, add_gradients, score_scale

# The cap of 1 / denominator. Where nothing linear was added, the gradient is zero times it, so products with it must
# stay finite.
_LARGEST_EXPONENT = 92.0


def readout_backward(
    output_cotangent: jax.Array,
    output: jax.Array,
    log_sum_exp: jax.Array,
    stabilizer: jax.Array | None,
    features: InlineFeatures,
    states: jax.Array,
    tiling: Tiling,
    *,
    causal: bool,
    continues: bool,
    source_gradient: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array | None, jax.Array | None]:
    """Gradients of the linear branch, except those of its keys.

    Returns: a tuple of
      - delta [batch, heads, blocks, 1, backward_block];
      - gradients of the states, float32, like `states`;
      - gradients of the feature map's weights, float32 [batch, heads, rows, columns];
      - the gradient of its source, or None if it is not wanted;
      - the gradient of its gain, float32, or None if it has none.
    """
    batch, _, heads, head_dim = output.shape
    rows, block_rows = state_rows(head_dim), tiling.backward_block
    num_blocks = tiling.tokens // block_rows
    per_chunk = tiling.geometry.chunk_frames * tiling.frame // block_rows

    def kernel(inputs, outputs, scratch):
        chunk, block = pl.program_id(2), pl.program_id(3)
        weights = tuple(matrix[...] for matrix in inputs["weights"])
        state, normalizer = inputs["states"][:head_dim, :], inputs["states"][head_dim : head_dim + 1, :]
        state = state.astype(output.dtype)

        @pl.when(block == 0)
        def _():
            outputs["states"][...] = jnp.zeros_like(outputs["states"])

        @pl.when((chunk == 0) & (block == 0))
        def _():
            for gradient in outputs["weights"]:
                gradient[...] = jnp.zeros_like(gradient)

        def transposed(tokens):
            cotangent, y = (inputs[name][tokens, :].astype(jnp.float32).T for name in ("cotangent", "output"))
            delta = (cotangent * y).sum(axis=0, keepdims=True)
            outputs["delta"][:, tokens] = delta
            return cotangent, delta

        def tiles_backward(tiles):
            for start, size in tiles:
                tokens = pl.ds(start, size)
                exponent = -inputs["log_sum_exp"][:, tokens]
                if stabilizer is not None:
                    exponent += inputs["stabilizer"][:, tokens]
                phi, pullback = jax.vjp(features.function, inputs["source"][tokens, :], *weights)
                weight = jnp.exp2(jnp.minimum(exponent, _LARGEST_EXPONENT))
                cotangent, delta = transposed(tokens)
                first_row = jax.lax.broadcasted_iota(jnp.int32, (rows - head_dim, size), 0) == 0
                d_reads, d_total = cotangent * weight, jnp.where(first_row, -weight * delta, 0)
                d_joined = jnp.concatenate([d_reads, d_total], axis=0)
                if features.gain is None:
                    d_joined = d_joined.astype(phi.dtype)
                    outputs["states"][...] += dot(d_joined, phi, NN)
                else:
                    gain = inputs["gain"][:, tokens]
                    outputs["states"][...] += dot((d_joined * gain).astype(phi.dtype), phi, NN)
                    d_joined = d_joined.astype(phi.dtype)
                # z separately: one row more than the matrix units' depth would take as long as all the others.
                d_phi = dot(d_joined[:head_dim], state, TN) + d_total.T[:, :1] * normalizer
                if features.gain is not None:
                    outputs["gain"][:, tokens] = gain_gradient(d_phi, phi)
                    d_phi = d_phi * column(gain)
                d_source, *d_weights = pullback(d_phi.astype(phi.dtype))
                if source_gradient:
                    outputs["source"][tokens, :] = d_source
                for gradient, d_weight in zip(outputs["weights"], d_weights, strict=True):
                    gradient[...] += d_weight.astype(jnp.float32)

        def tiles_without_state(tiles):
            for start, size in tiles:
                transposed(pl.ds(start, size))
                if source_gradient:
                    outputs["source"][pl.ds(start, size), :] = jnp.zeros((size, source.width), source.dtype)
                if features.gain is not None:
                    outputs["gain"][:, pl.ds(start, size)] = jnp.zeros((1, size), jnp.float32)

        is_block = chunk * per_chunk + block < num_blocks
        has_state = has_linear_keys(chunk, tiling, causal=causal, continues=continues)

        @pl.when(is_block & has_state)
        def _():
            for_tiles(block_rows, FEATURE_ROWS, 2, tiles_backward)

        @pl.when(is_block & ~has_state)
        def _():
            for_tiles(block_rows, FEATURE_ROWS, 2, tiles_without_state)

    index = lambda chunk, block: jnp.minimum(chunk * per_chunk + block, num_blocks - 1)
    tokens = lambda array: token_blocks(array, block_rows, index)
    chunk_index = lambda chunk, block: chunk
    source = HeadBlocks.of(features.source)
    results = call_kernel(
        "hybrid_readout_backward",
        kernel,
        (batch, heads, states.shape[0], per_chunk),
        {
            "source": tokens(features.source),
            "cotangent": tokens(output_cotangent),
            "output": tokens(output),
            "log_sum_exp": row_blocks(log_sum_exp, block_rows, index),
            "stabilizer": None if stabilizer is None else row_blocks(stabilizer, block_rows, index),
            "weights": per_head(features.weights),
            "gain": None
            if features.gain is None
            else row_blocks(query_gain_rows(features.gain, tiling), block_rows, index),
            "states": state_block(states, chunk_index),
        },
        {
            "delta": new_rows(batch, heads, num_blocks, block_rows, index),
            "states": state_block(jax.ShapeDtypeStruct(states.shape, jnp.float32), chunk_index),
            "weights": weight_gradients(features.weights, batch),
        }
        | ({"source": (source.shape, source.spec(block_rows, index))} if source_gradient else {})
        | ({} if features.gain is None else {"gain": new_rows(batch, heads, num_blocks, block_rows, index)}),
        parallel=2,
    )
    d_source = source.unview(results["source"]) if source_gradient else None
    d_gain = None if features.gain is None else gain_of_rows(results["gain"], tiling.tokens)
    return results["delta"], results["states"], results["weights"], d_source, d_gain


def window_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output_cotangent: jax.Array,
    log_sum_exp: jax.Array,
    delta: jax.Array,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    tiling: Tiling,
    *,
    missing_frames: jax.Array | None,
    anchors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the softmax window's gradients to `gradients`, the present ones of the query, the key and the value.

    The keys of the overlaps come first, then the chunks' own keys, then the anchors. Within either of the first two
    sets a key belongs to one chunk. One pass of five products a tile therefore gives all three gradients. The query's
    stays in VMEM until its chunk is done. A block of anchors stays there while all queries pass.

    Args: see `attend`.
    """
    geometry = tiling.geometry
    run = functools.partial(
        _window_part_backward,
        (query, key, value, output_cotangent, log_sum_exp, delta),
        tiling=tiling,
        missing_frames=missing_frames,
    )
    continues = missing_frames is not None
    overlap, own = geometry.overlap_frames, geometry.chunk_frames
    for group in range(own * tiling.frame // tiling.backward_group):
        if overlap and (geometry.num_chunks > 1 or continues):
            first_chunk = 0 if continues else 1
            gradients = run(gradients, group=group, first_chunk=first_chunk, frames=(0, overlap))
        gradients = run(gradients, group=group, first_chunk=0, frames=(overlap, overlap + own))
    # A video that is shorter than its anchors has one chunk, which attends to none.
    anchor_frames = geometry.anchor_frames if continues else min(geometry.anchor_frames, geometry.num_frames)
    for block in range(anchor_frames * tiling.key_blocks_per_frame):
        operands = query, key, value, output_cotangent, log_sum_exp, delta
        gradients = _anchor_backward(operands, gradients, anchors, block, tiling)
    return gradients


def _window_part_backward(
    operands: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    *,
    tiling: Tiling,
    group: int,
    first_chunk: int,
    frames: tuple[int, int],
    missing_frames: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`window_backward` for the window's range(*frames) and the `group`-th queries of chunks from `first_chunk` on."""
    query, key, value, output_cotangent, log_sum_exp, delta = operands
    batch, _, heads, head_dim = query.shape
    geometry, parts, rows = tiling.geometry, tiling.key_blocks_per_frame, tiling.backward_block
    score_gradient, scale = head_dim**-0.5, score_scale(head_dim)
    query_steps = tiling.backward_group // rows
    blocks_per_chunk = geometry.chunk_frames * tiling.frame // rows
    key_steps = (frames[1] - frames[0]) * parts
    num_query_blocks, num_key_blocks = tiling.tokens // rows, key.shape[1] // tiling.key_block
    window = functools.partial(window_block, tiling=tiling, continues=missing_frames is not None)
    # A ragged last chunk may end before this group.
    last_begins = (geometry.num_chunks - 1) * geometry.chunk_frames * tiling.frame + group * tiling.backward_group
    num_chunks = geometry.num_chunks - (last_begins >= tiling.tokens) - first_chunk
    if num_chunks == 0:
        return gradients

    def query_block_of(chunk, query_step):
        """The index of a query block; beyond the last block if there is none."""
        return (chunk + first_chunk) * blocks_per_chunk + group * query_steps + query_step

    def key_block_of(chunk, key_step):
        return window(chunk + first_chunk, key_step + (geometry.anchor_frames + frames[0]) * parts)

    def kernel(inputs, outputs, scratch):
        chunk, key_step, query_step = (pl.program_id(axis) for axis in (2, 3, 4))
        key_block = key_block_of(chunk, key_step)
        d_query, d_key, d_value = (scratch[name] for name in ("d_query", "d_key", "d_value"))
        queries = pl.ds(pl.multiple_of(query_step * rows, 8), rows)
        is_query_block = query_block_of(chunk, query_step) < num_query_blocks
        is_key_block = (key_block >= 0) & (key_block < num_key_blocks)
        if missing_frames is not None:
            step = frames[0] * parts + key_step
            is_key_block &= is_in_window(step, chunk + first_chunk, inputs["missing_frames"], tiling)

        @pl.when(key_step == 0)
        def _():
            d_query[queries, :] = inputs["d_query"][...].astype(jnp.float32) / score_gradient

        @pl.when(query_step == 0)
        def _():
            d_key[...] = inputs["d_key"][...].astype(jnp.float32) / score_gradient
            d_value[...] = inputs["d_value"][...].astype(jnp.float32)

        add = functools.partial(
            _add_tiles, inputs, (d_query, d_key, d_value), key_block, query_step * rows, tiling, scale
        )

        @pl.when(is_query_block & is_key_block)
        def _():
            for_tiles(rows, GRADIENT_COLUMNS, rows // GRADIENT_COLUMNS or 1, add)

        # A step out of range gets its neighbour's blocks again, and must not change them.
        @pl.when((query_step == query_steps - 1) & (key_block < num_key_blocks))
        def _():
            outputs["d_key"][...] = (d_key[...] * score_gradient).astype(outputs["d_key"].dtype)
            outputs["d_value"][...] = d_value[...].astype(outputs["d_value"].dtype)

        @pl.when((key_step == key_steps - 1) & is_query_block)
        def _():
            outputs["d_query"][...] = (d_query[queries, :] * score_gradient).astype(outputs["d_query"].dtype)

    shown = lambda chunk, query_step: jnp.minimum(query_block_of(chunk, query_step), num_query_blocks - 1)
    queries = lambda chunk, key_step, query_step: shown(chunk, query_step)
    keys = lambda chunk, key_step, query_step: jnp.clip(key_block_of(chunk, key_step), 0, num_key_blocks - 1)
    # Blocks are read at the first key block and written at the last. In between the block stays the same, so that
    # nothing is copied.
    first_time = lambda chunk, key_step, query_step: shown(chunk, jnp.where(key_step == 0, query_step, query_steps - 1))
    last_time = lambda chunk, key_step, query_step: shown(chunk, jnp.where(key_step == key_steps - 1, query_step, 0))
    d_query, d_key, d_value = gradients
    views = [HeadBlocks.of(array) for array in gradients]
    results = call_kernel(
        "hybrid_window_backward",
        kernel,
        (batch, heads, num_chunks, key_steps, query_steps),
        {
            "query": token_blocks(query, rows, queries),
            "cotangent": token_blocks(output_cotangent, rows, queries),
            "log_sum_exp": row_blocks(log_sum_exp, rows, queries),
            "delta": row_blocks(delta, rows, queries),
            "key": token_blocks(key, tiling.key_block, keys),
            "value": token_blocks(value, tiling.key_block, keys),
            "d_query": token_blocks(d_query, rows, first_time),
            "d_key": token_blocks(d_key, tiling.key_block, keys),
            "d_value": token_blocks(d_value, tiling.key_block, keys),
            "missing_frames": scalars(missing_frames),
        },
        {
            "d_query": (views[0].shape, views[0].spec(rows, last_time)),
            "d_key": (views[1].shape, views[1].spec(tiling.key_block, keys)),
            "d_value": (views[2].shape, views[2].spec(tiling.key_block, keys)),
        },
        {
            "d_query": pltpu.VMEM((query_steps * rows, head_dim), jnp.float32),
            "d_key": pltpu.VMEM((tiling.key_block, head_dim), jnp.float32),
            "d_value": pltpu.VMEM((tiling.key_block, head_dim), jnp.float32),
        },
        parallel=3,
        aliases={name: name for name in ("d_query", "d_key", "d_value")},
    )
    return tuple(view.unview(results[name]) for view, name in zip(views, ("d_query", "d_key", "d_value"), strict=True))


def _add_tiles(inputs, gradients, key_block, first_row, tiling: Tiling, scale: float, tiles) -> None:
    """`add_gradients` of the kernel's inputs. `key_block` is the number of the block of keys among all."""
    valid = None
    if tiling.is_padded:
        part = jax.lax.rem(key_block, tiling.key_blocks_per_frame)
        valid = lambda low, high: is_key(part, low, high - low, tiling)
    operands = (inputs[name] for name in ("query", "cotangent", "log_sum_exp", "delta", "key", "value"))
    add_gradients(*operands, gradients, tiles, tiling.key_tiles(), first_row=first_row, scale=scale, valid=valid)


def _anchor_backward(
    operands: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    anchors: jax.Array | None,
    block: int,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`window_backward` for one block of the anchors' keys and the queries of all chunks that attend to it."""
    query, key, value, output_cotangent, log_sum_exp, delta = operands
    batch, _, heads, head_dim = query.shape
    rows, parts = tiling.backward_block, tiling.key_blocks_per_frame
    score_gradient, scale = head_dim**-0.5, score_scale(head_dim)
    num_query_blocks = tiling.tokens // rows
    blocks_per_chunk = tiling.geometry.chunk_frames * tiling.frame // rows

    def kernel(inputs, outputs, scratch):
        query_block = pl.program_id(2)
        d_query, d_key, d_value = (scratch[name] for name in ("d_query", "d_key", "d_value"))
        d_query[...] = inputs["d_query"][...].astype(jnp.float32) / score_gradient

        @pl.when(query_block == 0)
        def _():
            d_key[...] = inputs["d_key"][...].astype(jnp.float32) / score_gradient
            d_value[...] = inputs["d_value"][...].astype(jnp.float32)

        @pl.when(block < inputs["anchors"][jax.lax.div(query_block, blocks_per_chunk)] * parts)
        def _():
            add = functools.partial(_add_tiles, inputs, (d_query, d_key, d_value), block, 0, tiling, scale)
            for_tiles(rows, GRADIENT_COLUMNS, rows // GRADIENT_COLUMNS or 1, add)

        outputs["d_query"][...] = (d_query[...] * score_gradient).astype(outputs["d_query"].dtype)

        @pl.when(query_block == num_query_blocks - 1)
        def _():
            outputs["d_key"][...] = (d_key[...] * score_gradient).astype(outputs["d_key"].dtype)
            outputs["d_value"][...] = d_value[...].astype(outputs["d_value"].dtype)

    queries, keys = lambda query_block: query_block, lambda query_block: block
    d_query, d_key, d_value = gradients
    views = [HeadBlocks.of(array) for array in gradients]
    results = call_kernel(
        "hybrid_anchor_backward",
        kernel,
        (batch, heads, num_query_blocks),
        {
            "query": token_blocks(query, rows, queries),
            "cotangent": token_blocks(output_cotangent, rows, queries),
            "log_sum_exp": row_blocks(log_sum_exp, rows, queries),
            "delta": row_blocks(delta, rows, queries),
            "key": token_blocks(key, tiling.key_block, keys),
            "value": token_blocks(value, tiling.key_block, keys),
            "d_query": token_blocks(d_query, rows, queries),
            "d_key": token_blocks(d_key, tiling.key_block, keys),
            "d_value": token_blocks(d_value, tiling.key_block, keys),
            "anchors": scalars(anchors),
        },
        {
            "d_query": (views[0].shape, views[0].spec(rows, queries)),
            "d_key": (views[1].shape, views[1].spec(tiling.key_block, keys)),
            "d_value": (views[2].shape, views[2].spec(tiling.key_block, keys)),
        },
        {
            "d_query": pltpu.VMEM((rows, head_dim), jnp.float32),
            "d_key": pltpu.VMEM((tiling.key_block, head_dim), jnp.float32),
            "d_value": pltpu.VMEM((tiling.key_block, head_dim), jnp.float32),
        },
        parallel=2,
        aliases={name: name for name in ("d_query", "d_key", "d_value")},
    )
    return tuple(view.unview(results[name]) for view, name in zip(views, ("d_query", "d_key", "d_value"), strict=True))
