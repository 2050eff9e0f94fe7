"""Three-dimensional rotary position embedding of the Wan transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rehyat_jax.attention.flat_tokens import flat, with_heads
from rehyat_jax.attention.platform import target_platform
from rehyat_jax.attention.product import accumulation_dtype
from rehyat_jax.parallel.mesh import is_cut
from rehyat_jax.parallel.sharding import HIDDEN

_TOKENS = PartitionSpec(*HIDDEN)
_TABLE = PartitionSpec("context")
_KERNEL_HEAD_DIM = 128  # of the TPU kernel


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of one head given to (frames, height, width): 44, 42, 42 of 128 (Wan2.1's `rope_params` calls)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


THETA = 10000.0
"""Base of the geometric frequencies."""


def axis_table(positions: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of one axis, each float32 [positions, dim], each pair's value twice.

    Angles are computed in float64: at position 1000 a float32 angle is already off by 3e-5.
    """
    frequencies = THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.outer(np.asarray(positions, np.float64), frequencies).repeat(2, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def frame_table(positions: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """`axis_table` of the temporal axis: what `rope_table` needs of the positions of a video's frames."""
    return axis_table(positions, axis_dims(head_dim)[0])


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, frames: tuple[jax.Array, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the tokens of one video.

    Args:
      grid: tokens along (frames, height, width).
      head_dim: d.
      frames: `frame_table` of the frames' positions, for a part of a video; by default they begin at 0.

    Returns:
      (cos, sin), each float32 [frames * height * width, d], tokens frame-major, each pair's value twice. A compiled
      program assembles them from one small table for every axis; constants for 161 frames at 480p would add a quarter
      of a gigabyte.
    """
    tables = [axis_table(np.arange(size), dim) for size, dim in zip(grid, axis_dims(head_dim), strict=True)]
    if frames is not None:
        tables[0] = frames
    columns: tuple[list, list] = ([], [])
    for axis, table in enumerate(tables):
        for values, whole in zip(table, columns, strict=True):
            shape = [1, 1, 1, values.shape[-1]]
            shape[axis] = grid[axis]
            whole.append(jnp.broadcast_to(jnp.asarray(values).reshape(shape), (*grid, shape[-1])))
    return tuple(jnp.concatenate(whole, axis=-1).reshape(-1, head_dim) for whole in columns)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates adjacent pairs (2i, 2i+1) of x [B, N, H, d] by `rope_table`'s angles; keeps x's dtype.

    Args:
      table: cosines and sines [N, d], each pair's value twice.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    turned = jnp.stack([-wide[..., 1::2], wide[..., 0::2]], axis=-1).reshape(x.shape)
    cos, sin = (jnp.asarray(part)[:, None, :] for part in table)
    return (wide * cos + turned * sin).astype(x.dtype)


def scaled_and_rotated(
    x: jax.Array, row_scale: jax.Array, column_scale: jax.Array, table: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """`rotate` of the heads of x * row_scale * column_scale, for example an RMS norm, after rounding to x's dtype.

    Args:
      x: [B, N, H * d].
      row_scale, column_scale: float32 [B, N, 1] and [H * d].
      table: cosines and sines [N, d].

    Returns: [B, N, H * d] in x's dtype.
    """
    cos, sin = table
    if target_platform() == "tpu" and cos.shape[-1] == _KERNEL_HEAD_DIM:
        # TPU kernels are imported where they are used.
        from rehyat_jax.attention.tpu.norm_rotate import scale_and_rotate

        run = scale_and_rotate
        if is_cut():
            # XLA cannot shard a kernel.
            specs = (_TOKENS, PartitionSpec(*_TOKENS[:2]), PartitionSpec("tensor"), _TABLE, _TABLE)
            run = jax.shard_map(run, in_specs=specs, out_specs=_TOKENS, check_vma=False)
        return run(x, row_scale, column_scale, cos, sin)
    scaled = (x * row_scale * column_scale).astype(x.dtype)
    return flat(rotate(with_heads(scaled, x.shape[-1] // cos.shape[-1]), table))
