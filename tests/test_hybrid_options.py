"""Anchors, decay, gates of keys, separate branches, linear windows: every implementation against the definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import F64, STABILIZERS, TPU_F32, assert_close, attention, jit, make_arrays, tpu_kernels_as_xla
from dense_flash import dense_cudnn
from test_mesh_attention import mesh_of, padded

from rehyat_jax.attention import (
    HybridState,
    InlineFeatures,
    hybrid_attention,
    hybrid_attention_weights,
    hybrid_key_sums,
)
from rehyat_jax.attention.features.inline import identity
from rehyat_jax.attention.on_mesh import hybrid_attention_on_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# (frames, tokens_per_frame, chunk_frames, overlap_frames, anchor_frames): anchors within the first window, beyond the
# second one's beginning, all of the first chunk; ragged and complete.
ANCHORED = [(8, 2, 3, 1, 1), (7, 2, 3, 1, 3), (6, 3, 2, 2, 2), (5, 2, 2, 0, 1)]
# Distinct decays of the heads: almost none, and half a frame's weight.
LOG_DECAY, GATE = np.array([-0.05, -0.7]), np.array([0.3, -0.2])
OPTIONS = {
    "anchors": {},
    "decay": {"log_decay": LOG_DECAY},
    "branches": {"branch_gate": GATE},
    "all": {"log_decay": LOG_DECAY, "branch_gate": GATE},
    "linear window": {},
    "linear window, anchors, branches": {"branch_gate": GATE},
}


def flags(form, name):
    """The options of a name in `OPTIONS` that are no arrays."""
    anchors = form[4] if name == "all" or "anchors" in name else 0
    return {"anchor_frames": anchors, "linear_window": "linear window" in name}


def attend_with(form, implementation, causal, stabilizer, name):
    """(query, key, value, phi_query, phi_key, gain, *per_head) -> output; `gain` multiplies phi_key."""

    def attend(query, key, value, phi_query, phi_key, gain, *arrays):
        options = flags(form, name) | dict(zip(OPTIONS[name], arrays, strict=True))
        return attention(form[:4], causal, stabilizer, implementation, **options)(
            query, key, value, phi_query, InlineFeatures(phi_key, (), identity, gain)
        )

    return attend


def arrays_of(form, batch=1):
    gain = np.random.default_rng(3).uniform(0.5, 2, (batch, form[0] * form[1], 2))
    return (*make_arrays(*form[:2], batch=batch), jnp.asarray(gain))


def results(attend, arrays):
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jit
    def run(arrays):
        output, pullback = jax.vjp(attend, *arrays)
        return output, pullback(jnp.asarray(cotangent, output.dtype))

    return jax.tree.map(np.asarray, run(arrays))


@functools.cache
def expected(form, causal, stabilizer, name, batch=1):
    with jax.enable_x64(True):
        arrays = (*arrays_of(form, batch), *map(jnp.asarray, OPTIONS[name].values()))
        return results(attend_with(form, "reference", causal, stabilizer, name), arrays)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form, name", [*zip(ANCHORED * 2, OPTIONS, strict=False), (ANCHORED[1], "all")], ids=str)
def test_outputs_and_gradients_are_those_of_the_definition(implementation, causal, form, name):
    stabilizer = STABILIZERS[causal]
    with jax.enable_x64(True):
        arrays = (*arrays_of(form), *map(jnp.asarray, OPTIONS[name].values()))
        attend = attend_with(form, implementation, causal, stabilizer, name)
        assert_close(results(attend, arrays), expected(form, causal, stabilizer, name), F64)


def test_weights_are_those_that_the_options_say():
    """The definition itself, written out by loops over frames of one token."""
    frames, chunk, overlap, anchors = 7, 2, 1, 1
    form = dict(tokens_per_frame=1, chunk_frames=chunk, overlap_frames=overlap, anchor_frames=anchors)
    with jax.enable_x64(True):
        query, key, _, phi_query, phi_key = map(np.asarray, make_arrays(frames, 1))
        weights = hybrid_attention_weights(
            query, key, phi_query, phi_key, log_decay=LOG_DECAY, branch_gate=GATE, causal=False, **form
        )
        softmax, linear = map(np.asarray, weights)
    for t, j, head in itertools.product(range(frames), range(frames), range(2)):
        first, end = t // chunk * chunk - overlap, (t // chunk + 1) * chunk
        in_softmax = first <= j < end or j < anchors
        assert (softmax[0, head, t, j] > 0) == in_softmax and (linear[0, head, t, j] != 0) == (not in_softmax)
    # Decay: two frames before the window of frame 4's chunk, [3, 6), is one frame further than one before.
    similarity = np.einsum("nhf,mhf->hnm", phi_query[0], phi_key[0])
    ratio = linear[0, :, 4, 1] / linear[0, :, 4, 2] / (similarity[:, 4, 1] / similarity[:, 4, 2])
    np.testing.assert_allclose(ratio, np.exp(LOG_DECAY), rtol=1e-12)
    with jax.enable_x64(True):
        weights = hybrid_attention_weights(query, key, phi_query, phi_key, linear_window=True, **form)
    both = (np.asarray(weights[0]) > 0) & (np.asarray(weights[1]) > 0)
    for t, j in itertools.product(range(frames), range(frames)):
        in_window = t // chunk * chunk - overlap <= j < (t // chunk + 1) * chunk
        assert both[0, :, t, j].all() == (in_window and j >= anchors)
    np.testing.assert_allclose(sum(map(np.asarray, weights)).sum(-1), 1, rtol=1e-12)
    # Branches: each sums to its share.
    np.testing.assert_allclose(linear[0].sum(-1), np.broadcast_to(GATE[:, None], (2, frames)), rtol=1e-12)
    np.testing.assert_allclose(softmax.sum(-1) + linear.sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("name", ["anchors", "all", "linear window, anchors, branches"])
def test_a_video_continued_from_its_state_equals_one_call(implementation, name):
    form, options = (8, 2, 3, 1, 2), OPTIONS[name]
    with jax.enable_x64(True):
        *arrays, _ = arrays_of(form)
        call = attention(form[:4], True, "joint", implementation, **flags(form, name), **options)

        @jax.jit
        def complete_and_in_parts(arrays):
            outputs, state = [], None
            for start, stop in ((0, 3), (3, 6), (6, 8)):
                part = [array[:, 2 * start : 2 * stop] for array in arrays]
                if stop == 8:
                    outputs.append(call(*part, initial_state=state))
                else:
                    output, state = call(*part, initial_state=state, return_state=True)
                    outputs.append(output)
            assert state.anchor_key.shape == (1, 4, 2, 4)
            return call(*arrays), jnp.concatenate(outputs, axis=1)

        complete, in_parts = complete_and_in_parts(arrays)
    assert_close(in_parts, complete, F64)


def test_a_state_of_zeros_begins_a_video_with_a_linear_window():
    arrays = make_arrays(3, 2, dtype=np.float32)
    sizes = dict(tokens_per_frame=2, overlap_frames=1, chunk_frames=3, stabilizer="joint", linear_window=True)
    start = HybridState.zeros(1, 2, 4, 6, **sizes)
    call = attention((3, 2, 3, 1), True, "joint", "scan", linear_window=True, return_state=True)
    output, state = call(*arrays, initial_state=start)
    np.testing.assert_array_equal(output, call(*arrays)[0])
    assert jax.tree.structure(state) == jax.tree.structure(start)


@pytest.mark.parametrize(
    "implementation, sizes, causal, name",
    [
        ("scan", (1, 1, 4, 2), True, "all"),
        ("scan", (1, 1, 4, 2), False, "all"),
        ("xla", (2, 1, 4, 1), True, "all"),
        ("xla", (2, 1, 4, 1), False, "all"),
        ("scan", (1, 1, 4, 2), True, "linear window, anchors, branches"),
        ("xla", (1, 1, 4, 1), False, "linear window"),
    ],
    ids=str,
)
def test_devices_together_give_the_definitions_results(implementation, sizes, causal, name):
    form = (11, 2, 2, 1, 2)

    def attend(query, key, value, phi_query, phi_key, gain, *arrays):
        pad = lambda array: padded(array, form, sizes[2])
        output = hybrid_attention_on_mesh(
            *map(pad, (query, key, value, phi_query)),
            InlineFeatures(pad(phi_key), (), identity, pad(gain[..., None])[..., 0]),
            num_frames=form[0],
            tokens_per_frame=form[1],
            chunk_frames=form[2],
            overlap_frames=form[3],
            causal=causal,
            stabilizer="joint",
            implementation=implementation,
            **flags(form, name),
            **dict(zip(OPTIONS[name], arrays, strict=True)),
        )
        return output[:, : form[0] * form[1]]

    with jax.enable_x64(True):
        arrays = (*arrays_of(form, 2), *map(jnp.asarray, OPTIONS[name].values()))
        with jax.set_mesh(mesh_of(sizes)):
            found = results(attend, arrays)
    assert_close(found, expected(form, causal, "joint", name, 2), F64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"anchor_frames": 4}, "anchor_frames must be between 0 and chunk_frames=3"),
        ({"anchor_frames": 1.5}, "anchor_frames must be an integer"),
        ({"log_decay": np.zeros(3)}, r"log_decay must be \[heads\] = \[2\], found shape \[3\]"),
        ({"linear_window": True, "log_decay": np.zeros(2)}, "linear_window and log_decay: expected one of them"),
        ({"branch_gate": 0.5}, r"branch_gate must be \[heads\] = \[2\], found shape \[\]"),
    ],
)
def test_wrong_options_are_named(change, message):
    arrays = make_arrays(6, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        hybrid_attention(*arrays, tokens_per_frame=2, chunk_frames=3, overlap_frames=1, **change)


# --------------------------------------------------------------------------------------------------------- TPU kernels

KERNEL_SIZES = dict(head_dim=64, features=128)


def kernel_case(form, options, causal, implementation, groups=None, dtype=np.float32, features=128):
    """Output and gradients, also of the gains of queries and keys, of one call or of calls on groups of frames.

    Without features, there is only the window. `options` that are arrays are differentiated too.
    """
    gains = np.random.default_rng(3).uniform(0.5, 2, (2, 1, form[0] * form[1], 2))
    arrays = make_arrays(*form[:2], dtype=dtype, **KERNEL_SIZES)
    arrays = (*arrays[:3], *(phi[..., :features] for phi in arrays[3:]), *map(jnp.asarray, gains.astype(dtype)))
    per_head = {name: jnp.asarray(x, dtype) for name, x in options.items() if isinstance(x, np.ndarray)}
    fixed = {"stabilizer": "joint", "anchor_frames": (*form, 0)[4]}
    fixed |= {name: x for name, x in options.items() if name not in per_head}

    def attend(query, key, value, phi_query, phi_key, query_gain, key_gain, per_head):
        outputs, state = [], None
        for start, stop in groups or [(0, form[0])]:
            part = slice(start * form[1], stop * form[1])
            call = attention(form[:4], causal, implementation=implementation, **fixed, **per_head)
            tokens = (x[:, part] for x in (query, key, value))
            features = lambda phi, gain, part: InlineFeatures(phi[:, part], (), identity, gain[:, part])
            phis = features(phi_query, query_gain, part), features(phi_key, key_gain, part)
            parts = {}
            if groups is not None:
                parts = {"initial_state": state, "return_state": stop < form[0]}
                if not causal:
                    rest = slice(stop * form[1], None) if stop < form[0] else part
                    later = hybrid_key_sums(
                        *(x[:, rest] for x in (key, value)),
                        features(phi_key, key_gain if stop < form[0] else 0 * key_gain, rest),
                        tokens_per_frame=form[1],
                        implementation=implementation,
                    )
                    parts["later"] = later
            output = call(*tokens, *phis, **parts)
            if parts.get("return_state"):
                output, state = output
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jit
    def run(arrays, per_head):
        output, pullback = jax.vjp(attend, *arrays, per_head)
        return output, pullback(jnp.asarray(cotangent, output.dtype))

    return jax.tree.map(np.asarray, run(arrays, per_head))


@pytest.mark.parametrize(
    "form, options, causal, groups, features",
    [
        ((7, 9, 3, 1), {}, True, None, 128),  # padded frames, a ragged chunk
        ((7, 8, 2, 1), {"log_decay": LOG_DECAY}, True, None, 128),
        ((6, 8, 2, 2, 1), {"log_decay": LOG_DECAY}, False, None, 128),
        ((7, 8, 2, 1), {"log_decay": LOG_DECAY}, True, [(0, 2), (2, 6), (6, 7)], 128),
        ((8, 9, 3, 1, 3), {}, True, None, 128),  # the second window begins with an anchor
        ((7, 8, 2, 1, 2), {"log_decay": LOG_DECAY}, True, [(0, 2), (2, 6), (6, 7)], 128),
        ((7, 9, 3, 1, 1), {"branch_gate": GATE, "log_decay": LOG_DECAY}, False, None, 128),
        ((7, 8, 2, 1), {"branch_gate": GATE}, True, [(0, 2), (2, 6), (6, 7)], 128),
        ((7, 9, 3, 1), {}, True, None, 0),
        ((7, 8, 2, 1, 1), {}, True, [(0, 2), (2, 6), (6, 7)], 0),
        ((7, 9, 3, 1), {"linear_window": True, "stabilizer": "row_max"}, True, None, 128),
        ((7, 8, 2, 1, 2), {"linear_window": True}, False, None, 128),
        ((7, 8, 2, 1), {"linear_window": True}, True, [(0, 4), (4, 7)], 128),
        ((6, 8, 2, 2, 1), {"linear_window": True}, True, [(0, 2), (2, 6)], 128),  # the overlap is a complete chunk
        ((4, 8, 1, 0), {"linear_window": True, "stabilizer": "row_max"}, False, [(0, 2), (2, 4)], 128),
        ((5, 8, 2, 1), {"linear_window": True, "branch_gate": GATE}, True, None, 128),
    ],
    ids=[
        "gains",
        "decay",
        "both directions",
        "decay in parts",
        "anchors",
        "anchors in parts",
        "branches",
        "branches in parts",
        "window",
        "window in parts",
        "linear window",
        "linear window, anchors, both directions",
        "linear window in parts",
        "linear window, anchors, in parts with all of a chunk as overlap",
        "linear window in parts without overlap, both directions",
        "linear window, branches",
    ],
)
def test_the_tpu_kernels_take_all_options(form, options, causal, groups, features):
    with jax.enable_x64(True):
        expected = kernel_case(form, options, causal, "reference", dtype=np.float64, features=features)
    with tpu_kernels_as_xla():
        found = kernel_case(form, options, causal, "pallas_tpu", groups, features=features)
    if "branch_gate" in options:  # a gain of queries cancels in a branch of its own, so its gradient is rounding alone
        assert np.abs(found[1][5]).max() < TPU_F32
        found, expected = ((output, gradients[:5] + gradients[6:]) for output, gradients in (found, expected))
    assert_close(found, expected, TPU_F32)


@pytest.mark.parametrize(
    "causal, options, per_head",
    [
        (False, {"anchor_frames": 1}, {"log_decay": LOG_DECAY}),
        (True, {"linear_window": True}, {}),  # the last device's padding is in the window of its last chunk
        (False, {"linear_window": True, "anchor_frames": 1}, {}),
    ],
    ids=str,
)
def test_the_tpu_kernels_take_options_on_a_mesh(causal, options, per_head):
    form = (7, 8, 2, 1)
    arrays = make_arrays(*form[:2], dtype=np.float32, **KERNEL_SIZES)

    def attend(*arrays):
        sizes = dict(zip(("tokens_per_frame", "chunk_frames", "overlap_frames"), form[1:], strict=True))
        sizes |= dict(num_frames=form[0], implementation="pallas_tpu", causal=causal)
        given = dict(zip(per_head, arrays[5:], strict=True))
        tokens = [padded(array, form, 2) for array in arrays[:3]]
        phis = [1 + padded(phi - 1, form, 2) for phi in arrays[3:5]]  # a map's features of padding are not zero
        output = hybrid_attention_on_mesh(*tokens, *phis, **sizes, **options, **given)
        return output[:, : form[0] * form[1]]

    def dense(*arrays):
        given = dict(zip(per_head, arrays[5:], strict=True))
        return attention(form, causal, "row_max", **options, **given)(*arrays[:5])

    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (*arrays, *per_head.values())]
        expected = results(dense, wide)
    with jax.set_mesh(mesh_of((1, 1, 2, 1))), tpu_kernels_as_xla():
        found = results(attend, (*arrays, *(jnp.asarray(array, jnp.float32) for array in per_head.values())))
    assert_close(found, expected, TPU_F32)


@pytest.mark.parametrize("causal, name", [(True, "all"), (False, "all"), (True, "linear window, anchors, branches")])
def test_cudnn_takes_all_options(causal, name):
    form = ANCHORED[0]
    with jax.enable_x64(True), dense_cudnn():
        arrays = (*arrays_of(form), *map(jnp.asarray, OPTIONS[name].values()))
        found = results(attend_with(form, "cudnn", causal, "joint", name), arrays)
    assert_close(found, expected(form, causal, "joint", name), F64)


def test_cudnn_takes_a_window_alone():
    form = ANCHORED[1]
    with jax.enable_x64(True), dense_cudnn():
        *arrays, _ = arrays_of(form)
        arrays = [*arrays[:3], *(phi[..., :0] for phi in arrays[3:])]
        call = lambda name: attention(form[:4], True, "joint", name, anchor_frames=form[4])
        assert_close(results(call("cudnn"), arrays), results(call("reference"), arrays), F64)
