"""The transformer over a video in parts, against the complete video at once."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import tpu_kernels_as_xla
from dense_flash import dense_cudnn
from flax import nnx
from tiny_runs import TINY, tiny_batch, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.diffusion.samplers import Coefficients, coefficient_table, initial_state, solver_step
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.generation import streaming
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.noise import host_noise, initial_noise
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.models.wan.streaming import apply_part, check_streams, initial_states, part_positions
from rehyat_jax.parallel.mesh import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

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
    "bidirectional": HybridConfig(chunk_frames=2, overlap_frames=1, causal=False, feature_map=MAP),
    "several, also bidirectional": (
        HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=MAP),
        HybridConfig(
            chunk_frames=1,
            overlap_frames=1,
            causal=False,
            feature_map=FeatureMapConfig(features=32, kind="hedgehog", input="unrotated"),
        ),
        HybridConfig(chunk_frames=2, overlap_frames=2, causal=False, stabilizer="joint", feature_map=MAP),
    ),
}
CAUSAL = tuple(name for name in FORMS if "bidirectional" not in name)


def student(form):
    return TINY.replace(hybrid_blocks="all", hybrid=form)


def of_parts(frames, part):
    return [part] * (frames // part) + ([frames % part] if frames % part else [])


@functools.cache
def part_program(graphdef, is_last):
    return jax.jit(apply_part(graphdef, is_last=is_last))


def in_parts(graphdef, params, batch, timestep, sizes, config, longest=None):
    """The velocity of a video whose parts have these numbers of frames."""
    latents = batch["latents"]
    tokens = latents.shape[2] * latents.shape[3] // 4
    states, velocities = initial_states(config, len(latents), tokens, jnp.float32), []
    ends = list(itertools.accumulate(sizes))
    for begin, end in zip([0, *ends], ends, strict=False):
        run = part_program(graphdef, end == latents.shape[1])
        positions = part_positions(begin, end - begin, config.head_dim, longest=longest)
        velocity, states = run(params, states, latents[:, begin:end], timestep, batch["text"], positions)
        velocities.append(velocity)
    return np.concatenate(velocities, axis=1)


SOLVER = dict(steps=3, flow_shift=3.0)


streamed = functools.partial(stream_latents, part_chunks=1)


def sampled(sample, model, noise, **options):
    """Latents of prompts that all these tests share."""
    text = tiny_batch()["text"].astype(noise.dtype)
    return sample(model, text, 0.1 * text, noise, **SOLVER, **options)


# 13 frames end within a part, 6 at the end of one, and 1 frame is less than a chunk.
@pytest.mark.parametrize(("form", "frames"), [*((form, 13) for form in CAUSAL), ("several", 6), ("several", 1)])
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


def test_positions_below_a_limit_keep_the_distances_within_bidirectional_windows():
    unrotated = FeatureMapConfig(features=16, input="unrotated")
    graphdef, params = tiny_model(student(dataclasses.replace(FORMS["bidirectional"], feature_map=unrotated)))
    model, noise = nnx.merge(graphdef, params), host_noise(3, 2, (5, 4, 6, 4))
    run = lambda longest: sampled(streamed, model, noise, guidance_scale=1.0, longest=longest)
    np.testing.assert_allclose(run(3), run(None), atol=2e-5, rtol=2e-5)


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


def test_layers_on_a_mesh():
    graphdef, params = tiny_model(student(FORMS["bidirectional"]))
    model, noise = nnx.merge(graphdef, params), np.array(initial_noise(3, 2, (5, 4, 6, 4)))
    expected = sampled(streamed, model, noise, guidance_scale=1.0)
    with jax.set_mesh(make_mesh(dict(zip(AXES, (1, 2, 1, 2), strict=True)), jax.devices()[:4])):
        found = sampled(streamed, model, noise, guidance_scale=1.0)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with (
        jax.set_mesh(make_mesh(dict(zip(AXES, (1, 1, 2, 1), strict=True)), jax.devices()[:2])),
        pytest.raises(ValueError, match="cannot be sharded along time, found 2 devices along it"),
    ):
        sampled(streamed, model, noise, guidance_scale=1.0)


@pytest.mark.parametrize("hybrid", [HybridConfig(), HybridConfig(causal=False)])
def test_blocks_that_need_the_complete_video_at_once_are_named(hybrid):
    check_streams(TINY.replace(hybrid_blocks="all", hybrid=hybrid))
    with pytest.raises(InputError, match=r"blocks 0, 2: expected hybrid attention in every block, found softmax"):
        check_streams(TINY.replace(hybrid_blocks=(1,), hybrid=hybrid))


def test_a_bidirectional_model_does_not_run_part_by_part():
    with pytest.raises(ValueError, match="expected causal attention in every block, found bidirectional"):
        initial_states(student(FORMS["bidirectional"]), 1, 6, jnp.float32)


@pytest.mark.parametrize(
    ("form", "frames", "part_chunks", "options"),
    [
        ("several", 7, 1, dict(guidance_scale=3.0)),
        ("joint", 5, 2, dict(guidance_scale=1.0, sampler="euler")),
        ("bidirectional", 5, 1, dict(guidance_scale=3.0)),
        ("several, also bidirectional", 7, 2, dict(guidance_scale=1.0, sampler="euler")),
    ],
)
def test_a_streamed_video_is_that_of_one_pass_in_float64(form, frames, part_chunks, options):
    with jax.enable_x64(True):
        graphdef, params = tiny_model(student(FORMS[form]), dtype=jnp.float64)
        model = nnx.merge(graphdef, params)
        noise = np.random.default_rng(3).standard_normal((2, frames, 4, 6, 4))
        expected = sampled(generate_latents, model, jnp.asarray(noise), **options)
        found = sampled(streamed, model, noise, part_chunks=part_chunks, **options)
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype == np.float64
        # Rounding of float64, 2e-16, grows a hundredfold in the layers of a step and once more over steps.
        np.testing.assert_allclose(found, expected, atol=1e-12, rtol=1e-12)


def test_the_default_precision_and_parts_stream_to_rounding():
    graphdef, params = tiny_model(student(FORMS["one"]))
    model, noise = nnx.merge(graphdef, params), np.array(initial_noise(3, 2, (9, 4, 6, 4)))
    expected = sampled(generate_latents, model, jnp.asarray(noise), guidance_scale=3.0)
    found = sampled(stream_latents, model, noise, guidance_scale=3.0)
    # Guidance magnifies the rounding of float32, 1e-6 after a few layers, in every step.
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=5e-5)


IMPLEMENTATIONS = {
    "xla": contextlib.nullcontext,
    "cudnn": dense_cudnn,
    "pallas_tpu": tpu_kernels_as_xla,
}


# The other tests run "scan", which CPUs prefer. "cudnn" and "xla" share their sums.
@pytest.mark.parametrize(
    ("implementation", "causal"),
    [("xla", True), ("xla", False), ("cudnn", True), ("pallas_tpu", True), ("pallas_tpu", False)],
)
def test_every_implementation_that_keeps_a_state_streams(implementation, causal):
    form = HybridConfig(chunk_frames=2, overlap_frames=1, causal=causal, feature_map=FeatureMapConfig(features=128))
    config = student(form).replace(num_heads=1, head_dim=64, num_layers=2)
    graphdef, params = tiny_model(config, attention_implementation=implementation)
    noise = np.array(initial_noise(3, 2, (5, 4, 6, 4)))
    with IMPLEMENTATIONS[implementation]():
        model = nnx.merge(graphdef, params)
        expected = sampled(generate_latents, model, jnp.asarray(noise), guidance_scale=1.0)
        found = sampled(streamed, model, noise, guidance_scale=1.0)
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("reference", '"reference" keeps no state: use "scan" or "xla" to continue a video'),
        ("pallas_gpu", '"pallas_gpu" cannot do this'),
    ],
)
def test_other_implementations_are_refused_by_name(implementation, message):
    graphdef, params = tiny_model(student(FORMS["one"]), attention_implementation=implementation)
    with pytest.raises(ValueError, match=message):
        sampled(streamed, nnx.merge(graphdef, params), host_noise(0, 2, (3, 4, 6, 4)), guidance_scale=1.0)


@pytest.mark.parametrize(("form", "given"), [("one", 4), ("one", 3), ("bidirectional", 2)])
def test_a_continued_video_is_that_of_one_pass_over_old_and_new_frames(form, given):
    with jax.enable_x64(True):
        graphdef, params = tiny_model(student(FORMS[form]), dtype=jnp.float64)
        draw = lambda seed: np.random.default_rng(seed).standard_normal((2, 7, 4, 6, 4))
        noise, before = draw(3), draw(4)[:, :given]
        found = sampled(streamed, nnx.merge(graphdef, params), noise, guidance_scale=1.0, before=before)

        # The solver, with the given frames put in their places before every evaluation of the model.
        apply, text, grid = jax.jit(apply_model(graphdef)), tiny_batch()["text"], wan_grid(3, 3.0)

        def velocity(latents, timestep):
            sigma = grid.sigmas[list(grid.timesteps).index(timestep[0])]
            seen = latents.at[:, :given].set((1 - sigma) * before + sigma * noise[:, :given])
            return apply(params, seen, timestep, text)

        state = initial_state(jnp.asarray(noise))
        for index in range(3):
            step = Coefficients(*(column[index] for column in coefficient_table(grid, "unipc", noise.dtype)))
            state = solver_step(velocity, state, step)
    np.testing.assert_array_equal(found[:, :given], before)
    # As above.
    np.testing.assert_allclose(found[:, given:], state.latents[:, given:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 4), (2, 2, 4, 8, 4), (1, 2, 4, 6, 4), (2, 0, 4, 6, 4), (4, 6, 4)])
def test_a_video_of_another_size_is_not_continued(shape):
    graphdef, params = tiny_model(student(FORMS["one"]))
    noise = host_noise(0, 2, (3, 4, 6, 4))
    with pytest.raises(InputError, match=r"expected latents \[2, 1 to 2, 4, 6, 4\].*, found \["):
        sampled(streamed, nnx.merge(graphdef, params), noise, guidance_scale=1.0, before=np.zeros(shape))


@pytest.mark.parametrize("form", ["one", "bidirectional"])
def test_a_longer_video_runs_the_same_programs(form, monkeypatch):
    # The same programs on arrays of the same shapes take the same memory.
    traced = []
    for name in ("apply_part", "apply_block"):
        run = getattr(streaming, name)
        record = lambda *a, run=run, **k: traced.append((run.__name__, k)) or run(*a, **k)
        monkeypatch.setattr(streaming, name, record)
    graphdef, params = tiny_model(student(FORMS[form]))
    name = "apply_part" if form == "one" else "apply_block"
    for frames in (5, 21):
        noise = host_noise(0, 2, (frames, 4, 8, 4))
        sampled(streamed, nnx.merge(graphdef, params), noise, guidance_scale=2.0)
        assert traced == [(name, {"is_last": False}), (name, {"is_last": True})]


def test_tokens_that_do_not_fit_the_host_are_refused(monkeypatch):
    monkeypatch.setattr("rehyat_jax.parallel.memory.host_bytes", lambda: 10**5)
    graphdef, params = tiny_model(student(FORMS["bidirectional"]))
    with pytest.raises(InputError, match=r"tokens of 2 videos, 99 latent frames of 4x6: needs .*causal=True"):
        sampled(streamed, nnx.merge(graphdef, params), host_noise(0, 2, (99, 4, 6, 4)), guidance_scale=1.0)
