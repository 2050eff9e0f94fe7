"""Rows of frames as the matrix units of TPUs take them, for the kernels of Wan's VAE.

A row is a matrix [columns, channels], and a convolution is a product of matrices. The channels of neighbouring rows and
frames are joined along the lanes, so that 96 or 192 channels fill the matrix unit's rows. One product gives the terms
of all columns of the convolution's kernel, joined along the lanes of the result. To add them takes shifts by one
column.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES
from rehyat_jax.errors import InputError

SUBLANES = 16
"""Rows of a register of bfloat16."""

VMEM_BYTES = 56 * 2**20
"""Limit of all that a kernel holds. v5p and TPU7x have 64 MiB, v5e and v6e twice as much. Earlier TPUs have less."""

_MOST_ROWS = 10


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def rows_of_block(height: int, bytes_of_row: int, fixed_bytes: int, unit: int = 1) -> int | None:
    """The most rows that divide `height` and fit into VMEM; None if none do.

    Args:
      bytes_of_row: VMEM for each row of a block.
      fixed_bytes: VMEM for everything else.
      unit: a block has a multiple of this number of rows, or all.
    """
    divisors = [rows for rows in range(1, height + 1) if height % rows == 0 and (rows % unit == 0 or rows == height)]
    fits = lambda rows: rows * bytes_of_row + fixed_bytes <= VMEM_BYTES
    few = [rows for rows in divisors if rows <= _MOST_ROWS] or divisors[:1]
    return max(filter(fits, few), default=None)


def checked(rows: int | None, width: int) -> int:
    """`rows_of_block` if a row fits. Raises InputError otherwise."""
    if rows is None:
        raise InputError(
            f"bfloat16 frames of {width} columns: a row is too large for the VMEM of a TPU; code frames in tiles "
            f"(tile=256), or compute in float32 (--vae-dtype float32)"
        )
    return rows


def for_every_row(rows: int, body: Callable[[jax.Array], None], *, interleaved: int) -> None:
    """Runs `body` for every row of a block. The compiler interleaves at most that many rows, to hide their latency."""
    # A remainder makes the compiler of libtpu 0.0.48 crash.
    unroll = max(n for n in range(1, interleaved + 1) if rows % n == 0)
    jax.lax.fori_loop(0, rows, lambda row, _: body(row), None, unroll=unroll)


def edge_row(inputs: dict[str, Any], name: str, is_edge: jax.Array) -> jax.Array:
    """The row `name` of another block; at the edge of a device's frame the row `name`_frame, zeros if there is none."""
    values, beyond = inputs[name][0], inputs.get(f"{name}_frame")
    return jnp.where(is_edge, jnp.zeros_like(values) if beyond is None else beyond[0], values)


def joined(pieces: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Matrices [N, C] of bfloat16 next to one another, [N, their channels, then zeros up to a multiple of 128].

    Registers hold pairs of rows. Joining the pairs moves half as many words.
    """
    pairs = [pltpu.bitcast(piece, jnp.int32) for piece in pieces]
    channels = sum(piece.shape[1] for piece in pieces)
    if zeros := round_up(channels, LANES) - channels:
        pairs.append(jnp.zeros((pairs[0].shape[0], zeros), jnp.int32))
    return pltpu.bitcast(jnp.concatenate(pairs, axis=-1), dtype)


def spacing(groups: int, channels: int) -> int:
    """Lanes from one of several groups of output channels to the next: aligned, unless packing saves registers."""
    aligned = round_up(channels, LANES)
    return channels if round_up(groups * channels, LANES) < groups * aligned else aligned


def joined_kernel(groups: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Matrices [K, N], one for each group, as the right side of a product: [K up to 128s, groups up to 128s]."""
    inside, outside = groups[0].shape
    step = spacing(len(groups), outside)
    columns = jnp.concatenate([jnp.pad(group, ((0, 0), (0, step - outside))) for group in groups], axis=1)
    padding = (0, round_up(inside, LANES) - inside), (0, round_up(columns.shape[1], LANES) - columns.shape[1])
    return jnp.pad(columns, padding).astype(dtype)


def group(product: jax.Array, groups: int, channels: int, index: int) -> jax.Array:
    """The columns of one group in a product with `joined_kernel`: [N, `channels`], or more for aligned groups."""
    step = spacing(groups, channels)
    return product[:, index * step : (index + 1) * step]


def from_left(values: jax.Array, axis: int = 0) -> jax.Array:
    """float32 values at the place before each along an axis, zeros before the first."""
    return jnp.where(_place(values, axis) == 0, 0.0, pltpu.roll(values, 1, axis))


def from_right(values: jax.Array, axis: int = 0) -> jax.Array:
    """float32 values at the place after each along an axis, zeros after the last."""
    last = values.shape[axis] - 1
    return jnp.where(_place(values, axis) == last, 0.0, pltpu.roll(values, last, axis))


def _place(values: jax.Array, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
