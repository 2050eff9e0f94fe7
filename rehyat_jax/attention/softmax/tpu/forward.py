"""The forward kernel of full softmax attention."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.softmax.tpu.blocks import Blocks
from rehyat_jax.attention.tpu.blocks import FEATURE_ROWS, HeadBlocks, for_tiles
from rehyat_jax.attention.tpu.kernel_call import call_kernel, new_rows, token_blocks
from rehyat_jax.attention.tpu.score_tiles import (
    LOWEST,
    Valid,
    add_keys,
    clear_sums,
    new_sums,
    score_scale,
)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, is_running: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Attention of all queries to all keys.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, heads, head_dim].
      is_running: int32 [batch, heads], 1 where exponents are relative to a running maximum, 0 where to nothing.

    Returns:
      (output; the log-sum-exp, base 2, [batch, heads, blocks of queries, 1, queries of a block]).
    """
    batch, queries, heads, head_dim = query.shape
    scale = score_scale(head_dim)
    parts = blocks.key_tiles(blocks.forward_keys)
    steps = pl.cdiv(blocks.keys, blocks.forward_keys)

    def kernel(inputs, outputs, scratch):
        step = pl.program_id(3)
        operands = (inputs[name] for name in ("query", "key", "value"))
        add = functools.partial(add_keys, *operands, scratch, parts=parts, scale=scale)
        is_running = inputs["is_running"][0, 0] == 1

        @pl.when(step == 0)
        def _():
            clear_sums(scratch)
            scratch["maximum"][...] = jnp.full_like(scratch["maximum"], jnp.where(is_running, LOWEST, 0.0))

        for valid, is_block in key_blocks(step, blocks.keys, blocks.forward_keys):
            for running, columns, unroll in ((False, 512, 3), (True, 256, 2)):

                @pl.when(is_block & (is_running == running))
                def _(valid=valid, running=running, columns=columns, unroll=unroll):
                    add_to = functools.partial(add, running=running, valid=valid)
                    for_tiles(blocks.forward_queries, columns, unroll if valid is None else 1, add_to)

        @pl.when(step == steps - 1)
        def _():
            def write(tiles):
                for tile in tiles:
                    columns = pl.ds(*tile)
                    total = scratch["total"][:, columns]
                    outputs["output"][columns, :] = (scratch["sums"][:, columns] / total).T.astype(query.dtype)
                    outputs["log_sum_exp"][:, columns] = scratch["maximum"][:, columns] * scale + jnp.log2(total)

            for_tiles(blocks.forward_queries, FEATURE_ROWS, 2, write)

    own, others = lambda block, step: block, lambda block, step: step
    output = HeadBlocks.of(query)
    results = call_kernel(
        "softmax_attend",
        kernel,
        (batch, heads, queries // blocks.forward_queries, steps),
        {
            "query": token_blocks(query, blocks.forward_queries, own),
            "key": token_blocks(key, blocks.forward_keys, others),
            "value": token_blocks(value, blocks.forward_keys, others),
            "is_running": (
                is_running[:, :, None, None],
                pl.BlockSpec((None, None, 1, 1), lambda b, h, *_: (b, h, 0, 0), memory_space=pltpu.SMEM),
            ),
        },
        {
            "output": (output.shape, output.spec(blocks.forward_queries, own)),
            "log_sum_exp": new_rows(batch, heads, queries // blocks.forward_queries, blocks.forward_queries, own),
        },
        new_sums(head_dim, blocks.forward_queries),
        parallel=3,
    )
    return output.unview(results["output"]), results["log_sum_exp"]


def key_blocks(step: jax.Array, keys: int, block: int) -> list[tuple[Valid | None, jax.Array]]:
    """(see `Valid`, whether the `step`-th block of keys is such a one): complete blocks, and a shorter last one."""
    if keys % block == 0:
        return [(None, step >= 0)]
    rows = lambda low, high: low + jax.lax.broadcasted_iota(jnp.int32, (high - low, 1), 0)
    is_last = step == keys // block
    return [(None, ~is_last), (lambda low, high: rows(low, high) < keys % block, is_last)]
