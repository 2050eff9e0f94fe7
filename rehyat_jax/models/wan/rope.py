"""Three-dimensional rotary position embedding of the Wan transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rehyat_jax.attention.flat_tokens import flat, with_heads
from rehyat_jax.attention.platform import target_platform
from rehyat_jax.parallel.mesh import is_cut
from rehyat_jax.parallel.sharding import HIDDEN

_TOKENS = PartitionSpec(*HIDDEN)
_TABLE = PartitionSpec("context")
_KERNEL_HEAD_DIM = 128  # of the TPU kernel


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of one head given to (frames, height, width): 44, 42, 42 of 128 (Wan2.1's `rope_params` calls)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, first_frame: int = 0, theta: float = 10000.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the tokens of one video.

    Args:
      grid: tokens along (frames, height, width).
      head_dim: d.
      first_frame: temporal position of the first latent frame, for videos that are produced piece by piece.
      theta: base of the geometric frequencies.

    Returns:
      (cos, sin), each float32 [frames * height * width, d], tokens frame-major, each pair's value twice. Angles are
      computed in float64: at position 1000 a float32 angle is already off by 3e-5. A compiled program assembles them
      from one small table for every axis; constants for 161 frames at 480p would add a quarter of a gigabyte.
    """
    cosines, sines = [], []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        positions = np.arange(size, dtype=np.float64) + (first_frame if axis == 0 else 0)
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.outer(positions, frequencies).repeat(2, axis=-1)
        shape = [1, 1, 1, dim]
        shape[axis] = size
        for columns, values in ((cosines, np.cos(angles)), (sines, np.sin(angles))):
            values = jnp.asarray(values.astype(np.float32).reshape(shape))
            columns.append(jnp.broadcast_to(values, (*grid, dim)))
    return tuple(jnp.concatenate(columns, axis=-1).reshape(-1, head_dim) for columns in (cosines, sines))


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates adjacent pairs (2i, 2i+1) of x [B, N, H, d] by `rope_table`'s angles, in float32; keeps x's dtype.

    Args:
      table: cosines and sines [N, d], each pair's value twice.
    """
    x32 = x.astype(jnp.float32)
    turned = jnp.stack([-x32[..., 1::2], x32[..., 0::2]], axis=-1).reshape(x.shape)
    cos, sin = (jnp.asarray(part)[:, None, :] for part in table)
    return (x32 * cos + turned * sin).astype(x.dtype)


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
    scaled = (x.astype(jnp.float32) * row_scale * column_scale).astype(x.dtype)
    return flat(rotate(with_heads(scaled, x.shape[-1] // cos.shape[-1]), table))
