"""What implementations of hybrid attention are compared with, and how."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from rehyat_jax.attention import hybrid_attention, hybrid_key_sums

HEADS, HEAD_DIM, FEATURES = 2, 4, 6
STABILIZERS = ("row_max", "joint")
NAMES = ("query", "key", "value", "phi_query", "phi_key")

# (frames, tokens_per_frame, chunk_frames, overlap_frames): ragged and whole, every kind of overlap, a single chunk.
FORMS = [(7, 1, 3, 1), (5, 9, 2, 0), (6, 5, 3, 2), (5, 5, 2, 2), (3, 1, 1, 1), (2, 5, 3, 1)]

# Rounding of sums of at most a hundred terms: some tens of units in the last place, 2e-16 and 1e-7.
F64, F32 = 1e-13, 1e-5

# The same of some hundred terms, as the TPU kernels' are. The gradients of features decide: they are differences of
# nearly equal terms, where "xla" in float32 is off by 2e-5 too.
TPU_F32 = 5e-5

# Compiling is all that most of these tests cost, so compile without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@contextlib.contextmanager
def tpu_kernels_as_xla():
    """Like `interpreted_tpu`, but only for values: memory and copies are not simulated, which is three times as fast.

    Memory that no kernel has written is NaN here too. tests/test_pallas_tpu.py simulates the rest.
    """
    call = pl.pallas_call
    as_xla = lambda *arguments, **options: call(*arguments, **(options | {"interpret": True}))
    with mock.patch.object(pl, "pallas_call", as_xla), jax.default_matmul_precision("highest"):
        yield


def make_arrays(
    frames, tokens_per_frame, *, batch=1, heads=HEADS, head_dim=HEAD_DIM, features=FEATURES, dtype=np.float64, seed=0
):
    """Query, key and value of order one, and non-negative features: a linear weight is of order one, as a score is."""
    rng = np.random.default_rng(seed)
    widths = (head_dim,) * 3 + (features,) * 2
    arrays = [rng.normal(size=(batch, frames * tokens_per_frame, heads, width)) for width in widths]
    return tuple(jnp.asarray(array, dtype) for array in (*arrays[:3], *(np.abs(arrays[3:]) / features**0.5)))


def with_scores_near(arrays, scores):
    """With q.k / sqrt(head_dim) that is scores[batch] plus or minus a few, for every pair."""
    query, key, *others = (np.array(array) for array in arrays)
    scores = np.asarray(scores, query.dtype)[:, None, None]
    root = np.sqrt(np.abs(scores))
    query[..., 0] = query.shape[-1] ** 0.5 * root
    key[..., 0] = np.sign(scores) * root
    return query, key, *others


def error_ratio(found, expected):
    """max |found - expected| / max |expected|; the absolute error where all that is expected is zeros."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max(initial=0) / (np.abs(expected).max(initial=0) or 1.0)


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


def streamed(form, implementation, groups, stabilizer="row_max", causal=True):
    """The output of one call, as several calls on consecutive groups of frames; only whole chunks hand on a state.

    Unless `causal`, each call also gets the sums over the groups after it.
    """

    def attend(*arrays):
        key, value, phi_key = arrays[1], arrays[2], arrays[4]
        state, outputs, start = None, [], 0
        for frames in groups:
            stop = start + frames * form[1]
            later = None
            if not causal:
                # After the last group the sums over no tokens, zero, are those of a group times 0.
                rest = [array[:, stop:] if stop < key.shape[1] else 0 * array for array in (key, value, phi_key)]
                later = hybrid_key_sums(*rest, tokens_per_frame=form[1], implementation=implementation)
            call = attention(form, causal, stabilizer, implementation, initial_state=state, later=later)
            group = [array[:, start:stop] for array in arrays]
            if frames % form[2]:
                outputs.append(call(*group))
            else:
                output, state = call(*group, return_state=True)
                outputs.append(output)
            start = stop
        return jnp.concatenate(outputs, axis=1)

    return attend


def output_and_gradients(attend, arrays):
    """{"output": y, "query": gradient of <cotangent, y>, ...} with a fixed random cotangent."""
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jit
    def run(arrays):
        output, pullback = jax.vjp(attend, *arrays)
        return {"output": output} | dict(zip(NAMES, pullback(jnp.asarray(cotangent, output.dtype)), strict=True))

    return run(arrays)


@functools.cache
def reference_results(form, causal, stabilizer, **inputs):
    """Output and gradients by the definition, in float64, of what `make_arrays` makes of `form` and `inputs`."""
    with jax.enable_x64(True):
        arrays = [np.asarray(array, np.float64) for array in make_arrays(*form[:2], **inputs)]
        return output_and_gradients(attention(form, causal, stabilizer), arrays)


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
