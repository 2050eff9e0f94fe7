"""Attention Surgery's hybrid attention (arXiv 2509.24899): softmax to every R-th token, linear attention to the others.

Every query attends to the same keys, so scores still grow with the square of the tokens, divided by R.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import InlineFeatures, as_array
from rehyat_jax.attention.hybrid.linear_products import sum_keys
from rehyat_jax.attention.hybrid.state import LinearState
from rehyat_jax.attention.hybrid.window import attend_window
from rehyat_jax.attention.platform import target_platform

IMPLEMENTATIONS = ("xla", "cudnn", "pallas_tpu")

# Bytes of the scores that are in memory at once.
_SCORE_BYTES = 2**28


def strided_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    *,
    stride: int,
    stabilizer: str = "row_max",
    implementation: str | None = None,
    axis: str | None = None,
    num_tokens: int | None = None,
) -> jax.Array:
    """Softmax over the tokens 0, R, 2R, ... of the video, linear attention to the others, one normalisation.

    Args:
      query, key, value: [batch, tokens, heads, head_dim].
      phi_query, phi_key: non-negative features [batch, tokens, heads, features], or `InlineFeatures`.
      stride: R, at least 1.
      stabilizer: see `hybrid_attention`.
      implementation: "xla", "cudnn" (NVIDIA GPUs, 16 bits), "pallas_tpu" (TPUs; not with `axis`), or None for the best
        one here.
      axis: mesh axis along which tokens are sharded, inside `shard_map`; None if they are not.
      num_tokens: tokens of the video that are not padding; None for all. The result of padding is zero.

    Returns: [batch, tokens, heads, head_dim] in the dtype of `query`.

    Raises:
      ValueError: an implementation that does not exist, or cannot take these arrays.
    """
    implementation = _checked(implementation, query, phi_query, axis)
    if implementation == "pallas_tpu":
        # TPU kernels are imported where they are used.
        from rehyat_jax.attention.hybrid.tpu import strided

        arrays = query, key, value, phi_query, phi_key
        return strided.strided_attention(*arrays, stride=stride, stabilizer=stabilizer)
    phi_query, phi_key = as_array(phi_query), as_array(phi_key)
    count = query.shape[1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * count
    token = first + np.arange(count)
    total = num_tokens or count * (1 if axis is None else jax.lax.axis_size(axis))
    is_linear = (token % stride > 0) & (token < total)
    linear = sum_keys(jnp.where(is_linear[:, None, None], phi_key, 0), value)
    if axis is not None:
        linear = jax.lax.psum(linear, axis)
        key, value = (jax.lax.all_gather(tokens, axis, axis=1, tiled=True) for tokens in (key, value))
    key, value = (tokens[:, :total:stride] for tokens in (key, value))
    attend = _cudnn if implementation == "cudnn" else _xla
    y = attend(query, key, value, phi_query, linear, stabilizer)
    return y if num_tokens is None else jnp.where((token < total)[:, None, None], y, 0)


def _checked(name: str | None, query: jax.Array, phi_query: jax.Array | InlineFeatures, axis: str | None) -> str:
    """The implementation of that name, or the best one. Raises ValueError if it cannot do this."""
    if name not in (None, *IMPLEMENTATIONS):
        raise ValueError(f'implementation "{name}" cannot do strided attention: use one of {IMPLEMENTATIONS}')
    fused = {"tpu": "pallas_tpu", "gpu": "cudnn"}.get(target_platform(), "xla")
    problem = _problem(name or fused, query, phi_query, axis)
    if name is None:
        return "xla" if problem else fused
    if problem:
        raise ValueError(f'implementation "{name}" cannot do this: {problem}')
    return name


def _problem(name: str, query: jax.Array, phi_query: jax.Array | InlineFeatures, axis: str | None) -> str | None:
    """The reason why an implementation cannot take these arrays, and the remedy; None if it can."""
    if name == "cudnn":
        from rehyat_jax.attention.hybrid.gpu.cudnn_calls import why_not_cudnn

        return why_not_cudnn(query)
    if name == "pallas_tpu":
        from rehyat_jax.attention.hybrid.tpu.op import why_not_arrays

        if axis is not None:
            return 'the video is sharded along time: use implementation="xla"'
        return why_not_arrays(query, phi_query)
    return None


def _xla(query, key, value, phi_query, linear: LinearState, stabilizer: str) -> jax.Array:
    """One stretch of queries after another, and again for the gradient."""
    batch, count, heads, _ = query.shape
    row_bytes = 4 * batch * heads * key.shape[1]
    size = max((n for n in range(1, count + 1) if count % n == 0 and n * row_bytes <= _SCORE_BYTES), default=1)
    is_key = jnp.ones(key.shape[1], bool)

    @jax.checkpoint
    def stretch(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, phis = arrays
        return attend_window(queries, key, value, is_key, phis, linear, stabilizer=stabilizer)

    if size == count:
        return stretch((query, phi_query))
    split = lambda tokens: jnp.moveaxis(tokens.reshape(batch, -1, size, *tokens.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(stretch, (split(query), split(phi_query))), 0, 1).reshape(query.shape)


def _cudnn(query, key, value, phi_query, linear: LinearState, stabilizer: str) -> jax.Array:
    """All keys are one window."""
    from rehyat_jax.attention.hybrid.cudnn import KERNELS
    from rehyat_jax.attention.hybrid.gpu.fused_window import attend_window_fused

    one = lambda array: array[:, None]
    return attend_window_fused(
        KERNELS,
        *map(one, (query, key, value)),
        jnp.full(1, key.shape[1], jnp.int32),
        one(phi_query),
        jax.tree.map(one, linear),
        stabilizer=stabilizer,
    )[:, 0]
