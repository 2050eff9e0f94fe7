"""RMS norm and rotation of queries or keys in one pass over memory, as Pallas kernels for TPUs.

Let n = x r w, where r is a token's 1 / RMS and w are the norm's weights. Let y = n cos + turn(n) sin be the rotation,
where turn(n)[2i] = -n[2i + 1] and turn(n)[2i + 1] = n[2i]. The gradients are

    dn = dy cos - turn(dy) sin      dx = dn r w      dr = sum over columns of dn x w      dw = sum over tokens of dn x r

(turn is its own inverse except for the sign, and sin is the same on both lanes of a pair). XLA makes one pass for the
norm. For the rotation it either copies between layouts, because heads and pairs of lanes are not axes of its tiles, or
loops over heads.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES
from rehyat_jax.attention.tpu.kernel_call import call_kernel

HEAD_DIM = LANES
"""Columns of a head, one row of lanes: the only width that the kernels take."""

# Limit for all that a step of the backward kernel reads and writes, held twice. A kernel has 16 MiB by default.
_VMEM_BYTES = 12 * 2**20

# Rows of a block that are processed at a time, few enough to keep cosines and sines in registers.
_ROWS = 32
_SUBLANES = 8


@jax.custom_vjp
def scale_and_rotate(
    x: jax.Array, row_scale: jax.Array, column_scale: jax.Array, cos: jax.Array, sin: jax.Array
) -> jax.Array:
    """x * row_scale * column_scale, rounded to x's dtype, with every pair of columns (2i, 2i + 1) rotated.

    Args:
      x: [B, N, heads * 128].
      row_scale: [B, N, 1] float32.
      column_scale: [heads * 128] float32.
      cos, sin: [N, 128] float32, each pair's value twice; no gradient.

    Returns: [B, N, heads * 128] in x's dtype, computed in float32.
    """
    blocks = _Blocks.of(x)

    def kernel(inputs, outputs, scratch):
        def rotate_rows(rows):
            row_scale, cos, sin = (inputs[name][rows] for name in ("row_scale", "cos", "sin"))
            row_scale = jnp.broadcast_to(row_scale, cos.shape)

            def rotate_head(values, lanes):
                scaled = values.astype(jnp.float32) * row_scale * inputs["column_scale"][:, lanes]
                scaled = scaled.astype(x.dtype).astype(jnp.float32)
                return (scaled * cos + _turned(scaled) * sin).astype(x.dtype)

            lanes = _heads(x.shape[-1])
            read = [inputs["x"][rows, part] for part in lanes]
            for part, rotated in zip(lanes, map(rotate_head, read, lanes), strict=True):
                outputs["y"][rows, part] = rotated

        _for_rows(blocks.rows, rotate_rows)

    results = call_kernel(
        "scale_and_rotate",
        kernel,
        blocks.grid,
        blocks.inputs(x, row_scale, column_scale, cos, sin),
        {"y": (jax.ShapeDtypeStruct(x.shape, x.dtype), blocks.of_tokens(x.shape[-1]))},
        parallel=2,
    )
    return results["y"]


def _backward(kept, cotangent):
    x, row_scale, column_scale, cos, sin = kept
    _, tokens, width = x.shape
    blocks = _Blocks.of(x)

    def kernel(inputs, outputs, scratch):
        first_row = pl.program_id(1) * blocks.rows
        outputs["d_column_scale"][...] = jnp.zeros_like(outputs["d_column_scale"])

        def rotate_rows(rows):
            row_scale, cos, sin = (inputs[name][rows] for name in ("row_scale", "cos", "sin"))
            row_scale = jnp.broadcast_to(row_scale, cos.shape)
            # Rows after the last token hold arbitrary values.
            row = first_row + rows.start + jax.lax.broadcasted_iota(jnp.int32, cos.shape, 0)
            is_token = row < tokens

            def rotate_head(dy, values, lanes):
                dy, values = dy.astype(jnp.float32), values.astype(jnp.float32)
                dn = dy * cos - _turned(dy) * sin
                scaled = dn * inputs["column_scale"][:, lanes]
                of_columns = jnp.where(is_token, dn * values * row_scale, 0).reshape(-1, _SUBLANES, LANES).sum(0)
                return (scaled * row_scale).astype(x.dtype), scaled * values, of_columns

            lanes = _heads(width)
            read = [(inputs["dy"][rows, part], inputs["x"][rows, part], part) for part in lanes]
            dx, of_rows, of_columns = zip(*itertools.starmap(rotate_head, read), strict=True)
            for n, part in enumerate(lanes):
                outputs["dx"][rows, part] = dx[n]
                outputs["d_column_scale"][:, part] += of_columns[n]
            outputs["d_row_scale"][rows] = sum(of_rows).sum(axis=1, keepdims=True)

        _for_rows(blocks.rows, rotate_rows)

    results = call_kernel(
        "scale_and_rotate_backward",
        kernel,
        blocks.grid,
        blocks.inputs(x, row_scale, column_scale, cos, sin) | {"dy": (cotangent, blocks.of_tokens(width))},
        {
            "dx": (jax.ShapeDtypeStruct(x.shape, x.dtype), blocks.of_tokens(width)),
            "d_row_scale": (jax.ShapeDtypeStruct(row_scale.shape, jnp.float32), blocks.of_tokens(1)),
            "d_column_scale": (
                jax.ShapeDtypeStruct((*blocks.grid, _SUBLANES, width), jnp.float32),
                pl.BlockSpec((None, None, _SUBLANES, width), lambda b, block: (b, block, 0, 0)),
            ),
        },
        parallel=2,
    )
    return results["dx"], results["d_row_scale"], results["d_column_scale"].sum((0, 1, 2)), None, None


scale_and_rotate.defvjp(lambda *arguments: (scale_and_rotate(*arguments), arguments), _backward)


class _Blocks(NamedTuple):
    """Blocks of [batch, tokens, width]: all columns of `rows` tokens a step."""

    batch: int
    tokens: int
    rows: int

    @classmethod
    def of(cls, x: jax.Array) -> "_Blocks":
        batch, tokens, width = x.shape
        # x and two arrays like it, two tables, and two values of a row, each of which takes up a row of lanes.
        row_bytes = 3 * width * x.dtype.itemsize + 4 * LANES * 4
        at_most = min(_VMEM_BYTES // (2 * row_bytes), pl.cdiv(tokens, _ROWS) * _ROWS)
        return cls(batch, tokens, max(1 << at_most.bit_length() - 1, _ROWS))

    @property
    def grid(self) -> tuple[int, int]:
        return self.batch, pl.cdiv(self.tokens, self.rows)

    def of_tokens(self, columns: int) -> pl.BlockSpec:
        """Blocks of [batch, tokens, columns]."""
        return pl.BlockSpec((None, self.rows, columns), lambda b, block: (b, block, 0))

    def inputs(self, x, row_scale, column_scale, cos, sin) -> dict:
        table = pl.BlockSpec((self.rows, LANES), lambda b, block: (block, 0))
        return {
            "x": (x, self.of_tokens(x.shape[-1])),
            "row_scale": (row_scale, self.of_tokens(1)),
            "column_scale": (column_scale[None], pl.BlockSpec((1, x.shape[-1]), lambda b, block: (0, 0))),
            "cos": (cos, table),
            "sin": (sin, table),
        }


def _for_rows(rows: int, body) -> None:
    """Calls `body` with `_ROWS` rows of a block at a time."""

    @pl.loop(0, rows, step=_ROWS)
    def _(start):
        body(pl.ds(pl.multiple_of(start, _ROWS), _ROWS))


def _heads(width: int) -> list[pl.Slice]:
    """The columns of every head. All are read before any is written, so that the compiler can overlap their work."""
    return [pl.ds(start, LANES) for start in range(0, width, LANES)]


def _turned(x: jax.Array) -> jax.Array:
    """turn(x) of the rows of one head."""
    is_even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    return jnp.where(is_even, -pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
