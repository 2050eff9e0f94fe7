"""Every implementation of hybrid attention, as it runs on a CPU, against the reference and other oracles."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_oracles import (
    F32,
    F64,
    FORMS,
    STABILIZERS,
    TPU_F32,
    assert_close,
    attention,
    attention_by_loops,
    error_ratio,
    jit,
    make_arrays,
    output_and_gradients,
    reference_results,
    streamed,
    tpu_kernels_as_xla,
    with_scores_near,
)
from dense_flash import dense_backward, dense_cudnn
from hopper_interpreter import interpreted_kernel

from rehyat_jax.attention import HybridState
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels
from rehyat_jax.attention.hybrid.gpu.hopper import hopper_window_forward

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Weights, states, cotangents and results are each rounded to 8 bits: a few times 2**-9.
BF16 = 2**-6


@contextlib.contextmanager
def interpreted_hopper():
    """Its backward is cuDNN's, so dense products here."""
    kernels = WindowKernels(hopper_window_forward, dense_backward)
    with mock.patch("rehyat_jax.attention.hybrid.pallas_gpu.KERNELS", kernels), interpreted_kernel():
        yield


ALTERNATING = tuple(
    (form, causal, STABILIZERS[(i + causal) % 2]) for i, form in enumerate(FORMS) for causal in (True, False)
)
CONTINUED = (
    *itertools.product([(7, 2, 2, 1)], [(2, 4, 1)], STABILIZERS, [True, False]),
    *itertools.product([(6, 1, 3, 0)], [(3, 3)], STABILIZERS, [True]),
    ((4, 2, 1, 1), (1, 2, 1), "joint", True),
    ((5, 2, 2, 2), (4, 1), "joint", False),
)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How an implementation is tested.

    Attributes:
      name: for `hybrid_attention`.
      inputs: what `make_arrays` is given besides a form; the widest dtype that runs, and sizes that do.
      tolerance: of error ratios in that dtype, by stabilizer.
      float32: the same in float32.
      cases: (form, causal, stabilizer) to compare outputs and gradients at.
      continued: (form, frames of each call, stabilizer, causal) to do in several calls.
      on_cpu: makes the context in which a CPU can run it.
    """

    name: str
    inputs: dict
    tolerance: dict[str, float]
    float32: float = F32
    cases: Sequence[tuple] = ALTERNATING
    continued: Sequence[tuple] = CONTINUED
    on_cpu: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __str__(self):
        return self.name

    def arrays(self, form, **inputs):
        return make_arrays(*form[:2], **(self.inputs | inputs))

    def attention(self, form, causal=True, stabilizer="row_max", **arguments):
        return attention(form, causal, stabilizer, self.name, **arguments)


SCAN, XLA = (Implementation(name, dict(dtype=np.float64), dict(row_max=F64, joint=F64)) for name in ("scan", "xla"))
# By dense products, which take float64.
CUDNN = Implementation(
    "cudnn",
    dict(dtype=np.float64),
    # The row's maximum is found to log(equal scores) / 2**16, and no two scores here are equal: F32 whatever the dtype.
    dict(row_max=F32, joint=F64),
    on_cpu=dense_cudnn,
)
PALLAS_TPU = Implementation(
    "pallas_tpu",
    dict(dtype=np.float32, head_dim=64, features=128),
    dict(row_max=TPU_F32, joint=TPU_F32),
    float32=TPU_F32,
    cases=(*ALTERNATING, ((4, 12, 3, 1), True, "row_max"), ((4, 12, 3, 1), False, "joint")),
    continued=(
        ((7, 8, 2, 1), (2, 4, 1), "row_max", True),
        ((7, 8, 2, 1), (4, 3), "joint", False),  # "joint" in causal parts: tests/test_hybrid_options.py
    ),
    on_cpu=tpu_kernels_as_xla,
)
PALLAS_GPU = Implementation(
    "pallas_gpu",
    dict(batch=1, heads=1, dtype=jnp.bfloat16, head_dim=128, features=256),
    dict(row_max=BF16, joint=BF16),
    # Tiles of 128 queries and blocks of 128 keys fit neither the chunks of 150 tokens nor their windows of 200; the
    # last chunk is ragged, and the first has no overlap. The other form has one whole tile a chunk. 256 features are
    # two steps. A case takes ten seconds: no other test runs this implementation.
    cases=(((5, 50, 3, 1), True, "row_max"), ((4, 64, 2, 1), False, "joint")),
    on_cpu=interpreted_hopper,
)
IMPLEMENTATIONS = (SCAN, XLA, CUDNN, PALLAS_TPU)


@pytest.fixture
def implementation(request):
    with request.param.on_cpu(), jax.enable_x64(request.param.inputs["dtype"] == np.float64):
        yield request.param


def each(implementations=IMPLEMENTATIONS):
    return pytest.mark.parametrize("implementation", implementations, ids=str, indirect=True)


@pytest.mark.parametrize(
    "implementation, form, causal, stabilizer",
    [(implementation, *case) for implementation in (*IMPLEMENTATIONS, PALLAS_GPU) for case in implementation.cases],
    ids=str,
    indirect=["implementation"],
)
def test_outputs_and_all_gradients_equal_the_reference(implementation, form, causal, stabilizer):
    inputs = dict(batch=2) | implementation.inputs
    found = output_and_gradients(implementation.attention(form, causal, stabilizer), make_arrays(*form[:2], **inputs))
    expected = reference_results(form, causal, stabilizer, **inputs)
    assert_close(found, expected, implementation.tolerance[stabilizer])


@each([SCAN, XLA, CUDNN])  # of "pallas_tpu" the above is this test
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_float32_is_as_exact_as_its_rounding(implementation, stabilizer):
    form, causal = FORMS[0], stabilizer == "joint"
    inputs = implementation.inputs | dict(batch=2, dtype=np.float32)
    found = output_and_gradients(implementation.attention(form, causal, stabilizer), make_arrays(*form[:2], **inputs))
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_close(found, reference_results(form, causal, stabilizer, **inputs), implementation.float32)


@each()
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_bfloat16_is_as_exact_as_its_rounding(implementation, stabilizer):
    form, inputs = (5, 16, 2, 1), implementation.inputs | dict(dtype=jnp.bfloat16)
    found = output_and_gradients(implementation.attention(form, True, stabilizer), make_arrays(*form[:2], **inputs))
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = reference_results(form, True, stabilizer, **inputs)
    assert_close(found, expected, BF16)
    assert_close(found["output"], expected["output"], 2**-7)


def softmax_attention_of_pytorch(query, key, value, mask=None):
    """Nobody here wrote it, and unlike jax's it computes in float64."""
    heads_first = [torch.tensor(np.asarray(array, np.float64)).transpose(1, 2) for array in (query, key, value)]
    mask = None if mask is None else torch.tensor(mask)
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).numpy()


def exact_features(tokens, points, head_dim, rng):
    """Queries and keys from small finite sets, and features of them whose product is exp(q.k / sqrt(head_dim))."""
    query_points, key_points = rng.normal(size=(2, points, head_dim))
    query_index, key_index = rng.integers(points, size=(2, 1, tokens, 2))
    kernel = np.exp(query_points @ key_points.T / np.sqrt(head_dim))
    one_hot = np.eye(points)[query_index]
    return query_points[query_index], key_points[key_index], one_hot, np.moveaxis(kernel[:, key_index], 0, -1)


@each()
@pytest.mark.parametrize("causal", [True, False])
def test_joint_form_with_exact_features_is_softmax_attention(implementation, causal):
    form = frames, tokens_per_frame, chunk_frames, _ = (7, 3, 2, 1)
    head_dim, points = (implementation.arrays(form)[i].shape[-1] for i in (0, 3))
    rng = np.random.default_rng(0)
    query, key, *features = exact_features(frames * tokens_per_frame, points, head_dim, rng)
    value = rng.normal(size=query.shape)
    arrays = [jnp.asarray(array, implementation.inputs["dtype"]) for array in (query, key, value, *features)]
    found = jit(implementation.attention(form, causal, "joint"))(*arrays)

    chunk = np.arange(frames * tokens_per_frame) // (chunk_frames * tokens_per_frame)
    mask = chunk[:, None] >= chunk if causal else None
    assert_close(found, softmax_attention_of_pytorch(query, key, value, mask), implementation.tolerance["joint"])


@each()
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_one_chunk_for_the_whole_video_is_softmax_attention(implementation, stabilizer):
    form = (3, 5, 4, 2)
    arrays = implementation.arrays(form)
    found = jit(implementation.attention(form, stabilizer == "joint", stabilizer))(*arrays)
    assert_close(found, softmax_attention_of_pytorch(*arrays[:3]), implementation.tolerance[stabilizer])


@each()
def test_frames_outside_the_window_have_no_order_and_the_future_no_influence(implementation):
    form = frames, tokens_per_frame, _, _ = (8, 2, 2, 1)
    attend, tolerance = jit(implementation.attention(form)), implementation.tolerance["row_max"]
    arrays = [np.asarray(array) for array in implementation.arrays(form)]
    arrays = [array.reshape(1, frames, tokens_per_frame, *array.shape[2:]) for array in arrays]
    flat = lambda arrays: [array.reshape(1, frames * tokens_per_frame, *array.shape[3:]) for array in arrays]
    run = lambda arrays: np.asarray(attend(*flat(arrays))).reshape(arrays[0].shape)
    output = run(arrays)

    # The window of the last chunk begins at frame 5.
    order = np.array([3, 0, 4, 2, 1, 5, 6, 7])
    permuted = run([array[:, order] for array in arrays])
    assert_close(permuted[:, 6:], output[:, 6:], tolerance)
    assert error_ratio(permuted[:, 4:6], output[:, 4:6]) > 0.01

    changed = run([array + (np.arange(frames) == 4)[:, None, None, None].astype(array.dtype) for array in arrays])
    assert_close(changed[:, :4], output[:, :4], tolerance)
    assert error_ratio(changed[:, 4:], output[:, 4:]) > 0.01


@pytest.mark.parametrize(
    "implementation, form, groups, stabilizer, causal",
    [(implementation, *case) for implementation in IMPLEMENTATIONS for case in implementation.continued],
    ids=str,
    indirect=["implementation"],
)
def test_video_continued_from_its_state_equals_one_call(implementation, form, groups, stabilizer, causal):
    inputs = implementation.inputs | dict(batch=2)
    attend = streamed(form, implementation.name, groups, stabilizer, causal)
    found = output_and_gradients(attend, make_arrays(*form[:2], **inputs))
    expected = reference_results(form, causal, stabilizer, **inputs)
    assert_close(found, expected, implementation.tolerance[stabilizer])


@each()
@pytest.mark.parametrize("overlap_frames", [0, 1, 2])
def test_state_holds_the_sums_over_frames_that_left_and_the_overlap_itself(implementation, overlap_frames):
    form = (6, 12, 2, overlap_frames)
    query, key, value, phi_query, phi_key = (np.asarray(array) for array in implementation.arrays(form))
    output, state = jit(implementation.attention(form, return_state=True))(query, key, value, phi_query, phi_key)

    split = (6 - overlap_frames) * 12
    past, overlap = slice(None, split), slice(split, None)
    wide_value, wide_phi_key = (np.asarray(array, np.float64) for array in (value, phi_key))
    sums = lambda tokens: {
        "state": np.einsum("bnhf,bnhd->bhfd", wide_phi_key[:, tokens], wide_value[:, tokens]),
        "normalizer": wide_phi_key[:, tokens].sum(1),
    }
    found = {"past": state.past._asdict(), "overlap": state.overlap._asdict()}
    tolerance = implementation.tolerance["row_max"]
    assert_close(found, {"past": sums(past), "overlap": sums(overlap)}, tolerance)
    np.testing.assert_array_equal(state.overlap_key, key[:, overlap])
    np.testing.assert_array_equal(state.overlap_value, value[:, overlap])
    assert state.chunks == 3

    sizes = (*query.shape[2:], phi_key.shape[-1])
    start = HybridState.zeros(
        1,
        *sizes,
        tokens_per_frame=12,
        chunk_frames=2,
        overlap_frames=overlap_frames,
        stabilizer="row_max",
        dtype=query.dtype,
    )
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, start)
    expected = reference_results(form, True, "row_max", **implementation.inputs)["output"]
    assert_close(output, expected, tolerance)


@each()
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_state_can_be_a_scan_carry_with_float32_sums(implementation, dtype):
    form = (6, 8, 2, 1)
    arrays = [np.asarray(array) for array in implementation.arrays(form, dtype=dtype)]
    chunks = [np.moveaxis(array.reshape(1, 3, 16, *array.shape[2:]), 1, 0) for array in arrays]
    sizes = (*arrays[0].shape[2:], arrays[-1].shape[-1])
    start = HybridState.zeros(1, *sizes, tokens_per_frame=8, overlap_frames=1, dtype=dtype)

    def step(state, chunk):
        output, state = implementation.attention(form, initial_state=state, return_state=True)(*chunk)
        return state, output

    final, outputs = jit(lambda start, chunks: jax.lax.scan(step, start, chunks))(start, chunks)
    found = np.moveaxis(np.asarray(outputs), 0, 1).reshape(arrays[0].shape)
    tolerance = implementation.float32 if dtype == np.float32 else 2**-7  # as in the test of bfloat16 above
    assert_close(found, attention_by_loops(arrays, form, True, "row_max"), tolerance)
    assert {leaf.dtype for leaf in jax.tree.leaves((final.past, final.overlap))} == {np.dtype(np.float32)}


# (score, logarithm of the factor of a linear weight), a video each: all that a test costs is compiling.
EXTREMES = [
    (200.0, 0.0),
    (-200.0, 0.0),
    (-60.0, 40.0),  # exp(100) apart: neither may be the scale of the other
    (-60.0, -60.0),  # equally tiny: both count
]
# Scores of videos whose features are zero, which leaves the window alone.
WITHOUT_FEATURES = [0.0, -200.0]


@each()
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_extreme_scores_and_extreme_and_zero_features_are_right_in_float32(implementation, stabilizer):
    form, (scores, log_similarities) = (5, 4, 2, 1), np.array(EXTREMES, np.float32).T
    arrays = implementation.arrays(form, batch=len(EXTREMES + WITHOUT_FEATURES), dtype=np.float32)
    *arrays, phi_query, phi_key = with_scores_near(arrays, [*scores, *WITHOUT_FEATURES])
    factors = np.array([*np.exp(log_similarities / 2), *(0.0 for _ in WITHOUT_FEATURES)], np.float32)
    arrays += [np.asarray(phi) * factors[:, None, None, None] for phi in (phi_query, phi_key)]
    found = output_and_gradients(implementation.attention(form, True, stabilizer), arrays)
    assert all(np.isfinite(array).all() for array in found.values())
    videos = lambda part: [array[part] for array in arrays]
    extreme, zero = slice(len(EXTREMES)), slice(len(EXTREMES), None)
    exact = [
        *attention_by_loops(videos(extreme), form, True, stabilizer),
        # "row_max" as loops whatever the stabilizer: without linear mass c cancels.
        *attention_by_loops(videos(zero), form, True, "row_max"),
    ]
    for video, case in enumerate((*EXTREMES, *WITHOUT_FEATURES)):
        # A score of 200 is rounded by up to 2e-5 in float32.
        tolerance = 1e-4 if case else implementation.float32
        assert_close({case: found["output"][video]}, {case: exact[video]}, tolerance)
