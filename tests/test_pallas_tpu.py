"""What is the TPU kernels' own: blocks, races, shifts, inlined feature maps, and compilation for TPUs not there.

Interpretation checks values and races, compilation whether Mosaic takes the kernels and they fit; neither does both.
"""

import contextlib
import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import (
    HEADS,
    STABILIZERS,
    TPU_F32,
    assert_close,
    attention,
    attention_by_loops,
    make_arrays,
    output_and_gradients,
    reference_results,
    tpu_kernels_as_xla,
)
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from tpu_topologies import compiled_for_tpu

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, hybrid_attention, interpreted_tpu
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.tpu import backward, forward, states, tiling
from rehyat_jax.attention.tpu import kernel_call, score_tiles
from rehyat_jax.benchmarks import tpu_cases
from rehyat_jax.models.wan.config import WAN_PRESETS

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

INPUTS = dict(dtype=np.float32, head_dim=64, features=128)


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(request):
    """All tests but those that simulate a TPU's memory or compile for a TPU run the kernels as XLA programs."""
    with contextlib.nullcontext() if {"simulated", "for_tpu"} & set(request.fixturenames) else tpu_kernels_as_xla():
        yield


@pytest.fixture
def simulated():
    with interpreted_tpu():
        yield


@pytest.fixture
def for_tpu():
    """Marks a test that compiles for a TPU."""


def found_results(form, arrays, stabilizer="row_max"):
    return output_and_gradients(attention(form, True, stabilizer, "pallas_tpu"), arrays)


@pytest.mark.parametrize("head_dim, features, stabilizer", [(128, 128, "joint"), (128, 512, "row_max")])
def test_widths_that_fill_registers_equal_the_reference(head_dim, features, stabilizer):
    form = (5, 8, 2, 1)
    inputs = dict(dtype=np.float32, head_dim=head_dim, features=features)
    found = found_results(form, make_arrays(*form[:2], **inputs), stabilizer)
    assert_close(found, reference_results(form, True, stabilizer, **inputs), TPU_F32)


CUTS = [
    # Tiles and stretches that loop, over a whole chunk of queries.
    ((4, 264, 3, 1), {}),
    # Several blocks a chunk, a frame and a group, with padding in every frame; the last chunk ends within a block.
    ((5, 30, 3, 2), dict(query_block=48, backward_group=48, backward_block=16, key_block=16)),
]


@pytest.mark.parametrize("form, blocks", CUTS, ids=str)
def test_blocks_and_tiles_of_every_size_equal_the_reference(form, blocks, simulated, monkeypatch):
    choose = tiling.Tiling.choose
    monkeypatch.setattr(
        tiling.Tiling, "choose", lambda *args, **kwargs: dataclasses.replace(choose(*args, **kwargs), **blocks)
    )
    monkeypatch.setattr(forward, "STRETCH", 256)
    for module in (forward, states, backward):
        monkeypatch.setattr(module, "FEATURE_ROWS", 128)
    found = found_results(form, make_arrays(*form[:2], **INPUTS))
    assert_close(found, reference_results(form, True, "row_max", **INPUTS), TPU_F32)


def make_maps(config, head_dim):
    """Graph definition and parameters of phi_query and phi_key, their scales drawn too."""
    maps = tuple(FeatureMap(config, heads=HEADS, head_dim=head_dim, rngs=nnx.Rngs(seed)) for seed in range(2))
    for n, feature_map in enumerate(maps):
        feature_map.log_scale[...] = jnp.linspace(-n, 1, HEADS)
    graphdef, state = nnx.split(maps)
    return graphdef, nnx.to_pure_dict(state)


def with_maps(form, graphdef, implementation, stabilizer="row_max", sources=None):
    """(query, key, value, parameters of the maps) -> output; `sources` of the features are shifted queries and keys."""

    def attend(query, key, value, parameters):
        maps = nnx.merge(graphdef, parameters)
        features = maps if sources is None else (maps[0].inline(query + sources), maps[1].inline(key + sources))
        return attention(form, True, stabilizer, implementation)(query, key, value, *features)

    return attend


def output_and_tree_gradients(attend, arrays, parameters, dtype):
    cast = lambda tree, dtype: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)
    output, pullback = jax.vjp(attend, *cast(arrays, dtype), parameters)
    return {"output": output, "gradients": pullback(jnp.asarray(cotangent, output.dtype))}


@pytest.mark.parametrize(
    "config, sources",
    [
        (FeatureMapConfig(features=128), 0.5),
        (FeatureMapConfig(features=256, num_layers=3, output_activation="softplus", hidden_activation="silu"), None),
        (FeatureMapConfig(features=128, num_layers=1, degree=1, output_activation="elu_plus_one"), None),
        (FeatureMapConfig(features=256, kind="hedgehog"), None),
    ],
    ids=str,
)
def test_inlined_feature_maps_and_their_gradients_equal_those_computed_outside(config, sources):
    form = (5, 8, 2, 1)
    arrays = make_arrays(*form[:2], batch=2, **INPUTS)[:3]
    graphdef, parameters = make_maps(config, INPUTS["head_dim"])
    run = lambda implementation, parameters, dtype: jax.jit(output_and_tree_gradients, static_argnums=(0, 3))(
        with_maps(form, graphdef, implementation, sources=sources), arrays, parameters, dtype
    )
    found = run("pallas_tpu", parameters, jnp.float32)
    with jax.enable_x64(True):
        expected = run("reference", jax.tree.map(lambda leaf: leaf.astype(jnp.float64), parameters), jnp.float64)
    assert_close(found, expected, 2 * TPU_F32)  # two layers and a square on the way


# Of a base-2 exponent, in 64 dimensions.
FROM_EXPONENT = np.log(2) * 8


@pytest.fixture(scope="module", params=STABILIZERS)
def compiled_once(request):
    """(form, stabilizer, attention of that form): one program for all scores."""
    form = (5, 4, 2, 1)
    return form, request.param, jax.jit(attention(form, True, request.param, "pallas_tpu"))


@pytest.mark.parametrize("exponent", [0.99, 1.01, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_at_and_beyond_the_bound_of_the_fixed_shift_are_right(compiled_once, exponent, sign):
    """All scores of the second chunk and its overlap are the bound times `exponent`, positive or negative."""
    form, stabilizer, attend = compiled_once
    query, key, value, phi_query, phi_key = make_arrays(*form[:2], **INPUTS)
    exponent *= score_tiles.FIXED_SHIFT_LIMIT
    direction = np.zeros(64, np.float32)
    direction[0] = np.sqrt(exponent * FROM_EXPONENT)
    # A thousandth of what they are besides, which the bound has to count too.
    query = query.at[:, 8:16].set(direction + query[:, 8:16] / 1000)
    key = key.at[:, 4:16].set(sign * direction + key[:, 4:16] / 1000)
    arrays = (query, key, value, phi_query, phi_key)
    found = attend(*arrays)
    # A score of 312 is rounded by up to 2e-5 in float32, and is a sum of such.
    assert_close(found, attention_by_loops(arrays, form, True, stabilizer), 1e-4)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_fixed_shift_and_running_maximum_agree_to_rounding(stabilizer, monkeypatch):
    form = (5, 8, 2, 1)
    arrays = make_arrays(*form[:2], **INPUTS)
    results = {}
    for limit in (0.0, 1e9):
        monkeypatch.setattr(score_tiles, "FIXED_SHIFT_LIMIT", limit)
        results[limit] = found_results(form, arrays, stabilizer)
    assert_close(results[0.0], results[1e9], TPU_F32)
    assert any((results[0.0][name] != results[1e9][name]).any() for name in results[0.0])  # two ways indeed


def test_only_chunks_that_see_large_tokens_need_a_running_maximum():
    form = (7, 4, 2, 1)
    geometry = ChunkGeometry(*form)
    blocks = tiling.Tiling.choose(geometry, head_dim=64, source_width=64, dtype=jnp.float32)
    small, large = np.ones((1, 1, 7), np.float32), np.ones((1, 1, 7), np.float32)
    large[..., 3] = (score_tiles.FIXED_SHIFT_LIMIT * FROM_EXPONENT) ** 2 * 1.01
    needs = lambda query, key: forward.needs_running_maximum(query, key, 64, blocks, continues=False)[0, 0].tolist()
    assert needs(small, small) == [0, 0, 0, 0]
    assert needs(large, small) == [0, 1, 0, 0]  # frame 3 is in chunk 1
    assert needs(small, large) == [0, 1, 1, 0]  # and in the overlap of chunk 2
    assert needs(small, large * 0.98) == [0, 0, 0, 0]
    assert needs(small * np.nan, small) == [1, 1, 1, 1]


def test_blocks_are_whole_tiles_of_memory(monkeypatch):
    info = types.SimpleNamespace(get_sublane_tiling=lambda dtype: 32 // jnp.dtype(dtype).itemsize, mxu_column_size=256)
    monkeypatch.setattr(tiling.pltpu, "get_tpu_info", lambda: info)

    def padded_frame(frames, *, dtype=jnp.bfloat16, continues=False):
        geometry = ChunkGeometry(frames, 1560, 3, 1)
        sizes = dict(head_dim=128, source_width=128, dtype=dtype, continues=continues)
        return tiling.Tiling.choose(geometry, **sizes).frame

    # 16 tokens divide an even number of frames.
    assert [padded_frame(frames) for frames in (6, 7, 12, 21)] == [1568, 1560, 1568, 1560]
    assert padded_frame(7, continues=True) == 1568
    assert padded_frame(6, dtype=jnp.float32) == 1560


def races(capfd, form, run=found_results):
    """What the race detector says about forward and backward of one head, on two cores in random order.

    Before jax 0.12 it printed that, and went on.
    """
    arrays = [array[:, :, :1] for array in make_arrays(*form[:2], **INPUTS)]
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            jax.block_until_ready(run(form, arrays))
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return capfd.readouterr().out


def test_kernels_have_no_races(simulated, capfd):
    assert races(capfd, (5, 8, 2, 1)) == ""


def test_the_detector_would_see_a_race(simulated, capfd, monkeypatch):
    call = kernel_call.pl.pallas_call

    def all_parallel(kernel, *, grid, **arguments):
        arguments["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",) * len(grid))
        return call(kernel, grid=grid, **arguments)

    monkeypatch.setattr(kernel_call.pl, "pallas_call", all_parallel)
    forward_alone = lambda form, arrays: jax.jit(attention(form, implementation="pallas_tpu"))(*arrays)
    assert "RACE DETECTED" in races(capfd, (5, 8, 2, 1), forward_alone)


MLP, HEDGEHOG = FeatureMapConfig(), FeatureMapConfig(kind="hedgehog")


def layer(tokens_per_frame, preset, stabilizer, frames, feature_map, linear_window):
    """(query, key, value, maps' parameters) -> output at a published model's width; and such arguments, abstract."""
    config = WAN_PRESETS[preset]
    make = lambda: tuple(
        FeatureMap(feature_map, heads=config.num_heads, head_dim=config.head_dim, rngs=nnx.Rngs(0)) for _ in range(2)
    )
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def attend(query, key, value, parameters):
        return hybrid_attention(
            query,
            key,
            value,
            *nnx.merge(graphdef, parameters),
            tokens_per_frame=tokens_per_frame,
            chunk_frames=3,
            overlap_frames=1,
            stabilizer=stabilizer,
            linear_window=linear_window,
        )

    shape = (1, frames * tokens_per_frame, config.num_heads, config.head_dim)
    return attend, shape, nnx.to_pure_dict(state)


def gradients(attend, argnums):
    loss = lambda *arguments: attend(*arguments).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, argnums)


# Tiles of scores depend on the width of matrix units. v5e and v5p have 128 columns and the least VMEM, of which float32
# takes twice as much. tpu7x has tiles of 16 tokens in memory, which divide 6 frames of 1560 tokens, but no frame. The
# kernels' code, which takes 20 seconds to compile, depends on neither heads nor frames.
@pytest.mark.parametrize(
    "preset, frames, tokens_per_frame, dtype, stabilizer, feature_map, linear_window, topology",
    [
        ("t2v-1.3B", 7, 3600, jnp.float32, "row_max", HEDGEHOG, True, "v5e:2x2"),
        ("t2v-14B", 7, 1560, jnp.bfloat16, "row_max", MLP, False, "v6e:2x2"),
        ("t2v-1.3B", 6, 1560, jnp.bfloat16, "joint", MLP, False, "tpu7x:2x2x1"),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "__name__", None)),
)
def test_wan_layers_compile_for_tpus_in_their_default_vmem(
    topology, preset, frames, tokens_per_frame, dtype, stabilizer, feature_map, linear_window, for_tpu
):
    attend, shape, parameters = layer(tokens_per_frame, preset, stabilizer, frames, feature_map, linear_window)
    array = jax.ShapeDtypeStruct(shape, dtype)
    compiled = compiled_for_tpu(
        topology, gradients(attend, (0, 1, 2, 3)), array, array, array, parameters, quickly=True
    )
    names = kernel_names(compiled)
    assert names == {
        "hybrid_states",
        "hybrid_attend",
        "hybrid_readout_backward",
        "hybrid_states_backward",
        "hybrid_window_backward",
    }
    # Of the order of the arrays given: nothing is stored that is quadratic in tokens, nor features.
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * array.size * array.dtype.itemsize


def test_gradients_of_feature_maps_alone_compile_to_no_softmax_backward(for_tpu):
    pullback, arguments = tpu_cases.hybrid(2, 128, 4, 64, implementation="pallas_tpu", direction="phi_backward")
    compiled = compiled_for_tpu("v5e:2x2", pullback, *arguments, quickly=True)
    assert kernel_names(compiled) == {"hybrid_readout_backward", "hybrid_states_backward"}


def kernel_names(compiled):
    return set(re.findall(r"%(?:\w*?jvp_+)?(hybrid_\w+?)_*(?:\.\d+)? = [^\n]*tpu_custom_call", compiled.as_text()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype=np.float16), r'"pallas_tpu" cannot do this: query of dtype float16.*use implementation="xla"'),
        (dict(head_dim=32), r'"pallas_tpu" cannot do this: query of head_dim 32.*use implementation="xla"'),
        (dict(features=96), r'"pallas_tpu" cannot do this: phi_query of 96 features.*use implementation="xla"'),
    ],
)
def test_what_the_kernels_cannot_do_is_said_with_who_can(change, message):
    arrays = make_arrays(2, 4, **(INPUTS | change))
    with pytest.raises(ValueError, match=message):
        attention((2, 4, 1, 0), implementation="pallas_tpu")(*arrays)
