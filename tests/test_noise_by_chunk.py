"""Training with a noise level for every chunk of a video."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TINY, digits_config, pretrained, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.diffusion import flow
from rehyat_jax.errors import InputError
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.train import train
from rehyat_jax.training import finetune
from rehyat_jax.training.config import check_config
from rehyat_jax.training.noising import chunk_sigmas, noise_batch
from rehyat_jax.training.setup import student_config
from rehyat_jax.weights import load_params, save_model
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch
from rehyat_jax.weights.load import read_model_metadata

FORM = HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=FeatureMapConfig(features=16))
DRAW = functools.partial(flow.sample_sigmas, distribution="logit_normal", shift=5.0)


def levels(videos=2000, frames=7, chunk_frames=2):
    """Levels [B, chunks], after a check that chunks have one level."""
    sigma = np.asarray(chunk_sigmas(DRAW, jax.random.key(0), (videos, frames), chunk_frames))
    assert sigma.shape == (videos, frames)
    first = np.arange(0, frames, chunk_frames)
    np.testing.assert_array_equal(sigma, np.repeat(sigma[:, first], chunk_frames, axis=1)[:, :frames])
    return sigma[:, first]


def test_chunks_of_a_video_have_different_levels_of_the_configured_distribution():
    found = levels()
    assert (np.diff(found)[found[:, 1:] > 0] != 0).all()
    # The median of a logit-normal is 1/2, shifted by 5 to 5/6. 2000 draws have it within 0.02.
    np.testing.assert_allclose(np.median(found[:, -1]), 5 / 6, atol=0.02)
    both = found[(found > 0).all(1)]
    assert abs(np.corrcoef(both[:, 0], both[:, 1])[0, 1]) < 0.1


def test_half_of_the_videos_begin_with_clean_chunks_and_every_video_has_a_noisy_one():
    is_clean = levels() == 0
    np.testing.assert_array_equal(is_clean, np.cumprod(is_clean, axis=1))
    counts = np.bincount(is_clean.sum(1), minlength=5) / len(is_clean)
    # Of 4 chunks, 0 to 3 are clean with equal probabilities in half of the videos; 0 in the others.
    np.testing.assert_allclose(counts, [0.625, 0.125, 0.125, 0.125, 0], atol=0.03)
    assert not (levels(videos=50, frames=2) == 0).any(), "a video of one chunk has nothing before it"


def test_noisy_latents_have_the_levels_of_their_timesteps():
    config, batch = tiny_config("finetune"), tiny_batch(8, 7)
    noisy = noise_batch(batch, jnp.zeros((4, 8)), jax.random.key(3), config, chunk_frames=2)
    assert noisy.timestep.shape == (8, 7)
    sigma = np.asarray(noisy.timestep)[..., None, None, None] / 1000
    noise = noisy.velocity + batch["latents"]
    np.testing.assert_allclose(noisy.latents, (1 - sigma) * batch["latents"] + sigma * noise, atol=1e-6)
    np.testing.assert_array_equal(noisy.noisy_frames, noisy.timestep > 0)
    assert not noisy.noisy_frames.all()


def test_the_loss_is_over_the_frames_that_are_not_clean():
    config, batch, seen = tiny_config("finetune"), tiny_batch(8, 7), {}

    def apply(params, latents, timestep, text):
        seen.update(latents=latents, timestep=timestep)
        return params * latents

    loss = finetune.make_loss(apply, config, chunk_frames=lambda params: 2)
    found, _ = loss(jnp.array(0.5), {"null_text": jnp.zeros((4, 8))}, batch, jax.random.key(3))
    sigma = np.asarray(seen["timestep"]) / 1000
    errors = []
    for video, frame in zip(*np.nonzero(sigma), strict=True):
        noisy, clean = np.asarray(seen["latents"])[video, frame], batch["latents"][video, frame]
        noise = (noisy - (1 - sigma[video, frame]) * clean) / sigma[video, frame]
        errors.append(np.square(0.5 * noisy - (noise - clean)).mean())
    assert len(errors) < sigma.size
    np.testing.assert_allclose(found, np.mean(errors), rtol=1e-4)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("distill", {"hybrid.blocks": "all"}, r'but only stages "pretrain", "finetune", "guidance", "dmd" draw'),
        ("velocity", {}, r"config.stage is 'velocity', which learns from a softmax model"),
        (
            "finetune",
            {"velocity.teacher_weight": 0.5},
            r"teacher_weight must be 0 with .*noise_by_chunk = True, found 0.5",
        ),
        ("dmd", {"mesh.context": 2}, r"mesh.context must be 1 with .*noise_by_chunk = True in stage 'dmd', found 2"),
    ],
)
def test_stages_with_a_teacher_of_one_level_are_refused(stage, changes, message):
    config = tiny_config(stage, noise_by_chunk=True, init_from="somewhere", **changes)
    with pytest.raises(InputError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("hybrid", "blocks", "found"),
    [
        (FORM, (1,), r"found softmax in blocks 0, 2"),
        (HybridConfig(causal=False), "all", r"found hybrid 3\+1, not causal in blocks 0, 1, 2"),
    ],
)
def test_models_that_are_not_causal_in_every_block_are_refused(hybrid, blocks, found):
    config = tiny_config("finetune", noise_by_chunk=True)
    with pytest.raises(InputError, match=rf"config.noise_by_chunk: expected causal .*{found}"):
        student_config(TINY.replace(hybrid_blocks=blocks, hybrid=hybrid), config)


def test_a_model_says_that_it_was_trained_by_chunk_and_is_made_one_of_few_steps(tmp_path):
    """tests/test_guidance.py has a run that trains by chunk, and what it writes; here the model is saved directly."""
    wan = load_params(pretrained(tmp_path))[0].replace(hybrid_blocks="all", hybrid=FORM)
    path, parts = tmp_path / "by_chunk", {"codec": "space_to_depth", "text_encoder": "word_vectors"}
    save_model(path, wan, tiny_model(wan)[1], **parts, noise_by_chunk=True)
    metadata = {**parts, "noise_levels": "by_chunk"}
    assert read_model_metadata(path)[1] == metadata
    # Conversion carries it along in both directions.
    convert_to_torch(path, tmp_path / "torch", "diffusers")
    convert_from_torch(tmp_path / "torch", tmp_path / "back")
    assert read_model_metadata(tmp_path / "back")[1] == metadata

    # A student of few steps that is made by chunk samples in this order, unless another one is asked for.
    few = {"steps": 3, "batch_size": 2, "few_step.steps": 2, "dmd.score_updates": 1}
    few = digits_config(tmp_path, "dmd", noise_by_chunk=True, init_from=str(path), **few)
    made = train(few, tmp_path / "few", jax.devices()[:1])
    assert read_model_metadata(made)[1].items() >= metadata.items()
    own, streamed = (Pipeline.from_pretrained(None, SamplingOptions(stream=it), student=made) for it in (False, True))
    assert (own.options.order, streamed.options.order) == ("chunks", "video")
    few.init_from = pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config.init_from: .* knows one noise level for all frames"):
        train(few, tmp_path / "other", jax.devices()[:1])

    description = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(description | {"noise_levels": "by_frame"}))
    with pytest.raises(InputError, match=r"model.json: noise_levels should be 'by_chunk', found 'by_frame'"):
        read_model_metadata(path)
