"""The transformer over a video in parts, against the complete video at once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import TINY, tiny_batch, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.form import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.generation import streaming
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.noise import host_noise, initial_noise
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.models.wan.streaming import apply_part, check_streams, initial_states, part_positions
from rehyat_jax.parallel.mesh import AXES, make_mesh

MAP = FeatureMapConfig(features=16)
FORMS = {
    "one": HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=MAP),
    "joint": HybridConfig(chunk_frames=3, overlap_frames=0, stabilizer="joint", feature_map=MAP),
    "whole overlap": HybridConfig(chunk_frames=1, overlap_frames=1, feature_map=MAP),
    "several": (
        HybridConfig(chunk_frames=2, overlap_frames=0, feature_map=MAP),
        HybridConfig(chunk_frames=1, overlap_frames=1, feature_map=FeatureMapConfig(features=32, kind="hedgehog")),
        HybridConfig(chunk_frames=2, overlap_frames=2, stabilizer="joint", feature_map=MAP),
    ),
}


def student(form):
    return TINY.replace(hybrid_blocks="all", hybrid=form)


def of_parts(frames, part):
    return [part] * (frames // part) + ([frames % part] if frames % part else [])


def in_parts(graphdef, params, batch, timestep, sizes, config, longest=None):
    """The velocity of a video whose parts have these numbers of frames."""
    latents = batch["latents"]
    tokens = latents.shape[2] * latents.shape[3] // 4
    states, velocities = initial_states(config, len(latents), tokens, jnp.float32), []
    ends = list(itertools.accumulate(sizes))
    for begin, end in zip([0, *ends], ends, strict=False):
        run = jax.jit(apply_part(graphdef, is_last=end == latents.shape[1]))
        positions = part_positions(begin, end - begin, config.head_dim, longest=longest)
        velocity, states = run(params, states, latents[:, begin:end], timestep, batch["text"], positions)
        velocities.append(velocity)
    return np.concatenate(velocities, axis=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [1, 6, 13])
def test_parts_give_the_velocity_of_the_complete_video(form, frames):
    config = student(FORMS[form])
    graphdef, params = tiny_model(config)
    batch, timestep = tiny_batch(frames=frames), jnp.array([700.0, 30.0])
    expected = jax.jit(apply_model(graphdef))(params, batch["latents"], timestep, batch["text"])
    chunk = config.block_forms.chunk_frames
    for part in (chunk, 2 * chunk):
        found = in_parts(graphdef, params, batch, timestep, of_parts(frames, part), config)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("feature_map", "is_equal"),
    [
        # No sum has positions: only the distances within a window count, which the turned overlap keeps right.
        (FeatureMapConfig(features=16, input="unrotated"), True),
        (MAP, False),
    ],
)
def test_positions_below_a_limit_keep_the_distances_within_windows(feature_map, is_equal):
    config = student(HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=feature_map))
    graphdef, params = tiny_model(config)
    batch, timestep = tiny_batch(frames=11), jnp.array([700.0, 30.0])
    run = lambda longest: in_parts(graphdef, params, batch, timestep, of_parts(11, 2), config, longest)
    expected = run(None)
    np.testing.assert_array_equal(run(11), expected)
    error = np.abs(run(5) - expected)
    np.testing.assert_allclose(error[:, :4], 0, atol=2e-5)
    assert (error[:, 6:].max() < 2e-5) == is_equal


def test_a_limit_below_a_part_is_refused():
    with pytest.raises(ValueError, match="at least the 3 frames of a part, found 2"):
        part_positions(0, 3, 12, longest=2)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_parts_on_a_mesh(implementation):
    config = student(FORMS["one"])
    graphdef, params = tiny_model(config, attention_implementation=implementation)
    batch, timestep = tiny_batch(frames=5), jnp.array([700.0, 30.0])
    expected = in_parts(graphdef, params, batch, timestep, [2, 2, 1], config)
    with jax.set_mesh(make_mesh(dict(zip(AXES, (1, 2, 1, 2), strict=True)), jax.devices()[:4])):
        found = in_parts(graphdef, params, batch, timestep, [2, 2, 1], config)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with (
        jax.set_mesh(make_mesh(dict(zip(AXES, (1, 1, 2, 1), strict=True)), jax.devices()[:2])),
        pytest.raises(ValueError, match="cannot be sharded along time, found 2 devices along it"),
    ):
        in_parts(graphdef, params, batch, timestep, [2, 2, 1], config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hybrid_blocks=(1,)), r"blocks 0, 2: expected causal hybrid attention in every block, found softmax"),
        (dict(hybrid=HybridConfig(causal=False)), r"blocks 0, 1, 2: .* found hybrid 3\+1 that is not causal"),
    ],
)
def test_blocks_that_need_the_complete_video_are_named(change, message):
    with pytest.raises(InputError, match=message):
        check_streams(TINY.replace(**{"hybrid_blocks": "all", **change}))


@pytest.mark.parametrize(("guidance_scale", "sampler", "part_chunks"), [(3.0, "unipc", 1), (1.0, "euler", 2)])
def test_a_streamed_video_is_that_of_one_pass(guidance_scale, sampler, part_chunks):
    config = student(FORMS["several"])
    graphdef, params = tiny_model(config)
    model, batch = nnx.merge(graphdef, params), tiny_batch(frames=7)
    noise, text = np.array(initial_noise(3, 2, (7, 4, 6, 4))), batch["text"]
    options = dict(steps=4, guidance_scale=guidance_scale, flow_shift=3.0, sampler=sampler)
    expected = generate_latents(model, text, 0.1 * text, jnp.asarray(noise), **options)
    found = stream_latents(model, text, 0.1 * text, noise, part_chunks=part_chunks, **options)
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=5e-5)
    assert isinstance(found, np.ndarray)


def test_a_longer_video_runs_the_same_programs(monkeypatch):
    # The same programs on arrays of the same shapes take the same memory.
    traced = []
    monkeypatch.setattr(streaming, "apply_part", lambda *a, **k: traced.append(k) or apply_part(*a, **k))
    config = student(FORMS["one"])
    graphdef, params = tiny_model(config)
    text = tiny_batch()["text"]
    for frames in (5, 21):
        noise = host_noise(0, 2, (frames, 4, 8, 4))
        stream_latents(nnx.merge(graphdef, params), text, text, noise, steps=1, guidance_scale=2.0, flow_shift=3.0)
        assert traced == [{"is_last": False}, {"is_last": True}]
