"""Full softmax attention: every implementation against PyTorch's, and TPU programs compiled without a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpu_topologies import TOPOLOGIES, compiled_for_tpu

from rehyat_jax.attention import softmax_attention
from rehyat_jax.attention.softmax import splash
from rehyat_jax.attention.softmax.heads_first import heads_first, tokens_first
from rehyat_jax.models.wan.config import WAN_PRESETS

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Rounding of sums of some thousands of terms; 16-bit queries, weights and outputs are each rounded by up to 2^-9.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

interpreted = functools.partial(splash.splash_attention, interpret=True)
xla = functools.partial(softmax_attention, implementation="xla")


def random_arrays(queries, keys, *, heads=1, head_dim=64, batch=1, dtype="float32"):
    rng = np.random.default_rng(0)
    lengths = {"query": queries, "key": keys, "value": keys, "cotangent": queries}
    return [jnp.asarray(rng.normal(size=(batch, n, heads, head_dim)), dtype) for n in lengths.values()]


def output_and_gradients(attend, query, key, value, cotangent):
    # A function of its own, or jit would remember what an equal one did before a constant was changed.
    output, pullback = jax.vjp(jax.jit(lambda *arrays: attend(*arrays)), query, key, value)
    return dict(zip(("output", "query", "key", "value"), (output, *pullback(cotangent)), strict=True))


def of_pytorch(*arrays):
    """What `output_and_gradients` should find, from the same numbers in float64."""
    query, key, value, cotangent = (torch.tensor(np.asarray(array, np.float64)).transpose(1, 2) for array in arrays)
    inputs = [array.requires_grad_() for array in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(*inputs)
    gradients = torch.autograd.grad(output, inputs, cotangent)
    found = dict(zip(("output", "query", "key", "value"), (output.detach(), *gradients), strict=True))
    return {name: array.transpose(1, 2).numpy() for name, array in found.items()}


def assert_equal_to_pytorch(attend, arrays):
    expected = of_pytorch(*arrays)
    for name, found in output_and_gradients(attend, *arrays).items():
        assert found.dtype == arrays[0].dtype, name
        error = np.abs(np.asarray(found, np.float64) - expected[name]).max() / np.abs(expected[name]).max()
        assert error < TOLERANCE[found.dtype.name], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attend", [xla, interpreted], ids=["xla", "splash"])
def test_every_implementation_equals_pytorch(attend, dtype):
    assert_equal_to_pytorch(attend, random_arrays(70, 150, heads=3, head_dim=128, batch=2, dtype=dtype))


@pytest.mark.parametrize("most_copies", [0, splash._MOST_DQ_COPIES_BYTES], ids=["two passes back", "one pass back"])
@pytest.mark.parametrize("queries, keys", [(1100, 1100), (256, 512), (130, 2048), (1024, 129)])
def test_splash_equals_pytorch_at_one_or_several_blocks_padded_or_not(queries, keys, most_copies, monkeypatch):
    monkeypatch.setattr(splash, "_MOST_DQ_COPIES_BYTES", most_copies)
    assert_equal_to_pytorch(interpreted, random_arrays(queries, keys))


@pytest.mark.parametrize("count, length", [(130, 384), (256, 256), (1000, 2048)])
def test_heads_come_first_and_go_back_with_their_gradients(count, length):
    tokens = random_arrays(count, 1, heads=3, head_dim=128, batch=2, dtype="bfloat16")[0]
    expected = jnp.pad(jnp.swapaxes(tokens, 1, 2).reshape(6, count, 128), ((0, 0), (0, length - count), (0, 0)))
    found, back = jax.vjp(lambda tokens: heads_first(tokens, length, interpret=True), tokens)
    np.testing.assert_array_equal(found, expected)
    cotangent = jax.random.normal(jax.random.key(0), found.shape, jnp.bfloat16)
    returned, forth = jax.vjp(lambda by_head: tokens_first(by_head, 2, count, interpret=True), cotangent)
    np.testing.assert_array_equal(back(cotangent)[0], returned)
    np.testing.assert_array_equal(returned, jnp.swapaxes(cotangent[:, :count].reshape(2, 3, count, 128), 1, 2))
    np.testing.assert_array_equal(forth(tokens)[0], expected)


def test_padded_keys_weigh_nothing_where_all_scores_are_low():
    query, key, value, cotangent = random_arrays(130, 150)
    arrays = (query + 30, key - 30, value, cotangent)  # scores of about -7000, where a padded key would have 0
    expected = of_pytorch(*arrays)["output"]
    # float32 scores of 7000 are off by up to 5e-4 each, and so are the weights.
    np.testing.assert_allclose(interpreted(*arrays[:3]), expected, atol=5e-3)


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


def count_kernels(compiled):
    """Of attention; the others take heads before tokens and back."""
    calls = re.findall(r'%([\w.\-]+) = .*custom_call_target="tpu_custom_call"', compiled.as_text())
    return sum("heads_first" not in name and "tokens_first" not in name for name in calls)


# Attention to the text is the same kernels with shorter blocks of keys, so the chip with the least VMEM stands for all.
@pytest.mark.parametrize(
    "topology, keys",
    [*((topology, 21 * TOKENS_PER_FRAME) for topology in TOPOLOGIES), ("v5e:2x2", WAN.text_length)],
    ids=[*TOPOLOGIES, "text"],
)
def test_on_tpus_wan_attention_is_a_forward_and_a_backward_kernel_and_no_branch(topology, keys):
    compiled = compiled_gradient(topology, 21 * TOKENS_PER_FRAME, keys)
    assert count_kernels(compiled) == 2
    assert " conditional(" not in compiled.as_text()
    # 2.2 GiB, most of it copies of the queries' gradient. The scores would be 48 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 2**30


def test_on_tpus_memory_grows_linearly_once_videos_are_long():
    compiled = compiled_gradient("v5e:2x2", 41 * TOKENS_PER_FRAME, 41 * TOKENS_PER_FRAME)
    assert count_kernels(compiled) == 3  # the backward pass in two, without copies: those would be 6 GiB
    tokens = 4 * 41 * TOKENS_PER_FRAME * WAN.width * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * tokens


def test_on_tpus_short_sequences_are_left_to_xla():
    assert count_kernels(compiled_gradient("v5e:2x2", 300, 300)) == 0


@pytest.mark.parametrize(
    "implementation, arguments, message",
    [
        ("flash", {}, r"implementation must be one of .*'splash'.* or None, found 'flash'"),
        ("splash", {"dtype": "float16"}, r'dtype bfloat16 or float32 for "splash", found float16; "xla" takes it'),
        ("splash", {"head_dim": 32}, r'head_dim must be one of \(64, 128\) for "splash", found 32; "xla" takes any'),
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
