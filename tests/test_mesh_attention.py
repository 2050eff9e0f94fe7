"""Attention of videos cut along batch, heads and time over eight virtual devices, against one device's definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import (
    F32,
    F64,
    STABILIZERS,
    TPU_F32,
    assert_close,
    attention,
    jit,
    make_arrays,
    tpu_kernels_as_xla,
)
from flax import nnx

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, softmax_attention
from rehyat_jax.attention.hybrid.context_parallel import padded_frames
from rehyat_jax.attention.on_mesh import (
    cross_attention_on_mesh,
    hybrid_attention_on_mesh,
    softmax_attention_on_mesh,
)
from rehyat_jax.parallel.mesh import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

MESHES = [(1, 1, 8, 1), (2, 1, 2, 2)]
# (frames, tokens_per_frame, chunk_frames, overlap_frames): chunks that divide and that don't, the last one ragged.
FORMS = [(7, 3, 3, 1), (24, 2, 3, 2), (10, 3, 2, 2), (5, 2, 2, 0), (8, 2, 1, 1)]


def mesh_of(sizes):
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])


def padded(array, form, devices):
    frames = padded_frames(form[0], form[2], devices)
    return jnp.pad(array, [(0, 0), (0, (frames - form[0]) * form[1]), (0, 0), (0, 0)])


def on_mesh(sizes, form, causal, stabilizer, implementation):
    """(query, key, value, features) of the video alone -> its output, by all devices together."""

    def attend(*arrays):
        output = hybrid_attention_on_mesh(
            *(padded(array, form, sizes[2]) for array in arrays),
            num_frames=form[0],
            tokens_per_frame=form[1],
            chunk_frames=form[2],
            overlap_frames=form[3],
            causal=causal,
            stabilizer=stabilizer,
            implementation=implementation,
        )
        return output[:, : form[0] * form[1]]

    return attend


def results(attend, arrays):
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jit
    def run(arrays):
        output, pullback = jax.vjp(attend, *arrays)
        return output, pullback(jnp.asarray(cotangent, output.dtype))

    return jax.tree.map(np.asarray, run(arrays))


@functools.cache
def expected_results(form, causal, stabilizer, batch):
    with jax.enable_x64(True):
        return results(attention(form, causal, stabilizer), make_arrays(*form[:2], batch=batch))


# Every form in both directions on both meshes, and in both implementations: these alternate.
EVERY_PAIR = [
    (("scan", "xla")[(number + direction + mesh) % 2], sizes, causal, form)
    for number, form in enumerate(FORMS)
    for direction, causal in enumerate((True, False))
    for mesh, sizes in enumerate(MESHES)
]


# 8 devices along time, and 2 of them with batch and heads sharded too; tests/test_mesh_training.py trains on 4. "xla"
# differs within a device alone, and where all of a device's frames are padding, as on 8 devices.
@pytest.mark.parametrize("implementation, sizes, causal, form", EVERY_PAIR, ids=str)
def test_devices_together_give_the_definitions_outputs_and_gradients(sizes, implementation, causal, form):
    stabilizer = STABILIZERS[(FORMS.index(form) + causal) % 2]
    with jax.enable_x64(True), jax.set_mesh(mesh_of(sizes)):
        arrays = make_arrays(*form[:2], batch=2)
        found = results(on_mesh(sizes, form, causal, stabilizer, implementation), arrays)
    assert_close(found, expected_results(form, causal, stabilizer, 2), F64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes, form", [((1, 1, 2, 2), (7, 8, 3, 1)), ((1, 1, 4, 1), (5, 8, 2, 0))], ids=["ragged", "beyond"]
)
def test_tpu_kernels_work_inside_the_mesh(sizes, form, causal):
    arrays = make_arrays(*form[:2], dtype=np.float32, head_dim=64, features=128)
    with jax.enable_x64(True):
        expected = results(attention(form, causal, "row_max"), jax.tree.map(lambda x: x.astype(jnp.float64), arrays))
    with jax.set_mesh(mesh_of(sizes)), tpu_kernels_as_xla():
        found = results(on_mesh(sizes, form, causal, "row_max", "pallas_tpu"), arrays)
    assert_close(found, expected, TPU_F32)


@pytest.mark.parametrize(
    "implementation, sizes, head_dim, features", [("scan", (2, 1, 2, 2), 4, 8), ("pallas_tpu", (1, 1, 2, 1), 64, 128)]
)
def test_gradients_of_feature_maps_are_sums_over_all_devices(implementation, sizes, head_dim, features):
    form = (7, 4, 2, 1)
    config = FeatureMapConfig(features=features)
    make = lambda seed: FeatureMap(config, heads=2, head_dim=head_dim, rngs=nnx.Rngs(seed))
    graphdef, weights = nnx.split((make(0), make(1)))
    arrays = make_arrays(*form[:2], batch=4, head_dim=head_dim, dtype=np.float32)[:3]
    cotangent = make_arrays(*form[:2], batch=4, head_dim=head_dim, dtype=np.float32, seed=1)[0]

    def gradients(attend):
        loss = lambda weights, arrays: (attend(*arrays, *nnx.merge(graphdef, weights)) * cotangent).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(nnx.to_pure_dict(weights), arrays)

    expected = gradients(attention(form, implementation="scan"))

    def attend(query, key, value, map_query, map_key):
        pad = lambda array: padded(array, form, sizes[2])
        query, key, value = map(pad, (query, key, value))
        names = ("tokens_per_frame", "chunk_frames", "overlap_frames")
        output = hybrid_attention_on_mesh(
            query,
            key,
            value,
            map_query.inline(),
            map_key.inline(),
            num_frames=form[0],
            **dict(zip(names, form[1:], strict=True)),
            causal=True,
            stabilizer="row_max",
            implementation=implementation,
        )
        return output[:, : form[0] * form[1]]

    with jax.set_mesh(mesh_of(sizes)), tpu_kernels_as_xla():
        found = gradients(attend)
    assert_close(found, expected, TPU_F32)


@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (2, 1, 2, 2), (1, 1, 4, 1), (1, 1, 8, 1)], ids=str)
def test_softmax_attention_over_devices_is_that_of_one(sizes):
    """Two heads: traded over two devices; on (2, 1, 2, 2) one head a device, so that keys are gathered; over 4 and 8
    devices both: pairs trade heads, and gather keys from the other pairs."""
    form = (5, 3, 1, 0)
    with jax.enable_x64(True):
        arrays = make_arrays(*form[:2], batch=2)[:3]
        expected = results(softmax_attention, arrays)
        with jax.set_mesh(mesh_of(sizes)):

            def attend(*arrays):
                arrays = [padded(array, form, sizes[2]) for array in arrays]
                output = softmax_attention_on_mesh(*arrays, num_tokens=15)
                return output[:, :15]

            found = results(attend, arrays)
    assert_close(found, expected, F64)


def test_padding_attends_to_nothing():
    form = (5, 3, 2, 1)
    sizes = (1, 1, 4, 1)
    arrays = [padded(array, form, 4) + 1 for array in make_arrays(*form[:2], dtype=np.float32)]
    with jax.set_mesh(mesh_of(sizes)):
        softmax = jax.jit(functools.partial(softmax_attention_on_mesh, num_tokens=15))(*arrays[:3])
        hybrid = jax.jit(
            functools.partial(
                hybrid_attention_on_mesh,
                num_frames=5,
                tokens_per_frame=3,
                chunk_frames=2,
                overlap_frames=1,
                causal=False,
                stabilizer="row_max",
            )
        )(*arrays)
    for output in (softmax, hybrid):
        assert (output[:, 15:] == 0).all()
        assert (output[:, :15] != 0).all()


def test_attention_to_the_text_is_that_of_one_device():
    query = make_arrays(8, 3, batch=2, dtype=np.float32)[0]
    key, value = make_arrays(5, 1, batch=2, dtype=np.float32, seed=1)[1:3]
    expected = softmax_attention(query, key, value)
    with jax.set_mesh(mesh_of((2, 1, 2, 2))):
        assert_close(jax.jit(cross_attention_on_mesh)(query, key, value), expected, F32)


@pytest.mark.parametrize(
    "frames, chunk_frames, devices, expected",
    [(21, 3, 1, 21), (21, 3, 2, 24), (161, 3, 8, 168), (20, 3, 1, 20), (5, 1, 8, 8)],
)
def test_padding_gives_every_device_whole_chunks(frames, chunk_frames, devices, expected):
    assert padded_frames(frames, chunk_frames, devices) == expected
