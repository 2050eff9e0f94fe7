"""What is the GPU implementations' own: the calls of cuDNN, against jax's; how many; what is refused."""

import functools
import json
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as jax_cudnn
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import HEADS, STABILIZERS, assert_close, attention, attention_by_loops, jit, make_arrays
from dense_flash import dense_cudnn

from rehyat_jax.attention.hybrid.gpu.cudnn_calls import cudnn_backward, cudnn_forward


def test_equal_scores_move_the_row_maximum_by_their_logarithm_at_most():
    form = (4, 30, 1, 1)
    with jax.enable_x64(True), dense_cudnn():
        query, *arrays = make_arrays(*form[:2])
        arrays = [jnp.zeros_like(query), *arrays]
        found = jit(attention(form, implementation="cudnn"))(*arrays)
    # All 60 scores of a window are 0, and the linear weights off by that factor: the bound that the code states.
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), np.log(60) / 2**16)


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


def gpu_program(argnums, stabilizer, implementation, head_dim, features, form=(12, 12, 3, 1)):
    """What a GPU is given to differentiate by the inputs `argnums`, all of them bfloat16."""
    widths = [head_dim] * 3 + [features] * 2
    shapes = [jax.ShapeDtypeStruct((1, form[0] * form[1], HEADS, width), jnp.bfloat16) for width in widths]
    attend = attention(form, True, stabilizer, implementation)
    loss = lambda *arrays: attend(*arrays).astype(jnp.float32).sum()
    return lowered_for_cuda(jax.grad(loss, argnums), *shapes)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("argnums, backward_calls", [((0, 1, 2, 3, 4), 1), ((3, 4), 0)])
def test_each_direction_takes_the_fewest_kernels(stabilizer, argnums, backward_calls):
    program = gpu_program(argnums, stabilizer, "cudnn", 8, 8)
    assert program.count("@__cudnn$fmhaSoftmax(") == {"row_max": 2, "joint": 1}[stabilizer]
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == backward_calls

    program = gpu_program(argnums, stabilizer, "pallas_gpu", 128, 128)
    assert program.count("@mosaic_gpu_v2(") == 1
    assert program.count("@__cudnn$fmhaSoftmax(") == 0
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == backward_calls


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("tokens_per_frame", [1, 60, 67, 128])
def test_the_hopper_kernel_is_lowered_at_any_number_of_tokens(tokens_per_frame, stabilizer):
    # 3 or 4 frames: fewer tokens than a tile, more but no multiple of 8 (the copies' unit), an odd number, whole tiles.
    program = gpu_program((0, 1, 2), stabilizer, "pallas_gpu", 128, 128, form=(7, tokens_per_frame, 3, 1))
    assert program.count("@mosaic_gpu_v2(") == 1


@pytest.mark.parametrize(
    "implementation, dtypes, head_dim, features, message",
    [
        ("cudnn", "ff", 8, 8, r"takes .* in bfloat16 or float16, found float32: cast them, or use"),
        ("cudnn", "ee", 12, 8, r"multiple of 8 and at most 128, found 12: use"),
        ("cudnn", "ee", 136, 8, r"multiple of 8 and at most 128, found 136: use"),
        ("pallas_gpu", "ff", 128, 128, r"one dtype, bfloat16 or float16, found float32 and float32"),
        ("pallas_gpu", "ef", 128, 128, r"one dtype, bfloat16 or float16, found float16 and float32"),
        ("pallas_gpu", "ee", 64, 128, r"head_dim 128 and a multiple of 128 features, found 64 and 128"),
        ("pallas_gpu", "ee", 128, 96, r"head_dim 128 and a multiple of 128 features, found 128 and 96"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused(implementation, dtypes, head_dim, features, message):
    arrays = [jnp.zeros((1, 4, 1, head_dim), dtypes[0])] * 3 + [jnp.zeros((1, 4, 1, features), dtypes[1])] * 2
    with pytest.raises(ValueError, match=message):
        attention((2, 2, 1, 1), implementation=implementation)(*arrays)
