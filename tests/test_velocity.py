"""Distillation end to end: the student learns the velocity of a softmax teacher from the same noisy latents."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prepared_data import write_data_set
from tiny_runs import TINY, digits_config, killed_after, pretrained, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.flops import StepFlops, forward_flops, teacher_flops, training_flops
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.planning.train_step import abstract_step
from rehyat_jax.train import train as train_on
from rehyat_jax.training import finetune
from rehyat_jax.training.config import check_config
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.velocity import make_teacher
from rehyat_jax.weights import load_params, save_model
from rehyat_jax.weights.identity import weights_identity
from rehyat_jax.weights.load import open_checkpoint

STUDENT = TINY.replace(num_layers=2, hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2))
NULL_TEXT = jnp.full((TINY.text_length, TINY.text_dim), 0.5)


def train(config, workdir, devices=1):
    return train_on(config, workdir, jax.devices()[:devices])


def logged(workdir, name):
    return [json.loads(line).get(name) for line in (workdir / "metrics.jsonl").open()]


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("weight, scale, own", [(1.0, 1.0, False), (0.25, 3.0, True)])
def test_loss_and_gradient_are_those_of_the_formula(weight, scale, own):
    model_def, params = tiny_model(STUDENT)
    teacher_def, teacher_params = tiny_model(TINY.replace(num_layers=2))
    shared = {name: tree for name, tree in params.items() if name != "feature_maps"}
    teacher_params = jax.tree.map(lambda leaf: np.float32(1.1) * np.asarray(leaf), teacher_params) if own else shared
    config = tiny_config("finetune", **{"velocity.guidance_scale": scale})
    batch, key = tiny_batch(), jax.random.key(3)
    context = {"null_text": NULL_TEXT} | ({"teacher": teacher_params} if own else {})
    student, teacher = apply_model(model_def), apply_model(teacher_def)

    def expected(params):
        noisy = noise_batch(batch, NULL_TEXT, key, config)
        predict = lambda text: teacher(teacher_params, noisy.latents, noisy.timestep, text)
        null = predict(jnp.stack([NULL_TEXT] * 2))
        target = null + scale * (predict(noisy.text) - null)
        velocity = student(params, noisy.latents, noisy.timestep, noisy.text)
        data, of_teacher = (jnp.square(v - noisy.velocity).mean() for v in (velocity, target))
        loss = weight * jnp.square(velocity - target).mean() + (1 - weight) * data
        error = jnp.abs(velocity - target).mean() / jnp.abs(target).mean()
        return loss, {"loss": loss, "velocity_error": error, "excess_vs_teacher": data - of_teacher}

    loss = finetune.make_loss(student, config, teacher=make_teacher(model_def, config), teacher_weight=weight)
    metrics, grads = jax.jit(finetune.make_grad_fn(loss))(params, context, batch, key)
    expected_grads, expected_metrics = jax.jit(jax.grad(expected, has_aux=True))(params)
    assert metrics.keys() == expected_metrics.keys()
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, (metrics, grads), (expected_metrics, expected_grads))


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Noisy latents of the digits' sizes with their timesteps, as a teacher's trajectories have them."""
    rng = np.random.default_rng(0)
    examples = [
        {
            "latents": rng.standard_normal((8, 6, 6, 16), np.float32),
            "text": rng.standard_normal((8, 64), np.float32),
            "timestep": np.float32(1000 * rng.random()),
        }
        for _ in range(8)
    ]
    folder = tmp_path_factory.mktemp("data") / "trajectories"
    write_data_set(folder, examples, kind="trajectories", codec="space_to_depth")
    return str(folder)


def velocity_config(tmp_path, teacher, stage="velocity", **changes):
    config = digits_config(tmp_path, stage, init_from=teacher, **changes)
    config.hybrid.blocks, config.hybrid.chunk_frames, config.hybrid.feature_map.features = "all", 2, 16
    config.optimizer.learning_rate = 1e-2
    return config


def test_feature_maps_alone_learn_the_velocity_of_their_own_model(tmp_path, teacher):
    config = velocity_config(tmp_path, teacher, steps=30, log_every=1)
    train(config, tmp_path / "run")
    errors = logged(tmp_path / "run", "velocity_error")
    assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:3])
    assert all(np.isfinite(logged(tmp_path / "run", "excess_vs_teacher")))
    found, expected = load_params(tmp_path / "run" / "model")[1], load_params(teacher)[1]
    assert found.pop("feature_maps")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_converted_model_goes_on_and_a_stopped_run_resumes_bit_for_bit(tmp_path, teacher, trajectories):
    data = {"data.source": "prepared", "data.path": trajectories}
    config = velocity_config(tmp_path, teacher, stage="distill", steps=3, **data)
    distilled = train(config, tmp_path / "distilled")
    config = velocity_config(tmp_path, str(distilled), **data)
    config.hybrid.blocks = None  # those of the model
    train(config, tmp_path / "whole")
    killed_after(3, tmp_path / "whole", tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    whole, stopped = (load_params(tmp_path / name / "model")[1] for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)
    # Trajectories have no clean latents to compare with.
    assert logged(tmp_path / "whole", "excess_vs_teacher") == [None] * 6


@pytest.fixture(scope="module")
def learned(tmp_path_factory, teacher, trajectories):
    """(configuration, directory) of a run of all parameters on the velocity of a teacher of its own, on one device."""
    folder = tmp_path_factory.mktemp("learned")
    data = {"data.source": "prepared", "data.path": trajectories}
    config = velocity_config(folder, teacher, "finetune", **data)
    config.velocity.teacher, config.velocity.teacher_weight, config.velocity.guidance_scale = teacher, 1.0, 2.0
    config.optimizer.learning_rate = 1e-3
    train(config, folder / "run")
    return config, folder / "run"


def test_all_parameters_learn_a_teacher_s_velocity_without_videos_on_any_mesh(tmp_path, learned):
    config, one = learned[0].copy_and_resolve_references(), learned[1]
    errors = logged(one, "velocity_error")
    assert errors[-1] < errors[0]
    config.mesh.fsdp, config.mesh.context = 2, 2
    train(config, tmp_path / "many", 4)
    # The same float32 sums in another order.
    np.testing.assert_allclose(logged(tmp_path / "many", "loss"), logged(one, "loss"), rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- memory and cost


def test_a_teacher_of_its_own_takes_memory_in_the_compute_dtype(tmp_path, teacher):
    config = velocity_config(tmp_path, teacher, "finetune", dtype="bfloat16")
    wan = WAN_PRESETS["tiny"].replace(num_layers=2, ffn_dim=64, num_heads=1, head_dim=24, hybrid_blocks="all")

    def memory(**changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        with jax.set_mesh(make_mesh(changed.mesh, jax.devices()[:1])):
            return abstract_step(changed, wan, (4, 4, 4)).memory

    alone, only_maps = memory(), memory(stage="velocity")
    weights = only_maps["frozen teacher"]
    assert alone["frozen teacher"] == 0 and weights + only_maps["parameters"] == alone["parameters"]
    with_teacher = memory(**{"velocity.teacher": teacher, "velocity.teacher_weight": 0.5})
    # The timestep's path, modulation, norms and the head stay float32.
    assert 0.5 * weights < with_teacher["frozen teacher"] < 0.75 * weights


def test_flops_of_a_step():
    wan = WAN_PRESETS["t2v-1.3B"].replace(num_layers=4, hybrid_blocks=(1, 3))
    latents, count = (6, 8, 8), forward_flops(wan, (6, 8, 8))
    attention = sum(flops.total for flops in count.attention[1:])
    forward = count.outside + count.blocks
    # Blocks from the first converted one on; the gradient of their inputs costs a forward pass.
    expected = StepFlops(forward + 3 * count.block + 2 * attention, 0)
    assert training_flops(wan, latents, remat="none", trains_weights=False) == expected
    config = tiny_config("velocity")
    flops = lambda: STAGES[config.stage].step_flops(wan, latents, config)
    assert flops() == StepFlops(expected.model + teacher_flops(wan, latents), 0)
    config.velocity.guidance_scale = 4.0
    assert flops() == StepFlops(expected.model + 2 * teacher_flops(wan, latents), 0)
    config.stage = "finetune"
    assert flops() == StepFlops(3 * forward, 0)
    config.velocity.teacher_weight, config.velocity.guidance_scale = 0.1, 1.0
    assert flops() == StepFlops(3 * forward + teacher_flops(wan, latents), 0)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_teacher_that_does_not_fit_is_refused_by_name(tmp_path, teacher):
    config = velocity_config(tmp_path, teacher, "finetune", **{"velocity.teacher_weight": 1.0})
    with pytest.raises(InputError, match=r"config\.velocity\.teacher is empty; .* 'finetune' learns the velocity"):
        check_config(config)

    wan = WAN_PRESETS["tiny"].replace(num_layers=2, ffn_dim=64, num_heads=1, head_dim=24)
    names = dict(codec="space_to_depth", text_encoder="word_vectors")
    others = {
        "ffn_dim, 64, found 32": (wan.replace(ffn_dim=32), names),
        "codec, 'space_to_depth', found 'wan_vae'": (wan, {**names, "codec": "wan_vae"}),
        r"hybrid blocks, \(0, 1\); give the softmax model": (wan.replace(hybrid_blocks="all"), names),
    }
    for number, (message, (other, metadata)) in enumerate(others.items()):
        config.velocity.teacher = str(tmp_path / str(number))
        save_model(tmp_path / str(number), other, tiny_model(other)[1], **metadata)
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "3").exists()


def test_trajectories_of_another_teacher_are_refused(tmp_path, teacher, learned):
    examples = [{"latents": np.zeros((8, 6, 6, 16)), "text": np.zeros((8, 64)), "timestep": np.float32(500)}] * 4
    examples = [{name: np.float32(value) for name, value in example.items()} for example in examples]
    own = weights_identity(open_checkpoint(teacher))

    def config(name, identity):
        folder = tmp_path / name
        write_data_set(folder, examples, kind="trajectories", codec="space_to_depth", teacher=identity)
        data = {"data.source": "prepared", "data.path": str(folder)}
        return velocity_config(tmp_path, teacher, stage="distill", steps=3, **data)

    with pytest.raises(InputError, match=f"weights 012345678901, but the teacher, config.init_from = .* {own[:12]}"):
        train(config("other", "0123456789" * 6 + "0123"), tmp_path / "run")
    student = train(config("own", own), tmp_path / "run")
    assert weights_identity(open_checkpoint(student)) == own
    # Finetuned weights are no longer the teacher's.
    assert weights_identity(open_checkpoint(learned[1] / "model")) != own


def test_videos_are_needed_unless_only_a_teacher_is_learned(tmp_path, teacher, trajectories):
    data = {"data.source": "prepared", "data.path": trajectories}
    config = velocity_config(tmp_path, teacher, "finetune", **data)
    config.velocity.teacher, config.velocity.teacher_weight = teacher, 0.9
    with pytest.raises(InputError, match=r"\"distill\", \"velocity\", .*\"dmd\" can learn, .*teacher_weight = 1"):
        train(config, tmp_path / "run")


def test_a_model_without_feature_maps_has_nothing_to_train(tmp_path, teacher):
    config = digits_config(tmp_path, "velocity", init_from=teacher)
    with pytest.raises(InputError, match="stage 'velocity' has nothing to train"):
        train(config, tmp_path / "run")


def test_another_teacher_in_a_resumed_run_is_told(tmp_path, teacher, learned, capsys):
    config, run = learned[0].copy_and_resolve_references(), tmp_path / "run"
    shutil.copytree(learned[1], run, ignore=shutil.ignore_patterns("model"))
    shutil.copytree(teacher, tmp_path / "copy")
    config.velocity.teacher = str(tmp_path / "copy")
    train(config, run)
    assert "files of config.velocity.teacher" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "copy")
    wan, params, names = load_params(teacher)
    save_model(tmp_path / "copy", wan, jax.tree.map(lambda leaf: np.float32(1.1) * leaf, params), **names)
    shutil.rmtree(run / "model")
    train(config, run)
    assert "files of config.velocity.teacher" in capsys.readouterr().out
