"""Sampling chunk by chunk, against a loop that runs the complete model on the finished chunks and the current one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_streaming import FORMS, SOLVER, student
from tiny_runs import TINY, tiny_batch, tiny_model

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.diffusion.samplers import Coefficients, coefficient_table, initial_state, solver_step
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.generation import chunks
from rehyat_jax.generation.chunks import chunk_by_chunk, sample_by_chunk
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.models.wan.modeling import apply_model


def draw(frames, seed=3):
    return np.random.default_rng(seed).standard_normal((2, frames, 4, 6, 4))


def texts(dtype=np.float64):
    text = tiny_batch()["text"].astype(dtype)
    return text, 0.1 * text


def by_complete_model(graphdef, params, noise, chunk_frames, *, guidance_scale, sampler="unipc", before=None):
    """Every step runs the model on all finished frames, clean and at timestep 0, and on the current chunk."""
    apply, grid = jax.jit(apply_model(graphdef)), wan_grid(SOLVER["steps"], SOLVER["flow_shift"])
    table, given = coefficient_table(grid, sampler, noise.dtype), 0 if before is None else before.shape[1]
    done = np.zeros_like(noise[:, :0])
    for begin in range(0, noise.shape[1], chunk_frames):
        chunk = noise[:, begin : begin + chunk_frames]
        known = max(0, min(given - begin, chunk.shape[1]))

        def velocity(latents, timestep, done=done, chunk=chunk, begin=begin, known=known):
            sigma = grid.sigmas[list(grid.timesteps).index(timestep[0])]
            if known:
                seen = (1 - sigma) * before[:, begin : begin + known] + sigma * chunk[:, :known]
                latents = latents.at[:, :known].set(seen)
            frames = jnp.concatenate([done, latents], axis=1)
            levels = jnp.concatenate(
                [jnp.zeros(done.shape[:2]), jnp.broadcast_to(timestep[:, None], latents.shape[:2])], axis=1
            )
            wanted, unwanted = (apply(params, frames, levels, text)[:, begin:] for text in texts())
            return unwanted + guidance_scale * (wanted - unwanted)

        state = initial_state(jnp.asarray(chunk))
        if known < chunk.shape[1]:
            for index in range(SOLVER["steps"]):
                state = solver_step(velocity, state, Coefficients(*(column[index] for column in table)))
        finished = np.array(state.latents)
        if known:
            finished[:, :known] = before[:, begin : begin + known]
        done = np.concatenate([done, finished], axis=1)
    return done


# 5 frames end within a chunk of 2.
@pytest.mark.parametrize(
    ("form", "frames", "given", "options"),
    [
        (FORMS["one"], 5, 0, dict(guidance_scale=3.0)),
        (FORMS["several"], 6, 0, dict(guidance_scale=1.0, sampler="euler")),
        (dataclasses.replace(FORMS["one"], anchor_frames=1), 6, 2, dict(guidance_scale=1.0)),
        (FORMS["one"], 5, 3, dict(guidance_scale=3.0)),
    ],
    ids=["guidance, incomplete chunk", "several forms", "anchors, given chunk", "given frames within a chunk"],
)
def test_chunks_are_those_of_the_complete_model_on_clean_finished_chunks(form, frames, given, options):
    with jax.enable_x64(True):
        config = student(form)
        graphdef, params = tiny_model(config, dtype=jnp.float64)
        noise, before = draw(frames), draw(given, seed=4) if given else None
        expected = by_complete_model(graphdef, params, noise, config.chunk_frames, before=before, **options)
        model = nnx.merge(graphdef, params)
        found = sample_by_chunk(model, *texts(), noise, before=before, **SOLVER, **options)
        assert isinstance(found, np.ndarray) and found.dtype == np.float64
        # Rounding of float64, 2e-16, grows a hundredfold in the layers of a step and once more over steps and chunks.
        np.testing.assert_allclose(found, expected, atol=1e-11, rtol=1e-11)
        if given:
            np.testing.assert_array_equal(found[:, :given], before)


def test_a_chunk_is_there_before_the_next_one_begins_and_a_longer_video_runs_the_same_programs(monkeypatch):
    traced = []
    run = chunks.apply_part
    monkeypatch.setattr(chunks, "apply_part", lambda *a, **k: traced.append(k) or run(*a, **k))
    graphdef, params = tiny_model(student(FORMS["one"]))
    model, noise = nnx.merge(graphdef, params), host_noise(0, 2, (9, 4, 8, 4))
    sample = lambda noise: chunk_by_chunk(model, *texts(np.float32), noise, guidance_scale=2.0, **SOLVER)
    found = sample(noise)
    first = next(found)
    assert traced == [{"is_last": True}, {}]
    assert [first.shape[1], *(chunk.shape[1] for chunk in found)] == [2, 2, 2, 2, 1]
    assert traced == [{"is_last": True}, {}, {"is_last": True}], "one more program for the incomplete last chunk"
    # The noise of a longer video begins with that of the shorter one.
    longer = list(sample(np.concatenate([noise[:, :8], draw(7).astype(np.float32).repeat(2, 3)[..., :8, :]], axis=1)))
    assert len(traced) == 3
    np.testing.assert_array_equal(longer[0], first)


def test_positions_below_a_limit_keep_the_distances_within_windows():
    unrotated = dataclasses.replace(FORMS["one"].feature_map, input="unrotated")
    graphdef, params = tiny_model(student(dataclasses.replace(FORMS["one"], feature_map=unrotated)))
    model, noise = nnx.merge(graphdef, params), host_noise(3, 2, (7, 4, 6, 4))
    run = lambda longest: sample_by_chunk(
        model, *texts(np.float32), noise, guidance_scale=1.0, longest=longest, **SOLVER
    )
    np.testing.assert_allclose(run(3), run(None), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    ("hybrid", "blocks", "found"),
    [(HybridConfig(), (1,), "softmax in blocks 0, 2"), (HybridConfig(causal=False), "all", "not causal in blocks 0")],
)
def test_a_model_that_is_not_causal_in_every_block_is_refused(hybrid, blocks, found):
    graphdef, params = tiny_model(TINY.replace(hybrid_blocks=blocks, hybrid=hybrid))
    with pytest.raises(InputError, match=f"sampling chunk by chunk: expected causal .*{found}"):
        sample_by_chunk(
            nnx.merge(graphdef, params),
            *texts(np.float32),
            host_noise(0, 2, (3, 4, 6, 4)),
            guidance_scale=1.0,
            **SOLVER,
        )
