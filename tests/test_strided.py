"""Strided attention against its definition in float64, on CPUs and by the interpreted TPU kernels."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rehyat_jax import interpreted_tpu
from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.strided import strided_attention

BATCH, HEADS, HEAD_DIM, FEATURES = 2, 2, 64, 128
NAMES = "query", "key", "value", "phi_query", "phi_key"


def make_arrays(tokens: int) -> list[np.ndarray]:
    """Query, key, value, and the matrices of two feature maps."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape)
    matrices = (normal(HEADS, HEAD_DIM, FEATURES) / 8 for _ in range(2))
    return [*(normal(BATCH, tokens, HEADS, HEAD_DIM) for _ in range(3)), *matrices]


def phi(tokens: jax.Array, matrix: jax.Array) -> jax.Array:
    """The features of one head's tokens. Large enough that the linear part matters."""
    return (jax.nn.softplus(tokens @ matrix) / 16).astype(tokens.dtype)


def by_definition(query, key, value, query_matrix, key_matrix, *, stride: int, stabilizer: str) -> jax.Array:
    """All weights between all tokens."""
    heads = lambda x: jnp.moveaxis(x, 2, 1)
    query, key, value = map(heads, (query, key, value))
    scores = query @ jnp.swapaxes(key, -1, -2) / HEAD_DIM**0.5
    linear = phi(query, query_matrix) @ jnp.swapaxes(phi(key, key_matrix), -1, -2)
    is_softmax = np.arange(key.shape[2]) % stride == 0
    largest = jnp.where(is_softmax, scores, -jnp.inf).max(-1, keepdims=True)
    shift = jax.lax.stop_gradient(largest) if stabilizer == "row_max" else 0
    weights = jnp.where(is_softmax, jnp.exp(scores - shift), linear)
    return heads(weights / weights.sum(-1, keepdims=True) @ value)


def output_and_gradients(attend, arrays, dtype) -> dict[str, np.ndarray]:
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape)
    arrays = [jnp.asarray(array, dtype) for array in arrays]

    @jax.jit
    def run(*arrays):
        output, pullback = jax.vjp(attend, *arrays)
        return output, pullback(jnp.asarray(cotangent, dtype))

    output, gradients = run(*arrays)
    return {"output": output} | dict(zip(NAMES, gradients, strict=True))


@functools.cache
def expected(tokens: int, stride: int, stabilizer: str) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        attend = functools.partial(by_definition, stride=stride, stabilizer=stabilizer)
        return output_and_gradients(attend, make_arrays(tokens), jnp.float64)


# The number of tokens is a multiple of the stride, or is not.
@pytest.mark.parametrize(
    ("tokens", "stride", "stabilizer", "implementation"),
    [
        (96, 3, "row_max", "xla"),
        (50, 4, "joint", "xla"),
        (96, 3, "joint", "pallas_tpu"),
        (50, 4, "row_max", "pallas_tpu"),
    ],
)
def test_strided_attention_is_its_definition(tokens, stride, stabilizer, implementation):
    def attend(query, key, value, *matrices):
        maps = (InlineFeatures(None, (matrix,), phi) for matrix in matrices)
        features = (found.bound(x) for found, x in zip(maps, (query, key), strict=True))
        options = dict(stride=stride, stabilizer=stabilizer, implementation=implementation)
        return strided_attention(query, key, value, *features, **options)

    with interpreted_tpu() if implementation == "pallas_tpu" else contextlib.nullcontext():
        found = output_and_gradients(attend, make_arrays(tokens), jnp.float32)
    for name, array in expected(tokens, stride, stabilizer).items():
        scale = np.abs(array).max()
        # float32 has 7 digits, and a gradient is a sum over some hundred products.
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("tokens", "stride"), [(4097, 2), (4634, 17), (75_600, 8)])
def test_every_length_can_be_divided_into_blocks_of_the_kernels(tokens, stride):
    features = InlineFeatures(None, (jnp.zeros((1, HEAD_DIM, FEATURES)),), phi)
    arrays = [jax.ShapeDtypeStruct((1, tokens, 1, HEAD_DIM), jnp.bfloat16)] * 3

    def attend(query, key, value):
        bound = (features.bound(x) for x in (query, key))
        return strided_attention(query, key, value, *bound, stride=stride, implementation="pallas_tpu").sum()

    found = jax.eval_shape(jax.grad(attend, argnums=(0, 1, 2)), *arrays)
    assert [gradient.shape for gradient in found] == [array.shape for array in arrays]


def test_an_implementation_says_what_it_cannot_do():
    query, key, value = (jnp.zeros((1, 8, 1, 32)) for _ in range(3))
    features = jnp.zeros((1, 8, 1, 128))
    attend = functools.partial(strided_attention, query, key, value, features, features, stride=2)
    with pytest.raises(ValueError, match=r"pallas_tpu.*head_dim 32, only of multiples of 64: use implementation"):
        attend(implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"cannot do strided attention: use one of .*pallas_tpu"):
        attend(implementation="scan")
    with pytest.raises(ValueError, match="sharded along time"):
        jax.shard_map(
            functools.partial(attend, implementation="pallas_tpu", axis="context"),
            mesh=jax.make_mesh((1,), ("context",)),
            in_specs=(),
            out_specs=jax.sharding.PartitionSpec(),
        )()
