"""Full softmax attention on TPUs, by JAX's splash attention kernels."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from rehyat_jax.attention.residuals import ATTENTION_RESIDUALS
from rehyat_jax.attention.softmax.heads_first import heads_first, tokens_first


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """softmax(q.k / sqrt(head_dim)) v over all keys. No score is ever stored, not even for the gradient.

    Lengths are padded to complete blocks. Padded keys belong to another segment than all queries, which masks them. The
    results of padded queries are dropped. The kernels do not scale scores, so queries are scaled before: one more
    rounding of 16-bit queries.

    Args:
      query: [batch, queries, heads, head_dim], of the dtypes and widths that `softmax_attention` accepts.
      key, value: [batch, keys, heads, head_dim].
      interpret: interpret the kernels, on any platform and slowly.

    Returns: [batch, queries, heads, head_dim] in the dtype of `query`.
    """
    batch, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    query_block = _even_block(queries, 1024, multiple_of=128)
    # The most keys that fit into every generation's VMEM next to 1024 queries and the backward kernels' buffers.
    key_block = _even_block(keys, 4096 // query.dtype.itemsize, multiple_of=128 if keys <= 512 else 512)
    padded_queries, padded_keys = _round_up(queries, query_block), _round_up(keys, key_block)
    # On a TPU a head takes up complete rows of 128 lanes.
    dq_copies_bytes = query.nbytes * max(128 // head_dim, 1) * (padded_keys // key_block)

    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((padded_queries, padded_keys))] * (batch * heads)),
        block_sizes=_block_sizes(query_block, key_block, one_pass_backward=dq_copies_bytes <= _MOST_DQ_COPIES_BYTES),
        head_shards=1,
        q_seq_shards=1,
        # Attention to a text is cheap to recompute, and its result is as large as that of a video's self-attention.
        residual_checkpoint_name=ATTENTION_RESIDUALS if keys >= queries else None,
        interpret=interpret,
    )
    segments = None
    if padded_keys > keys:
        is_key = (jnp.arange(padded_keys) < keys).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.ones(padded_queries, jnp.int32), kv=is_key)

    output = kernel(
        heads_first(query * head_dim**-0.5, padded_queries, interpret),
        heads_first(key, padded_keys, interpret),
        heads_first(value, padded_keys, interpret),
        segments,
    )
    return tokens_first(output, batch, queries, interpret)


# The one-pass backward kernel is faster than two passes. But it writes a copy of the queries' gradient for every block
# of keys, and then sums the copies. Their memory grows with the square of a video's length.
_MOST_DQ_COPIES_BYTES = 2 * 2**30


def _block_sizes(query_block: int, key_block: int, *, one_pass_backward: bool) -> splash.BlockSizes:
    """The same blocks in all kernels; the keys of a block are computed up to 512 at a time.

    Static cycles of the TPU compiler in millions, for v5e (libtpu 0.0.51; 12 heads x 128, 32,760 tokens, bfloat16):

    - forward: 68 with blocks of 1024 queries and 2048 keys, 81 with 1024 and 1024;
    - backward in one pass: 163, or 159 with 512 and 4096;
    - backward in two passes: 195, or 204 with 1024 and 1024.

    Blocks of 512 and 4096 make half as many copies, but do not fit into the VMEM of v5p.
    """
    compute = math.gcd(key_block, 512)
    two_passes = dict(block_q_dq=query_block, block_kv_dq=key_block)
    return splash.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_kv_compute=compute,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=one_pass_backward,
        **({} if one_pass_backward else two_passes),
    )


def _even_block(length: int, largest: int, *, multiple_of: int) -> int:
    """The length of the equal blocks, as few as possible, that cover `length`."""
    return _round_up(math.ceil(length / math.ceil(length / largest)), multiple_of)


def _round_up(length: int, multiple_of: int) -> int:
    return math.ceil(length / multiple_of) * multiple_of
