"""Full softmax attention: of the teacher, of blocks that are not converted, and to the text."""

import functools

import jax

from rehyat_jax.attention.platform import target_platform

IMPLEMENTATIONS = ("xla", "pallas_tpu", "cudnn")

TPU_DTYPES, TPU_HEAD_DIMS = ("bfloat16", "float32"), (64, 128)

# With fewer queries or keys than this, the scores are small enough to be stored.
_SHORTEST_FUSED = 512


def softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """softmax(q.k / sqrt(head_dim)) v over all keys.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, heads, head_dim].
      implementation: one of
        - "xla" (any platform): stores all scores; from 512 queries and keys on it recomputes them for the gradient;
        - "pallas_tpu" (TPUs; bfloat16 or float32, head_dim 64 or 128): stores no scores;
        - "cudnn" (NVIDIA GPUs from Ampere on; bfloat16 or float16, head_dim a multiple of 8 up to 128): stores none;
        - None: the best that these arrays allow on the platform that the program is compiled for (`target_platform`).
        Only "xla" supports forward mode (`jax.jvp`).

    Returns: [batch, queries, heads, head_dim] in the dtype of `query`; weights are computed in float32.

    Raises:
      ValueError: if the implementation cannot take these arrays.
    """
    _check_arrays(query, key, value)
    if implementation is None:
        implementation = _default_implementation(query, key)
    if problem := _problem(implementation, query):
        raise ValueError(problem)
    return _FORMS[implementation](query, key, value)


def _default_implementation(query: jax.Array, key: jax.Array) -> str:
    if min(query.shape[1], key.shape[1]) < _SHORTEST_FUSED:
        return "xla"
    fused = {"tpu": "pallas_tpu", "gpu": "cudnn"}.get(target_platform(), "xla")
    return "xla" if _problem(fused, query) else fused


def _xla(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    if min(query.shape[1], key.shape[1]) >= _SHORTEST_FUSED:
        attend = jax.checkpoint(attend)
    return attend(query, key, value)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _pallas_tpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    # TPU kernels are imported where they are used.
    from rehyat_jax.attention.softmax.tpu.op import attention

    return attention(query, key, value)


_FORMS = {"xla": _xla, "pallas_tpu": _pallas_tpu, "cudnn": _cudnn}


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array):
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, queries, heads, head_dim], found shape {query.shape}")
    if key.ndim != 4:
        raise ValueError(f"key must be [batch, keys, heads, head_dim], found shape {key.shape}")
    expected = (query.shape[0], key.shape[1], *query.shape[2:])
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}, found shape {array.shape}")
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, found {array.dtype}")


def _problem(implementation: str, query: jax.Array) -> str | None:
    """The reason why an implementation cannot take these arrays; None if it can."""
    dtype, head_dim = query.dtype.name, query.shape[-1]
    if implementation not in IMPLEMENTATIONS:
        return f"implementation must be one of {IMPLEMENTATIONS} or None, found {implementation!r}"
    if implementation == "pallas_tpu":
        if dtype not in TPU_DTYPES:
            return f'query must be of dtype {" or ".join(TPU_DTYPES)} for "pallas_tpu", found {dtype}; "xla" takes it'
        if head_dim not in TPU_HEAD_DIMS:
            return f'head_dim must be one of {TPU_HEAD_DIMS} for "pallas_tpu", found {head_dim}; "xla" takes any'
    if implementation == "cudnn":
        if dtype not in ("bfloat16", "float16"):
            return f'query must be of dtype bfloat16 or float16 for "cudnn", found {dtype}; "xla" takes it'
        if head_dim % 8 or head_dim > 128:
            return f'head_dim must be a multiple of 8 up to 128 for "cudnn", found {head_dim}; "xla" takes any'
        if target_platform() != "gpu":
            return (
                f'implementation "cudnn" needs an NVIDIA GPU, this program is made for {target_platform()}; use "xla"'
            )
    return None
