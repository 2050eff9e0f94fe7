"""Hybrid attention's definition: the reference against the paper's equations; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import (
    F64,
    FEATURES,
    FORMS,
    HEAD_DIM,
    HEADS,
    NAMES,
    STABILIZERS,
    assert_close,
    attention,
    attention_by_loops,
    jit,
    make_arrays,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from rehyat_jax.attention import HybridState, hybrid_attention


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 7),
    tokens_per_frame=st.integers(1, 3),
    chunk_frames=st.integers(1, 4),
    overlap_frames=st.integers(0, 4),
    causal=st.booleans(),
    stabilizer=st.sampled_from(STABILIZERS),
)
def test_reference_is_the_papers_definition(frames, tokens_per_frame, chunk_frames, overlap_frames, causal, stabilizer):
    form = (frames, tokens_per_frame, chunk_frames, min(overlap_frames, chunk_frames))
    with jax.enable_x64(True):
        arrays = make_arrays(frames, tokens_per_frame)
        found = jit(attention(form, causal, stabilizer))(*arrays)
    assert_close(found, attention_by_loops(arrays, form, causal, stabilizer), F64)


def test_reference_in_bfloat16_is_as_exact_as_its_rounding():
    form = FORMS[0]
    arrays = make_arrays(*form[:2], dtype=jnp.bfloat16)
    found = jit(attention(form))(*arrays)
    assert found.dtype == jnp.bfloat16
    # Inputs are given as they are; weights, states and output are rounded to 8 bits: a few times 2**-9.
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), 2**-7)


def products_with_scores(jaxpr, queries, keys):
    """How many matrix products, at any depth, read or write an array with both these dimensions."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        is_product = equation.primitive.name == "dot_general"
        count += is_product and any(queries in shape and keys in shape for shape in shapes)
        count += sum(products_with_scores(inner, queries, keys) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_gradient_of_the_features_alone_needs_no_softmax_backward(implementation, stabilizer):
    form = (12, 5, 3, 1)
    arrays = make_arrays(*form[:2], dtype=np.float32)

    def products(argnums):
        loss = lambda *arrays: attention(form, True, stabilizer, implementation)(*arrays).sum()
        return products_with_scores(jax.make_jaxpr(jax.grad(loss, argnums))(*arrays).jaxpr, 15, 20)

    assert products((3, 4)) == 2  # the scores and the weighted values
    assert products((0, 1, 2)) == 6  # and their four transposes


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens_per_frame=4), r"10 tokens, not a positive multiple of tokens_per_frame=4"),
        (dict(chunk_frames=0), r"chunk_frames must be at least 1, found 0"),
        (dict(overlap_frames=3), r"overlap_frames must be between 0 and chunk_frames=2.*found 3"),
        (dict(overlap_frames=-1), r"overlap_frames must be between 0"),
        (dict(stabilizer="max"), r"stabilizer must be one of .*'row_max', 'joint'.*found 'max'"),
        (dict(implementation="triton"), r"implementation must be one of .*found 'triton'"),
        (dict(query=np.zeros((10, 2, 4))), r"query must be \[batch, tokens, heads, head_dim\]"),
        (dict(query=np.zeros((1, 10, 2, 4), int)), r"query must be of a floating dtype, found int"),
        (dict(key=np.zeros((1, 8, 2, 4), np.float32)), r"key must have query's shape \(1, 10, 2, 4\)"),
        (dict(value=np.zeros((1, 10, 2, 4), np.float16)), r"value must have query's .*float32, found .*float16"),
        (dict(phi_key=np.zeros((1, 10, 2, 5), np.float32)), r"found phi_key of shape \(1, 10, 2, 5\)"),
        (dict(phi_query=np.zeros((1, 10, 2, 6), np.float16)), r"phi_query must be of dtype float32.*found float16"),
        (dict(return_state=True), r"return_state needs whole chunks: found 5 frames.*without return_state"),
        (dict(return_state=True, causal=False), r"need causal=True"),
        (dict(return_state=True, implementation="reference"), r'use "scan" or "xla"'),
        (dict(initial_state=0), r"initial_state must be a HybridState, found int"),
    ],
)
def test_errors_say_what_was_expected_and_found(change, message):
    arguments = dict(zip(NAMES, make_arrays(5, 2, dtype=np.float32), strict=True))
    arguments |= dict(tokens_per_frame=2, chunk_frames=2, overlap_frames=1)
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**(arguments | change))


def test_state_of_another_geometry_is_refused():
    state = HybridState.zeros(1, HEADS, HEAD_DIM, FEATURES, tokens_per_frame=3, overlap_frames=1)
    call = attention((4, 2, 2, 1), implementation="scan", initial_state=state)
    with pytest.raises(
        ValueError, match=r"initial_state\.overlap_key must be float32\[1, 2, 2, 4\], found .*\[1, 3, 2, 4\]"
    ):
        call(*make_arrays(4, 2, dtype=np.float32))
