"""The backward kernel of full softmax attention.

One pass of five products a tile gives all gradients. The gradients of queries stay in VMEM while the kernel walks over
all keys. There is never a copy of them for each block of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.softmax.tpu.blocks import Blocks
from rehyat_jax.attention.softmax.tpu.forward import key_blocks
from rehyat_jax.attention.tpu.blocks import HeadBlocks, for_tiles
from rehyat_jax.attention.tpu.kernel_call import call_kernel, row_blocks, token_blocks
from rehyat_jax.attention.tpu.score_tiles import GRADIENT_COLUMNS, add_gradients, score_scale

# Tiles in one stretch of code.
_UNROLL = 5


def attend_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output_cotangent: jax.Array,
    log_sum_exp: jax.Array,
    delta: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values.

    Args:
      query, key, value: see `attend`.
      output_cotangent: like `query`.
      log_sum_exp: from `attend`.
      delta: sum of output times its cotangent, of every query, in the layout of `log_sum_exp`.
    """
    operands = query, key, value, output_cotangent, log_sum_exp, delta
    groups = blocks.queries // blocks.group
    # Sums over several groups stay float32.
    dtype = key.dtype if groups == 1 else jnp.float32
    sums: tuple[jax.Array, ...] = ()
    d_queries = []
    for group in range(groups):
        d_query, *sums = _group_backward(operands, sums, blocks, group, dtype)
        d_queries.append(d_query)
    d_key, d_value = (x.astype(key.dtype) for x in sums)
    return jnp.concatenate(d_queries, axis=1) if groups > 1 else d_queries[0], d_key, d_value


def _group_backward(
    operands: tuple[jax.Array, ...], before: tuple[jax.Array, ...], blocks: Blocks, group: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a group's queries, and those of keys and values, added to `before`."""
    query, key, value, output_cotangent, log_sum_exp, delta = operands
    batch, _, heads, head_dim = query.shape
    rows, key_block = blocks.backward_queries, blocks.backward_keys
    key_steps, query_steps = pl.cdiv(blocks.keys, key_block), blocks.group // rows
    scale, score_gradient = score_scale(head_dim), head_dim**-0.5
    parts = blocks.key_tiles(key_block)
    of_keys = ("d_key", "d_value")

    def kernel(inputs, outputs, scratch):
        key_step, query_step = pl.program_id(2), pl.program_id(3)
        gradients = d_query, d_key, d_value = tuple(scratch[name] for name in ("d_query", *of_keys))
        first_row = query_step * rows
        queries = pl.ds(pl.multiple_of(first_row, 8), rows)
        names = ("query", "cotangent", "log_sum_exp", "delta", "key", "value")
        add = functools.partial(
            add_gradients,
            *(inputs[name] for name in names),
            gradients,
            parts=parts,
            first_row=first_row,
            scale=scale,
        )

        @pl.when(key_step == 0)
        def _():
            d_query[queries, :] = jnp.zeros((rows, head_dim), jnp.float32)

        @pl.when(query_step == 0)
        def _():
            d_key[...] = inputs["d_key"][...] / score_gradient if before else jnp.zeros_like(d_key)
            d_value[...] = inputs["d_value"][...] if before else jnp.zeros_like(d_value)

        for valid, is_block in key_blocks(key_step, blocks.keys, key_block):

            @pl.when(is_block)
            def _(valid=valid):
                for_tiles(rows, GRADIENT_COLUMNS, _UNROLL if valid is None else 1, functools.partial(add, valid=valid))

        @pl.when(query_step == query_steps - 1)
        def _():
            outputs["d_key"][...] = (d_key[...] * score_gradient).astype(dtype)
            outputs["d_value"][...] = d_value[...].astype(dtype)

        @pl.when(key_step == key_steps - 1)
        def _():
            outputs["d_query"][...] = (d_query[queries, :] * score_gradient).astype(query.dtype)

    queries = lambda key_step, query_step: group * query_steps + query_step
    keys = lambda key_step, query_step: key_step
    # Until the last keys the block stays the same, so that nothing is copied.
    finished = lambda key_step, query_step: jnp.where(key_step == key_steps - 1, query_step, 0)
    of_group = HeadBlocks(batch, blocks.group, heads, head_dim, query.dtype)
    sums = HeadBlocks(*key.shape, dtype)
    results = call_kernel(
        "softmax_backward",
        kernel,
        (batch, heads, key_steps, query_steps),
        {
            "query": token_blocks(query, rows, queries),
            "cotangent": token_blocks(output_cotangent, rows, queries),
            "log_sum_exp": row_blocks(log_sum_exp, rows, queries),
            "delta": row_blocks(delta, rows, queries),
            "key": token_blocks(key, key_block, keys),
            "value": token_blocks(value, key_block, keys),
            **{name: token_blocks(x, key_block, keys) for name, x in zip(of_keys, before, strict=False)},
        },
        {
            "d_query": (of_group.shape, of_group.spec(rows, finished)),
            **{name: (sums.shape, sums.spec(key_block, keys)) for name in of_keys},
        },
        {
            "d_query": pltpu.VMEM((blocks.group, head_dim), jnp.float32),
            **{name: pltpu.VMEM((key_block, head_dim), jnp.float32) for name in of_keys},
        },
        parallel=2,
        aliases={name: name for name in of_keys} if before else None,
        vmem_bytes=blocks.backward_vmem,
    )
    return of_group.unview(results["d_query"]), *(sums.unview(results[name]) for name in of_keys)
