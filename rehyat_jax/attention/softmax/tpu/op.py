"""implementation="pallas_tpu": full softmax attention by fused TPU kernels, with its gradients."""

import functools

import jax
import jax.numpy as jnp

from rehyat_jax.attention.residuals import kept
from rehyat_jax.attention.softmax.tpu.backward import attend_backward
from rehyat_jax.attention.softmax.tpu.blocks import Blocks, padded_queries
from rehyat_jax.attention.softmax.tpu.forward import attend
from rehyat_jax.attention.tpu.blocks import HeadBlocks, unview
from rehyat_jax.attention.tpu.score_tiles import fits_fixed_shift
from rehyat_jax.attention.tpu.token_dots import token_dots


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q.k / sqrt(head_dim)) v over all keys. No score is ever stored, not even for the gradient.

    Arrays keep the model's layout. Scores of normalised queries and keys are bounded, and such heads need no running
    maximum; the kernel takes one for the other heads.

    Args:
      query: [batch, queries, heads, head_dim], of the dtypes and widths that `softmax_attention` accepts.
      key, value: [batch, keys, heads, head_dim].

    Returns: [batch, queries, heads, head_dim] in the dtype of `query`.
    """
    queries, heads, head_dim = query.shape[1:]
    choose = functools.partial(Blocks.choose, keys=key.shape[1], head_dim=head_dim, dtype=query.dtype)
    blocks = choose(queries)
    if blocks is None:
        padded = padded_queries(queries)
        query, blocks = jnp.pad(query, ((0, 0), (0, padded - queries), (0, 0), (0, 0))), choose(padded)
    views = (HeadBlocks.of(x).view(x) for x in (query, key, value))
    return unview(_attention(blocks, heads, *views), heads)[:, :queries]


# Arrays are passed, kept for the backward pass and returned as the views that kernels read. A TPU would pad the heads
# of [batch, tokens, heads, head_dim] to a multiple of eight.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(blocks: Blocks, heads: int, *views: jax.Array) -> jax.Array:
    return _forward(blocks, heads, *views)[0]


def _forward(blocks: Blocks, heads: int, *views: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    query, key, value = (unview(view, heads) for view in views)
    fits = fits_fixed_shift(_largest_square(query), _largest_square(key), query.shape[-1])
    is_running = jnp.where(fits, 0, 1).astype(jnp.int32)
    output, log_sum_exp = attend(query, key, value, is_running, blocks)
    results = HeadBlocks.of(output).view(output), log_sum_exp
    # Attention to a text is cheap to compute again, and its result is as large as that of a video's self-attention.
    output, log_sum_exp = kept(results) if blocks.keys >= blocks.queries else results
    return output, (*views, output, log_sum_exp)


def _largest_square(tokens: jax.Array) -> jax.Array:
    """The largest squared norm, float32 [batch, heads]."""
    batch, count, heads, _ = tokens.shape
    squares = token_dots(tokens, tokens, min(2048, -(-count // 128) * 128))
    return squares.reshape(batch, heads, -1)[:, :, :count].max(-1)


def _backward(
    blocks: Blocks, heads: int, saved: tuple[jax.Array, ...], d_output: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    *views, output, log_sum_exp = saved
    query, key, value, output, d_output = (unview(x, heads) for x in (*views, output, d_output))
    delta = token_dots(d_output, output, blocks.backward_queries)
    gradients = attend_backward(query, key, value, d_output, log_sum_exp, delta, blocks)
    return tuple(HeadBlocks.of(x).view(x) for x in gradients)


_attention.defvjp(_forward, _backward)
