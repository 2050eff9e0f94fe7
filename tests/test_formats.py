"""Checkpoints and exports of earlier versions of the formats still load, and compute what they did.

`fixtures/version_1` was written by the release with `format_version` 1: a student of two blocks, the second one hybrid,
as a model checkpoint and exported in both layouts, and the velocity that it computed then.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from rehyat_jax import FeatureMapConfig, HybridConfig, load_wan
from rehyat_jax.pytorch.rehyat_torch import load_student
from rehyat_jax.weights.model_checkpoint import read_model_description

VERSION_1 = Path(__file__).parent / "fixtures" / "version_1"

FORM = HybridConfig(2, 0, causal=False, stabilizer="joint", feature_map=FeatureMapConfig(features=4))


def inputs():
    rng = np.random.default_rng(1)
    latents, text = rng.standard_normal((1, 5, 2, 4, 2), np.float32), rng.standard_normal((1, 2, 4), np.float32)
    return latents, np.array([737.0], np.float32), text


@pytest.mark.parametrize("name", ["student", "student_diffusers", "student_original"])
def test_a_student_of_version_1_computes_what_it_did(name):
    student = load_wan(VERSION_1 / name, attention_implementation="reference")
    assert (student.config.hybrid_block_indices, student.config.hybrid) == ((1,), FORM)
    # Another version of XLA may round otherwise.
    np.testing.assert_allclose(student(*inputs()), np.load(VERSION_1 / "student_velocity.npy"), atol=1e-5)


def test_a_teacher_of_version_1_has_no_hybrid_block():
    config, metadata = read_model_description(VERSION_1 / "teacher")
    assert config.hybrid_block_indices == ()
    assert metadata == {"codec": "wan_vae", "text_encoder": "umt5"}


def test_an_export_of_version_1_runs_in_pytorch():
    latents, timestep, text = map(torch.tensor, inputs())
    with torch.no_grad():
        velocity = load_student(VERSION_1 / "student_diffusers")(latents.permute(0, 4, 1, 2, 3), timestep, text).sample
    # diffusers' sinusoids of the timestep are float32: good to 3e-5 at t = 737.
    expected = np.load(VERSION_1 / "student_velocity.npy")
    np.testing.assert_allclose(velocity.permute(0, 2, 3, 4, 1), expected, atol=5e-5)
