"""The losses of the complete transformer: flow matching on data, and the velocity of a softmax teacher.

Pretraining and stage 2 learn the velocity of the data, noise - x. With a teacher (`rehyat_jax.training.velocity`), the
target is the velocity that the teacher predicts from the same noisy latents, or both losses are mixed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from rehyat_jax.diffusion import flow
from rehyat_jax.training.noising import NoisyBatch, noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics

Teacher = Callable[[Any, Context, NoisyBatch], jax.Array]
"""(parameters of the student, context, noisy latents) -> the velocity to imitate, [B, T, H, W, C]."""


def make_loss(
    apply: Callable[..., jax.Array],
    config: ml_collections.ConfigDict,
    *,
    teacher: Teacher | None = None,
    teacher_weight: float = 0.0,
    chunk_frames: Callable[[Any], int] | None = None,
) -> Callable[[Any, Context, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    """A function of (params, context, batch, key) -> (loss, metrics).

    The loss is (1 - w) mean (v - (noise - x))^2 + w mean (v - v_teacher)^2. Without clean latents x, as in a teacher's
    trajectories, only the second term is there, and w must be 1.

    If chunks have their own noise levels, the mean is over the frames that are not clean.

    The metrics are "loss" and, with a teacher, "velocity_error": mean |v - v_teacher| / mean |v_teacher|. With a
    teacher and clean latents there is also "excess_vs_teacher": the first term's loss of v minus that of v_teacher, on
    the same noise.

    Args:
      apply: (params, latents, timestep, text) -> velocity. With teacher forcing, see `over_chunks.make_apply`.
      config: see `noise_batch`.
      teacher: the velocity to imitate; needed if w is above 0.
      teacher_weight: w, from 0 to 1.
      chunk_frames: params -> latent frames of the chunks that have their own noise levels; None for one level in all
        frames.
    """

    def loss_fn(params: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        by_chunk = None if chunk_frames is None else chunk_frames(params)
        noisy = noise_batch(batch, context["null_text"], key, config, chunk_frames=by_chunk)
        velocity = apply(params, noisy.latents, noisy.timestep, noisy.text, *noisy.past)
        mean_square = functools.partial(flow.flow_matching_loss, frames=noisy.noisy_frames)
        mean_size = functools.partial(_mean_size, frames=noisy.noisy_frames)
        losses, metrics = [], {}
        if teacher is not None:
            target = teacher(params, context, noisy)
            losses.append(teacher_weight * mean_square(velocity, target))
            metrics["velocity_error"] = mean_size(velocity - target) / mean_size(target)
        if noisy.velocity is not None:
            data_loss = mean_square(velocity, noisy.velocity)
            losses.append((1 - teacher_weight) * data_loss)
            if teacher is not None:
                metrics["excess_vs_teacher"] = data_loss - mean_square(target, noisy.velocity)
        loss = sum(losses)
        return loss, {"loss": loss, **metrics}

    return loss_fn


def _mean_size(array: jax.Array, frames: jax.Array | None) -> jax.Array:
    """mean |x| of [B, T, ...], over the chosen frames [B, T] if there is a choice."""
    return jnp.abs(array).mean(where=True if frames is None else frames.reshape(*frames.shape, 1, 1, 1))


def make_grad_fn(
    loss_fn: Callable[[Any, Context, Batch, jax.Array], tuple[jax.Array, Metrics]],
    join: Callable[[Any, Any], Any] = lambda trained, frozen: trained,
) -> GradFn:
    """Gradients of a loss with respect to the parameters in training.

    Args:
      loss_fn: result of `make_loss`.
      join: (trained parameters, context["frozen"] or {}) -> parameters of the model; by default all are trained.
    """

    def grad_fn(trained: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        of_trained = lambda trained: loss_fn(join(trained, context.get("frozen", {})), context, batch, key)
        grads, metrics = jax.grad(of_trained, has_aux=True)(trained)
        return metrics, grads

    return grad_fn
