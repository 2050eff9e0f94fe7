"""The transformer over a video in parts: the device holds one part, and states of attention of constant size.

A part is a whole number of chunks of every block's form. There are two ways through parts and blocks:

- `apply_part`: a part goes through all blocks. Every block attends from its own tokens and its own state, which sums up
  the parts before. All forms must be causal. The states of all blocks are one tree with a leading layer axis.
- `embed_part` and `apply_block`: a block goes through all parts, whose tokens are kept elsewhere. It also needs the
  sums over the keys of later parts, so they are computed as soon as the block before is done with a part. Forms may be
  bidirectional.

Both give the velocity of the complete video. Memory does not depend on its length. Blocks of several forms share the
shapes of the largest state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention.flat_tokens import flat, with_heads
from rehyat_jax.attention.forms.base import AttentionInputs, Form
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.errors import InputError
from rehyat_jax.models.hybrid import by_form
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import Conditions, WanBlock, WanTransformer
from rehyat_jax.models.wan.rope import frame_table, rope_table, rotate
from rehyat_jax.parallel.mesh import axis_size
from rehyat_jax.parallel.sharding import gathered


def check_streams(config: WanConfig) -> None:
    """Raises InputError, naming the blocks, if a block's attention cannot be computed part by part."""
    forms = config.block_forms.of_block
    if blocks := [block for block, form in enumerate(forms) if not form.attends_in_parts]:
        kinds = ", ".join(sorted({forms[block].label for block in blocks}))
        raise InputError(
            f"blocks {', '.join(map(str, blocks))}: expected hybrid attention in every block, found {kinds}, which "
            f"needs the complete video at once; sample without streaming, or train a student with "
            f"config.hybrid.blocks=all"
        )


def is_causal(config: WanConfig) -> bool:
    """True if every block needs only the parts before: `apply_part` can run the model."""
    return all(form.streams for form in config.block_forms.forms)


def check_causal(config: WanConfig, place: str) -> None:
    """Raises InputError, which begins with `place` and names the blocks, unless `is_causal`."""
    forms = config.block_forms.of_block
    if blocks := [block for block, form in enumerate(forms) if not form.streams]:
        bidirectional = [forms[block].label + ", not causal" * forms[block].attends_in_parts for block in blocks]
        raise InputError(
            f"{place}: expected causal hybrid attention in every block, so that a chunk needs only those before it; "
            f"found {'; '.join(sorted(set(bidirectional)))} in blocks {', '.join(map(str, blocks))}. Train a student "
            f"with config.hybrid.blocks=all and config.hybrid.causal=True"
        )


def initial_states(config: WanConfig, batch: int, tokens_per_frame: int, dtype: jax.typing.DTypeLike) -> HybridState:
    """The states of all blocks before a video's first part, with a leading layer axis. Overlaps are [B, tokens, H * d].

    Args:
      config: the architecture.
      batch: number of examples.
      tokens_per_frame: tokens of one latent frame.
      dtype: compute dtype of the transformer.

    Raises:
      InputError: a block's attention cannot be computed part by part.
      ValueError: a block is not causal.
    """
    check_streams(config)
    if not is_causal(config):
        raise ValueError("expected causal attention in every block, found bidirectional; use apply_block")
    return jax.tree.map(
        lambda leaf: jnp.zeros((config.num_layers, *leaf.shape), leaf.dtype),
        _largest(config, batch, tokens_per_frame, dtype),
    )


def initial_state(config: WanConfig, batch: int, tokens_per_frame: int, dtype: jax.typing.DTypeLike) -> HybridState:
    """`initial_states` of one block, of any form that attends in parts."""
    check_streams(config)
    return _zeros(_largest(config, batch, tokens_per_frame, dtype))


class PartPositions(NamedTuple):
    """The rotations of one part of a video; made by `part_positions`.

    Attributes:
      frames: `frame_table` of the positions of the part's frames, each [T, d'], d' the temporal part of a head.
      overlap: the rotation of the overlap's keys, from their positions in the state to their positions relative to
        this part's frames; each [1, d']. None if both are equal in every part.
    """

    frames: tuple[np.ndarray, np.ndarray]
    overlap: tuple[np.ndarray, np.ndarray] | None


def apply_part(graphdef: nnx.GraphDef, *, is_last: bool = False) -> Callable[..., tuple[jax.Array, HybridState]]:
    """The transformer on one part of a video, as a pure function of its parameters.

    Args:
      graphdef: as in `apply_model`.
      is_last: True for the last part of a video, which may end within a chunk.

    Returns:
      (params, states, latents, timestep, text, positions) -> (velocity, states after the part; unchanged after the last
      one). latents [B, T, H, W, C] are the part's, and positions are its `part_positions`. The rest is as in
      `apply_model`.
    """

    def apply(
        params: dict[str, Any],
        states: HybridState,
        latents: jax.Array,
        timestep: jax.Array,
        text: jax.Array,
        positions: PartPositions,
    ) -> tuple[jax.Array, HybridState]:
        _check_mesh()
        model = nnx.merge(graphdef, params)
        per_block = model.per_block_attention() | {"state": states}
        attend = lambda inputs, block: _attend(model, inputs, block, positions, is_last=is_last)
        velocity, after = model.forward(latents, timestep, text, attend, per_block, frames=positions.frames)
        # As a result of the scan over blocks, XLA would copy unchanged states.
        return velocity, states if is_last else after

    return apply


def embed_part(graphdef: nnx.GraphDef) -> Callable[..., tuple[jax.Array, LinearState]]:
    """The way of one part of a video to the first block, as a pure function of the parameters.

    Returns:
      (params, latents [B, T, H, W, C], positions, conditions) -> (tokens x [B, N, D], sums over the keys of the first
      block). See `apply_block`.
    """

    def apply(
        params: dict[str, Any], latents: jax.Array, positions: PartPositions, conditions: Conditions
    ) -> tuple[jax.Array, LinearState]:
        _check_mesh()
        model = nnx.merge(graphdef, params)
        x, grid = model.embed(latents)
        return x, _key_sums(model, jnp.int32(0), x, grid, positions, conditions)

    return apply


def apply_block(
    graphdef: nnx.GraphDef, grid: tuple[int, int, int], *, is_last: bool = False
) -> Callable[..., tuple[jax.Array, HybridState, LinearState]]:
    """One block on one part of a video, as a pure function of the model's parameters.

    Args:
      graphdef: as in `apply_model`.
      grid: the part's tokens along frames, height and width.
      is_last: True for the last part of a video, which may end within a chunk.

    Returns:
      (params, block, x, state, later, positions, conditions) -> (x after the block, state after the part; unchanged
      after the last one, sums over the part's keys of the next block), where

      - block is the block's number, int32 scalar: one program serves all blocks;
      - x is the part's tokens [B, N, D] in the compute dtype;
      - state is the block's state after the parts before, at first `initial_state`;
      - later is the sum over the keys of the parts after this one;
      - positions are the part's `part_positions`, and conditions those of the model.

      After the last block the sums have no meaning.
    """

    def apply(
        params: dict[str, Any],
        block: jax.Array,
        x: jax.Array,
        state: HybridState,
        later: LinearState,
        positions: PartPositions,
        conditions: Conditions,
    ) -> tuple[jax.Array, HybridState, LinearState]:
        model = nnx.merge(graphdef, params)
        module, arguments = _block(model, block)
        arguments |= {"state": state, "later": later}
        attend = lambda inputs: _attend(model, inputs, arguments, positions, is_last=is_last)
        rope, sizes = _rope_and_sizes(model, grid, positions)
        x, after = module(x, conditions.text, conditions.time_modulation, rope, sizes, attend)
        following = jnp.minimum(block + 1, model.config.num_layers - 1)
        return x, state if is_last else after, _key_sums(model, following, x, grid, positions, conditions)

    return apply


def part_positions(first_frame: int, frames: int, head_dim: int, *, longest: int | None = None) -> PartPositions:
    """The rotations of the part of a video that begins at `first_frame`.

    Args:
      first_frame: number of frames before the part.
      frames: frames of the part.
      head_dim: d.
      longest: the largest position is below it. Frames beyond are rotated as if the video had begun later, so that the
        distances within a window remain right, and the overlap's keys are turned back to match. Sums over earlier
        frames keep the positions that their keys had. None for the frames' own positions, however far.

    Raises:
      ValueError: the part is longer than `longest`.
    """
    if longest is not None and frames > longest:
        raise ValueError(f"longest must be at least the {frames} frames of a part, found {longest}")
    if longest is None:
        return PartPositions(frame_table(first_frame + np.arange(frames), head_dim), None)
    # How much later the video seems to begin, for this part and for the one before.
    later, before = (max(0, end - longest) for end in (first_frame + frames, first_frame))
    return PartPositions(
        frame_table(first_frame - later + np.arange(frames), head_dim),
        frame_table(np.array([before - later]), head_dim),
    )


def _check_mesh() -> None:
    if (devices := axis_size("context")) > 1:
        raise ValueError(f"the parts of a video cannot be sharded along time, found {devices} devices along it")


def _attend(
    model: WanTransformer, inputs: AttentionInputs, per_block: Any, positions: PartPositions, *, is_last: bool
) -> tuple[jax.Array, HybridState | None]:
    """One block's attention in its own form, from its own state; an `Attend` whose auxiliary output is the state.

    After the last part there is no state.
    """
    state, later = per_block["state"], per_block.get("later")

    def in_form(form: Form) -> Callable[[], tuple[jax.Array, HybridState | None]]:
        features = model.features(form, inputs, per_block.get("feature_maps"))
        own = _own_state(form, inputs)

        def run() -> tuple[jax.Array, HybridState | None]:
            before = _with_heads(jax.tree.map(_first, state, own), model.config.num_heads)
            if positions.overlap is not None:
                before = dataclasses.replace(before, overlap_key=_turned(before.overlap_key, positions.overlap))
            y, after = form.attend_part(
                inputs,
                features,
                before,
                later=None if later is None else jax.tree.map(_first, later, own.past),
                is_last=is_last,
                implementation=model.attention_implementation,
            )
            return y, None if is_last else jax.tree.map(_grown, _flat(after), state)

        return run

    return by_form(model.config.block_forms, per_block, in_form)


def _block(model: WanTransformer, index: jax.Array) -> tuple[WanBlock, dict[str, Any]]:
    """A block by its number, and its slice of the per-block arguments."""
    block_def, params = nnx.split(model.blocks)
    row = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    params, arguments = jax.tree.map(row, (params, model.per_block_attention()))
    return nnx.merge(block_def, gathered(params, model.dtype)), arguments


def _rope_and_sizes(model: WanTransformer, grid: tuple[int, int, int], positions: PartPositions) -> tuple[Any, Any]:
    rope = rope_table(grid, model.config.head_dim, frames=positions.frames)
    return rope, (grid[1] * grid[2], grid[0])


def _key_sums(
    model: WanTransformer,
    index: jax.Array,
    x: jax.Array,
    grid: tuple[int, int, int],
    positions: PartPositions,
    conditions: Conditions,
) -> LinearState:
    """The sums over a part's keys in the block of this number; zero if its form does not read them."""
    block, arguments = _block(model, index)
    inputs = block.attention_inputs(x, conditions.time_modulation, *_rope_and_sizes(model, grid, positions))
    tokens = inputs.tokens_per_frame
    largest = _largest(model.config, len(x), tokens, x.dtype).past

    def in_form(form: Form) -> Callable[[], LinearState]:
        if form.streams:
            return lambda: _zeros(largest)
        features = model.features(form, inputs, arguments.get("feature_maps"))
        sums = lambda: form.key_sums(inputs, features, implementation=model.attention_implementation)
        return lambda: jax.tree.map(_grown, sums(), largest)

    return by_form(model.config.block_forms, arguments, in_form)


def _turned(key: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Keys [B, n, H, d] with another rotation [1, d'] of the first d' dimensions, those of the temporal axis."""
    cosines, sines = table
    temporal = cosines.shape[-1]
    return jnp.concatenate([rotate(key[..., :temporal], (cosines, sines)), key[..., temporal:]], axis=-1)


def _largest(config: WanConfig, batch: int, tokens_per_frame: int, dtype: jax.typing.DTypeLike) -> Any:
    """The shapes of a state that has room for every form's."""
    sizes = batch, tokens_per_frame, config.num_heads, config.head_dim
    make = lambda form: jax.eval_shape(lambda: _flat(form.zero_state(*sizes, dtype)))
    largest = lambda *leaves: jax.ShapeDtypeStruct(
        tuple(np.max([leaf.shape for leaf in leaves], axis=0).astype(int)), leaves[0].dtype
    )
    return jax.tree.map(largest, *map(make, config.block_forms.forms))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _own_state(form: Form, inputs: AttentionInputs) -> Any:
    """The shapes of a form's own state."""
    batch, _, heads, head_dim = inputs.query.shape
    sizes = batch, inputs.tokens_per_frame, heads, head_dim
    return jax.eval_shape(lambda: _flat(form.zero_state(*sizes, inputs.query.dtype)))


def _flat(state: HybridState) -> HybridState:
    """The state as it is kept between parts: its tokens as flat views, see `attention.flat_tokens`.

    A state without anchors has an array of no anchors, so that states of all forms have one structure.
    """
    none = flat(state.overlap_key)[:, :0]
    arrays = {name: flat(getattr(state, name)) for name in ("overlap_key", "overlap_value")}
    anchors = {name: getattr(state, name) for name in ("anchor_key", "anchor_value")}
    arrays |= {name: none if tokens is None else flat(tokens) for name, tokens in anchors.items()}
    return dataclasses.replace(state, **arrays)


def _with_heads(state: HybridState, heads: int) -> HybridState:
    """The inverse of `_flat`."""
    arrays = {name: with_heads(getattr(state, name), heads) for name in ("overlap_key", "overlap_value")}
    anchors = {name: getattr(state, name) for name in ("anchor_key", "anchor_value")}
    arrays |= {name: with_heads(view, heads) if view.shape[1] else None for name, view in anchors.items()}
    return dataclasses.replace(state, **arrays)


def _first(leaf: jax.Array, own: jax.ShapeDtypeStruct) -> jax.Array:
    return leaf[tuple(map(slice, own.shape))]


def _grown(leaf: jax.Array, largest: jax.Array) -> jax.Array:
    room = [(0, more - size, 0) for size, more in zip(leaf.shape, largest.shape, strict=True)]
    return jax.lax.pad(leaf, jnp.zeros((), leaf.dtype), room)
