"""Three-dimensional rotary position embedding of the Wan transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rehyat_jax.attention.platform import target_platform
from rehyat_jax.parallel.attention import CONTEXT, TOKENS
from rehyat_jax.parallel.mesh import is_cut

_TABLE = PartitionSpec(CONTEXT)


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
      (cos, sin), each float32 [frames * height * width, d], tokens frame-major, those of every pair twice. Angles are
      formed in float64: at position 1000 a float32 angle is already off by 3e-5. In a compiled program they are put
      together from one small table for every axis; as constants, 161 frames at 480p would add a quarter of a gigabyte.
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
      table: cosines and sines [N, d], those of every pair twice.
    """
    if target_platform() == "tpu":
        # XLA would not see that a part of the heads is on a device whole.
        on_mesh = jax.shard_map(rotate_by_heads, in_specs=(TOKENS, (_TABLE, _TABLE)), out_specs=TOKENS, check_vma=False)
        return (on_mesh if is_cut() else rotate_by_heads)(x, table)
    x32 = x.astype(jnp.float32)
    turned = jnp.stack([-x32[..., 1::2], x32[..., 0::2]], axis=-1).reshape(x.shape)
    cos, sin = (jnp.asarray(part)[:, None, :] for part in table)
    return (x32 * cos + turned * sin).astype(x.dtype)


@jax.custom_vjp
def rotate_by_heads(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`rotate` for TPUs, head by head. Pairs of lanes are turned by a product with a matrix of signs, which is exact.

    Strided lanes, and an axis of heads beside that of lanes, make XLA copy everything from layout to layout. By its
    own estimates for 1.3B at 480p and 81 frames on v5e, the queries of one block take 6.4 million cycles more so than
    without rotation, and 17.5 backward; here 1.4 either way, of some 280 for the whole block.
    """
    batch, tokens, heads, head_dim = x.shape
    even = np.arange(0, head_dim, 2)
    signs = np.zeros((head_dim, head_dim), np.float32)
    signs[even + 1, even], signs[even, even + 1] = -1, 1
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    cos, sin = table

    def rotate_head(head: jax.Array, flat: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(flat, head * head_dim, head_dim, axis=-1)
        turned = jnp.dot(part, jnp.asarray(signs, x.dtype), precision=exact)
        rotated = (part.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(flat, rotated, head * head_dim, axis=-1)

    # A loop, not `heads` copies of its body: of 40 the compiler makes code for a minute, to save 8% of the cycles.
    flat = x.reshape(batch, tokens, heads * head_dim)
    return jax.lax.fori_loop(0, heads, rotate_head, flat).reshape(x.shape)


def _rotate_by_heads_backward(table: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = table
    return rotate_by_heads(cotangent, (cos, -sin)), None


rotate_by_heads.defvjp(lambda x, table: (rotate_by_heads(x, table), table), _rotate_by_heads_backward)
