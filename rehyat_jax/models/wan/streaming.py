"""The transformer over a video in parts: the device holds one part, and one state of attention for every block.

A part is a whole number of chunks of every block's form. Every block attends from its own tokens and its own state,
which sums up the parts before. The parts of a video therefore give the same velocity as the complete video, and memory
does not depend on its length. The states of all blocks are one tree with a leading layer axis; blocks of several forms
share the shapes of the largest state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention.form import AttentionInputs, Form, Sizes
from rehyat_jax.attention.hybrid.state import HybridState
from rehyat_jax.errors import InputError
from rehyat_jax.models.hybrid import by_form
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.rope import frame_table, rotate
from rehyat_jax.parallel.mesh import axis_size


def check_streams(config: WanConfig) -> None:
    """Raises InputError, naming the blocks, if a block's attention needs the complete video."""
    forms = config.block_forms.of_block
    if blocks := [block for block, form in enumerate(forms) if not form.streams]:
        kinds = ", ".join(sorted({_reason(forms[block]) for block in blocks}))
        raise InputError(
            f"blocks {', '.join(map(str, blocks))}: expected causal hybrid attention in every block, found {kinds}, "
            f"which needs the complete video; sample without streaming, or train a student with "
            f"config.hybrid.blocks=all and config.hybrid.causal=True"
        )


def _reason(form: Form) -> str:
    return form.label if form.causal else f"{form.label} that is not causal"


def initial_states(config: WanConfig, batch: int, tokens_per_frame: int, dtype: jax.typing.DTypeLike) -> HybridState:
    """The states of all blocks before a video's first part, with a leading layer axis.

    Args:
      config: the architecture.
      batch: number of examples.
      tokens_per_frame: tokens of one latent frame.
      dtype: compute dtype of the transformer.

    Raises:
      InputError: a block's attention needs the complete video.
    """
    check_streams(config)
    return jax.tree.map(
        lambda leaf: jnp.zeros((config.num_layers, *leaf.shape), leaf.dtype),
        _largest(config, batch, tokens_per_frame, dtype),
    )


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
        if (devices := axis_size("context")) > 1:
            raise ValueError(f"the parts of a video cannot be sharded along time, found {devices} devices along it")
        model = nnx.merge(graphdef, params)
        states = dataclasses.replace(states, overlap_key=_turned(states.overlap_key, positions.overlap))
        per_block = model.per_block_attention() | {"state": states}
        attend = lambda inputs, block: _attend(model, inputs, block, is_last=is_last)
        return model.forward(latents, timestep, text, attend, per_block, frames=positions.frames)

    return apply


class PartPositions(NamedTuple):
    """The rotations of one part of a video; made by `part_positions`.

    Attributes:
      frames: `frame_table` of the positions of the part's frames, each [T, d'], d' the temporal part of a head.
      overlap: the rotation of the overlap's keys, from their positions in the state to their positions relative to
        this part's frames; each [1, d'].
    """

    frames: tuple[np.ndarray, np.ndarray]
    overlap: tuple[np.ndarray, np.ndarray]


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
    # How much later the video seems to begin, for this part and for the one before.
    later, before = (max(0, end - longest) if longest else 0 for end in (first_frame + frames, first_frame))
    return PartPositions(
        frame_table(first_frame - later + np.arange(frames), head_dim),
        frame_table(np.array([before - later]), head_dim),
    )


def _attend(
    model: WanTransformer, inputs: AttentionInputs, per_block: Any, *, is_last: bool
) -> tuple[jax.Array, HybridState]:
    """One block's attention in its own form, from its own state; an `Attend` whose auxiliary output is the state."""
    batch, _, _, _ = inputs.query.shape
    state = per_block["state"]

    def in_form(form: Form) -> Callable[[], tuple[jax.Array, HybridState]]:
        features = model.features(form, inputs, per_block.get("feature_maps"))
        sizes = _sizes(model.config, inputs.tokens_per_frame)
        own = jax.eval_shape(lambda: form.zero_state(batch, sizes, inputs.query.dtype))

        def run() -> tuple[jax.Array, HybridState]:
            y, after = form.attend_part(
                inputs,
                features,
                jax.tree.map(_first, state, own),
                is_last=is_last,
                implementation=model.attention_implementation,
            )
            return y, jax.tree.map(_grown, after, state)

        return run

    return by_form(model.config.block_forms, per_block, in_form)


def _turned(key: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Keys [..., d] with another rotation [1, d'] of the first d' dimensions, those of the temporal axis."""
    cosines, sines = table
    temporal = cosines.shape[-1]
    turned = rotate(key[..., :temporal].reshape(1, -1, 1, temporal), (cosines, sines))
    return jnp.concatenate([turned.reshape(*key.shape[:-1], temporal), key[..., temporal:]], axis=-1)


def _sizes(config: WanConfig, tokens_per_frame: int) -> Sizes:
    return Sizes(0, tokens_per_frame, config.num_heads, config.head_dim)


def _largest(config: WanConfig, batch: int, tokens_per_frame: int, dtype: jax.typing.DTypeLike) -> Any:
    """The shapes of a state that has room for every form's."""
    sizes = _sizes(config, tokens_per_frame)
    make = lambda form: jax.eval_shape(lambda: form.zero_state(batch, sizes, dtype))
    largest = lambda *leaves: jax.ShapeDtypeStruct(
        tuple(np.max([leaf.shape for leaf in leaves], axis=0).astype(int)), leaves[0].dtype
    )
    return jax.tree.map(largest, *map(make, config.block_forms.forms))


def _first(leaf: jax.Array, own: jax.ShapeDtypeStruct) -> jax.Array:
    return leaf[tuple(map(slice, own.shape))]


def _grown(leaf: jax.Array, largest: jax.Array) -> jax.Array:
    room = [(0, more - size, 0) for size, more in zip(leaf.shape, largest.shape, strict=True)]
    return jax.lax.pad(leaf, jnp.zeros((), leaf.dtype), room)
