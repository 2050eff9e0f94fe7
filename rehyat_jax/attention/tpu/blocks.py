"""The division of token arrays into blocks for the TPU kernels, and a kernel's walk over a block."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.flat_tokens import flat, with_heads

LANES = 128

FEATURE_ROWS = 768
"""Rows of queries, keys and features in one stretch of code that involves no scores."""

# Contractions of two matrices: over the columns of both (a b^T), as usual (a b), and over the rows of both (a^T b).
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def dot(left: jax.Array, right: jax.Array, contraction) -> jax.Array:
    """A matrix product accumulated in float32."""
    return jax.lax.dot_general(left, right, contraction, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class HeadBlocks:
    """A view of [batch, tokens, heads, width] from which a kernel takes blocks [rows, width] of one head's tokens.

    If a head fills complete vector registers (width a multiple of 128 lanes), the view is
    [batch, tokens, heads * width], the layout in which projections write. Otherwise it is
    [batch, heads, tokens, width], which costs a copy.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, array: jax.Array) -> "HeadBlocks":
        return cls(*array.shape, array.dtype)

    @property
    def in_place(self) -> bool:
        return self.width % LANES == 0

    def view(self, array: jax.Array) -> jax.Array:
        if self.in_place:
            return flat(array)
        return jnp.moveaxis(array, 2, 1)

    def unview(self, view: jax.Array) -> jax.Array:
        return unview(view, self.heads)

    @property
    def shape(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the view."""
        if self.in_place:
            return jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads * self.width), self.dtype)
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.tokens, self.width), self.dtype)

    def spec(self, rows: int, index: Callable[..., jax.Array]) -> pl.BlockSpec:
        """Blocks of `rows` tokens. `index` takes the grid indices after (batch, head) and returns the block's index."""
        if self.in_place:
            return pl.BlockSpec((None, rows, self.width), lambda b, h, *step: (b, index(*step), h))
        return pl.BlockSpec((None, None, rows, self.width), lambda b, h, *step: (b, h, index(*step), 0))


def unview(view: jax.Array, heads: int) -> jax.Array:
    """The array [batch, tokens, heads, width] that has this view."""
    if view.ndim == 3:
        return with_heads(view, heads)
    return jnp.moveaxis(view, 1, 2)


def block_unit(dtype: jnp.dtype, lengths: list[int]) -> int:
    """The number of tokens of which every block is a multiple, for arrays of these lengths in tokens.

    It is 8, the height of a vector register. But a block must be whole tiles of its array, and from TPU v7 on, XLA
    stores a 16-bit array in tiles of 16 rows if its length is a multiple of 16.
    """
    try:
        rows = pltpu.get_tpu_info().get_sublane_tiling(dtype)
    except ValueError:  # interpreted, on another platform
        rows = 8
    return rows if any(length % rows == 0 for length in lengths) else 8


def for_tiles(length: int, width: int, unroll: int, body: Callable[[list[tuple[int | jax.Array, int]]], None]) -> None:
    """Calls `body` with lists of tiles (start, size) that cover range(length) in order, about `unroll` tiles a list.

    The compiler may overlap the work of tiles within a list, but not between lists. Starts are multiples of `width`,
    which must be a multiple of 128. A narrow remainder joins the last tile.
    """
    stretch = unroll * width
    looped = max((length - width) // stretch, 0)  # what is left holds at least one tile of full width
    if looped > 1:

        @pl.loop(0, looped)
        def _(i):
            start = pl.multiple_of(i * stretch, LANES)
            body([(start + n * width, width) for n in range(unroll)])

    else:
        looped = 0
    starts = [*range(looped * stretch, length, width)]
    if len(starts) > 1 and length - starts[-1] < width / 4:
        del starts[-1]
    body([(start, stop - start) for start, stop in itertools.pairwise([*starts, length])])
