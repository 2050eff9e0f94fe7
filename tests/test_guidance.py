"""Stage "guidance": a student learns its own velocity after guidance, and then samples with fewer evaluations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TINY, digits_config, pretrained, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.models.wan.flops import StepFlops, forward_flops, training_flops
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.train import train
from rehyat_jax.training import finetune
from rehyat_jax.training.config import check_config
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.velocity import make_teacher
from rehyat_jax.weights import load_wan, save_model
from rehyat_jax.weights.load import read_model_metadata

STUDENT = TINY.replace(
    num_layers=1, hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2, feature_map=FeatureMapConfig(features=16))
)
NULL_TEXT = jnp.full((TINY.text_length, TINY.text_dim), 0.5)


def test_the_target_by_chunk_is_the_guided_velocity_of_the_initial_model_in_noisy_frames():
    model_def, params = tiny_model(STUDENT)
    teacher_params = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    config = tiny_config("guidance", noise_by_chunk=True, **{"velocity.guidance_scale": 3.0})
    batch, key, apply = tiny_batch(4, 7), jax.random.key(1), apply_model(model_def)
    noisy = noise_batch(batch, NULL_TEXT, key, config, chunk_frames=2)
    is_noisy = np.asarray(noisy.timestep) > 0
    assert is_noisy.any() and not is_noisy.all()

    def expected(params):
        predict = lambda text: apply(teacher_params, noisy.latents, noisy.timestep, text)
        null = predict(jnp.broadcast_to(NULL_TEXT, noisy.text.shape))
        target = null + 3 * (predict(noisy.text) - null)
        error = (apply(params, noisy.latents, noisy.timestep, noisy.text) - target)[is_noisy]
        return jnp.square(error).mean(), jnp.abs(error).mean() / jnp.abs(target[is_noisy]).mean()

    teacher = make_teacher(model_def, config, is_softmax=False)
    loss = finetune.make_loss(apply, config, teacher=teacher, teacher_weight=1.0, chunk_frames=lambda params: 2)
    context = {"null_text": NULL_TEXT, "teacher": teacher_params}
    metrics, grads = jax.jit(finetune.make_grad_fn(loss))(params, context, batch, key)
    (expected_loss, expected_error), expected_grads = jax.jit(jax.value_and_grad(expected, has_aux=True))(params)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["velocity_error"], expected_error, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


def test_a_student_by_chunk_starts_at_its_own_velocity_and_keeps_its_solver(tmp_path):
    form = HybridConfig(feature_map=FeatureMapConfig(features=16))
    wan = load_wan(pretrained(tmp_path, num_layers=1)).config.replace(hybrid_blocks="all", hybrid=form)
    parts = {"codec": "space_to_depth", "text_encoder": "word_vectors", "noise_by_chunk": True}
    by_chunk = tmp_path / "by_chunk"
    save_model(by_chunk, wan, tiny_model(wan)[1], **parts)
    changes = {"noise_by_chunk": True, "teacher_forcing": True, "steps": 3, "log_every": 1}
    changes |= {"few_step.steps": 7, "velocity.guidance_scale": 2.0}
    config = digits_config(tmp_path, "guidance", init_from=str(by_chunk), **changes)
    made = train(config, tmp_path / "guided", jax.devices()[:1])
    solver = {"steps": 7, "guidance_scale": 1.0, "flow_shift": config.flow_shift, "sampler": "unipc"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "guided" / "metrics.jsonl").open()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    metadata = read_model_metadata(made)[1]
    assert (metadata["sampling"], metadata["noise_levels"]) == (solver, "by_chunk")
    options = Pipeline.from_pretrained(student=made).options
    assert {name: getattr(options, name) for name in solver} == solver and options.order == "chunks"


def test_its_teacher_costs_two_forward_passes_of_the_student():
    config, latents = tiny_config("guidance", **{"velocity.guidance_scale": 2.0}), (5, 4, 6)
    update = training_flops(STUDENT, latents, remat=config.remat, trains_weights=True, lora=None)
    forward = forward_flops(STUDENT, latents)
    found = STAGES["guidance"].step_flops(STUDENT, latents, config)
    assert found == StepFlops(update.model + 2 * (forward.outside + forward.blocks), update.recomputed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"guidance_scale must be above 1 in stage 'guidance', found 1.0"),
        (
            {"velocity.guidance_scale": 3.0, "noise_by_chunk": True, "velocity.teacher": "softmax"},
            r"velocity.teacher must be empty with .*noise_by_chunk = True in stage 'guidance', found 'softmax'",
        ),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check_config(tiny_config("guidance", init_from="somewhere", **changes))


def test_trajectories_have_no_levels_by_chunk():
    kinds = lambda stage, **changes: STAGES[stage].data_kinds(tiny_config(stage, **changes))
    assert kinds("guidance") == ("examples", "trajectories")
    assert kinds("guidance", noise_by_chunk=True) == ("examples",)
    # It only reads how large they are.
    assert kinds("dmd", noise_by_chunk=True) == ("examples", "trajectories")
