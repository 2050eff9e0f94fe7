"""The convolutions of Wan's VAE that double or halve height and width, as Pallas kernels for TPUs.

Doubling repeats every pixel before a 3x3 convolution. A pixel of the result sees at most two different columns and two
different rows. So there are four convolutions of 2x2, one for each place of the result in its square, and their kernels
are sums of the given one's taps. They need 4 products a pixel in place of 9.
"""

from collections.abc import Callable

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
    group,
    joined,
    joined_kernel,
    round_up,
    rows_of_block,
)


def doubled_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    above: jax.Array | None = None,
    below: jax.Array | None = None,
) -> jax.Array:
    """The convolution of frames whose pixels are repeated twice along both sides, zeros around.

    Args:
      x: bfloat16 [B, T, H, W, C].
      kernel: [3, 3, C, N]; `bias`: [N].
      above, below: the rows around `x`, bfloat16 [B, T, 1, W, C]; None for zeros.

    Returns:
      bfloat16 [B, T, 2H, 2W, N].

    Raises:
      InputError: a row does not fit into VMEM.
    """
    width, outside = x.shape[3], kernel.shape[-1]
    # Taps that see the first and the second of two neighbouring pixels, for an upper (left) and a lower (right) result.
    upper, lower = ((0,), (1, 2)), ((0, 1), (2,))
    summed = lambda rows, columns: sum(kernel[row, column] for row in rows for column in columns)
    # Groups: the left result's left and own column, the right result's own and right column.
    matrices = [
        joined_kernel([jnp.concatenate([summed(row, column) for row in rows]) for column in (*upper, *lower)], x.dtype)
        for rows in (upper, lower)
    ]

    def convolve(lines, row, outputs, inputs):
        for place in range(2):
            pieces = [lines[row + place], lines[row + place + 1]]
            matrix = inputs["lower" if place else "upper"][...]
            product = jnp.dot(joined(pieces, x.dtype), matrix, preferred_element_type=jnp.float32)
            before, left, right, after = (group(product, 4, outside, index)[:, :outside] for index in range(4))
            results = from_left(before) + left, right + from_right(after)
            even, odd = (_bits((values + inputs["bias"][...]).astype(x.dtype)) for values in results)
            # A word of a register holds two neighbouring rows of a matrix.
            words = jax.lax.shift_right_logical(even, 16) | odd
            outputs["y"][2 * row + place] = pltpu.bitcast(words, x.dtype)[: 2 * width]

    named = {"upper": matrices[0], "lower": matrices[1], "bias": bias.astype(jnp.float32)[None]}
    return _resampled(
        "vae_doubled_convolution",
        convolve,
        x,
        named,
        (2, 2 * width, outside),
        rows_in=1,
        unit=SUBLANES,
        above=above,
        below=below,
    )


def halved_convolution(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, below: jax.Array | None = None
) -> jax.Array:
    """The convolution at every second row and column, with zeros below and on the right.

    Args:
      x: bfloat16 [B, T, H, W, C], with even H and W.
      kernel: [3, 3, C, N]; `bias`: [N].
      below: the row below `x`, bfloat16 [B, T, 1, W, C]; None for zeros.

    Returns:
      bfloat16 [B, T, H / 2, W / 2, N].

    Raises:
      InputError: two rows do not fit into VMEM.
    """
    width, outside = x.shape[3], kernel.shape[-1]
    rows = lambda column: kernel[:, column].reshape(-1, outside)
    # The third column of a result is the first one of the next result.
    own = joined_kernel([jnp.concatenate([rows(0), rows(1)])], x.dtype)
    following = joined_kernel([rows(2)], x.dtype)

    def convolve(lines, row, outputs, inputs):
        pairs = [pltpu.bitcast(lines[2 * row + 1 + y], jnp.int32) for y in range(3)]
        first, second = [_number(pair << 16) for pair in pairs], [_number(pair & ~0xFFFF) for pair in pairs]
        dot = lambda pieces, name: jnp.dot(
            joined(pieces, x.dtype), inputs[name][...], preferred_element_type=jnp.float32
        )
        y = (dot(first + second, "own") + from_right(dot(first, "following")))[:, :outside]
        outputs["y"][row] = (y + inputs["bias"][...])[: width // 2].astype(x.dtype)

    named = {"own": own, "following": following, "bias": bias.astype(jnp.float32)[None]}
    return _resampled(
        "vae_halved_convolution",
        convolve,
        x,
        named,
        (1, width // 2, outside),
        rows_in=2,
        unit=2 * SUBLANES,
        above=None,
        below=below,
    )


def _bits(values: jax.Array) -> jax.Array:
    """The bits of bfloat16 numbers in the upper half of int32."""
    return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _number(bits: jax.Array) -> jax.Array:
    """Inverse of `_bits`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _resampled(
    name: str,
    convolve: Callable,
    x: jax.Array,
    named: dict[str, jax.Array],
    shape_out: tuple[int, int, int],
    *,
    rows_in: int,
    unit: int,
    above: jax.Array | None,
    below: jax.Array | None,
) -> jax.Array:
    """Calls `convolve(lines, row, outputs, inputs)` for each unit of rows of every frame.

    Args:
      named: matrices that every step reads, by the names under which `inputs` has them.
      shape_out: rows, columns and channels of the result that belong to `rows_in` rows of `x`.
      unit: `lines` holds the rows of a block and one more on either side. Their columns are padded with zeros to a
        multiple of this number.
    """
    batch, frames, height, width, channels = x.shape
    rows_out, width_out, outside = shape_out
    pitch = round_up(width, unit)
    row = lambda width, channels: 2 * width * round_up(channels, LANES)
    moved = 2 * (rows_in * row(width, channels) + rows_out * row(width_out, outside))
    inside, columns = max((matrix.shape for matrix in named.values()), key=lambda shape: shape[0] * shape[1])
    fixed = 6 * row(pitch, channels) + 8 * inside * columns + pitch * (2 * inside + 2 * 4 * columns)
    rows = checked(rows_of_block(height // rows_in, rows_in * row(pitch, channels) + moved, fixed), width)
    blocks, block_rows = height // rows_in // rows, rows * rows_in

    def kernel_body(inputs, outputs, scratch):
        block, lines = pl.program_id(2), scratch["lines"]

        if pitch > width:
            lines[...] = jnp.zeros(lines.shape, lines.dtype)
        lines[0, :width] = edge_row(inputs, "above", block == 0)
        lines[1 : block_rows + 1, :width] = inputs["x"][...]
        lines[block_rows + 1, :width] = edge_row(inputs, "below", block == blocks - 1)
        for_every_row(rows, lambda row: convolve(lines, row, outputs, inputs), interleaved=2)

    def row_spec(row):
        return pl.BlockSpec((None, None, 1, width, channels), lambda b, t, i: (b, t, row(i), 0, 0))

    block = lambda rows, width, channels: pl.BlockSpec(
        (None, None, rows, width, channels), lambda b, t, i: (b, t, i, 0, 0)
    )
    around = {
        "above": (x, row_spec(lambda i: jnp.maximum(i * block_rows - 1, 0))),
        "below": (x, row_spec(lambda i: jnp.minimum((i + 1) * block_rows, height - 1))),
        "above_frame": None if above is None else (above, row_spec(lambda i: 0)),
        "below_frame": None if below is None else (below, row_spec(lambda i: 0)),
    }
    whole = {key: (array, pl.BlockSpec(array.shape, lambda b, t, i: (0, 0))) for key, array in named.items()}
    shape = jax.ShapeDtypeStruct((batch, frames, height // rows_in * rows_out, width_out, outside), x.dtype)
    return call_kernel(
        name,
        kernel_body,
        (batch, frames, blocks),
        {"x": (x, block(block_rows, width, channels)), **around, **whole},
        {"y": (shape, block(rows * rows_out, width_out, outside))},
        {"lines": pltpu.VMEM((block_rows + 2, pitch, channels), x.dtype)},
        parallel=3,
        vmem_bytes=VMEM_BYTES,
    )["y"]
