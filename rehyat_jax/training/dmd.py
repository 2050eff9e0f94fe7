"""Distribution matching distillation to a few steps (DMD2, arXiv 2405.14867, without its GAN).

Three networks:

- the generator, the student, makes clean latents of noise in a few evaluations;
- the real score, frozen, predicts the velocity of the model that it is distilled from, after guidance;
- the fake score learns the velocity of what the generator makes, by flow matching. It starts as the real score.

All start from the initial model. With `velocity.teacher`, both scores are that softmax model, as in CausVid (arXiv
2412.07772): they read the complete video where a causal generator reads the past.

The generator's gradient, with respect to the clean latents x that it makes, is the difference of the clean latents that
the two scores predict from a noisy x. It moves the generator's videos to where the real score finds them more likely
than the fake score does. The loss needs no videos. Training simulates sampling, `rehyat_jax.training.rollout`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from rehyat_jax.diffusion import flow
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.models.lora import adapted_layers, joined
from rehyat_jax.models.student import softmax_velocity
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training import finetune
from rehyat_jax.training.noising import NoisyBatch
from rehyat_jax.training.optimizer import make_optimizer
from rehyat_jax.training.rollout import Rollout, chunk_by_chunk, whole_videos
from rehyat_jax.training.step import Batch, Context, Metrics, Params, Proposal, UpdateFn, accumulate
from rehyat_jax.training.velocity import make_teacher

GENERATOR, FAKE_SCORE = "generator", "fake_score"

SCORED_SIGMAS = (0.02, 0.98)
"""Least and largest noise level at which the scores are compared, as in DMD2."""

Apply = Callable[..., jax.Array]
"""(parameters, latents, timestep, text) -> velocity."""
Join = Callable[[Params, dict[str, Any]], dict[str, Any]]
"""(trained parameters of one network, frozen ones) -> all parameters of the network."""


def make_optimizers(config: ml_collections.ConfigDict) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each network. The fake score makes dmd.score_updates updates in a step."""
    of_score = config.copy_and_resolve_references()
    for name in ("learning_rate", "muon_learning_rate"):
        of_score.optimizer[name] *= config.dmd.score_rate
    return {GENERATOR: make_optimizer(config), FAKE_SCORE: make_optimizer(of_score, config.dmd.score_updates)}


def joint_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """`make_optimizers` as one optimizer of the tree {GENERATOR: ..., FAKE_SCORE: ...}."""
    optimizers = make_optimizers(config)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        of = lambda name: optimizers[name].update(grads[name], state[name], params and params[name])
        results = {name: of(name) for name in optimizers}
        return tuple({name: result[index] for name, result in results.items()} for index in (0, 1))

    return optax.GradientTransformation(
        lambda params: {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}, update
    )


def start(trained: Params, context: Context, config: ml_collections.ConfigDict) -> dict[str, Params]:
    """The parameters in training at first, from the trained part of the initial model.

    Without adapters, the fake score of a softmax teacher has the teacher's weights, context["teacher"], as far as that
    has them: feature maps stay in its tree, but nothing reads them.
    """
    score = trained
    if config.velocity.teacher and not any(adapted_layers(trained)):
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), context.get("teacher", {}))
        score = joined(trained, weights)
    return {GENERATOR: trained, FAKE_SCORE: score}


def make_score(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict
) -> tuple[Apply, Callable[[Context], Context]]:
    """The network of the fake score.

    Returns:
      The network, and a function from a step's context to the one in which `Join` finds the frozen parameters of the
      fake score: adapters are added to the teacher's weights.
    """
    if not config.velocity.teacher:
        return apply_model(model_def), lambda context: context

    def apply(params: Any, *inputs: jax.Array) -> jax.Array:
        return softmax_velocity(nnx.merge(model_def, params), inputs)

    return apply, lambda context: {**context, "frozen": joined(context.get("frozen", {}), context["teacher"])}


def make_rollout(model_def: nnx.GraphDef, config: ml_collections.ConfigDict) -> Rollout:
    """How the generator makes videos: few_step.steps, flow_shift and noise_by_chunk are read."""
    make = chunk_by_chunk if config.noise_by_chunk else whole_videos
    return make(model_def, steps=config.few_step.steps, flow_shift=config.flow_shift)


def make_generator_grad_fn(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, join: Join
) -> Callable[[Any, Context, Batch, jax.Array], tuple[Metrics, Any]]:
    """Gradients of the generator's loss.

    Args:
      model_def: graph definition of the student.
      config: velocity.teacher and velocity.guidance_scale describe the real score; flow_shift and timestep_sampling the
        noise levels at which the scores are compared; see also `make_rollout`.
      join: see `Join`.

    Returns:
      A function of (trained parameters, context, batch, key). context[FAKE_SCORE] has the trained parameters of the
      fake score. The batch is that of `Rollout.velocity`, with "sigma" [B].
    """
    rollout = make_rollout(model_def, config)
    fake_score, of_score = make_score(model_def, config)
    real_score = make_teacher(model_def, config, is_softmax=bool(config.velocity.teacher))

    def loss_fn(trained: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        frozen, text = context.get("frozen", {}), batch["text"]
        params = join(trained, frozen)
        clean = flow.predict_clean(batch["noisy"], rollout.velocity(params, batch), batch["sigma"])

        sigma_key, noise_key = jax.random.split(key)
        sigma = flow.sample_sigmas(
            sigma_key, len(clean), distribution=config.timestep_sampling, shift=config.flow_shift
        ).clip(*SCORED_SIGMAS)
        noise = jax.random.normal(noise_key, clean.shape)
        latents = flow.add_noise(jax.lax.stop_gradient(clean), noise, sigma)
        noisy = NoisyBatch(latents, flow.sigma_to_timestep(sigma), text, None)
        real = flow.predict_clean(latents, real_score(params, context, noisy), sigma)
        fake = join(context[FAKE_SCORE], of_score(context).get("frozen", {}))
        fake = fake_score(fake, noisy.latents, noisy.timestep, text)
        fake = flow.predict_clean(latents, fake, sigma)

        # DMD (arXiv 2311.18828), equation 8: differences at all noise levels have the same size.
        size = jnp.abs(clean - real).mean(axis=(1, 2, 3, 4), keepdims=True)
        gradient = jax.lax.stop_gradient((fake - real) / size)
        loss = 0.5 * jnp.square(clean - jax.lax.stop_gradient(clean - gradient)).mean()
        return loss, {"loss": loss, "score_difference": jnp.abs(gradient).mean()}

    def grad_fn(trained: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(trained, context, batch, key)
        return metrics, grads

    return grad_fn


def make_update(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, join: Join
) -> UpdateFn:
    """The update of a step: one of the generator, then dmd.score_updates of the fake score on what the generator made.

    The metrics are "loss" (the generator's, half the mean square of its gradient), "score_difference" (the mean
    absolute value of that gradient) and "fake_loss" (the flow-matching loss of the fake score).

    Args:
      model_def: graph definition of the student.
      config: the groups few_step and dmd; see also `make_generator_grad_fn`.
      optimizer: `joint_optimizer`, whose parts are used one by one.
      join: see `Join`.
    """
    del optimizer
    optimizers, rollout = make_optimizers(config), make_rollout(model_def, config)
    fake_score, of_score = make_score(model_def, config)
    grid = wan_grid(config.few_step.steps, config.flow_shift)
    generator_grads = accumulate(make_generator_grad_fn(model_def, config, join), config.accumulation_steps)
    undropped = config.copy_and_resolve_references()
    undropped.caption_dropout = 0.0
    score_loss = finetune.make_loss(fake_score, undropped)
    score_grads = accumulate(finetune.make_grad_fn(score_loss, join), config.accumulation_steps)

    def updated(name: str, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizers[name].update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def update(params: Params, opt_state: Any, context: Context, batches: Batch, key: jax.Array) -> Proposal:
        simulate_key, generator_key, score_key = jax.random.split(key, 3)
        generator, score = params[GENERATOR], params[FAKE_SCORE]
        of_generator = join(generator, context.get("frozen", {}))

        def made(part: tuple[Batch, jax.Array]) -> tuple[Batch, Batch]:
            batch, key = part
            shape, text = batch["latents"].shape, batch["text"]
            step_key, noise_key = jax.random.split(key)
            step = jax.random.randint(step_key, (), 0, config.few_step.steps)
            noisy, clean = rollout.simulate(of_generator, shape, text, noise_key, step)
            sigma, timestep = (jnp.full(shape[0], jnp.asarray(of, jnp.float32)[step]) for of in grid)
            level = {"sigma": sigma, "timestep": timestep}
            return {"noisy": noisy, "finished": clean, "text": text, **level}, {"latents": clean, "text": text}

        keys = jax.random.split(simulate_key, config.accumulation_steps)
        inputs, videos = jax.lax.stop_gradient(jax.lax.map(made, (batches, keys)))
        metrics, grads = generator_grads(generator, {**context, FAKE_SCORE: score}, inputs, generator_key)
        squares = [optax.tree.norm(grads, squared=True)]
        generator, generator_state = updated(GENERATOR, grads, generator, opt_state[GENERATOR])

        def learn(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
            found, grads = score_grads(carry[0], of_score(context), videos, key)
            return updated(FAKE_SCORE, grads, *carry), (found["loss"], optax.tree.norm(grads, squared=True))

        keys = jax.random.split(score_key, config.dmd.score_updates)
        (score, score_state), (fake_loss, score_squares) = jax.lax.scan(learn, (score, opt_state[FAKE_SCORE]), keys)
        return Proposal(
            {**metrics, "fake_loss": fake_loss.mean()},
            jnp.sqrt(sum(squares) + score_squares.max()),
            {GENERATOR: generator, FAKE_SCORE: score},
            {GENERATOR: generator_state, FAKE_SCORE: score_state},
        )

    return update
