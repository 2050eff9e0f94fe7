"""Tiles of scores in the kernels of softmax attention: sums over a block of keys, and their gradients.

Score tiles are transposed, [keys, queries]. A statistic of queries (maximum, sum, log-sum-exp) is then a row that fills
complete registers, and reductions over keys are elementwise. Exponents are in base 2.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES, NN, NT, TN, dot

LOWEST = -1e30
"""A finite stand-in for minus infinity: differences of two such scores are zero, not NaN."""

FIXED_SHIFT_LIMIT = 90.0
"""The largest scores, in base 2, that are exponentiated without a shift.

2**90 times a million keys and values of 2**16 stays below 2**127, and 2**-90 is a normal number."""

GRADIENT_COLUMNS = 512
"""Columns (queries) of a score tile in the backward pass."""

# Tiles whose scores are issued before the maximum of the current tile.
_LOOK_AHEAD = 3

Tiles = list[tuple[Any, int]]
"""(start, size) of the tiles, in queries of a block."""

Valid = Callable[[int, int], jax.Array]
"""(start, stop) of keys of a block -> bool [keys, 1]: false for what is no key."""


def score_scale(head_dim: int) -> float:
    """The factor from q.k to the exponent of 2."""
    return 1 / (math.sqrt(head_dim) * math.log(2))


def fits_fixed_shift(query_squares: jax.Array, key_squares: jax.Array, head_dim: int) -> jax.Array:
    """True where scores can be exponentiated without a shift: |q.k| is at most |q||k| (Cauchy and Schwarz).

    Args:
      query_squares, key_squares: the largest squared norms.
    """
    return score_scale(head_dim) * jnp.sqrt(query_squares * key_squares) <= FIXED_SHIFT_LIMIT


def key_tiles(key_block: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of the parts of a block of keys, divided at multiples of 128, the depth of a matrix unit."""
    parts = min(parts, -(-key_block // LANES))
    edges = [key_block * n // parts // LANES * LANES for n in range(parts)] + [key_block]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]


def new_sums(head_dim: int, query_block: int, *, row_max: bool = False) -> dict[str, Any]:
    """The scratch memory of `add_keys`: of every query the maximum, and sums of exponentials and of values.

    Args:
      row_max: also keep the largest score under a fixed shift.
    """
    row = pltpu.VMEM((1, query_block), jnp.float32)
    sums = {"maximum": row, "total": row, "sums": pltpu.VMEM((head_dim, query_block), jnp.float32)}
    return sums | ({"row_max": row} if row_max else {})


def clear_sums(sums: Mapping[str, Any]) -> None:
    """Sets the memory of `new_sums` to the sums over no keys."""
    for name, memory in sums.items():
        lowest = name in ("maximum", "row_max")
        memory[...] = jnp.full_like(memory, LOWEST) if lowest else jnp.zeros_like(memory)


def add_keys(
    query: Any,
    key: Any,
    value: Any,
    sums: Mapping[str, Any],
    tiles: Tiles,
    parts: list[tuple[int, int]],
    *,
    scale: float,
    running: bool,
    valid: Valid | None = None,
) -> None:
    """Adds a block of keys to the sums of tiles of queries.

    Args:
      query, key, value: references to blocks [tokens, head_dim].
      sums: see `new_sums`. Under a fixed shift, its maximum is that shift and stays.
      parts: see `key_tiles`.
      scale: see `score_scale`.
      running: exponents are relative to a running maximum.
      valid: None if all keys are.
    """
    maximum, total, weighted, row_max = (sums.get(name) for name in ("maximum", "total", "sums", "row_max"))

    def scores(tile, part):
        (start, size), (low, high) = tile, part
        tile_scores = dot(key[low:high, :], query[pl.ds(start, size), :], NT)
        return tile_scores if valid is None else jnp.where(valid(low, high), tile_scores, LOWEST)

    work = [(tile, part) for tile in tiles for part in parts]
    look_ahead = _LOOK_AHEAD if running else 1
    ahead = [scores(*item) for item in work[:look_ahead]]
    for n, (tile, (low, high)) in enumerate(work):
        tile_scores = ahead.pop(0)
        if n + look_ahead < len(work):
            ahead.append(scores(*work[n + look_ahead]))
        columns = pl.ds(*tile)
        tile_total, tile_sums = total[:, columns], weighted[:, columns]
        if running or row_max is not None:
            tile_max = tile_scores.max(axis=0, keepdims=True)
        if row_max is not None:
            row_max[:, columns] = jnp.maximum(row_max[:, columns], tile_max)
        if running:
            before = maximum[:, columns]
            after = jnp.maximum(before, tile_max)
            shrink = jnp.exp2((before - after) * scale)
            tile_total, tile_sums = tile_total * shrink, tile_sums * shrink
            maximum[:, columns] = after
            tile_scores = tile_scores - after
        weights = jnp.exp2(tile_scores * scale)
        total[:, columns] = tile_total + weights.sum(axis=0, keepdims=True)
        tile_value = _valid_rows(value, low, high, valid)
        weighted[:, columns] = tile_sums + dot(tile_value, weights.astype(value.dtype), TN)


def add_gradients(
    query: Any,
    cotangent: Any,
    log_sum_exp: Any,
    delta: Any,
    key: Any,
    value: Any,
    gradients: tuple[Any, Any, Any],
    tiles: Tiles,
    parts: list[tuple[int, int]],
    *,
    first_row: Any,
    scale: float,
    valid: Valid | None = None,
) -> None:
    """Adds the gradients of the scores between a block of keys and tiles of a block of queries.

    Args:
      query, key, value: references to blocks [tokens, head_dim].
      cotangent: that of the output, like `query`.
      log_sum_exp, delta: of the queries, [1, tokens], see `attention/hybrid/tpu/backward.py`.
      gradients: float32 references: of queries, of which the block's begin at `first_row`, of the keys and the values.
        Those of queries and keys lack the factor head_dim**-0.5.
      parts: see `key_tiles`.
      scale: see `score_scale`.
      valid: None if all keys are.
    """
    d_query, d_key, d_value = gradients
    for start, size in tiles:
        columns = pl.ds(start, size)
        tile_query, tile_cotangent = query[columns, :], cotangent[columns, :]
        tile_log_sum_exp, tile_delta = log_sum_exp[:, columns], delta[:, columns]
        d_rows = pl.ds(pl.multiple_of(first_row + start, 8), size)
        for low, high in parts:
            part_key, part_value = (_valid_rows(block, low, high, valid) for block in (key, value))
            weights = jnp.exp2(dot(part_key, tile_query, NT) * scale - tile_log_sum_exp)
            if valid is not None:
                weights = jnp.where(valid(low, high), weights, 0)
            d_value[low:high, :] += dot(weights.astype(tile_cotangent.dtype), tile_cotangent, NN)
            d_scores = weights * (dot(part_value, tile_cotangent, NT) - tile_delta)
            d_scores = d_scores.astype(tile_query.dtype)
            d_key[low:high, :] += dot(d_scores, tile_query, NN)
            d_query[d_rows, :] += dot(d_scores, part_key, TN)


def _valid_rows(block: Any, low: int, high: int, valid: Valid | None) -> jax.Array:
    """Rows of a block of keys or values. What lies behind the end of an array may be anything, NaN too."""
    rows = block[low:high, :]
    return rows if valid is None else jnp.where(valid(low, high), rows, jnp.zeros_like(rows))
