"""RMS norm and rotation in one TPU kernel against the model's form for other platforms, which is held to diffusers'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import tpu_kernels_as_xla
from tpu_topologies import TOPOLOGIES, compiled_for_tpu

from rehyat_jax.attention.tpu import norm_rotate
from rehyat_jax.attention.tpu.norm_rotate import scale_and_rotate
from rehyat_jax.models.wan import rope
from rehyat_jax.models.wan.rope import rope_table, scaled_and_rotated
from rehyat_jax.parallel.mesh import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


def make_arrays(grid, heads, dtype=jnp.float32):
    """((x, row_scale, column_scale), cotangent)."""
    tokens, keys = math.prod(grid), jax.random.split(jax.random.key(0), 4)
    x, cotangent = (jax.random.normal(key, (2, tokens, heads * 128), dtype) for key in keys[:2])
    row_scale = jax.random.uniform(keys[2], (2, tokens, 1), minval=0.5, maxval=2)
    return (x, row_scale, jax.random.normal(keys[3], (heads * 128,))), cotangent


def results(function, arrays, cotangent):
    output, pullback = jax.vjp(function, *arrays)
    return output, *pullback(cotangent)


def assert_same(found, expected, dtype=jnp.float32):
    for one, other in zip(found, expected, strict=True):
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        # The one rounds what the other does not.
        assert np.linalg.norm(one - other) < 4 * float(jnp.finfo(dtype).eps) * np.linalg.norm(other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("grid", "vmem_bytes"),
    [((3, 4, 5), norm_rotate._VMEM_BYTES), ((5, 5, 6), 2**20)],
    ids=["one block", "several, the last not full"],
)
def test_the_kernels_give_the_same_outputs_and_gradients(dtype, grid, vmem_bytes, monkeypatch):
    monkeypatch.setattr(norm_rotate, "_VMEM_BYTES", vmem_bytes)
    arrays, cotangent = make_arrays(grid, 3, dtype)
    table = rope_table(grid, 128)
    run = lambda function: jax.jit(lambda *arguments: results(function, *arguments))(arrays, cotangent)
    expected = run(lambda *arrays: scaled_and_rotated(*arrays, table))
    with tpu_kernels_as_xla():
        assert_same(run(lambda *arrays: scale_and_rotate(*arrays, *table)), expected, dtype)


def test_the_kernels_work_inside_the_mesh(monkeypatch):
    arrays, cotangent = make_arrays((4, 2, 3), 4)
    table = rope_table((4, 2, 3), 128)
    run = lambda: jax.jit(lambda *arrays: results(lambda *a: scaled_and_rotated(*a, table), *arrays))(arrays, cotangent)
    expected = run()
    monkeypatch.setattr(rope, "target_platform", lambda: "tpu")
    mesh = make_mesh(dict(zip(AXES, (2, 1, 2, 2), strict=True)), jax.devices())
    with jax.set_mesh(mesh), tpu_kernels_as_xla():
        assert_same(run(), expected)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("heads", "dtype"), [(1, jnp.bfloat16), (12, jnp.float32), (40, jnp.bfloat16)])
def test_the_kernels_compile_for_every_generation(topology, heads, dtype):
    make = lambda: (*make_arrays((2, 30, 52), heads, dtype), rope_table((2, 30, 52), 128))
    run = lambda arrays, cotangent, table: results(lambda *a: scaled_and_rotated(*a, table), arrays, cotangent)
    compiled = compiled_for_tpu(topology, run, *jax.eval_shape(make))
    assert compiled.as_text().count('"tpu_custom_call"') == 2
