"""Where the attention of every block goes: from which frame to which frame, in any form of attention.

The result of an attention is the sum of the values under its weights. Values that are 1 for the keys of one frame, and
0 for all others, give the sum of the weights of that frame. So the attention itself computes its mass by frames: one
call for every head_dim frames, without dense weights, and for every form that is linear in its values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from rehyat_jax.attention.forms.base import AttentionInputs
from rehyat_jax.models.student import Inputs
from rehyat_jax.models.wan.modeling import WanTransformer


def attention_mass(model: WanTransformer, inputs: Inputs) -> jax.Array:
    """The mass of attention between frames in every block, each in its own form, while the model runs.

    Args:
      model: a transformer, softmax or hybrid.
      inputs: of the model.

    Returns:
      Float32 [blocks, B, T, T], [..., q, k] the mean over the tokens and heads of frame q of the weights of the keys of
      frame k. A row sums to one if the form's weights do.
    """

    def attend(inputs: AttentionInputs, per_block: Any) -> tuple[jax.Array, jax.Array]:
        output, _ = model.attend(inputs, per_block)
        frame_of_key, width = jnp.arange(inputs.value.shape[1]) // inputs.tokens_per_frame, inputs.value.shape[-1]
        parts = []
        for first in range(0, inputs.num_frames, width):
            is_of_frame = frame_of_key[:, None] == first + jnp.arange(width)
            value = jnp.broadcast_to(is_of_frame[None, :, None].astype(inputs.value.dtype), inputs.value.shape)
            part, _ = model.attend(dataclasses.replace(inputs, value=value), per_block)
            parts.append(part[:, : inputs.num_tokens].astype(jnp.float32))
        mass = jnp.concatenate(parts, axis=-1)[..., : inputs.num_frames]
        return output, rearrange(mass, "b (t p) h k -> b t p h k", t=inputs.num_frames).mean((2, 3))

    return model.forward(*inputs, attend, model.per_block_attention())[1]


def by_distance(mass: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The mass by distance in frames: the frame of the query minus that of the key, positive for the past.

    Args:
      mass: [..., T, T].

    Returns:
      (the distances from 1 - T to T - 1, their mass [..., 2 T - 1] as a share of all queries).
    """
    frames = mass.shape[-1]
    distances = list(range(1 - frames, frames))
    shares = [np.trace(mass, -distance, axis1=-2, axis2=-1) / frames for distance in distances]
    return distances, np.stack(shares, axis=-1)


def moved_mass(mass: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of the attention's mass that goes to another frame: half the L1 distance of rows, mean over queries.

    Args:
      mass, other: [..., T, T], with rows that sum to one.

    Returns:
      [...], from 0 to 1.
    """
    return np.abs(mass - other).sum(-1).mean(-1) / 2
