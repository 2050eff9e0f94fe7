"""Hybrid attention: the reference against the paper's definition, every implementation against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from rehyat_jax.attention import HybridState, hybrid_attention

HEADS, HEAD_DIM, FEATURES = 2, 4, 6
IMPLEMENTATIONS = ("scan", "xla")
STABILIZERS = ("row_max", "joint")
NAMES = ("query", "key", "value", "phi_query", "phi_key")

# Compiling is all that these tests cost, so compile without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Rounding of sums of at most a hundred terms: some tens of units in the last place, 2e-16 and 1e-7.
F64, F32 = 1e-13, 1e-5


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_arrays(frames, tokens_per_frame, *, batch=1, dtype=np.float64, seed=0, head_dim=HEAD_DIM, features=FEATURES):
    """Query, key, value and non-negative features, all of order one."""
    rng = np.random.default_rng(seed)
    widths = (head_dim,) * 3 + (features,) * 2
    arrays = [rng.normal(size=(batch, frames * tokens_per_frame, HEADS, width)) for width in widths]
    return tuple(jnp.asarray(array, dtype) for array in (*arrays[:3], *np.abs(arrays[3:])))


def error_ratio(found, expected):
    """max |found - expected| / max |expected|; the absolute error where all that is expected is zeros."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / (np.abs(expected).max() or 1.0)


def assert_close(found, expected, tolerance):
    """Compares two trees tensor by tensor, in error ratios."""
    ratios = jax.tree.map(error_ratio, found, expected)
    wrong = {
        jax.tree_util.keystr(path): r for path, r in jax.tree_util.tree_leaves_with_path(ratios) if not r < tolerance
    }
    assert not wrong, f"error ratios not below {tolerance}: {wrong}"


def attention(form, causal=True, stabilizer="row_max", implementation="reference", **arguments):
    """`hybrid_attention` with `form` = (frames, tokens_per_frame, chunk_frames, overlap_frames)."""
    return functools.partial(
        hybrid_attention,
        tokens_per_frame=form[1],
        chunk_frames=form[2],
        overlap_frames=form[3],
        causal=causal,
        stabilizer=stabilizer,
        implementation=implementation,
        **arguments,
    )


def output_and_gradients(attend, arrays):
    """{"output": y, "query": gradient of <cotangent, y>, ...} with a fixed random cotangent."""
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jit
    def run(arrays):
        output, pullback = jax.vjp(attend, *arrays)
        return {"output": output} | dict(zip(NAMES, pullback(jnp.asarray(cotangent, output.dtype)), strict=True))

    return run(arrays)


def attention_by_loops(arrays, form, causal, stabilizer):
    """ReHyAt's equations, token by token and key by key over explicit sets of frames, in numpy."""
    query, key, value, phi_query, phi_key = (np.asarray(array, np.float64) for array in arrays)
    num_frames, tokens_per_frame, chunk_frames, overlap_frames = form
    batch, tokens, heads, head_dim = query.shape
    frames = set(range(num_frames))
    output = np.zeros_like(query)
    for b, h, i in np.ndindex(batch, heads, tokens):
        chunk = (i // tokens_per_frame) // chunk_frames
        window = frames & set(range(max(chunk * chunk_frames - overlap_frames, 0), (chunk + 1) * chunk_frames))
        outside = {frame for frame in frames - window if frame < min(window) or not causal}
        softmax_keys, linear_keys = (
            [j for j in range(tokens) if j // tokens_per_frame in kept] for kept in (window, outside)
        )
        scores = [query[b, i, h] @ key[b, j, h] / np.sqrt(head_dim) for j in softmax_keys]
        c = max(scores) if stabilizer == "row_max" else 0.0
        numerator, denominator = np.zeros(head_dim), 0.0
        for j, score in zip(softmax_keys, scores, strict=True):
            numerator += np.exp(score - c) * value[b, j, h]
            denominator += np.exp(score - c)
        for j in linear_keys:
            weight = phi_query[b, i, h] @ phi_key[b, j, h]
            numerator += weight * value[b, j, h]
            denominator += weight
        output[b, i, h] = numerator / denominator
    return output


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


# (frames, tokens_per_frame, chunk_frames, overlap_frames): ragged and whole, every kind of overlap, a single chunk.
FORMS = [(7, 1, 3, 1), (5, 9, 2, 0), (6, 5, 3, 2), (5, 5, 2, 2), (3, 1, 1, 1), (2, 5, 3, 1)]


@functools.cache
def reference_results(form, causal, stabilizer):
    return output_and_gradients(attention(form, causal, stabilizer), make_arrays(*form[:2], batch=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_and_all_gradients_equal_the_reference(implementation, causal, form, x64):
    stabilizer = STABILIZERS[(FORMS.index(form) + causal) % 2]
    arrays = make_arrays(*form[:2], batch=2)
    found = output_and_gradients(attention(form, causal, stabilizer, implementation), arrays)
    assert_close(found, reference_results(form, causal, stabilizer), F64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_float32_is_as_exact_as_its_rounding(implementation, stabilizer, x64):
    form, causal = FORMS[0], stabilizer == "joint"
    arrays = make_arrays(*form[:2], batch=2, dtype=np.float32)
    found = output_and_gradients(attention(form, causal, stabilizer, implementation), arrays)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_close(found, reference_results(form, causal, stabilizer), F32)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_bfloat16_is_as_exact_as_its_rounding(implementation):
    form = FORMS[0]
    arrays = make_arrays(*form[:2], dtype=jnp.bfloat16)
    found = jit(attention(form, implementation=implementation))(*arrays)
    assert found.dtype == jnp.bfloat16
    # Inputs are given as they are; weights, states and output are rounded to 8 bits: a few times 2**-9.
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), 2**-7)


def softmax_attention_of_pytorch(query, key, value, mask=None):
    """Nobody here wrote it, and unlike jax's it computes in float64."""
    heads_first = [torch.tensor(np.asarray(array)).transpose(1, 2) for array in (query, key, value)]
    mask = None if mask is None else torch.tensor(mask)
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).numpy()


def exact_features(tokens, points, rng):
    """Queries and keys from small finite sets, and features of them whose product is exp(q.k / sqrt(head_dim))."""
    query_points, key_points = rng.normal(size=(2, points, HEAD_DIM))
    query_index, key_index = rng.integers(points, size=(2, 1, tokens, HEADS))
    kernel = np.exp(query_points @ key_points.T / np.sqrt(HEAD_DIM))
    one_hot = np.eye(points)[query_index]
    return query_points[query_index], key_points[key_index], one_hot, np.moveaxis(kernel[:, key_index], 0, -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_joint_form_with_exact_features_is_softmax_attention(implementation, causal, x64):
    form = frames, tokens_per_frame, chunk_frames, _ = (7, 3, 2, 1)
    rng = np.random.default_rng(0)
    query, key, phi_query, phi_key = exact_features(frames * tokens_per_frame, 5, rng)
    value = rng.normal(size=query.shape)
    found = jit(attention(form, causal, "joint", implementation))(query, key, value, phi_query, phi_key)

    chunk = np.arange(frames * tokens_per_frame) // (chunk_frames * tokens_per_frame)
    mask = chunk[:, None] >= chunk if causal else None
    assert_close(found, softmax_attention_of_pytorch(query, key, value, mask), F64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_one_chunk_for_the_whole_video_is_softmax_attention(implementation, stabilizer, x64):
    form = (3, 5, 4, 2)
    arrays = make_arrays(*form[:2])
    found = jit(attention(form, stabilizer == "joint", stabilizer, implementation))(*arrays)
    assert_close(found, softmax_attention_of_pytorch(*arrays[:3]), F64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frames_outside_the_window_have_no_order_and_the_future_no_influence(implementation, x64):
    form = frames, tokens_per_frame, _, _ = (8, 2, 2, 1)
    attend = jit(attention(form, implementation=implementation))
    arrays = [array.reshape(1, frames, tokens_per_frame, HEADS, -1) for array in make_arrays(*form[:2])]
    flat = lambda arrays: [array.reshape(1, frames * tokens_per_frame, HEADS, -1) for array in arrays]
    output = attend(*flat(arrays)).reshape(arrays[0].shape)

    # The window of the last chunk begins at frame 5.
    order = np.array([3, 0, 4, 2, 1, 5, 6, 7])
    permuted = attend(*flat([array[:, order] for array in arrays])).reshape(output.shape)
    assert_close(permuted[:, 6:], output[:, 6:], F64)
    assert error_ratio(permuted[:, 4:6], output[:, 4:6]) > 0.01

    changed = attend(*flat([array.at[:, 4].add(1) for array in arrays])).reshape(output.shape)
    assert_close(changed[:, :4], output[:, :4], F64)
    assert error_ratio(changed[:, 4:], output[:, 4:]) > 0.01


def streamed(form, implementation, groups, stabilizer="row_max"):
    """The output of one call, as several calls on consecutive groups of frames; only whole chunks hand on a state."""

    def attend(*arrays):
        state, outputs, start = None, [], 0
        for frames in groups:
            stop = start + frames * form[1]
            call = attention(form, True, stabilizer, implementation, initial_state=state)
            group = [array[:, start:stop] for array in arrays]
            if frames % form[2]:
                outputs.append(call(*group))
            else:
                output, state = call(*group, return_state=True)
                outputs.append(output)
            start = stop
        return jnp.concatenate(outputs, axis=1)

    return attend


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "form, groups",
    [((7, 2, 2, 1), (2, 2, 2, 1)), ((6, 1, 3, 0), (3, 3)), ((4, 2, 1, 1), (1, 2, 1))],
    ids=str,
)
def test_video_continued_from_its_state_equals_one_call(implementation, form, groups, x64):
    stabilizer = STABILIZERS[form[2] % 2]
    found = output_and_gradients(streamed(form, implementation, groups, stabilizer), make_arrays(*form[:2], batch=2))
    assert_close(found, reference_results(form, True, stabilizer), F64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("overlap_frames", [0, 1, 2])
def test_state_holds_the_sums_over_frames_that_left_and_the_overlap_itself(implementation, overlap_frames, x64):
    form = (6, 3, 2, overlap_frames)
    query, key, value, phi_query, phi_key = make_arrays(*form[:2])
    attend = jit(attention(form, implementation=implementation, return_state=True))
    _, state = attend(query, key, value, phi_query, phi_key)

    split = (6 - overlap_frames) * 3
    expected = {
        "past.state": np.einsum("bnhf,bnhd->bhfd", phi_key[:, :split], value[:, :split]),
        "past.normalizer": phi_key[:, :split].sum(1),
        "overlap.state": np.einsum("bnhf,bnhd->bhfd", phi_key[:, split:], value[:, split:]),
        "overlap.normalizer": phi_key[:, split:].sum(1),
    }
    found = {
        f"{part}.{leaf}": getattr(getattr(state, part), leaf)
        for part in ("past", "overlap")
        for leaf in ("state", "normalizer")
    }
    assert_close(found, expected, F64)
    np.testing.assert_array_equal(state.overlap_key, key[:, split:])
    np.testing.assert_array_equal(state.overlap_value, value[:, split:])
    assert state.chunks == 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_can_be_a_scan_carry_with_float32_sums_of_bfloat16_inputs(implementation):
    form = (6, 2, 2, 1)
    arrays = make_arrays(*form[:2], dtype=jnp.bfloat16)
    chunks = [jnp.moveaxis(array.reshape(1, 3, 4, HEADS, -1), 1, 0) for array in arrays]
    start = HybridState.zeros(1, HEADS, HEAD_DIM, FEATURES, tokens_per_frame=2, overlap_frames=1, dtype=jnp.bfloat16)

    def step(state, chunk):
        call = attention(form, implementation=implementation, initial_state=state, return_state=True)
        output, state = call(*chunk)
        return state, output

    final, outputs = jit(lambda start, chunks: jax.lax.scan(step, start, chunks))(start, chunks)
    found = jnp.moveaxis(outputs, 0, 1).reshape(arrays[0].shape)
    # As in the test of bfloat16 above.
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), 2**-7)
    assert {leaf.dtype for leaf in jax.tree.leaves((final.past, final.overlap))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize(
    "score, log_similarity",
    [
        (200.0, 0.0),
        (-200.0, 0.0),
        (-60.0, 40.0),  # exp(100) apart: neither may be the scale of the other
        (-60.0, -60.0),  # equally tiny: both count
    ],
)
def test_extreme_scores_and_features_are_right_in_float32(implementation, stabilizer, score, log_similarity, x64):
    form = (5, 2, 2, 1)
    query, key, value, phi_query, phi_key = make_arrays(*form[:2], dtype=np.float32)
    # q.k / sqrt(4) is `score` plus or minus a few for every pair.
    query = query.at[..., 0].set(2 * abs(score) ** 0.5)
    key = key.at[..., 0].set(score / abs(score) ** 0.5)
    phi_query, phi_key = (phi * np.float32(np.exp(log_similarity / 2)) for phi in (phi_query, phi_key))
    arrays = (query, key, value, phi_query, phi_key)
    found = output_and_gradients(attention(form, True, stabilizer, implementation), arrays)
    assert all(np.isfinite(array).all() for array in found.values())
    exact = attention_by_loops(arrays, form, True, stabilizer)
    # A score of 200 is rounded by up to 2e-5 in float32.
    assert_close(found["output"], exact, 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("score", [0.0, -200.0])
def test_zero_features_leave_the_window_alone(implementation, stabilizer, score):
    form = (5, 2, 2, 1)
    query, key, value, phi_query, phi_key = make_arrays(*form[:2], dtype=np.float32)
    query, key = query.at[..., 0].set(20.0), key.at[..., 0].set(score / 10)
    arrays = (query, key, value, jnp.zeros_like(phi_query), jnp.zeros_like(phi_key))
    found = output_and_gradients(attention(form, True, stabilizer, implementation), arrays)
    assert all(np.isfinite(array).all() for array in found.values())
    # "row_max" as loops whatever the stabilizer: without linear mass c cancels. Tolerance as above.
    assert_close(found["output"], attention_by_loops(arrays, form, True, "row_max"), 1e-4)


def products_with_scores(jaxpr, queries, keys):
    """How many matrix products, at any depth, read or write an array with both these dimensions."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        is_product = equation.primitive.name == "dot_general"
        count += is_product and any(queries in shape and keys in shape for shape in shapes)
        count += sum(products_with_scores(inner, queries, keys) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
