"""Attention for NVIDIA GPUs, without one.

The arithmetic around the kernels is tested against the reference, with dense products in cuDNN's place; the calls of
cuDNN against those of jax; the Hopper kernel in Pallas' interpreter.
"""

import functools
import json
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as jax_cudnn
import jax.numpy as jnp
import numpy as np
import pytest
from dense_flash import DENSE_KERNELS, dense_backward
from hopper_interpreter import interpreted_kernel
from test_hybrid_attention import (
    F32,
    F64,
    FORMS,
    HEADS,
    STABILIZERS,
    assert_close,
    attention_by_loops,
    make_arrays,
    output_and_gradients,
    reference_results,
)

from rehyat_jax.attention import HybridState
from rehyat_jax.attention.chunks import attend_chunks
from rehyat_jax.attention.cudnn import hybrid_attention_cudnn
from rehyat_jax.attention.geometry import ChunkGeometry
from rehyat_jax.attention.gpu.cudnn_calls import cudnn_backward, cudnn_forward
from rehyat_jax.attention.gpu.fused_window import WindowKernels, attend_window_fused
from rehyat_jax.attention.gpu.hopper import hopper_window_forward
from rehyat_jax.attention.pallas_gpu import hybrid_attention_pallas_gpu


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def by_kernels(kernels):
    """An implementation of `hybrid_attention` by any kernels."""
    return functools.partial(attend_chunks, functools.partial(attend_window_fused, kernels))


dense = by_kernels(DENSE_KERNELS)


def attention(form, causal=True, stabilizer="row_max", implementation=dense):
    """An implementation's output, `form` = (frames, tokens_per_frame, chunk_frames, overlap_frames)."""

    def attend(query, *arrays, state=None, return_state=False):
        _, tokens_per_frame, chunk_frames, overlap_frames = form
        geometry = ChunkGeometry(query.shape[1] // tokens_per_frame, tokens_per_frame, chunk_frames, overlap_frames)
        if state is None:
            state = HybridState.zeros(
                query.shape[0],
                *query.shape[2:],
                arrays[-1].shape[-1],
                tokens_per_frame=tokens_per_frame,
                overlap_frames=overlap_frames,
                dtype=query.dtype,
            )
        results = implementation(query, *arrays, geometry, causal=causal, stabilizer=stabilizer, initial_state=state)
        return results if return_state else results[0]

    return attend


# The row's maximum is found to log(equal scores) / 2**16, and no two scores here are equal: F32 whatever the dtype.
TOLERANCE = {"joint": F64, "row_max": F32}


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_and_all_gradients_equal_the_reference(stabilizer, causal, form, x64):
    found = output_and_gradients(attention(form, causal, stabilizer), make_arrays(*form[:2], batch=2))
    assert_close(found, reference_results(form, causal, stabilizer), TOLERANCE[stabilizer])


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_float32_is_as_exact_as_its_rounding(stabilizer, x64):
    form, causal = FORMS[0], stabilizer == "joint"
    arrays = make_arrays(*form[:2], batch=2, dtype=np.float32)
    found = output_and_gradients(attention(form, causal, stabilizer), arrays)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_close(found, reference_results(form, causal, stabilizer), F32)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_bfloat16_is_as_exact_as_its_rounding(stabilizer, x64):
    form = FORMS[0]
    arrays = make_arrays(*form[:2], batch=2, dtype=jnp.bfloat16)
    found = output_and_gradients(attention(form, True, stabilizer), arrays)
    exact = output_and_gradients(attention(form, True, stabilizer), [array.astype(np.float64) for array in arrays])
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.bfloat16)}
    # Weights, states, cotangents and results are each rounded to 8 bits: a few times 2**-9.
    assert_close(found, exact, 2**-6)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("form, groups", [((7, 2, 2, 1), (2, 2, 2, 1)), ((6, 1, 3, 0), (3, 3))], ids=str)
def test_video_continued_from_its_state_equals_one_call(stabilizer, form, groups, x64):
    attend = attention(form, True, stabilizer)

    def streamed(*arrays):
        state, outputs = None, []
        for stop, frames in zip(np.cumsum(groups), groups, strict=True):
            group = [array[:, (stop - frames) * form[1] : stop * form[1]] for array in arrays]
            output, state = attend(*group, state=state, return_state=True)
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    found = output_and_gradients(streamed, make_arrays(*form[:2], batch=2))
    assert_close(found, reference_results(form, True, stabilizer), TOLERANCE[stabilizer])


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("score, log_similarity", [(200.0, 0.0), (-200.0, 0.0), (-60.0, 40.0), (-60.0, -60.0)])
def test_extreme_scores_and_features_are_right_in_float32(stabilizer, score, log_similarity, x64):
    form = (5, 2, 2, 1)
    query, key, value, phi_query, phi_key = make_arrays(*form[:2], dtype=np.float32)
    # q.k / sqrt(4) is `score` plus or minus a few for every pair.
    query = query.at[..., 0].set(2 * abs(score) ** 0.5)
    key = key.at[..., 0].set(score / abs(score) ** 0.5)
    phi_query, phi_key = (phi * np.float32(np.exp(log_similarity / 2)) for phi in (phi_query, phi_key))
    arrays = (query, key, value, phi_query, phi_key)
    found = output_and_gradients(attention(form, True, stabilizer), arrays)
    assert all(np.isfinite(array).all() for array in found.values())
    # A score of 200 is rounded by up to 2e-5 in float32.
    assert_close(found["output"], attention_by_loops(arrays, form, True, stabilizer), 1e-4)


def test_equal_scores_move_the_row_maximum_by_their_logarithm_at_most(x64):
    form = (4, 30, 1, 1)
    query, *arrays = make_arrays(*form[:2])
    arrays = [jnp.zeros_like(query), *arrays]
    found = attention(form)(*arrays)
    # All 60 scores of a window are 0, and the linear weights off by that factor: the bound that the code states.
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), np.log(60) / 2**16)


def test_zero_features_leave_the_window_alone():
    form = (5, 2, 2, 1)
    *arrays, phi_query, phi_key = make_arrays(*form[:2], dtype=np.float32)
    arrays = (*arrays, jnp.zeros_like(phi_query), jnp.zeros_like(phi_key))
    for stabilizer in STABILIZERS:
        found = output_and_gradients(attention(form, True, stabilizer), arrays)
        assert all(np.isfinite(array).all() for array in found.values())
        assert_close(found["output"], attention_by_loops(arrays, form, True, "row_max"), F32)


def lowered_for_cuda(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(program):
    """{target: (configuration, the rest of the call)} of a StableHLO program."""
    calls = re.findall(r"custom_call @(__cudnn\$\w+)\([^)]*\) \{(.*)backend_config = \"(.*?)\"(.*)", program)
    assert calls
    return {
        target: (json.loads(config.replace(r"\22", '"')), start.replace(" ", ""), rest.replace(" ", ""))
        for target, start, config, rest in calls
    }


def test_cudnn_is_called_as_jax_calls_it(monkeypatch):
    # The only question that jax asks of a GPU before it makes the call.
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91400)
    query, key = jax.ShapeDtypeStruct((2, 48, 3, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 3, 16), jnp.bfloat16)
    num_keys = jax.ShapeDtypeStruct((2,), jnp.int32)

    def of_jax(query, key, value, num_keys, cotangent):
        attend = functools.partial(jax.nn.dot_product_attention, key_value_seq_lengths=num_keys, implementation="cudnn")
        output, pullback = jax.vjp(attend, query, key, value)
        return output, pullback(cotangent)

    def ours(query, key, value, num_keys, cotangent):
        inputs = (query, key, value, num_keys)
        output, log_sum_exp = cudnn_forward(*inputs, scale=16**-0.5)
        return output, cudnn_backward(*inputs, output, log_sum_exp, cotangent)

    shapes = (query, key, key, num_keys, query)
    found, expected = cudnn_calls(lowered_for_cuda(ours, *shapes)), cudnn_calls(lowered_for_cuda(of_jax, *shapes))
    assert found.keys() == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert found == expected


def gpu_program(argnums, stabilizer, implementation, head_dim, features):
    """What a GPU is given to differentiate by the inputs `argnums`, all of them bfloat16."""
    form = (12, 12, 3, 1)
    widths = [head_dim] * 3 + [features] * 2
    shapes = [jax.ShapeDtypeStruct((1, form[0] * form[1], HEADS, width), jnp.bfloat16) for width in widths]
    attend = attention(form, True, stabilizer, implementation)
    loss = lambda *arrays: attend(*arrays).astype(jnp.float32).sum()
    return lowered_for_cuda(jax.grad(loss, argnums), *shapes)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("argnums, backward_calls", [((0, 1, 2, 3, 4), 1), ((3, 4), 0)])
def test_each_direction_takes_the_fewest_kernels(stabilizer, argnums, backward_calls):
    program = gpu_program(argnums, stabilizer, hybrid_attention_cudnn, 8, 8)
    assert program.count("@__cudnn$fmhaSoftmax(") == {"row_max": 2, "joint": 1}[stabilizer]
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == backward_calls

    program = gpu_program(argnums, stabilizer, hybrid_attention_pallas_gpu, 128, 128)
    assert program.count("@mosaic_gpu_v2(") == 1
    assert program.count("@__cudnn$fmhaSoftmax(") == 0
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == backward_calls


# Tiles of 128 queries and blocks of 128 keys fit neither the chunks of 150 tokens nor their windows of 200; the last
# chunk is ragged, and the first has no overlap. The other form has one whole tile a chunk. 256 features are two steps.
@pytest.mark.parametrize(
    "stabilizer, causal, form", [("row_max", True, (5, 50, 3, 1)), ("joint", False, (4, 64, 2, 1))], ids=str
)
def test_hopper_kernel_equals_the_arithmetic_around_it(stabilizer, causal, form):
    rng, tokens = np.random.default_rng(0), form[0] * form[1]
    arrays = [rng.normal(size=(1, tokens, 1, width)) for width in (128, 128, 128, 256, 256)]
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in (*arrays[:3], *(np.abs(arrays[3:]) / 16))]
    with jax.enable_x64(True):
        wide = [array.astype(np.float64) for array in arrays]
        exact = output_and_gradients(attention(form, causal, stabilizer), wide)
    hopper = by_kernels(WindowKernels(hopper_window_forward, dense_backward))
    with interpreted_kernel():
        found = output_and_gradients(attention(form, causal, stabilizer, hopper), arrays)
    # As in the test of bfloat16 above. The gradients have their log-sum-exp and linear weights from the kernel.
    assert_close(found, exact, 2**-6)


@pytest.mark.parametrize(
    "implementation, dtypes, head_dim, features, message",
    [
        (hybrid_attention_cudnn, "ff", 8, 8, r"takes .* in bfloat16 or float16, found float32: cast them, or use"),
        (hybrid_attention_cudnn, "ee", 12, 8, r"multiple of 8 and at most 128, found 12: use"),
        (hybrid_attention_cudnn, "ee", 136, 8, r"multiple of 8 and at most 128, found 136: use"),
        (hybrid_attention_pallas_gpu, "ff", 128, 128, r"one dtype, bfloat16 or float16, found float32 and float32"),
        (hybrid_attention_pallas_gpu, "ef", 128, 128, r"one dtype, bfloat16 or float16, found float16 and float32"),
        (hybrid_attention_pallas_gpu, "ee", 64, 128, r"head_dim 128 and a multiple of 128 features, found 64 and 128"),
        (hybrid_attention_pallas_gpu, "ee", 128, 96, r"head_dim 128 and a multiple of 128 features, found 128 and 96"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused(implementation, dtypes, head_dim, features, message):
    arrays = [jnp.zeros((1, 4, 1, head_dim), dtypes[0])] * 3 + [jnp.zeros((1, 4, 1, features), dtypes[1])] * 2
    with pytest.raises(ValueError, match=message):
        attention((2, 2, 1, 1), implementation=implementation)(*arrays)
