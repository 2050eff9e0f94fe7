"""Strided attention by the TPU kernels of hybrid attention.

To the kernels, the video is one chunk of R frames, each as long as the list of softmax keys. These keys are the overlap
before the chunk. The chunk's own tokens are no softmax keys. They enter the linear sums, where a gain of zero removes
every R-th token.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import InlineFeatures, as_inline, with_gain
from rehyat_jax.attention.flat_tokens import flat, with_heads
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.tpu.op import attend_to_overlap


def strided_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    *,
    stride: int,
    stabilizer: str,
) -> jax.Array:
    """Softmax over the tokens 0, R, 2R, ..., linear attention to the others; see `rehyat_jax.attention.strided`."""
    tokens, heads = query.shape[1:3]
    rows = -(-tokens // stride)
    place = np.arange(tokens)
    is_linear = jnp.asarray(place % stride > 0, jnp.float32)
    features = (as_inline(phi, query.dtype).bound(own) for phi, own in ((phi_query, query), (phi_key, key)))
    phi_query, phi_key = features
    softmax_key, softmax_value = (with_heads(flat(array)[:, ::stride], heads) for array in (key, value))
    return attend_to_overlap(
        query,
        softmax_key,
        softmax_value,
        value,
        phi_query,
        with_gain(phi_key, is_linear[:, None]),
        ChunkGeometry(stride, rows, chunk_frames=stride, overlap_frames=1, linear_window=True),
        stabilizer=stabilizer,
    )
