"""Kernels that sum keys and values into the states which the chunks' queries read, and their gradients.

A state is transposed and joined with its normalizer, [state_rows(head_dim), features]. Row d < head_dim is the sum of
v_d phi_key, row head_dim is the sum of phi_key, and the rows after it are zero.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.tpu.gain import column, gain_gradient, gain_of_rows, gain_rows, multiplied
from rehyat_jax.attention.hybrid.tpu.tiling import Tiling, is_key
from rehyat_jax.attention.tpu.blocks import FEATURE_ROWS, LANES, NN, NT, TN, HeadBlocks, dot, for_tiles
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


def state_rows(head_dim: int) -> int:
    return head_dim + 8


def has_linear_keys(chunk: jax.Array, tiling: Tiling, *, causal: bool, continues: bool) -> jax.Array:
    """True if a chunk's state holds any frame. `continues` means that the video has frames before the first chunk."""
    if continues:
        return chunk >= 0
    has_past = chunk >= first_chunk_with_past(tiling)
    return has_past if causal else has_past | (chunk < tiling.geometry.num_chunks - 1)


def first_chunk_with_past(tiling: Tiling) -> int:
    """The first chunk with a linear key among this video's frames up to the end of its window."""
    return tiling.geometry.linear_delay // tiling.geometry.chunk_frames


@dataclasses.dataclass(frozen=True)
class Walk:
    """An order of the frames in which each chunk's linear keys on one side are all the frames up to some point.

    Attributes:
      is_future: True for states of the frames after the window, walked from the last frame; False for states of the
        frames before it, with linear_window up to its end, walked from the first.
      num_states: number of states: one for every chunk; for the past, optionally one more for the next chunk. With
        linear_window it divides the last chunk: one state ends before the last overlap, one with it.
      accumulates: False for states that hold only the frames that no earlier state in this order holds.
    """

    tiling: Tiling
    is_future: bool
    num_states: int
    accumulates: bool = True

    def frame(self, step: jax.Array) -> jax.Array:
        return self.tiling.geometry.num_frames - 1 - step if self.is_future else step

    def state(self, frame: jax.Array) -> jax.Array:
        """The first state, in the order of the walk, that holds a frame; out of range if none does."""
        geometry = self.tiling.geometry
        if self.is_future:
            return jax.lax.div(frame, geometry.chunk_frames) - 1
        state = jax.lax.div(frame + geometry.linear_delay, geometry.chunk_frames)
        if geometry.linear_window and self.num_states > geometry.num_chunks:
            state += (frame >= geometry.num_frames - geometry.overlap_frames).astype(jnp.int32)
        return state

    @property
    def meets_padding(self) -> bool:
        """True if a state may hold the last chunk's frames, some of which may be padding."""
        return self.is_future or self.tiling.geometry.linear_window

    def is_held(self, frame: jax.Array) -> jax.Array:
        state = self.state(frame)
        return (state >= 0) & (state < self.num_states)

    def shown_state(self, frame: jax.Array) -> jax.Array:
        return jnp.clip(self.state(frame), 0, self.num_states - 1)


def chunk_states(
    features: InlineFeatures,
    value: jax.Array,
    walk: Walk,
    *,
    initial: jax.Array | None = None,
    padding_frames: jax.Array | None = None,
    measured: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The states, and the largest norms of tokens that the same pass measures.

    Args:
      features: phi_key, perhaps with a gain.
      value: [batch, tokens, heads, head_dim].
      initial: sums that all states hold in addition, float32 [batch, heads, state_rows, features].
      padding_frames: number of frames at the end that no state holds, int32 [1].
      measured: arrays to measure, like `value`, by name. A "key" that is the features' own source is not read a second
        time.

    Returns:
      States, float32 [num_states, batch, heads, state_rows, features], undefined where they hold no frame; and the
      largest squared norm of every frame's tokens in each array to be measured, float32 [batch, heads, frames].
    """
    measured = measured or {}
    tiling = walk.tiling
    batch, _, heads, head_dim = value.shape
    num_frames, parts = tiling.geometry.num_frames, tiling.key_blocks_per_frame
    state_shape = (state_rows(head_dim), features.shape[-1])

    def kernel(inputs, outputs, scratch):
        step, part = pl.program_id(2), pl.program_id(3)
        frame, source, running = walk.frame(step), inputs["source"], scratch["running"]

        @pl.when((step == 0) & (part == 0))
        def _():
            running[...] = jnp.zeros_like(running) if initial is None else inputs["initial"][...]

        if not walk.accumulates:

            @pl.when((step > 0) & (part == 0) & (walk.state(frame) != walk.state(walk.frame(step - 1))))
            def _():
                running[...] = jnp.zeros_like(running)

        @pl.when(part == 0)
        def _():
            for name in measured:
                outputs[name][...] = jnp.zeros_like(outputs[name])

        def measure(tiles):
            for start, size in tiles:
                for name in measured:
                    square = _largest_square(inputs.get(name, source)[pl.ds(start, size), :])
                    outputs[name][...] = jnp.maximum(outputs[name][...], square)

        def add(tiles):
            measure(tiles)  # next to the products, where it costs nothing
            weights = tuple(matrix[...] for matrix in inputs["weights"])
            # All features first: the next tile's products overlap with the arithmetic of the tile before.
            phis = [features.function(source[pl.ds(*tile), :], *weights) for tile in tiles]
            for (start, size), phi in zip(tiles, phis, strict=True):
                if tiling.is_padded:
                    phi = jnp.where(is_key(part, start, size, tiling), phi, jnp.zeros_like(phi))
                if features.gain is not None:
                    phi = multiplied(phi, inputs["gain"][:, pl.ds(start, size)])
                running[:head_dim, :] += dot(inputs["value"][pl.ds(start, size), :], phi, TN)
                normalizer = phi.astype(jnp.float32).sum(axis=0, keepdims=True)
                first_row = jax.lax.broadcasted_iota(jnp.int32, (state_shape[0] - head_dim, phi.shape[1]), 0) == 0
                running[head_dim:, :] += jnp.where(first_row, normalizer, 0)

        is_added = _is_added(frame, walk, inputs)

        @pl.when(is_added)
        def _():
            for_tiles(tiling.key_block, FEATURE_ROWS, 2, add)

        if measured:

            @pl.when(~is_added)
            def _():
                for_tiles(tiling.key_block, FEATURE_ROWS, 2, measure)

        @pl.when(walk.is_held(frame) & (part == parts - 1))
        def _():
            outputs["states"][...] = running[...]

    block = lambda step, part: walk.frame(step) * parts + part
    tokens = lambda array: token_blocks(array, tiling.key_block, block)
    square = (
        jax.ShapeDtypeStruct((batch, heads, num_frames, 1, LANES), jnp.float32),
        pl.BlockSpec((None, None, None, 1, LANES), lambda b, h, step, part: (b, h, walk.frame(step), 0, 0)),
    )
    states = jax.ShapeDtypeStruct((walk.num_states, batch, heads, *state_shape), jnp.float32)
    results = call_kernel(
        "hybrid_states",
        kernel,
        (batch, heads, num_frames, parts),
        {
            "source": tokens(features.source),
            "value": tokens(value),
            "weights": per_head(features.weights),
            "gain": key_gain_blocks(features, tiling, block),
            "initial": None
            if initial is None
            else (initial, pl.BlockSpec((None, None, *state_shape), lambda b, h, *_: (b, h, 0, 0))),
            "padding_frames": scalars(padding_frames),
        }
        | {name: tokens(array) for name, array in measured.items() if not (name == "key" and features.of_own_tokens)},
        {"states": state_block(states, lambda step, part: walk.shown_state(walk.frame(step)))}
        | dict.fromkeys(measured, square),
        {"running": pltpu.VMEM(state_shape, jnp.float32)},
        parallel=2,
    )
    return results["states"], {name: results[name][..., 0, 0] for name in measured}


def chunk_states_backward(
    states_cotangent: jax.Array,
    features: InlineFeatures,
    value: jax.Array,
    walk: Walk,
    *,
    padding_frames: jax.Array | None = None,
    token_gradients: bool,
) -> tuple[tuple[jax.Array, ...], jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of `chunk_states`, by the reverse walk: a frame's gradient is the sum over all states that hold it.

    Args:
      states_cotangent: float32, like the states; ignored where they hold no frame.

    Returns:
      Gradients of the feature map's weights, float32 [batch, heads, rows, columns]; of its source and of `value`, if
      `token_gradients`, else None; and of its gain, float32, or None if it has none.
    """
    tiling = walk.tiling
    batch, _, heads, head_dim = value.shape
    num_frames, parts = tiling.geometry.num_frames, tiling.key_blocks_per_frame
    frame_of = lambda step: walk.frame(num_frames - 1 - step)

    def kernel(inputs, outputs, scratch):
        step, part = pl.program_id(2), pl.program_id(3)
        frame, running = frame_of(step), scratch["running"]
        weights = tuple(matrix[...] for matrix in inputs["weights"])
        is_first = (step == 0) & (part == 0)

        @pl.when(is_first)
        def _():
            running[...] = jnp.zeros_like(running)
            for gradient in outputs["weights"]:
                gradient[...] = jnp.zeros_like(gradient)

        is_new_state = (step == 0) | (walk.state(frame_of(step - 1)) != walk.state(frame))

        @pl.when(walk.is_held(frame) & is_new_state & (part == 0))
        def _():
            running[...] = inputs["states"][...] + (running[...] if walk.accumulates else 0)

        def tiles_backward(tiles):
            d_state = running[:head_dim, :].astype(value.dtype)
            d_normalizer = running[head_dim : head_dim + 1, :]
            for start, size in tiles:
                tokens = pl.ds(start, size)
                phi, pullback = jax.vjp(features.function, inputs["source"][tokens, :], *weights)
                d_phi = dot(inputs["value"][tokens, :], d_state, NN) + d_normalizer
                if tiling.is_padded:
                    d_phi = jnp.where(is_key(part, start, size, tiling), d_phi, 0)
                if features.gain is not None:
                    gain = inputs["gain"][:, tokens]
                    outputs["gain"][:, tokens] = gain_gradient(d_phi, phi)
                    d_phi = d_phi * column(gain)
                d_source, *d_weights = pullback(d_phi.astype(phi.dtype))
                for gradient, d_weight in zip(outputs["weights"], d_weights, strict=True):
                    gradient[...] += d_weight.astype(jnp.float32)
                if token_gradients:
                    outputs["source"][tokens, :] = d_source
                    phi = phi if features.gain is None else multiplied(phi, gain)
                    outputs["value"][tokens, :] = dot(phi, d_state, NT).astype(outputs["value"].dtype)

        has_gradient = _is_added(frame, walk, inputs)

        @pl.when(has_gradient)
        def _():
            for_tiles(tiling.key_block, FEATURE_ROWS, 2, tiles_backward)

        of_tokens = [name for name in ("source", "value", "gain") if name in outputs]
        if of_tokens:

            @pl.when(~has_gradient)
            def _():
                for name in of_tokens:
                    outputs[name][...] = jnp.zeros_like(outputs[name])

    block = lambda step, part: frame_of(step) * parts + part
    tokens = lambda array: token_blocks(array, tiling.key_block, block)
    views = {"source": HeadBlocks.of(features.source), "value": HeadBlocks.of(value)} if token_gradients else {}
    results = call_kernel(
        "hybrid_states_backward",
        kernel,
        (batch, heads, num_frames, parts),
        {
            "source": tokens(features.source),
            "value": tokens(value),
            "weights": per_head(features.weights),
            "gain": key_gain_blocks(features, tiling, block),
            "states": state_block(states_cotangent, lambda step, part: walk.shown_state(frame_of(step))),
            "padding_frames": scalars(padding_frames),
        },
        {"weights": weight_gradients(features.weights, batch)}
        | {name: (view.shape, view.spec(tiling.key_block, block)) for name, view in views.items()}
        | (
            {}
            if features.gain is None
            else {"gain": new_rows(batch, heads, num_frames * parts, tiling.key_block, block)}
        ),
        {"running": pltpu.VMEM(states_cotangent.shape[-2:], jnp.float32)},
        parallel=2,
    )
    d_source, d_value = (views[name].unview(results[name]) if token_gradients else None for name in ("source", "value"))
    d_gain = None if features.gain is None else gain_of_rows(results["gain"], tiling.tokens)
    return results["weights"], d_source, d_value, d_gain


def key_gain_blocks(
    features: InlineFeatures, tiling: Tiling, index: Callable[..., jax.Array]
) -> tuple[jax.Array, pl.BlockSpec] | None:
    """An input with the gains of the keys of a step; None without gains."""
    if features.gain is None:
        return None
    blocks = tiling.geometry.num_frames * tiling.key_blocks_per_frame
    return row_blocks(gain_rows(features.gain, blocks, tiling.key_block), tiling.key_block, index)


def _is_added(frame: jax.Array, walk: Walk, inputs: dict) -> jax.Array:
    """True if a state holds the frame and the frame is not padding."""
    is_added = walk.is_held(frame)
    if "padding_frames" in inputs:
        is_added &= frame < walk.tiling.geometry.num_frames - inputs["padding_frames"][0]
    return is_added


def _largest_square(rows: jax.Array) -> jax.Array:
    """The largest squared norm of the rows [tokens, head_dim], a float32 scalar."""
    rows = rows.astype(jnp.float32)
    return jnp.max(jnp.sum(rows * rows, axis=1, keepdims=True))
