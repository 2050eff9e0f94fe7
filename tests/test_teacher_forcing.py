"""Teacher forcing: every chunk learns after the clean chunks of a real video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TINY, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.flops import forward_flops, training_flops
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training import finetune
from rehyat_jax.training.config import check_config
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.over_chunks import make_apply
from rehyat_jax.training.stages import STAGES

FORM = HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=FeatureMapConfig(features=16), linear_window=True)
STUDENT = TINY.replace(num_layers=1, hybrid_blocks="all", hybrid=FORM)
NULL_TEXT = jnp.full((TINY.text_length, TINY.text_dim), 0.5)
FORCED = {"noise_by_chunk": True, "teacher_forcing": True}


def test_a_chunk_and_its_gradients_are_those_of_the_complete_model_after_clean_chunks():
    model_def, params = tiny_model(STUDENT)
    config, batch, key = tiny_config("finetune", **FORCED), tiny_batch(2, 5), jax.random.key(5)
    complete = apply_model(model_def)

    def expected(params):
        noisy = noise_batch(batch, NULL_TEXT, key, config, chunk_frames=2)
        velocity = []
        for start in range(0, 5, 2):
            now = slice(start, start + 2)
            latents = jnp.concatenate([batch["latents"][:, :start], noisy.latents[:, now]], axis=1)
            levels = jnp.concatenate([jnp.zeros((2, start)), noisy.timestep[:, now]], axis=1)
            velocity.append(complete(params, latents, levels, noisy.text)[:, start:])
        error = jnp.concatenate(velocity, axis=1) - noisy.velocity
        return jnp.square(error).mean()

    loss = finetune.make_loss(make_apply(config)(model_def), config, chunk_frames=lambda params: 2)
    metrics, grads = jax.jit(finetune.make_grad_fn(loss))(params, {"null_text": NULL_TEXT}, batch, key)
    expected_loss, expected_grads = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)
    # Through the states, the features of keys learn from later chunks.
    assert np.abs(jax.tree.leaves(grads["feature_maps"])[0]).max() > 1e-4


def test_every_chunk_is_noisy_and_what_others_read_is_clean():
    config, batch = tiny_config("finetune", **FORCED), tiny_batch(200, 4)
    noisy = noise_batch(batch, NULL_TEXT, jax.random.key(3), config, chunk_frames=2)
    assert (noisy.timestep > 0).all() and (noisy.timestep[:, 0] != noisy.timestep[:, 2]).all()
    np.testing.assert_array_equal(*noisy.past, batch["latents"])


def test_flops_are_those_of_the_noisy_and_of_the_finished_chunks():
    config, latents, finished = tiny_config("finetune", **FORCED), (5, 4, 6), (4, 4, 6)
    how = dict(remat=config.remat, trains_weights=True, lora=None)
    noisy, past = (training_flops(STUDENT, size, **how) for size in (latents, finished))
    forward = forward_flops(STUDENT, finished)
    found = STAGES["finetune"].step_flops(STUDENT, latents, config)
    assert found.model == noisy.model + past.model
    assert found.recomputed == noisy.recomputed + past.recomputed + 2 * (forward.outside + forward.blocks)
    alone = STAGES["finetune"].step_flops(STUDENT, (2, 4, 6), config)
    assert alone == training_flops(STUDENT, (2, 4, 6), **how)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("finetune", {"noise_by_chunk": False}, r"teacher_forcing must be False .*noise_by_chunk = False"),
        ("dmd", {}, r"teacher_forcing must be False in stage 'dmd'"),
        ("finetune", {"mesh.context": 2}, r"mesh.context must be 1 .*teacher_forcing = True, found 2"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(stage, changes, message):
    with pytest.raises(InputError, match=message):
        check_config(tiny_config(stage, init_from="somewhere", **FORCED | changes))
