"""cuDNN's flash attention, forward and backward, as the custom calls that XLA's GPU compiler turns into cuDNN graphs.

`jax.nn.dot_product_attention` makes the same calls, with two limits. It rounds the log-sum-exp to the dtype of the
query: in bfloat16 a window's weight would be wrong by percents. Its backward accepts no other output and log-sum-exp.
The tests compare these calls with jax's own, field by field.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

_ELEMENT_TYPES = {jnp.dtype(jnp.bfloat16): "BF16", jnp.dtype(jnp.float16): "F16"}
_MAX_HEAD_DIM = 128

# (contracting, batch) dimensions of (left, right), where queries, keys and values are [batch, tokens, heads, head_dim]
# and scores [batch, heads, queries, keys].
_FORWARD_PRODUCTS = {
    "bmm1": ((3, 3), ((0, 2), (0, 2))),  # query, key -> scores
    "bmm2": ((3, 1), ((0, 1), (0, 2))),  # weights, value -> output
}
_BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),  # score cotangents, query -> key cotangents
    "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),  # score cotangents, key -> query cotangents
    "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),  # weights, cotangent -> value cotangents
    "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),  # cotangent, value -> weight cotangents
}


def cudnn_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, num_keys: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention to the first keys of each batch element.

    Args:
      query: [n, queries, heads, head_dim], bfloat16 or float16; head_dim a multiple of 8 up to 128.
      key, value: [n, keys, heads, head_dim].
      num_keys: number of keys that are not padding, int32 [n].

    Returns: the output in query's shape and dtype, and the log-sum-exp of scale * q.k, [n, heads, queries] in float32.
    """
    batch, queries, heads, head_dim = query.shape
    results = (
        jax.ShapeDtypeStruct((batch, heads, queries, head_dim), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    operands = (query, key, value, *_lengths(query, num_keys))
    return _call("__cudnn$fmhaSoftmax", operands, results, scale, _FORWARD_PRODUCTS)


def cudnn_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_keys: jax.Array,
    output: jax.Array,
    log_sum_exp: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward of `WindowKernels` (fused_window.py), for scores q.k / sqrt(head_dim)."""
    heads_first = lambda array: jax.ShapeDtypeStruct(tuple(array.shape[axis] for axis in (0, 2, 1, 3)), array.dtype)
    results = tuple(map(heads_first, (query, key, value)))
    operands = (query, key, value, log_sum_exp, cotangent, output, *_lengths(query, num_keys))
    return _call("__cudnn$fmhaSoftmaxBackward", operands, results, query.shape[-1] ** -0.5, _BACKWARD_PRODUCTS)


def why_not_cudnn(query: jax.Array) -> str | None:
    """The reason why cuDNN's attention cannot take these queries, and the remedy; None if it can."""
    if query.dtype not in _ELEMENT_TYPES:
        return (
            f"cuDNN's attention takes query, key and value in bfloat16 or float16, found {query.dtype}: cast them, or "
            f'use implementation="xla"'
        )
    if query.shape[-1] % 8 or query.shape[-1] > _MAX_HEAD_DIM:
        return (
            f"cuDNN's attention takes a head_dim that is a multiple of 8 and at most {_MAX_HEAD_DIM}, found "
            f'{query.shape[-1]}: use implementation="xla"'
        )
    return None


def _lengths(query: jax.Array, num_keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of queries and of keys that cuDNN reads, int32 [n]. Padding queries are computed, then dropped."""
    return jnp.full((query.shape[0],), query.shape[1], jnp.int32), num_keys


def _call(target: str, operands: tuple, results: tuple, scale: float, products: dict) -> tuple[jax.Array, ...]:
    """The results of a cuDNN call, those of rank 4 tokens first.

    Their shape in the call is [batch, heads, ...], but their layout in memory is tokens first.
    """
    query, key = operands[:2]
    scores_shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    # XLA gives cuDNN its workspace in place of this last, empty result.
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
    layouts = [(0, 2, 1, 3) if len(result.shape) == 4 else tuple(range(len(result.shape))) for result in results]
    call = jax.ffi.ffi_call(
        target,
        (*results, workspace),
        output_layouts=(*layouts, (0,)),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(_backend_config(query.dtype, scores_shape, scale, products)),
    )
    *arrays, _ = call(*operands)
    return tuple(jnp.swapaxes(array, 1, 2) if array.ndim == 4 else array for array in arrays)


def _backend_config(dtype: np.dtype, scores_shape: tuple[int, ...], scale: float, products: dict) -> dict:
    """XLA's CudnnfMHABackendConfig, as the JSON form of a protocol buffer: 64-bit integers are strings."""
    strings = lambda numbers: [str(number) for number in numbers]
    dimension_numbers = {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": strings([left]),
            "rhs_contracting_dimensions": strings([right]),
            "lhs_batch_dimensions": strings(left_batch),
            "rhs_batch_dimensions": strings(right_batch),
        }
        for name, ((left, right), (left_batch, right_batch)) in products.items()
    }
    attention = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": _ELEMENT_TYPES[jnp.dtype(dtype)],
            "dimensions": strings(scores_shape),
            "tuple_shapes": [],
            "layout": {
                "dim_level_types": [],
                "dim_unique": [],
                "dim_ordered": [],
                "minor_to_major": strings(reversed(range(4))),
                "tiles": [],
                "element_size_in_bits": "0",
                "memory_space": "0",
                "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "dynamic_shape_metadata_prefix_bytes": "0",
            },
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "PADDING",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": attention | dimension_numbers}
