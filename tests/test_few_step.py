"""Students of few steps: the sampler "renoise", and the stages "dmd" and "consistency"."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_runs import TINY, digits_config, killed_after, one_at_a_time, pretrained, tiny_batch, tiny_config, tiny_model

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.diffusion.samplers import fresh_noise, sample
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.chunks import sample_by_chunk
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.models.lora import LoraConfig
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.planning.train_step import abstract_step
from rehyat_jax.train import train as train_on
from rehyat_jax.training import consistency, dmd, finetune, rollout
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights import load_params, save_model

STUDENT = TINY.replace(num_layers=1, hybrid_blocks="all", hybrid=HybridConfig(chunk_frames=2))
SOFTMAX = TINY.replace(num_layers=1)  # for what does not depend on the attention: programs are a third smaller
NULL_TEXT = jnp.full((TINY.text_length, TINY.text_dim), 0.5)


def train(config, workdir, devices=1):
    return train_on(config, workdir, jax.devices()[:devices])


def logged(workdir, name):
    return [json.loads(line).get(name) for line in (workdir / "metrics.jsonl").open()]


def scaled(factor, params):
    return jax.tree.map(lambda leaf: np.float32(factor) * np.asarray(leaf), params)


# ---------------------------------------------------------------------------------------------------------- the sampler


def test_renoising_is_the_loop_of_consistency_models():
    noise = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2)))
    velocity = lambda latents, timestep: jnp.tanh(latents) * timestep.reshape(-1, 1, 1, 1, 1) / 1000
    grid = wan_grid(4, 5.0)
    x = jnp.asarray(noise)
    for number in range(4):
        clean = x - grid.sigmas[number] * velocity(x, jnp.full(2, grid.timesteps[number]))
        x = (1 - grid.sigmas[number + 1]) * clean + grid.sigmas[number + 1] * fresh_noise(jnp.asarray(noise), number)
    np.testing.assert_allclose(sample(velocity, noise, grid, sampler="renoise"), x, atol=1e-5)


def test_new_noise_is_normal_and_belongs_to_its_video_and_step():
    noise = jax.random.normal(jax.random.key(0), (3, 5, 8, 8, 4))
    found = np.stack([fresh_noise(noise, number) for number in range(3)])
    np.testing.assert_array_equal(fresh_noise(noise[1:2], 2)[0], found[2, 1])
    with_initial = np.concatenate([noise[None], found]).reshape(12, -1)
    correlations = np.corrcoef(with_initial)
    # Of 1,280 independent values: a standard deviation of 0.028.
    assert np.abs(correlations - np.eye(12)).max() < 0.12
    assert np.abs(with_initial.mean(1)).max() < 0.12 and np.abs(with_initial.std(1) - 1).max() < 0.1


def test_streamed_videos_get_the_same_new_noise():
    graphdef, params = tiny_model(STUDENT)
    model = nnx.merge(graphdef, params)
    noise = np.asarray(tiny_batch(frames=7)["latents"])
    text = jnp.asarray(tiny_batch()["text"])
    options = dict(steps=3, guidance_scale=1.0, flow_shift=3.0, sampler="renoise")
    expected = generate_latents(model, text, text, jnp.asarray(noise), **options)
    np.testing.assert_allclose(stream_latents(model, text, text, noise, part_chunks=1, **options), expected, atol=5e-5)
    # A chunk alone is a video; the next one has noise of its own.
    expected = generate_latents(model, text, text, jnp.asarray(noise[:, :2]), **options)
    by_chunk = sample_by_chunk(model, text, text, noise[:, :4], **options)
    np.testing.assert_allclose(by_chunk[:, :2], expected, atol=5e-5)
    assert not np.array_equal(fresh_noise(noise[:, :2], 0), fresh_noise(noise[:, 2:4], 0))


# ------------------------------------------------------------------------------------------------------------------ dmd


@pytest.mark.parametrize("teacher", ["", "softmax"])
def test_the_generators_gradient_is_the_difference_of_the_scores(teacher):
    scale = 3.0  # without guidance: the next test
    model_def, generator = tiny_model(STUDENT if teacher else SOFTMAX)
    fake, real = scaled(1.1, generator), scaled(0.9, generator)
    changes = {"velocity.teacher": teacher, "velocity.guidance_scale": scale, "timestep_sampling": "uniform"}
    config, apply, key = tiny_config("dmd", **changes), apply_model(model_def), jax.random.key(4)
    score = apply_softmax if teacher else apply
    batch = {**tiny_batch(), "noisy": tiny_batch()["latents"], "sigma": np.full(2, 0.8), "timestep": np.full(2, 800.0)}
    context = {"null_text": NULL_TEXT, "teacher": real, dmd.FAKE_SCORE: fake}
    grad_fn = jax.jit(dmd.make_generator_grad_fn(model_def, config, STAGES["dmd"].join))
    metrics, grads = grad_fn(generator, context, batch, key)

    @jax.jit
    def expected(generator, fake, real):
        make = lambda params: batch["noisy"] - 0.8 * apply(params, batch["noisy"], batch["timestep"], batch["text"])
        clean, pull = jax.vjp(make, generator)
        sigma_key, noise_key = jax.random.split(key)
        sigma = jax.random.uniform(sigma_key, (2,))
        sigma = (config.flow_shift * sigma / (1 + (config.flow_shift - 1) * sigma)).clip(0.02, 0.98)
        of = sigma.reshape(2, 1, 1, 1, 1)
        noisy = (1 - of) * clean + of * jax.random.normal(noise_key, clean.shape)
        predict = lambda params, text: noisy - of * score(params, noisy, 1000 * sigma, text)
        null = jnp.stack([NULL_TEXT] * 2)
        of_real = predict(real, null) + scale * (predict(real, batch["text"]) - predict(real, null))
        difference = predict(fake, batch["text"]) - of_real
        difference /= jnp.abs(clean - of_real).mean((1, 2, 3, 4), keepdims=True)
        return jnp.abs(difference).mean(), pull(difference / clean.size)[0]

    size, expected_grads = expected(generator, fake, real)
    np.testing.assert_allclose(metrics["score_difference"], size, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)


def apply_softmax(params, *inputs):
    """The student with softmax attention in all blocks, in which feature maps have no part."""
    model_def, _ = tiny_model(STUDENT.replace(hybrid_blocks=()))
    return apply_model(model_def)({name: tree for name, tree in params.items() if name != "feature_maps"}, *inputs)


def test_the_fake_score_of_a_softmax_teacher_starts_as_this_teacher():
    """Of all weights, and of adapters on a frozen base. The student and its base have other weights."""
    stage, config = STAGES["dmd"], tiny_config("dmd", **{"velocity.teacher": "softmax"})
    batch = tiny_batch()
    inputs = (batch["latents"], jnp.full(2, 800.0), batch["text"])
    teacher = scaled(0.9, tiny_model(STUDENT.replace(hybrid_blocks=()))[1])
    expected = jax.jit(apply_softmax)(teacher, *inputs)
    for lora in (None, LoraConfig(2, 2.0, ("query",))):
        model_def, params = tiny_model(STUDENT, lora=lora)
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: 0 * leaf if path[-1].key == "b" else leaf, params)
        trained, frozen = stage.split(params)
        context = {"teacher": teacher, **({"frozen": frozen} if frozen else {})}
        start = stage.start(trained, context, config)
        jax.tree.map(np.testing.assert_array_equal, start[dmd.GENERATOR], trained)
        score, of_score = dmd.make_score(model_def, config)
        found = jax.jit(score)(stage.join(start[dmd.FAKE_SCORE], of_score(context).get("frozen", {})), *inputs)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_step_updates_the_generator_once_and_then_the_fake_score_on_what_it_made():
    model_def, params = tiny_model(SOFTMAX)
    changes = {"few_step.steps": 2, "dmd.score_updates": 2, "dmd.score_rate": 0.5, "caption_dropout": 0.0}
    config, join = tiny_config("dmd", **changes), STAGES["dmd"].join
    state, optimizers = {dmd.GENERATOR: params, dmd.FAKE_SCORE: params}, dmd.make_optimizers(config)
    context = {"null_text": NULL_TEXT, "teacher": scaled(0.9, params)}
    batch, key = tiny_batch(), jax.random.key(6)
    update = jax.jit(dmd.make_update(model_def, config, dmd.joint_optimizer(config), join))
    found = update(state, dmd.joint_optimizer(config).init(state), context, one_at_a_time(batch), key)

    apply, (simulate_key, generator_key, score_key) = apply_model(model_def), jax.random.split(key, 3)

    @jax.jit
    def expected_generator():
        options = dict(steps=2, flow_shift=config.flow_shift)
        step_key, noise_key = jax.random.split(jax.random.split(simulate_key, 1)[0])
        step, grid = jax.random.randint(step_key, (), 0, 2), wan_grid(2, config.flow_shift)
        simulate = rollout.whole_videos(model_def, **options).simulate
        noisy, clean = simulate(params, batch["latents"].shape, batch["text"], noise_key, step)
        sigma, timestep = (jnp.full(2, jnp.asarray(values, jnp.float32)[step]) for values in grid)
        inputs = {**batch, "noisy": noisy, "sigma": sigma, "timestep": timestep}
        grad_fn = dmd.make_generator_grad_fn(model_def, config, join)
        _, grads = grad_fn(params, {**context, dmd.FAKE_SCORE: params}, inputs, generator_key)
        updates, _ = optimizers[dmd.GENERATOR].update(grads, optimizers[dmd.GENERATOR].init(params), params)
        return optax.apply_updates(params, updates), clean

    @jax.jit
    def learned(score, score_state, clean, key):
        videos, loss_fn = {"latents": clean, "text": batch["text"]}, finetune.make_loss(apply, config)
        grads, metrics = jax.grad(lambda score: loss_fn(score, context, videos, key), has_aux=True)(score)
        updates, score_state = optimizers[dmd.FAKE_SCORE].update(grads, score_state, score)
        return optax.apply_updates(score, updates), score_state, metrics["loss"]

    generator, clean = expected_generator()
    score, score_state, losses = params, optimizers[dmd.FAKE_SCORE].init(params), []
    for fake_key in jax.random.split(score_key, 2):
        score, score_state, loss = learned(score, score_state, clean, fake_key)
        losses.append(loss)
    networks = {dmd.GENERATOR: generator, dmd.FAKE_SCORE: score}
    np.testing.assert_allclose(found.metrics["fake_loss"], np.mean(losses), rtol=1e-5)
    # AdamW's first updates have the size of the learning rate, 1e-4, whatever the gradient.
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)
    found, networks, state = jax.device_get((found.params, networks, state))
    jax.tree.map(lambda a, b, start: compare(a - start, b - start), found, networks, state)


def test_the_simulation_meets_the_inputs_of_the_sampler():
    """A generator that always makes the same video: its inputs are mixtures of this video and normal noise."""
    video, shape, grid = 3.0, (2, 3, 8, 8, 4), wan_grid(4, 5.0)
    perfect = lambda latents, timestep: (latents - video) / (level(timestep).reshape(-1, 1, 1, 1, 1))
    level = lambda timestep: jnp.asarray(grid.sigmas)[jnp.argmin(abs(grid.timesteps - timestep[:, None]), axis=1)]
    solve = jax.jit(lambda key, step: rollout.solve(perfect, shape, key, step, steps=4, flow_shift=5.0))
    for step, sigma in enumerate(grid.sigmas[:4]):
        noisy, clean = solve(jax.random.key(step), step)
        np.testing.assert_allclose(clean, video, rtol=1e-4)
        noise = (noisy - (1 - sigma) * video * (step > 0)) / (sigma if step else 1)
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_chunk_by_chunk_a_student_reads_its_own_finished_chunks():
    """Beside the complete model on finished chunks at timestep 0 and the current one. The last chunk is incomplete."""
    model_def, params = tiny_model(STUDENT)
    text, shape, key, steps = jnp.asarray(tiny_batch()["text"]), (2, 5, 4, 6, 4), jax.random.key(3), 2
    grid, complete = wan_grid(steps, 3.0), jax.jit(apply_model(model_def))
    chunks = [slice(0, 2), slice(2, 4), slice(4, 5)]

    def velocity_after(finished, latents, timestep):
        timesteps = jnp.concatenate([jnp.zeros(finished.shape[:2]), jnp.full(latents.shape[:2], timestep)], axis=1)
        velocity = complete(params, jnp.concatenate([finished, latents], axis=1), timesteps, text)
        return velocity[:, finished.shape[1] :]

    finished, noisy = jnp.zeros((2, 0, 4, 6, 4)), []
    for number, frames in enumerate(chunks):
        noise = lambda step, number=number, size=frames.stop - frames.start: jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, number), step), (2, size, 4, 6, 4)
        )
        latents = noise(0)
        for step in range(steps):
            noisy_chunk, sigma = latents, grid.sigmas[step]
            clean = latents - sigma * velocity_after(finished, latents, grid.timesteps[step])
            if step + 1 < steps:
                latents = (1 - grid.sigmas[step + 1]) * clean + grid.sigmas[step + 1] * noise(step + 1)
        finished = jnp.concatenate([finished, clean], axis=1)
        noisy.append(noisy_chunk)
    made = rollout.chunk_by_chunk(model_def, steps=steps, flow_shift=3.0)
    found = jax.jit(lambda step: made.simulate(params, shape, text, key, step))(steps - 1)
    for array, expected in zip(found, (jnp.concatenate(noisy, axis=1), finished), strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-4)

    timestep = jnp.full(2, grid.timesteps[-1], jnp.float32)
    batch = {"noisy": found[0], "finished": finished, "timestep": timestep, "text": text}
    of = lambda params, finished: made.velocity(params, {**batch, "finished": finished})

    @jax.jit
    def velocity_and_gradients(params, finished):
        velocity, pull = jax.vjp(of, params, finished)
        return velocity, pull(velocity)

    velocity, (grads, of_finished) = velocity_and_gradients(params, finished)
    np.testing.assert_allclose(found[0] - grid.sigmas[steps - 1] * velocity, finished, atol=1e-4)
    assert not np.any(of_finished), "the states pass no gradient"
    # One chunk has no states: the gradient is that of the complete model.
    alone = {name: value[:, :2] if value.ndim == 5 else value for name, value in batch.items()}
    of_chunk, of_video = (
        jax.jit(jax.grad(lambda params, run=run: jnp.square(run.velocity(params, alone)).mean()))(params)
        for run in (made, rollout.whole_videos(model_def, steps=steps, flow_shift=3.0))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), of_chunk, of_video)
    assert np.any(grads["feature_maps"]["query"]["log_scale"])


# ---------------------------------------------------------------------------------------------------------- consistency


SCALE = 3.0  # without guidance: test_velocity


@functools.cache
def consistency_grad_fn():
    config = tiny_config("consistency", **{"velocity.guidance_scale": SCALE, "consistency.warmup_steps": 4})
    return config, jax.jit(consistency.make_grad_fn(tiny_model(SOFTMAX)[0], config, STAGES["consistency"].join))


@jax.jit
def consistency_by_central_differences(params, teacher, noisy, share):
    """(mean size of the tangent, gradient)."""
    apply, null = apply_model(tiny_model(SOFTMAX)[0]), jnp.stack([NULL_TEXT] * 2)
    predict = lambda text: apply(teacher, noisy.latents, noisy.timestep, text)
    along = predict(null) + SCALE * (predict(noisy.text) - predict(null))

    def velocity(distance):
        """Of the student, further along the straight line with the teacher's velocity."""
        return apply(params, noisy.latents + distance * along, noisy.timestep + 1000 * distance, noisy.text)

    distance = 1e-4
    change = (velocity(distance) - velocity(-distance)) / (2 * distance)
    sigma = (noisy.timestep / 1000).reshape(2, 1, 1, 1, 1)
    tangent = along - velocity(0.0) - share * sigma * change
    size = jnp.sqrt(jnp.square(tangent).mean((1, 2, 3, 4), keepdims=True))
    pull = jax.vjp(lambda params: apply(params, noisy.latents, noisy.timestep, noisy.text), params)[1]
    return size.mean(), pull(-2 * tangent / (size + 0.1) / tangent.size)[0]


@pytest.mark.parametrize("step", [0, 2, 9])
def test_the_target_of_consistency_is_the_derivative_along_the_teachers_path(step):
    _, params = tiny_model(SOFTMAX)
    teacher = scaled(0.9, params)
    config, grad_fn = consistency_grad_fn()
    key, batch = jax.random.key(5), tiny_batch()
    context = {"null_text": NULL_TEXT, "teacher": teacher, "step": jnp.int32(step)}
    metrics, grads = grad_fn(params, context, batch, key)

    noisy = noise_batch(batch, NULL_TEXT, key, config)
    size, expected = consistency_by_central_differences(params, teacher, noisy, min(1.0, step / 4))
    np.testing.assert_allclose(metrics["tangent"], size, rtol=1e-2)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    # Central differences in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2 * scale), grads, expected)


# ----------------------------------------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The checkpoint of a hybrid model of random weights."""
    folder = tmp_path_factory.mktemp("student")
    form = HybridConfig(chunk_frames=2, feature_map=FeatureMapConfig(features=16))
    wan = load_params(pretrained(folder))[0].replace(hybrid_blocks="all", hybrid=form)
    save_model(folder / "student", wan, tiny_model(wan)[1], codec="space_to_depth", text_encoder="word_vectors")
    return str(folder / "student")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, student):
    """A function from a stage to (configuration, directory) of its run on one device.

    Stage "dmd" trains adapters with a softmax model as its scores, so that the networks have different forms of
    attention. `test_recipe` trains all its weights.
    """

    @functools.cache
    def run(stage):
        folder = tmp_path_factory.mktemp(stage)
        changes = {"steps": 4, "checkpoint_every": 2, "few_step.steps": 3, "dmd.score_updates": 2}
        changes |= {"consistency.warmup_steps": 2, "optimizer.learning_rate": 1e-3, "init_from": student}
        if stage == "dmd":
            changes |= {"lora.rank": 2, "velocity.teacher": pretrained(folder), "accumulation_steps": 2}
            changes["ema_decay"] = 0.9
        config = digits_config(folder, stage, **changes)
        train(config, folder / "run")
        return config, folder / "run"

    return run


@pytest.mark.parametrize("stage", ["dmd", "consistency"])
def test_a_stopped_run_resumes_bit_for_bit_and_others_stay_frozen(stage, tmp_path, student, whole_run):
    config, whole_dir = whole_run(stage)
    killed_after(2, whole_dir, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    whole, stopped, before = (
        load_params(path)[1] for path in (whole_dir / "model", tmp_path / "stopped" / "model", student)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)
    assert logged(whole_dir, "loss") == logged(tmp_path / "stopped", "loss")
    pipeline = Pipeline.from_pretrained(student=whole_dir / "model")
    solver = [getattr(pipeline.options, name) for name in ("steps", "guidance_scale", "flow_shift", "sampler")]
    assert solver == [3, 1.0, config.flow_shift, "renoise"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, before)
    assert not same["blocks"]["self_attention"]["query"]["kernel"]
    # The base of adapters has its own feature maps.
    assert all(jax.tree.leaves(same["feature_maps"])) == (config.lora.rank > 0)
    assert all(np.isfinite(logged(whole_dir, "loss")))


def test_all_weights_have_the_same_shapes_and_shardings_after_a_step_on_a_softmax_teacher_s_scores():
    """Traced only. The fake score takes the teacher's weights, which lack the feature maps of the generator."""
    config = tiny_config("dmd", **{"velocity.teacher": "softmax", "mesh.fsdp": 2, "dmd.score_updates": 2})
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:2])):
        plan = abstract_step(config, STUDENT, (5, 4, 6))
        state, _ = jax.eval_shape(plan.step, plan.state, plan.context, plan.batch)
    assert "feature_maps" not in plan.context["teacher"]
    shape = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(shape, state) == jax.tree.map(shape, plan.state)
    generator, score = (
        [leaf.sharding for leaf in jax.tree.leaves(plan.state["params"][name])]
        for name in (dmd.GENERATOR, dmd.FAKE_SCORE)
    )
    assert generator == score and any(not sharding.is_fully_replicated for sharding in score)


def test_a_run_on_many_devices_is_that_on_one(tmp_path, whole_run):
    """Of stage "dmd": "consistency" has one network, and `test_forward_mode` differentiates on meshes."""
    config, one = whole_run("dmd")
    config = config.copy_and_resolve_references()
    config.mesh.fsdp, config.mesh.context = 2, 2
    train(config, tmp_path / "many", 4)
    # The same float32 sums in another order.
    for name in ("loss", "fake_loss"):
        found, expected = (logged(run, name) for run in (tmp_path / "many", one))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
