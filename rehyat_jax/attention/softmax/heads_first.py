"""Transposition of tokens and heads, in one copy of complete tiles.

In HBM, an array [tokens, heads * head_dim] consists of tiles of 8 tokens by 128 columns, which may be one head's. XLA
does not use that. It makes two or three copies in other layouts to get the [heads, tokens, head_dim] that kernels need.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rehyat_jax.attention.tpu.blocks import LANES, HeadBlocks
from rehyat_jax.attention.tpu.kernel_call import call_kernel, token_blocks


def heads_first(tokens: jax.Array, length: int, interpret: bool = False) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> [batch * heads, length, head_dim], zeros after the tokens.

    Args:
      length: a multiple of 128.
      interpret: interpret the kernel, on any platform and slowly.
    """
    return _to_heads(_Move(*tokens.shape, length, interpret), tokens)


def tokens_first(by_head: jax.Array, batch: int, count: int, interpret: bool = False) -> jax.Array:
    """[batch * heads, length, head_dim] -> [batch, count, heads, head_dim], the first `count` tokens: the inverse."""
    rows, length, head_dim = by_head.shape
    return _to_tokens(_Move(batch, count, rows // batch, head_dim, length, interpret), by_head)


class _Move(NamedTuple):
    batch: int
    count: int
    heads: int
    head_dim: int
    length: int
    interpret: bool

    @property
    def rows(self) -> int:
        """Tokens of a step."""
        return math.gcd(self.length, 1024)

    @property
    def of_head(self) -> pl.BlockSpec:
        """Blocks of [batch * heads, length, head_dim]."""
        return pl.BlockSpec((None, self.rows, self.head_dim), lambda b, h, block: (b * self.heads + h, block, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_heads(move: _Move, tokens: jax.Array) -> jax.Array:
    if move.head_dim % LANES:
        padded = jnp.pad(tokens, ((0, 0), (0, move.length - move.count), (0, 0), (0, 0)))
        return jnp.swapaxes(padded, 1, 2).reshape(-1, move.length, move.head_dim)
    last = pl.cdiv(move.count, move.rows) - 1
    result = jax.ShapeDtypeStruct((move.batch * move.heads, move.length, move.head_dim), tokens.dtype)

    def kernel(inputs, outputs, scratch):
        row = pl.program_id(2) * move.rows + jax.lax.broadcasted_iota(jnp.int32, (move.rows, 1), 0)
        tokens = inputs["tokens"][...]
        outputs["by_head"][...] = jnp.where(row < move.count, tokens, jnp.zeros_like(tokens))

    results = call_kernel(
        "heads_first",
        kernel,
        (move.batch, move.heads, move.length // move.rows),
        {"tokens": token_blocks(tokens, move.rows, lambda block: jnp.minimum(block, last))},
        {"by_head": (result, move.of_head)},
        parallel=3,
        interpret=move.interpret,
    )
    return results["by_head"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_tokens(move: _Move, by_head: jax.Array) -> jax.Array:
    if move.head_dim % LANES:
        by_head = by_head.reshape(move.batch, move.heads, move.length, move.head_dim)
        return jnp.swapaxes(by_head[:, :, : move.count], 1, 2)
    tokens = HeadBlocks(move.batch, move.count, move.heads, move.head_dim, by_head.dtype)

    def kernel(inputs, outputs, scratch):
        outputs["tokens"][...] = inputs["by_head"][...]

    results = call_kernel(
        "tokens_first",
        kernel,
        (move.batch, move.heads, pl.cdiv(move.count, move.rows)),
        {"by_head": (by_head, move.of_head)},
        {"tokens": (tokens.shape, tokens.spec(move.rows, lambda block: block))},
        parallel=3,
        interpret=move.interpret,
    )
    return tokens.unview(results["tokens"])


# Each is the other's transpose.
_to_heads.defvjp(lambda move, x: (_to_heads(move, x), None), lambda move, _, cotangent: (_to_tokens(move, cotangent),))
_to_tokens.defvjp(lambda move, x: (_to_tokens(move, x), None), lambda move, _, cotangent: (_to_heads(move, cotangent),))
