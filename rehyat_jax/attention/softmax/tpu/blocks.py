"""Sizes of the blocks that the kernels of full softmax attention hold in VMEM."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import LANES, block_unit
from rehyat_jax.attention.tpu.score_tiles import key_tiles

# XLA's default VMEM for a kernel on the chips with the least (v5e, v5p), and the part of it for score tiles and spilled
# registers.
_FORWARD_VMEM, _TILES = 16 * 2**20, 6 * 2**20
# Keys of a score tile.
_TILE_KEYS = 512
# The share of a chip's VMEM that the backward kernel takes, which keeps the gradients of a group of queries there.
_BACKWARD_SHARE = 0.75
# VMEM of chips that are unknown, or interpreted.
_UNKNOWN_VMEM = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks in tokens. Those of queries divide the number of queries; the last block of keys may be shorter.

    Attributes:
      queries, keys: number of tokens.
      forward_queries, forward_keys: of a step of the forward kernel.
      backward_queries, backward_keys: of a step of the backward kernel.
      group: queries whose gradients stay in VMEM while the backward kernel walks over all keys.
      backward_vmem: VMEM of the backward kernel in bytes.
    """

    queries: int
    keys: int
    forward_queries: int
    forward_keys: int
    backward_queries: int
    backward_keys: int
    group: int
    backward_vmem: int

    @classmethod
    def choose(cls, queries: int, keys: int, *, head_dim: int, dtype: jnp.dtype) -> "Blocks | None":
        """The blocks for arrays of this size; None if queries must be padded first, see `padded_queries`."""
        width, item = max(head_dim, LANES), jnp.dtype(dtype).itemsize
        unit = block_unit(dtype, [queries])
        forward_keys = backward_keys = _even_block(keys, 4096 // item)
        # Every input and output is held twice: the block in use, and the block in transfer. Sums are float32.
        rest = _FORWARD_VMEM - _TILES - 4 * forward_keys * width * item
        forward_queries = _best_divisor(queries, rest // (width * (4 * item + 4)), unit)
        backward_queries = _best_divisor(queries, 8192 // item, unit)
        if min(forward_queries, backward_queries) < min(queries, 512):
            return None
        vmem = int(_BACKWARD_SHARE * _vmem_bytes())
        # Key and value, their gradients as inputs and outputs and sums; query, cotangent and the query's gradient.
        rest = vmem - _TILES - backward_keys * width * (4 * item + 24) - backward_queries * 6 * width * item
        steps = queries // backward_queries
        of_step = backward_queries * width * 4
        fitting = [n for n in range(1, steps + 1) if steps % n == 0 and n * of_step <= rest]
        group = max(fitting, default=1) * backward_queries
        return cls(queries, keys, forward_queries, forward_keys, backward_queries, backward_keys, group, vmem)

    @staticmethod
    def key_tiles(keys: int) -> list[tuple[int, int]]:
        """(start, stop) of the keys of a block's score tiles."""
        return key_tiles(keys, -(-keys // _TILE_KEYS))


def padded_queries(queries: int) -> int:
    """The number of queries with so much padding that they can be divided into large blocks."""
    return _round_up(queries, 128 if queries <= 1024 else 1024)


def _vmem_bytes() -> int:
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return _UNKNOWN_VMEM


def _best_divisor(length: int, largest: int, unit: int) -> int:
    """The divisor of `length` up to `largest` that wastes the fewest lanes; 0 if no multiple of `unit` divides it."""
    divisors = [n for n in range(unit, min(length, largest) + 1, unit) if length % n == 0]
    return min(divisors, key=lambda n: (_round_up(n, LANES) / n, -n), default=0)


def _even_block(length: int, largest: int) -> int:
    """The length of the blocks, as few as possible, that cover `length`; a multiple of 128."""
    return _round_up(math.ceil(length / math.ceil(length / largest)), LANES)


def _round_up(length: int, multiple_of: int) -> int:
    return math.ceil(length / multiple_of) * multiple_of
