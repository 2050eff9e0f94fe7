"""Feature maps against grouped convolutions of PyTorch, and the calibration of the linear branch's mass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, hybrid_attention
from rehyat_jax.attention.features.maps import FeatureFunction
from rehyat_jax.attention.hybrid.calibration import linear_mass_log_scale
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry

HEADS, HEAD_DIM = 3, 8

HIDDEN = {
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}
OUTPUT = {"relu": torch.relu, "softplus": torch.nn.functional.softplus, "elu_plus_one": lambda x: torch.nn.ELU()(x) + 1}


def make_map(seed=0, **fields):
    config = FeatureMapConfig(**{"features": 12, **fields})
    feature_map = FeatureMap(config, heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(seed))
    feature_map.log_scale[...] = jnp.linspace(-1, 1, HEADS)
    return feature_map


def make_inputs(tokens=10, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (2, tokens, HEADS, HEAD_DIM)).astype(dtype)


def features_of_pytorch(feature_map, x):
    """The map of ReHyAt as printed: grouped 1x1 convolutions over [batch, heads * channels, tokens], in float64."""
    config = feature_map.config
    batch, tokens = x.shape[:2]
    hidden = torch.tensor(np.asarray(x, np.float64)).reshape(batch, tokens, -1).transpose(1, 2)
    for i in range(config.num_layers):
        kernel = torch.tensor(np.asarray(getattr(feature_map, f"layer_{i}").kernel[...], np.float64))
        weight = kernel.transpose(1, 2).reshape(-1, kernel.shape[1], 1)
        hidden = torch.nn.functional.conv1d(hidden, weight, groups=HEADS)
        hidden = (OUTPUT[config.output_activation] if i == config.num_layers - 1 else HIDDEN[config.hidden_activation])(
            hidden
        )
    output = hidden.transpose(1, 2).reshape(batch, tokens, HEADS, config.degree, -1)
    powers = torch.stack([output[..., i, :] ** (i + 1) for i in range(config.degree)], dim=-2).flatten(-2)
    scale = np.exp(np.asarray(feature_map.log_scale[...], np.float64))[:, None] / np.sqrt(config.features)
    return powers.numpy() * scale


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(num_layers=1, degree=1, output_activation="softplus"),
        dict(num_layers=3, degree=6, hidden_activation="silu", output_activation="elu_plus_one"),
        dict(degree=3, hidden_activation="relu"),
    ],
    ids=str,
)
def test_features_equal_grouped_convolutions_and_powers(fields):
    feature_map, x = make_map(**fields), make_inputs()
    found, expected = jax.jit(feature_map)(x), features_of_pytorch(feature_map, x)
    # float32, and the sixth power multiplies a relative error by six.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert found.min() >= 0 and found.max() > 0


def test_hedgehogs_features_are_two_softmaxes_of_each_token():
    feature_map, x = make_map(kind="hedgehog"), make_inputs()
    kernel = feature_map.layer_0.kernel[...]
    np.testing.assert_array_equal(kernel, np.broadcast_to(np.eye(HEAD_DIM, 6), kernel.shape))
    feature_map.layer_0.kernel[...] = kernel = jax.random.normal(jax.random.key(2), kernel.shape)
    scores = torch.einsum("bnhd,hdf->bnhf", *(torch.tensor(np.asarray(a, np.float64)) for a in (x, kernel)))
    features = torch.cat([scores.softmax(-1), (-scores).softmax(-1)], dim=-1).numpy()
    scale = np.exp(np.asarray(feature_map.log_scale[...], np.float64))[:, None] * np.sqrt(12) / 2
    # Float32 rounding of a softmax over 6 features. 2e-7 was seen.
    np.testing.assert_allclose(jax.jit(feature_map)(x), features * scale, rtol=0, atol=2e-6)


def test_equal_features_of_hedgehog_are_weights_of_one():
    feature_map = make_map(kind="hedgehog")
    feature_map.log_scale[...] = jnp.zeros(HEADS)
    phi = feature_map(jnp.zeros((1, 1, HEADS, HEAD_DIM)))
    np.testing.assert_allclose((phi * phi).sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="hedgehog", degree=3), 'degree is not a field of kind "hedgehog"'),
        (dict(kind="hedgehog", features=7), "features must be even"),
        (dict(kind="taylor"), "kind must be one of"),
    ],
)
def test_fields_that_a_kind_does_not_have_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FeatureMapConfig(**fields)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_gradients_equal_those_of_pytorch(hidden):
    """Of the features' sum of squares, by the first layer, the last and the tokens, in float64."""
    config = FeatureMapConfig(features=12, num_layers=3, hidden_activation=hidden, output_activation="softplus")
    feature_map = FeatureMap(config, heads=1, head_dim=HEAD_DIM, rngs=nnx.Rngs(0))
    arrays = [4 * make_inputs()[0, :, 0]] + [getattr(feature_map, f"layer_{i}").kernel[0] for i in range(3)]
    scale = jnp.full((1, 1), 0.3)
    found = jax.grad(lambda arrays: (FeatureFunction(config)(arrays[0], scale, *arrays[1:]) ** 2).sum())(arrays)

    tensors = [torch.tensor(np.asarray(array, np.float64), requires_grad=True) for array in arrays]
    values, *kernels = tensors
    for kernel in kernels[:-1]:
        values = HIDDEN[hidden](values @ kernel)
    first, second = OUTPUT["softplus"](values @ kernels[-1]).split(6, dim=1)
    (0.3 * torch.cat([first, second**2], dim=1)).pow(2).sum().backward()
    for array, tensor in zip(found, tensors, strict=True):
        expected = tensor.grad.numpy()
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())  # float32


def test_features_of_bfloat16_are_bfloat16_from_float32_parameters():
    feature_map, x = make_map(), make_inputs(dtype=jnp.bfloat16)
    found, expected = feature_map(x), features_of_pytorch(feature_map, x)
    assert found.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(feature_map))} == {np.dtype(np.float32)}
    # Kernels, hidden values and features are rounded to 8 bits, and the square doubles a relative error.
    assert np.abs(np.asarray(found, np.float64) - expected).max() < 2**-5 * expected.max()


def test_two_maps_of_a_converted_block_have_the_published_parameter_count():
    maps = [nnx.eval_shape(lambda: FeatureMap(FeatureMapConfig(), heads=12, head_dim=128, rngs=nnx.Rngs(0)))] * 2
    sizes = [leaf.size for feature_map in maps for leaf in jax.tree.leaves(nnx.state(feature_map))]
    assert sum(sizes) == 2_359_296 + 24  # the weights, 2.4M as published, and a scale per head and map


def test_parameters_are_the_named_tree_and_stack_over_blocks():
    graphdef, state = nnx.split(
        nnx.vmap(lambda rngs: FeatureMap(FeatureMapConfig(features=12), heads=HEADS, head_dim=HEAD_DIM, rngs=rngs))(
            nnx.Rngs(0).split(4)
        )
    )
    tree = nnx.to_pure_dict(state)
    assert jax.tree.map(lambda leaf: leaf.shape, tree, is_leaf=lambda x: hasattr(x, "shape")) == {
        "layer_0": {"kernel": (4, HEADS, HEAD_DIM, 12)},
        "layer_1": {"kernel": (4, HEADS, 12, 12)},
        "log_scale": (4, HEADS),
    }
    assert np.abs(tree["layer_0"]["kernel"][0] - tree["layer_0"]["kernel"][1]).max() > 0.1

    # A pure function of the tree, inside scan, jit and grad.
    @jax.jit
    @jax.grad
    def gradient(tree, x):
        step = lambda total, block: (total + nnx.merge(graphdef, block)(x).sum(), None)
        return jax.lax.scan(step, 0.0, tree)[0]

    gradients = gradient(tree, make_inputs())
    assert jax.tree.structure(gradients) == jax.tree.structure(tree)
    assert all((np.abs(leaf).reshape(4, -1).max(axis=1) > 0).all() for leaf in jax.tree.leaves(gradients))


def test_every_kernel_starts_at_a_scale_that_keeps_activations():
    feature_map = FeatureMap(FeatureMapConfig(num_layers=3), heads=2, head_dim=64, rngs=nnx.Rngs(0))
    for layer, fan_in in (("layer_0", 64), ("layer_1", 256), ("layer_2", 256)):
        # He's variance 2 / fan_in of one head; 30,000 samples estimate a standard deviation within 1%.
        np.testing.assert_allclose(getattr(feature_map, layer).kernel[0].std(), (2 / fan_in) ** 0.5, rtol=0.02)


def test_hybrid_attention_calls_feature_maps_on_queries_and_keys():
    query, key, value = (make_inputs() * scale for scale in (1.0, -0.5, 2.0))
    phi_query, phi_key = make_map(0), make_map(1)
    arguments = dict(tokens_per_frame=2, chunk_frames=2, overlap_frames=1)
    called = hybrid_attention(query, key, value, phi_query, phi_key, **arguments)
    given = hybrid_attention(query, key, value, phi_query(query), phi_key(key), **arguments)
    np.testing.assert_array_equal(called, given)


FORM = dict(tokens_per_frame=3, chunk_frames=2, overlap_frames=1)


def attention_inputs(frames=7, seed=0):
    """Queries, keys and features; sharp attention, so that masses differ by orders of magnitude between tokens."""
    rng = np.random.default_rng(seed)
    shape = (2, frames * FORM["tokens_per_frame"], HEADS)
    query, key = 3 * rng.normal(size=(2, *shape, HEAD_DIM))
    phi_query, phi_key = np.abs(rng.normal(size=(2, *shape, 5))) * np.array([1e-3, 1.0, 1e3])[:, None]
    return query, key, phi_query, phi_key


def linear_shares(query, key, phi_query, phi_key, causal, stabilizer):
    """The linear branch's share of every token that has linear keys, ours and the true one: two [tokens, heads]."""
    frame = np.arange(query.shape[1]) // FORM["tokens_per_frame"]
    found, true = [], []
    for b, i in np.ndindex(*query.shape[:2]):
        chunk_start = frame[i] // FORM["chunk_frames"] * FORM["chunk_frames"]
        before = frame < chunk_start - FORM["overlap_frames"]
        after = frame >= chunk_start + FORM["chunk_frames"]
        linear = before if causal else before | after
        scores = np.einsum("hd,khd->kh", query[b, i], key[b]) / np.sqrt(HEAD_DIM)
        window = scores[~before & ~after]
        c = window.max(axis=0) if stabilizer == "row_max" else 0
        mass = np.einsum("hf,khf->h", phi_query[b, i], phi_key[b, linear])
        if linear.any():
            found.append(mass / (mass + np.exp(window - c).sum(axis=0)))
            true.append(np.exp(scores[linear]).sum(axis=0) / (np.exp(scores[linear]).sum(0) + np.exp(window).sum(0)))
    return np.array(found), np.array(true)


def log_scale_of(query, *others, causal, stabilizer):
    geometry = ChunkGeometry(query.shape[1] // FORM["tokens_per_frame"], **FORM)
    return linear_mass_log_scale(
        query,
        *others,
        tokens_per_frame=FORM["tokens_per_frame"],
        key_masks=geometry.key_masks(causal=causal),
        stabilizer=stabilizer,
    )


@pytest.mark.parametrize("causal, stabilizer", list(itertools.product([True, False], ["row_max", "joint"])))
def test_calibrated_linear_branch_has_the_share_of_attention_it_stands_for(causal, stabilizer):
    query, key, phi_query, phi_key = attention_inputs()
    arrays = [jnp.asarray(array, jnp.float32) for array in (query, key, phi_query, phi_key)]
    log_scale = log_scale_of(*arrays, causal=causal, stabilizer=stabilizer)
    half = np.exp(np.asarray(log_scale, np.float64) / 2)[:, None]
    found, true = linear_shares(query, key, phi_query * half, phi_key * half, causal, stabilizer)
    # The masses are summed and compared in float32.
    np.testing.assert_allclose(found.mean(axis=0) / true.mean(axis=0), 1, atol=1e-4)
    assert (np.abs(log_scale) > 0.1).all()


def test_calibration_is_not_decided_by_a_token_of_huge_mass():
    query, key, phi_query, phi_key = (jnp.asarray(array, jnp.float32) for array in attention_inputs(frames=14))
    calibrate = lambda query: log_scale_of(query, key, phi_query, phi_key, causal=True, stabilizer="joint")
    # The last token of each of the two videos now looks at one far key with a score in the hundreds.
    sharp = query.at[:, -1].set(30 * key[:, 0])
    # Two tokens of 72 move the mean share by at most 3%, but a mean of masses by the exponential of hundreds.
    np.testing.assert_allclose(calibrate(sharp), calibrate(query), atol=1.0)


def test_calibration_leaves_maps_alone_where_nothing_can_be_matched():
    query, key, phi_query, phi_key = (jnp.asarray(array, jnp.float32) for array in attention_inputs())
    calibrate = lambda frames, phi_query: log_scale_of(
        *(array[:, : frames * 3] for array in (query, key, phi_query, phi_key)), causal=True, stabilizer="row_max"
    )
    np.testing.assert_array_equal(calibrate(2, phi_query), 0)  # one chunk: no linear keys
    dead_head = phi_query.at[:, :, 1].set(0)
    found = calibrate(7, dead_head)
    assert found[1] == 0 and (found[np.array([0, 2])] != 0).all()
