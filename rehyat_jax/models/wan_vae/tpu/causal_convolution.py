"""The causal 3x3x3 convolution of Wan's VAE as a Pallas kernel for TPUs, with norm, SiLU, bias and residual.

The kernel walks down a frame in blocks of rows. At every block it loads one frame after another, first the two cached
ones. It norms each row once, and keeps it in VMEM until all outputs that need it are computed. The outputs of a block
need the first row of the block below, so they are computed one block later:

    block i of frame t arrives -> norm, SiLU -> rows of frame t
    rows of frames t - 2, t - 1, t around block i - 1 -> product -> block i - 1 of output frame t

So HBM is read and written once. The product of one row joins the channels of 9 rows, 3 frames by 3 rows (see `rows`).
The compiler runs it at the same time as the norm of a row of the next block.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES
from rehyat_jax.attention.tpu.kernel_call import call_kernel, scalars
from rehyat_jax.models.wan_vae.tpu.rows import (
    SUBLANES,
    VMEM_BYTES,
    checked,
    from_left,
    from_right,
    group,
    joined,
    joined_kernel,
    round_up,
    rows_of_block,
)

PAST = 2
"""Frames before its own that an output frame sees."""

_SHIFTS = 3  # columns of the convolution's kernel


def causal_convolution(
    x: jax.Array,
    past: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    norm_scale: jax.Array | None,
    residual: jax.Array | None,
    shortcut: tuple[jax.Array, jax.Array] | None,
    only_last: jax.Array,
    above: jax.Array | None = None,
    below: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """convolution(silu(norm(x))) + shortcut(residual) over frames that follow `past`, and the next call's past.

    Args:
      x: bfloat16 [B, T, H, W, C].
      past: the last two frames that the convolution saw, after norm and SiLU, bfloat16 [B, 2, H, W, `padded`(C)]. The
        channels from C on are never read, and may be NaN. Its memory becomes that of the result.
      kernel: [3, 3, 3, C, N]; `bias`: [N].
      norm_scale: scale of the RMS norm before SiLU, [C]; None for neither.
      residual: bfloat16 [B, T, H, W, M], or None.
      shortcut: matrix [M, N] and bias [N] of a product with the residual; None if M is N.
      only_last: bool []; True replaces all frames of silu(norm(x)) but the last by zeros.
      above, below: the rows around the frames, after norm and SiLU, bfloat16 [B, 2 + T, 1, W, C]; None for zeros.

    Returns:
      (bfloat16 [B, T, H, W, N], bfloat16 like `past`).

    Raises:
      InputError: a row of the frames does not fit into VMEM.
    """
    batch, frames, height, width, channels = x.shape
    outside, dtype, steps = kernel.shape[-1], x.dtype, PAST + frames
    if shortcut is not None:
        bias = bias + shortcut[1]
    # One group for each column of the kernel. Rows of each: frames, rows, channels.
    columns = [kernel[:, :, column].reshape(-1, outside) for column in range(_SHIFTS)]
    matrix = joined_kernel(columns, dtype)
    sizes = _Sizes(height, width, channels, outside, 0 if residual is None else residual.shape[-1], steps, matrix.shape)
    # Few output channels leave most lanes empty. They become rows of registers, and the columns of a frame lanes.
    has_planes = _SHIFTS * outside <= SUBLANES and residual is None and sizes.rows(in_planes=True) is not None
    rows, pitch = checked(sizes.rows(has_planes), width), sizes.pitch(has_planes)
    blocks = height // rows
    held = 2 * rows + 1  # rows of a frame in VMEM: this block, the block above, and one more row above it

    def kernel_body(inputs, outputs, scratch):
        block, step = pl.program_id(1), pl.program_id(2)
        lines = scratch["lines"]
        is_below = block == blocks
        is_skipped = jnp.logical_and(inputs["only_last"][0] == 1, jnp.logical_and(step >= PAST, step < steps - 1))
        keep = jnp.where(jnp.logical_or(is_skipped, is_below), 0.0, 1.0)

        def normed(row):
            values = inputs["x"][row].astype(jnp.float32)
            if norm_scale is None:
                return (values * keep).astype(dtype)
            squares = jnp.maximum(jnp.sum(values * values, axis=-1, keepdims=True), 1e-24)
            half = values * jax.lax.rsqrt(squares) * (keep * inputs["half_scale"][...])
            return (half + half * jnp.tanh(half)).astype(dtype)  # silu(2 half)

        def cached(row):
            values = inputs["past"][row, :, :channels]
            return jnp.where(is_below, jnp.zeros_like(values), values)

        def put(row, values):
            """Stores a row of this block in place of one that no output of this block or the next needs."""
            if below is not None:
                values = jnp.where(jnp.logical_and(is_below, row == 0), inputs["below"][0], values)
            lines[step, (block * rows + row) % held, :width] = values

            # Steps before the last two write here too; what they write is overwritten before it is moved.
            last = outputs["past"][row, :, :channels]
            outputs["past"][row, :, :channels] = jnp.where(is_below, last, values)

        def through_shortcut(residual):
            if shortcut is None:
                return residual.astype(jnp.float32)
            product = jnp.dot(residual, inputs["shortcut"][...], preferred_element_type=jnp.float32)
            return product[:, :outside]

        def convolve_planes(pieces):
            """The outputs of one row, [N, columns]."""
            contract = (((1,), (1,)), ((), ()))
            product = jax.lax.dot_general(inputs["matrix"][...], pieces, contract, preferred_element_type=jnp.float32)
            left, middle, right = (product[index * outside : (index + 1) * outside] for index in range(_SHIFTS))
            return from_left(left, 1) + middle + from_right(right, 1) + inputs["bias"][...]

        def convolve(row):
            """Row `row` of the outputs of the block above."""
            first = (block - 1) * rows + row - 1 + held  # positive
            pieces = [lines[step - PAST + t, (first + y) % held] for t in range(3) for y in range(3)]
            if has_planes:
                planes = convolve_planes(joined(pieces, dtype))
                for channel in range(outside):
                    outputs["y"][channel, pl.ds(row, 1)] = planes[channel : channel + 1, :width]
                return
            product = jnp.dot(joined(pieces, dtype), inputs["matrix"][...], preferred_element_type=jnp.float32)
            left, middle, right = (group(product, _SHIFTS, outside, index) for index in range(_SHIFTS))
            y = (from_left(left) + middle + from_right(right))[:width, :outside] + inputs["bias"][...]
            if residual is not None:
                y += through_shortcut(inputs["residual"][row])
            outputs["y"][row] = y.astype(dtype)

        def convolve_and_norm(row, _):
            # The rows stored now are read one block later. Staging them tells the compiler that the product need not
            # wait for them.
            if rows > 1:
                convolve(row)
            scratch["staged"][...] = normed(row)
            put(row, scratch["staged"][...])
            if rows == 1:
                convolve(row)

        every_row = lambda body: jax.lax.fori_loop(0, rows, lambda row, _: body(row), None)

        @pl.when(block == 0)
        def _():
            lines[step] = jnp.zeros(lines.shape[1:], dtype)
            if above is not None:
                lines[step, held - 1, :width] = inputs["above"][0]

        @pl.when(step < PAST)
        def _():
            every_row(lambda row: put(row, cached(row)))

        @pl.when(jnp.logical_and(step >= PAST, block == 0))
        def _():
            every_row(lambda row: put(row, normed(row)))

        @pl.when(jnp.logical_and(step >= PAST, block > 0))
        def _():
            jax.lax.fori_loop(0, rows, convolve_and_norm, None)

    frame = lambda step: jnp.maximum(step - PAST, 0)
    # A step that does not use a block keeps the last one, so that nothing is moved for it.
    until_below = lambda block, index, last: jnp.where(block < blocks, index, last)
    above_block = lambda block: jnp.maximum(block - 1, 0)
    here = lambda block: jnp.minimum(block, blocks - 1)

    def spec(channels, frame, block):
        return pl.BlockSpec((None, None, rows, width, channels), lambda b, i, s: (b, frame(i, s), block(i), 0, 0))

    output_frame = lambda i, s: jnp.where(i > 0, frame(s), 0)
    output = spec(outside, output_frame, above_block)
    y = jax.ShapeDtypeStruct((*x.shape[:-1], outside), dtype), output
    if has_planes:
        place = lambda b, i, s: (b, output_frame(i, s), 0, above_block(i), 0)
        y = (
            jax.ShapeDtypeStruct((batch, frames, outside, height, width), jnp.float32),
            pl.BlockSpec((None, None, outside, rows, width), place),
        )
        matrix, bias = matrix[:, : round_up(_SHIFTS * outside, 8)].T, bias[None].T
    edge = lambda step: pl.BlockSpec((None, None, 1, width, channels), lambda b, i, s: (b, step(i, s), 0, 0, 0))
    whole = lambda array: (array, pl.BlockSpec(array.shape, lambda b, i, s: (0, 0)))
    width_held = past.shape[-1]
    results = call_kernel(
        "vae_causal_convolution",
        kernel_body,
        (batch, blocks + 1, steps),
        {
            "only_last": scalars(only_last.astype(jnp.int32).reshape(1)),
            "past": (past, spec(width_held, lambda i, s: until_below(i, jnp.minimum(s, PAST - 1), PAST - 1), here)),
            "x": (x, spec(channels, lambda i, s: until_below(i, frame(s), frames - 1), here)),
            "matrix": whole(matrix),
            "bias": whole((bias if has_planes else bias[None]).astype(jnp.float32)),
            "half_scale": None if norm_scale is None else whole((0.5 * channels**0.5 * norm_scale)[None]),
            "residual": None if residual is None else (residual, spec(residual.shape[-1], output_frame, above_block)),
            "shortcut": None if shortcut is None else whole(shortcut[0].astype(dtype)),
            "above": None if above is None else (above, edge(lambda i, s: jnp.where(i == 0, s, steps - 1))),
            "below": None if below is None else (below, edge(lambda i, s: until_below(i, 0, s))),
        },
        {
            "y": y,
            "past": (
                jax.ShapeDtypeStruct(past.shape, past.dtype),
                spec(width_held, lambda i, s: until_below(i, jnp.maximum(s - frames, 0), PAST - 1), here),
            ),
        },
        {
            "lines": pltpu.VMEM((steps, held, pitch, channels), dtype),
            "staged": pltpu.VMEM((width, channels), dtype),
        },
        parallel=1,
        aliases={"past": "past"},
        vmem_bytes=VMEM_BYTES,
    )
    found = jnp.moveaxis(results["y"], 2, -1).astype(dtype) if has_planes else results["y"]
    return found, results["past"]


def padded(channels: int) -> int:
    """The channels of `past`: complete registers, so that XLA lays out the array as the kernel reads it."""
    return round_up(channels, LANES)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes of a call: height, width and channels of the frames, of outputs and residuals; frames; the matrix."""

    height: int
    width: int
    channels: int
    outside: int
    added: int
    steps: int
    matrix: tuple[int, ...]

    def pitch(self, in_planes: bool) -> int:
        """Columns of a row in VMEM, with zeros."""
        return round_up(self.width, LANES if in_planes else SUBLANES)

    def rows(self, in_planes: bool) -> int | None:
        """The rows of a block; None if not one fits into VMEM.

        Args:
          in_planes: outputs are planes of rows and columns, whose blocks need a multiple of 8 rows.
        """
        pitch, (inside, columns) = self.pitch(in_planes), self.matrix
        row = lambda channels: 2 * pitch * padded(channels)
        line, joined_row = row(self.channels), 2 * pitch * inside
        product, output = 4 * pitch * columns, row(self.outside)
        if in_planes:
            product, output = 4 * pitch * SUBLANES, 4 * pitch * self.outside
        # All that moves is held twice: x, past and its successor; the residual and the output.
        of_row = 2 * self.steps * line + 2 * (3 * line + row(self.added) + output)
        fixed = (self.steps + 1) * line + 2 * 2 * inside * columns + joined_row + 2 * product
        return rows_of_block(self.height, of_row, fixed, 8 if in_planes else 1)
