"""Sizes of the blocks that the TPU kernels hold in VMEM."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.tpu.blocks import LANES, block_unit
from rehyat_jax.attention.tpu.score_tiles import key_tiles

# XLA's default VMEM for a kernel on the chips with the least (v5e, v5p). The tile sizes below bound what a kernel holds
# there in addition to its blocks: score tiles and spilled registers.
_VMEM_BYTES = 16 * 2**20
_VMEM_FOR_TILES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Blocks and tiles, in tokens. All blocks are multiples of `block_unit`, 8 or 16 tokens.

    Attributes:
      geometry: frames of `frame` tokens.
      tokens_per_frame: number of a frame's tokens that are real; the others are zeros appended to it.
      query_block: queries of a forward step, a divisor of the chunk.
      backward_group: queries whose gradients are kept while the backward pass walks over their window's keys, a divisor
        of the chunk.
      backward_block: queries of a backward step, a divisor of query_block, of backward_group and of the frame.
      key_block: keys of a step, a divisor of the frame.
      running_columns: columns (queries) of a score tile under a running maximum.
      fixed_columns: columns of a score tile under a fixed shift.
      key_parts: number of score tiles of a key block.
    """

    geometry: ChunkGeometry
    tokens_per_frame: int
    query_block: int
    backward_group: int
    backward_block: int
    key_block: int
    running_columns: int
    fixed_columns: int
    key_parts: int

    @property
    def frame(self) -> int:
        return self.geometry.tokens_per_frame

    @property
    def tokens(self) -> int:
        return self.geometry.num_frames * self.frame

    @property
    def is_padded(self) -> bool:
        """True if frames end in padding."""
        return self.tokens_per_frame < self.frame

    @property
    def num_query_blocks(self) -> int:
        return -(-self.tokens // self.query_block)

    @property
    def last_query_block(self) -> int:
        """Queries in the last block, which a ragged video may end early."""
        return self.tokens - (self.num_query_blocks - 1) * self.query_block

    @property
    def query_blocks_per_chunk(self) -> int:
        return self.geometry.chunk_frames * self.frame // self.query_block

    @property
    def key_blocks_per_frame(self) -> int:
        return self.frame // self.key_block

    def key_tiles(self) -> list[tuple[int, int]]:
        """(start, stop) of the parts of a key block."""
        return key_tiles(self.key_block, self.key_parts)

    @classmethod
    def choose(
        cls,
        geometry: ChunkGeometry,
        *,
        head_dim: int,
        source_width: int,
        dtype: jnp.dtype,
        continues: bool = False,
        largest_group: int | None = None,
    ) -> "Tiling":
        """The largest blocks that fit, with frames padded only where they cannot be divided otherwise.

        Large blocks waste fewer lanes: a frame of 1560 queries fills 13 columns of 128 lanes by 94%, a chunk of three
        frames fills 37 by 99%.

        Args:
          continues: True if anchors and the overlap of earlier frames go before the keys.
          largest_group: largest backward_group, for frames that are longer than a chunk should be; None for no bound.
        """
        before = geometry.anchor_frames + geometry.overlap_frames if continues else 0
        lengths = [geometry.num_frames, geometry.num_frames + before]
        unit = block_unit(dtype, [frames * geometry.tokens_per_frame for frames in lengths])
        chunk_frames = min(geometry.chunk_frames, geometry.num_frames)
        vmem = _Vmem(max(head_dim, LANES), max(source_width, LANES), np.dtype(dtype).itemsize)
        for frame, group in _cuts(geometry.tokens_per_frame, chunk_frames, unit):
            largest = functools.partial(_largest_block, unit=unit)
            if largest_group is not None:
                group = largest(frame, largest_group.__ge__)
            key_block = largest(frame, functools.partial(vmem.holds_keys, group))
            query_block = largest(chunk_frames * frame, functools.partial(vmem.holds_forward, key_block))
            backward_block = largest(
                math.gcd(query_block, frame, group), functools.partial(vmem.holds_backward, group, key_block)
            )
            if min(key_block, query_block, backward_block) >= min(frame, 2 * LANES):
                break
        padded = dataclasses.replace(geometry, tokens_per_frame=frame, chunk_frames=chunk_frames)
        return cls(padded, geometry.tokens_per_frame, query_block, group, backward_block, key_block, *_score_tiles())


@dataclasses.dataclass(frozen=True)
class _Vmem:
    """The VMEM that the kernels' blocks take, and checks that they fit.

    Every input and output is held twice: the block in use, and the block in transfer.
    """

    width: int
    source_width: int
    item: int

    def holds_forward(self, key_block: int, query_block: int) -> bool:
        # Query, output and source of features; float32 sums. Key and value.
        queries = query_block * (2 * self.item * (2 * self.width + self.source_width) + 4 * self.width)
        return queries + 4 * key_block * self.width * self.item <= _VMEM_BYTES - _VMEM_FOR_TILES

    def holds_backward(self, group: int, key_block: int, query_block: int) -> bool:
        # Query, output's cotangent, query's gradient as input and as output. Key and value with their gradients as
        # input and as output. In float32, the gradients of a group of queries and of the keys and values.
        queries = query_block * 8 * self.width * self.item + group * 4 * self.width
        keys = key_block * (12 * self.width * self.item + 8 * self.width)
        return queries + keys <= _VMEM_BYTES - _VMEM_FOR_TILES

    def holds_keys(self, group: int, key_block: int) -> bool:
        return self.holds_backward(group, key_block, min(key_block, 4 * LANES))


def _cuts(tokens_per_frame: int, chunk_frames: int, unit: int) -> Iterator[tuple[int, int]]:
    """(frame, backward group) to try: least padding first, then largest groups; the last one always fits."""
    frames = [tokens_per_frame] if tokens_per_frame % unit == 0 else []
    for frame in (*frames, -(-tokens_per_frame // 16) * 16, -(-tokens_per_frame // 256) * 256):
        yield frame, chunk_frames * frame
        yield frame, frame
    yield frame, 256


def _largest_block(length: int, fits: Callable[[int], bool], *, unit: int) -> int:
    """The largest divisor of `length` that is a multiple of `unit` and fits; `unit` if none does."""
    blocks = [n for n in range(unit, length + 1, unit) if length % n == 0 and fits(n)]
    return blocks[-1] if blocks else unit


def _score_tiles() -> tuple[int, int, int]:
    """(running_columns, fixed_columns, key_parts) for the target chip, chosen by static cycles."""
    try:
        mxu_columns = pltpu.get_tpu_info().mxu_column_size
    except ValueError:  # interpreted, on another platform
        mxu_columns = LANES
    return (256, 512, 1) if mxu_columns > LANES else (256, 256, 2)


def is_key(part: jax.Array, start: int | jax.Array, size: int, tiling: Tiling) -> jax.Array:
    """Boolean [size, 1]: True for tokens of the `part`-th key block of a frame that are not padding."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return part * tiling.key_block + start + row < tiling.tokens_per_frame
