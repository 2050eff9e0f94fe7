"""Block sizes of JAX's splash attention, the best that were found: the baseline gets what it can."""

from collections.abc import Callable

Blocks = dict[str, tuple[int, ...]]
"""(queries, keys, keys at a time) of the kernels "forward", "fused" and "dkv"; (queries, keys) of "dq"."""

_FIELDS = {
    "forward": ("block_q", "block_kv", "block_kv_compute"),
    "fused": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    "dkv": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    "dq": ("block_q_dq", "block_kv_dq"),
}

# Found by `python -m rehyat_jax.benchmarks.tpu_static --search`: jax 0.10.2, libtpu 0.0.51, 12 heads of 128, 21 frames
# of 1560 tokens. Cycles are proportional to the number of blocks, so that other lengths and heads want the same.
SPLASH_BLOCKS: dict[str, Blocks] = {
    "v5e": {"forward": (1024, 2048, 1024), "fused": (512, 4096, 512), "dkv": (2048, 1024, 512), "dq": (1024, 2048)},
    "v5p": {"forward": (1024, 2048, 1024), "fused": (512, 4096, 512), "dkv": (2048, 1024, 512), "dq": (1024, 2048)},
    "v6e": {"forward": (1024, 2048, 1024), "fused": (512, 4096, 512), "dkv": (2048, 1024, 512), "dq": (1024, 2048)},
    "tpu7x": {"forward": (1024, 2048, 1024), "fused": (512, 4096, 512), "dkv": (2048, 1024, 512), "dq": (1024, 2048)},
}


def splash_arguments(implementation: str, blocks: Blocks) -> dict:
    """Keywords of `tpu_cases.full_softmax` for "splash" (forward), "splash_fused" or "splash_unfused" (backward)."""
    kernels = {"splash": ["forward"], "splash_fused": ["fused"], "splash_unfused": ["dkv", "dq"]}[implementation]
    sizes = {field: size for kernel in kernels for field, size in zip(_FIELDS[kernel], blocks[kernel], strict=True)}
    direction = "forward" if implementation == "splash" else "backward"
    return {"direction": direction, "blocks": sizes, "is_fused": implementation == "splash_fused"}


def search(cycles: Callable[[dict], int | None], start: Blocks) -> Blocks:
    """The best blocks among those of 2 or 4 million scores, one kernel after the other from `start`; prints what it
    tries.

    Smaller blocks load more for the same work; of larger ones VMEM holds none. `cycles` takes keywords of
    `tpu_cases.full_softmax`, and returns None for what cannot be compiled.
    """
    sizes = (256, 512, 1024, 2048, 4096, 8192)
    blocks = [(queries, keys) for queries in sizes for keys in sizes if queries * keys in (2**21, 2**22)]
    looped = [
        (*block, keys_at_a_time) for block in blocks for keys_at_a_time in (512, 1024) if keys_at_a_time <= block[1]
    ]
    best = dict(start)
    for kernel, implementation, candidates in (
        ("forward", "splash", looped),
        ("fused", "splash_fused", looped),
        ("dkv", "splash_unfused", looped),
        ("dq", "splash_unfused", blocks),
    ):
        found = {}
        for candidate in candidates:
            result = cycles(splash_arguments(implementation, best | {kernel: candidate}))
            told = "cannot be compiled" if result is None else f"{result:,}"
            print(f"{implementation} {kernel} {candidate}: {told}", flush=True)
            if result is not None:
                found[candidate] = result
        best[kernel] = min(found, key=found.get)
    return best
