"""The best block sizes found for JAX's splash attention, so that the baseline is as fast as possible."""

import math
import sys
from collections.abc import Callable

from rehyat_jax.cli import not_a_command

Blocks = dict[str, tuple[int, ...]]
"""(queries, keys, keys at a time) of the kernels "forward", "fused" and "dkv"; (queries, keys) of "dq"."""

_FIELDS = {
    "forward": ("block_q", "block_kv", "block_kv_compute"),
    "fused": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    "dkv": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    "dq": ("block_q_dq", "block_kv_dq"),
}

# Static cycles of 12 heads of 128 and 21 frames of 1560 tokens with jax 0.10.2, in millions (libtpu 0.0.51 / 0.0.42):
#   v5e    forward 55.3 / 55.2 (1024, 2048, 1024: 59.0 / -), fused 142.0 / 142.3, dkv and dq 182.2 / 182.4
#   v5p    forward 28.2 / 28.1 on both cores; fused 137.6 / 137.8, dkv and dq - / 183.6 on one: none declares parallel
#   v6e    forward 33.2 / 33.0, fused 71.5 / 71.5, dkv and dq 93.2 / 93.3
#   tpu7x  forward 34.3 / 33.7, fused 74.4 / 74.4, dkv and dq 93.0 / -
# These are the best of those tried, except fused on tpu7x: (1024, 8192, 512) has 71.7 with 0.0.51, and has not been
# compiled with 0.0.42. The sizes tried are:
#   forward, fused, and dkv and dq on tpu7x: most neighbours
#   dkv and dq elsewhere: all blocks of 2 or 4 million scores; on v5p four pairs
# Cycles are proportional to the number of blocks, so the same sizes are best for other lengths and numbers of heads.
SPLASH_BLOCKS: dict[str, Blocks] = {
    "v5e": {"forward": (256, 8192, 512), "fused": (512, 4096, 512), "dkv": (2048, 2048, 1024), "dq": (2048, 1024)},
    "v5p": {"forward": (256, 8192, 512), "fused": (512, 4096, 512), "dkv": (4096, 1024, 512), "dq": (2048, 1024)},
    "v6e": {"forward": (2048, 4096, 1024), "fused": (2048, 8192, 128), "dkv": (2048, 2048, 1024), "dq": (2048, 2048)},
    "tpu7x": {"forward": (2048, 4096, 1024), "fused": (512, 8192, 512), "dkv": (4096, 2048, 1024), "dq": (4096, 1024)},
}


def splash_arguments(implementation: str, blocks: Blocks) -> dict:
    """Keywords of `tpu_cases.full_softmax` for "splash" (forward), "splash_fused" or "splash_unfused" (backward)."""
    kernels = {"splash": ["forward"], "splash_fused": ["fused"], "splash_unfused": ["dkv", "dq"]}[implementation]
    sizes = {field: size for kernel in kernels for field, size in zip(_FIELDS[kernel], blocks[kernel], strict=True)}
    direction = "forward" if implementation == "splash" else "backward"
    return {"direction": direction, "blocks": sizes, "is_fused": implementation == "splash_fused"}


def search(cycles: Callable[[dict], int | None], start: Blocks) -> Blocks:
    """Searches from `start`, one kernel after the other, for blocks that are better than all their neighbours.

    Prints every trial. `cycles` takes keywords of `tpu_cases.full_softmax`, and returns None for blocks that cannot be
    compiled because they do not fit into VMEM.
    """
    best = dict(start)
    for kernel in start:
        implementation = {"forward": "splash", "fused": "splash_fused"}.get(kernel, "splash_unfused")
        found: dict[tuple[int, ...], float] = {}
        asked = {best[kernel]}
        while asked:
            for blocks in sorted(asked):
                result = cycles(splash_arguments(implementation, best | {kernel: blocks}))
                print(f"{kernel} {blocks}: {'cannot be compiled' if result is None else f'{result:,}'}", flush=True)
                found[blocks] = math.inf if result is None else result
            best[kernel] = min(found, key=found.get)
            asked = _neighbours(best[kernel]) - set(found)
    return best


def _neighbours(blocks: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Blocks with one size doubled or halved, or with one of queries and keys doubled and the other halved."""
    moves = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (0.5, 1, 1), (1, 0.5, 1), (1, 1, 0.5), (2, 0.5, 1), (0.5, 2, 1)]
    moved = {tuple(int(size * factor) for size, factor in zip(blocks, move, strict=False)) for move in moves}
    # The keys taken at a time divide a block, and 128 is the smallest size.
    return {sizes for sizes in moved if min(sizes) >= 128 and sizes[-1] <= sizes[1]} - {blocks}


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.tpu_static"))
