"""Full softmax attention: every implementation against PyTorch's, and TPU programs compiled without a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_oracles import tpu_kernels_as_xla
from tpu_topologies import TOPOLOGIES, compiled_for_tpu

from rehyat_jax.attention import interpreted_tpu, softmax_attention
from rehyat_jax.attention.softmax.tpu import blocks
from rehyat_jax.attention.softmax.tpu.blocks import Blocks
from rehyat_jax.models.wan.config import WAN_PRESETS

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Rounding of sums of some thousands of terms; 16-bit queries, weights and outputs are each rounded by up to 2^-9.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

xla = functools.partial(softmax_attention, implementation="xla")
kernels = functools.partial(softmax_attention, implementation="pallas_tpu")


def random_arrays(queries, keys, *, heads=1, head_dim=64, batch=1, dtype="float32"):
    rng = np.random.default_rng(0)
    lengths = {"query": queries, "key": keys, "value": keys, "cotangent": queries}
    return [jnp.asarray(rng.normal(size=(batch, n, heads, head_dim)), dtype) for n in lengths.values()]


def output_and_gradients(attend, query, key, value, cotangent, interpreted=tpu_kernels_as_xla):
    # A function of its own, or jit would remember what an equal one did before a constant was changed.
    def run(query, key, value, cotangent):
        output, pullback = jax.vjp(attend, query, key, value)
        return dict(zip(("output", "query", "key", "value"), (output, *pullback(cotangent)), strict=True))

    with interpreted():
        return jax.jit(run)(query, key, value, cotangent)


def of_pytorch(*arrays):
    """What `output_and_gradients` should find, from the same numbers in float64."""
    query, key, value, cotangent = (torch.tensor(np.asarray(array, np.float64)).transpose(1, 2) for array in arrays)
    inputs = [array.requires_grad_() for array in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(*inputs)
    gradients = torch.autograd.grad(output, inputs, cotangent)
    found = dict(zip(("output", "query", "key", "value"), (output.detach(), *gradients), strict=True))
    return {name: array.transpose(1, 2).numpy() for name, array in found.items()}


def assert_equal_to_pytorch(attend, arrays, **how):
    expected = of_pytorch(*arrays)
    for name, found in output_and_gradients(attend, *arrays, **how).items():
        assert found.dtype == arrays[0].dtype, name
        error = np.abs(np.asarray(found, np.float64) - expected[name]).max() / np.abs(expected[name]).max()
        assert error < TOLERANCE[found.dtype.name], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attend", [xla, kernels], ids=["xla", "pallas_tpu"])
def test_every_implementation_equals_pytorch(attend, dtype):
    assert_equal_to_pytorch(attend, random_arrays(70, 150, heads=3, head_dim=128, batch=2, dtype=dtype))


# One block of queries and keys, or several; complete blocks of keys or a shorter last one; and queries that are padded.
@pytest.mark.parametrize("queries, keys", [(1100, 1100), (256, 512), (130, 2100), (1024, 129)])
def test_the_kernels_equal_pytorch_at_any_number_of_blocks(queries, keys):
    # A TPU's memory and copies are simulated too, which takes three times as long.
    assert_equal_to_pytorch(kernels, random_arrays(queries, keys), interpreted=interpreted_tpu)


def test_gradients_that_do_not_fit_into_vmem_are_summed_group_by_group(monkeypatch):
    monkeypatch.setattr(blocks, "_UNKNOWN_VMEM", 20 * 2**20)
    # The interpreter cannot alias an array whose last block is shorter.
    assert Blocks.choose(4096, 1280, head_dim=64, dtype=jnp.float32).group == 2048
    assert_equal_to_pytorch(kernels, random_arrays(4096, 1280))


@pytest.mark.parametrize("queries", [16 * 1560, 21 * 1560, 21 * 3600, 81 * 1560, 161 * 3600])
def test_blocks_of_queries_divide_wans_videos(queries):
    chosen = Blocks.choose(queries, queries, head_dim=128, dtype=jnp.bfloat16)
    for block in (chosen.forward_queries, chosen.backward_queries):
        assert queries % block == 0
        assert -(-block // 128) * 128 / block < 1.05  # the share of lanes in use


def test_padded_keys_weigh_nothing_where_all_scores_are_low():
    query, key, value, cotangent = random_arrays(130, 150)
    arrays = (query + 30, key - 30, value, cotangent)  # scores of about -7000, where a padded key would have 0
    expected = of_pytorch(*arrays)["output"]
    # float32 scores of 7000 are off by up to 5e-4 each, and so are the weights.
    with interpreted_tpu():
        found = kernels(*arrays[:3])
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_the_default_for_long_sequences_differentiates_through_a_scan_with_remat():
    def attend_twice(attend, query, key, value):
        layer = lambda total, scale: (total + attend(scale * query, key, value), None)
        layer = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(layer, jnp.zeros_like(query), jnp.array([1.0, 2.0]))[0]

    arrays = random_arrays(600, 512)
    found, expected = (
        output_and_gradients(functools.partial(attend_twice, attend), *arrays) for attend in (softmax_attention, xla)
    )
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE["float32"], err_msg=name)


WAN = WAN_PRESETS["t2v-1.3B"]
TOKENS_PER_FRAME = 30 * 52  # of Wan's 480 x 832 video


def compiled_gradient(topology, queries, keys):
    """The softmax attention of Wan2.1 1.3B and its gradients as one TPU program."""
    array = lambda tokens: jax.ShapeDtypeStruct((1, tokens, WAN.num_heads, WAN.head_dim), jnp.bfloat16)

    def gradients(query, key, value, cotangent):
        output, pullback = jax.vjp(softmax_attention, query, key, value)
        return output, pullback(cotangent)

    arrays = array(queries), array(keys), array(keys), array(queries)
    return compiled_for_tpu(topology, gradients, *arrays, quickly=True)


def kernel_names(compiled):
    """The names of a program's kernels."""
    calls = re.findall(r'%([\w.\-]+) = .*custom_call_target="tpu_custom_call"', compiled.as_text())
    names = ("softmax_attend", "softmax_backward", "token_dots")
    return sorted(next(name for name in names if name in call) for call in calls)


# The kernels of a long video take the most VMEM, of which v5p has the least. Short ones, for the other topologies, have
# less code to compile.
@pytest.mark.parametrize(
    "topology, queries, keys",
    [
        ("v5p:2x2x1", 21 * TOKENS_PER_FRAME, 21 * TOKENS_PER_FRAME),
        ("v5p:2x2x1", 21 * TOKENS_PER_FRAME, WAN.text_length),
        *((topology, 1024, 1000) for topology in TOPOLOGIES if topology != "v5p:2x2x1"),
    ],
)
def test_on_tpus_wan_attention_is_a_forward_and_a_backward_kernel_and_no_branch(topology, queries, keys):
    compiled = compiled_gradient(topology, queries, keys)
    # Norms of queries and keys, and one number a query for the backward pass.
    assert kernel_names(compiled) == ["softmax_attend", "softmax_backward", *["token_dots"] * 3]
    assert " conditional(" not in compiled.as_text()
    # The scores would be 48 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 2**30


def test_on_tpus_gradients_that_do_not_fit_into_vmem_take_a_kernel_for_each_group_of_queries(monkeypatch):
    monkeypatch.setattr(blocks, "_vmem_bytes", lambda: 24 * 2**20)
    compiled = compiled_gradient("v5e:2x2", 8192, 1000)
    assert kernel_names(compiled) == ["softmax_attend", *["softmax_backward"] * 2, *["token_dots"] * 3]


def test_on_tpus_short_sequences_are_left_to_xla():
    assert not kernel_names(compiled_gradient("v5e:2x2", 300, 300))


@pytest.mark.parametrize(
    "implementation, arguments, message",
    [
        ("flash", {}, r"implementation must be one of .*'pallas_tpu'.* or None, found 'flash'"),
        (
            "pallas_tpu",
            {"dtype": "float16"},
            r'dtype bfloat16 or float32 for "pallas_tpu", found float16; "xla" takes it',
        ),
        (
            "pallas_tpu",
            {"head_dim": 32},
            r'one of \(64, 128\) for "pallas_tpu", found 32; "xla" takes any',
        ),
        ("cudnn", {}, r'dtype bfloat16 or float16 for "cudnn", found float32; "xla" takes it'),
        ("cudnn", {"dtype": "float16", "head_dim": 36}, r'multiple of 8 up to 128 for "cudnn", found 36; "xla" takes'),
        ("cudnn", {"dtype": "float16"}, r'"cudnn" needs an NVIDIA GPU, this program is made for cpu; use "xla"'),
    ],
)
def test_an_implementation_that_cannot_says_why_and_which_can(implementation, arguments, message):
    query, key, value, _ = random_arrays(4, 4, **arguments)
    with pytest.raises(ValueError, match=message):
        softmax_attention(query, key, value, implementation=implementation)


def test_arrays_that_do_not_fit_together_are_named():
    query, key, value, _ = random_arrays(4, 6)
    with pytest.raises(
        ValueError, match=r"query must be \[batch, queries, heads, head_dim\], found shape \(4, 1, 64\)"
    ):
        softmax_attention(query[0], key, value)
    with pytest.raises(ValueError, match=r"value must be \[1, 6, 1, 64\], found shape \(1, 5, 1, 64\)"):
        softmax_attention(query, key, value[:, :5])
    with pytest.raises(ValueError, match="key must have query's dtype float32, found bfloat16"):
        softmax_attention(query, key.astype("bfloat16"), value)
