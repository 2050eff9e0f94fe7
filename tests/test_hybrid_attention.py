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
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from rehyat_jax import FeatureMap, FeatureMapConfig, WanConfig, WanTransformer
from rehyat_jax.attention import HybridState, hybrid_attention, hybrid_attention_weights


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


def _map_of(heads):
    return FeatureMap(FeatureMapConfig(features=6), heads=heads, head_dim=HEAD_DIM, rngs=nnx.Rngs(0))


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
        (dict(return_state=True, causal=False), r"expected later, the sums over the frames after these .*, found None"),
        (dict(return_state=True, implementation="reference"), r'use "scan" or "xla"'),
        (dict(initial_state=0), r"initial_state must be a HybridState, found int"),
        (dict(phi_query=None), r"phi_query must be features .* or a feature map, found None"),
        (dict(chunk_frames=2.0), r"chunk_frames must be an integer, found 2.0"),
        (dict(tokens_per_frame="2"), r"tokens_per_frame must be an integer, found '2'"),
        (dict(phi_key=_map_of(heads=3)), r"phi_key: expected a map of 2 heads, as query has, found 3"),
        # What is wrong with the queries is said before a map is called on them.
        (dict(query=np.zeros((10, 2, 4)), phi_query=_map_of(heads=2)), r"query must be \[batch, tokens, heads"),
        (dict(tokens_per_frame=3), r"its shape \(1, 10, 2, 4\) must be \[batch, tokens, heads, head_dim\]"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((4, 2, 4, 1), "is of chunk_frames=2, found chunk_frames=4"),
        ((4, 2, 2, 0), "is of overlap_frames=1, found overlap_frames=0"),
        ((4, 2, 2, 1, "joint"), "is of stabilizer='row_max', found stabilizer='joint'"),
    ],
)
def test_a_video_continues_in_the_form_that_it_began_with(change, message):
    arrays = make_arrays(4, 2, dtype=np.float32)
    _, state = attention((4, 2, 2, 1), implementation="scan", return_state=True)(*arrays)
    form, stabilizer = change[:4], change[4:] or ("row_max",)
    call = attention(form, implementation="scan", initial_state=state, stabilizer=stabilizer[0])
    with pytest.raises(ValueError, match=message):
        call(*arrays)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_one_and_give_the_output(causal, stabilizer):
    form = dict(tokens_per_frame=2, chunk_frames=2, overlap_frames=1, causal=causal, stabilizer=stabilizer)
    query, key, value, *features = make_arrays(5, 2, dtype=np.float32)
    softmax, linear = hybrid_attention_weights(query, key, *features, **form)
    np.testing.assert_allclose((softmax + linear).sum(-1), 1, atol=1e-6)
    # A key is in the window or outside it.
    assert not np.any((softmax > 0) & (linear > 0))
    output = np.einsum("bhqk,bkhd->bqhd", softmax + linear, value)
    np.testing.assert_allclose(output, hybrid_attention(query, key, value, *features, **form), atol=1e-5)


def test_weights_of_a_long_video_are_refused():
    arrays = [np.zeros((1, 20_000, 1, 1), np.float32)] * 4
    with pytest.raises(ValueError, match="at most 268435456 weights, found 400000000"):
        hybrid_attention_weights(*arrays, tokens_per_frame=1, chunk_frames=1, overlap_frames=0)


def test_a_state_is_shown_by_its_shapes():
    state = HybridState.zeros(1, 2, 4, 6, tokens_per_frame=3, overlap_frames=1)
    assert repr(state) == (
        "HybridState(chunks=0, past=LinearState(state=float32[1, 2, 6, 4], normalizer=float32[1, 2, 6]), "
        "overlap=LinearState(state=float32[1, 2, 6, 4], normalizer=float32[1, 2, 6]), "
        "overlap_key=float32[1, 3, 2, 4], overlap_value=float32[1, 3, 2, 4])"
    )
    assert "chunks=int32[]" in str(jax.eval_shape(lambda: state))
    assert "state=0, normalizer=0" in repr(jax.tree.map(lambda _: 0, state))


def test_a_model_refuses_an_unknown_implementation():
    config = WanConfig(num_heads=1, head_dim=8, ffn_dim=8, num_layers=1)
    with pytest.raises(ValueError, match=r"attention_implementation must be one of .*'xla'.*found 'triton'"):
        nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), attention_implementation="triton"))
