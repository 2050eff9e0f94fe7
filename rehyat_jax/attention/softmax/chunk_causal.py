"""Softmax attention that is causal by chunks: each chunk of a video attends to itself and to all chunks before it."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.softmax.api import softmax_attention


def chunk_causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, chunk_tokens: int) -> jax.Array:
    """Softmax attention of the tokens of every chunk to the tokens up to the chunk's end.

    This is the attention of causal video diffusion models with a cache of keys and values (CausVid, arXiv 2412.07772).
    Each chunk makes one call of `softmax_attention`, so no weight of a later chunk is computed.

    Args:
      query, key, value: [batch, tokens, heads, head_dim].
      chunk_tokens: tokens of a chunk; the last one may have fewer.

    Returns:
      [batch, tokens, heads, head_dim] in the dtype of `query`.
    """
    tokens = query.shape[1]
    ends = [min(start + chunk_tokens, tokens) for start in range(0, tokens, chunk_tokens)]
    starts = [0, *ends[:-1]]
    chunks = [
        softmax_attention(query[:, start:end], key[:, :end], value[:, :end])
        for start, end in zip(starts, ends, strict=True)
    ]
    return jnp.concatenate(chunks, axis=1)
