"""Full softmax attention: the teacher's, and that of the blocks which stay as they are."""

import jax


def softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """softmax(q.k / sqrt(head_dim)) v over all keys.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, heads, head_dim].
      implementation: "xla", "cudnn" (NVIDIA GPUs, bfloat16 or float16), or None for jax's choice on this platform.

    Returns: [batch, queries, heads, head_dim] in the dtype of `query`; weights are computed in float32.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
