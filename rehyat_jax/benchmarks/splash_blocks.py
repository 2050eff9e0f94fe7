"""Block sizes of JAX's splash attention, the best that were found: the baseline gets what it can."""

import math
from collections.abc import Callable

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
# Of those tried these are the best, but for fused on tpu7x: (1024, 8192, 512) has 71.7 with 0.0.51, and has not been
# compiled with 0.0.42. Tried were most neighbours of forward and fused, and on tpu7x of dkv and dq; of other dkv and dq
# all blocks of 2 or 4 million scores, on v5p four pairs. Cycles are proportional to the number of blocks, so that other
# lengths and numbers of heads want the same.
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
    """Walks from `start`, one kernel after the other, to blocks that no neighbours are better than.

    Prints what it tries. `cycles` takes keywords of `tpu_cases.full_softmax`, and returns None for what cannot be
    compiled: VMEM does not hold it.
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
    """One size twice or half as large, or queries and keys traded for one another."""
    moves = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (0.5, 1, 1), (1, 0.5, 1), (1, 1, 0.5), (2, 0.5, 1), (0.5, 2, 1)]
    moved = {tuple(int(size * factor) for size, factor in zip(blocks, move, strict=False)) for move in moves}
    # Keys are taken in whole parts of a block, and 128 is the least.
    return {sizes for sizes in moved if min(sizes) >= 128 and sizes[-1] <= sizes[1]} - {blocks}
