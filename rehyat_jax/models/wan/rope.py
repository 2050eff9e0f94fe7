"""Three-dimensional rotary position embedding of the Wan transformer."""

import jax
import jax.numpy as jnp
import numpy as np


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of one head given to (frames, height, width): 44, 42, 42 of 128 (Wan2.1's `rope_params` calls)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, first_frame: int = 0, theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for the tokens of one video.

    Args:
      grid: tokens along (frames, height, width).
      head_dim: d.
      first_frame: temporal position of the first latent frame, for videos that are produced piece by piece.
      theta: base of the geometric frequencies.

    Returns:
      (cos, sin), each float32 [frames * height * width, d / 2], tokens frame-major. Angles are formed in float64: at
      position 1000 a float32 angle is already off by 3e-5.
    """
    columns = []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        positions = np.arange(size, dtype=np.float64) + (first_frame if axis == 0 else 0)
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.outer(positions, frequencies)
        shape = [1, 1, 1, angles.shape[1]]
        shape[axis] = size
        columns.append(np.broadcast_to(angles.reshape(shape), (*grid, angles.shape[1])))
    angles = np.concatenate(columns, axis=-1).reshape(-1, head_dim // 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates adjacent pairs (2i, 2i+1) of x [B, N, H, d] by `rope_table`'s angles, in float32; keeps x's dtype."""
    cos, sin = (jnp.asarray(part)[None, :, None, :] for part in table)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
