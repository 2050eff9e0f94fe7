"""The 3x3x3 convolution of frames with few channels, such as RGB, as a Pallas kernel for TPUs.

Three channels would leave most lanes of a register empty. Here the columns of a frame are lanes, and a row is a matrix
[channels, columns]. The rows of all taps stand below one another. One product over all taps gives the outputs of a row,
[columns, channels].
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES
from rehyat_jax.attention.tpu.kernel_call import call_kernel
from rehyat_jax.models.wan_vae.tpu.rows import (
    SUBLANES,
    VMEM_BYTES,
    checked,
    edge_row,
    for_every_row,
    from_left,
    from_right,
    round_up,
    rows_of_block,
)

TAPS = 27

_WINDOW = 3  # frames, and rows, of the kernel


def takes_planes(channels: int) -> bool:
    """True if this kernel takes frames with so few channels."""
    return TAPS * channels <= LANES


def planar_convolution(
    window: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    above: jax.Array | None = None,
    below: jax.Array | None = None,
) -> jax.Array:
    """The convolution of frames with the two frames before each, zeros around.

    Args:
      window: bfloat16 [B, 2 + T, H, W, C].
      kernel: [3, 3, 3, C, N]; `bias`: [N].
      above, below: the rows around `window`, bfloat16 [B, 2 + T, 1, W, C]; None for zeros.

    Returns:
      bfloat16 [B, T, H, W, N].

    Raises:
      InputError: a row does not fit into VMEM.
    """
    batch, frames, height, width, channels = window.shape
    frames, outside, dtype = frames - _WINDOW + 1, kernel.shape[-1], window.dtype
    pitch, taps = round_up(width, LANES), round_up(TAPS * channels, SUBLANES)
    # The order of rows: column of the kernel, frame, row, channel.
    matrix = jnp.moveaxis(kernel, 2, 0).reshape(TAPS * channels, outside)
    matrix = jnp.pad(matrix, ((0, taps - TAPS * channels), (0, 0))).astype(dtype)
    planes = lambda x: jnp.moveaxis(x, -1, -2).astype(jnp.float32)
    row_bytes = 2 * width * round_up(outside, LANES) + 4 * (2 * _WINDOW + 1) * SUBLANES * pitch
    rows = checked(rows_of_block(height, 2 * row_bytes, 16 * taps * pitch), width)
    blocks = height // rows

    def kernel_body(inputs, outputs, scratch):
        block, lines = pl.program_id(2), scratch["lines"]

        if pitch > width:
            lines[...] = jnp.zeros(lines.shape, lines.dtype)
        for frame in range(_WINDOW):
            lines[frame, 0, :, :width] = edge_row(inputs, f"above_{frame}", block == 0)
            lines[frame, 1 : rows + 1, :, :width] = inputs[f"block_{frame}"][...]
            lines[frame, rows + 1, :, :width] = edge_row(inputs, f"below_{frame}", block == blocks - 1)

        def convolve(row):
            middle = jnp.concatenate([lines[frame, row + y] for frame in range(_WINDOW) for y in range(_WINDOW)])
            columns = [from_left(middle, 1), middle, from_right(middle, 1)]
            if taps > TAPS * channels:
                columns.append(jnp.zeros((taps - TAPS * channels, pitch)))
            seen = jnp.concatenate(columns).astype(dtype)
            contract = (((0,), (0,)), ((), ()))
            y = jax.lax.dot_general(seen, inputs["matrix"][...], contract, preferred_element_type=jnp.float32)
            outputs["y"][row] = (y[:width] + inputs["bias"][...]).astype(dtype)

        for_every_row(rows, convolve, interleaved=5)

    def rows_spec(count, frame, place):
        return pl.BlockSpec((None, None, count, channels, width), lambda b, t, i: (b, t + frame, place(i), 0, 0))

    arrays = planes(window)
    inputs = {}
    for frame in range(_WINDOW):
        first, last = lambda i: jnp.maximum(i * rows - 1, 0), lambda i: jnp.minimum((i + 1) * rows, height - 1)
        inputs[f"block_{frame}"] = arrays, rows_spec(rows, frame, lambda i: i)
        inputs[f"above_{frame}"] = arrays, rows_spec(1, frame, first)
        inputs[f"below_{frame}"] = arrays, rows_spec(1, frame, last)
        for name, row in (("above", above), ("below", below)):
            if row is not None:
                inputs[f"{name}_{frame}_frame"] = planes(row), rows_spec(1, frame, lambda i: 0)
    whole = lambda array: (array, pl.BlockSpec(array.shape, lambda b, t, i: (0, 0)))
    shape = jax.ShapeDtypeStruct((batch, frames, height, width, outside), dtype)
    return call_kernel(
        "vae_planar_convolution",
        kernel_body,
        (batch, frames, blocks),
        {**inputs, "matrix": whole(matrix), "bias": whole(bias.astype(jnp.float32)[None])},
        {"y": (shape, pl.BlockSpec((None, None, rows, width, outside), lambda b, t, i: (b, t, i, 0, 0)))},
        {"lines": pltpu.VMEM((_WINDOW, rows + 2, channels, pitch), jnp.float32)},
        parallel=3,
        vmem_bytes=VMEM_BYTES,
    )["y"]
