"""Consistency distillation in continuous time: the student learns to jump from any noise level to clean latents.

A consistency model f predicts the same clean latents along a whole trajectory of its teacher (arXiv 2303.01469), so its
derivative along the trajectory is zero. With f = x - sigma v and the teacher's velocity u = dx/dsigma, that is

    df/dsigma = u - v - sigma dv/dsigma = 0,    dv/dsigma = (dv/dx) u + dv/dsigma at fixed x,

and the student's target is v + df/dsigma. The derivative dv/dsigma is one forward-mode pass of the student. At weight 0
of its term, this is the distillation of the teacher's velocity (`rehyat_jax.training.velocity`), so the weight grows in
the first steps. The size of df/dsigma is normalised. Both are from sCM (arXiv 2410.11081), whose noise schedule is
another one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from rehyat_jax.attention.platform import without_kernels
from rehyat_jax.diffusion import flow
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training import finetune
from rehyat_jax.training.dmd import Join
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics, UpdateFn, accumulate, gradient_update
from rehyat_jax.training.velocity import make_teacher

SMALLEST_SIZE = 0.1
"""Added to the root mean square of df/dsigma by which it is divided, as in sCM."""


def make_grad_fn(model_def: nnx.GraphDef, config: ml_collections.ConfigDict, join: Join) -> GradFn:
    """Gradients of mean (v - target)^2, where the target is v + g with g = df/dsigma / (its root mean square + 0.1).

    The metrics are "loss"; "tangent", the root mean square of df/dsigma; and "velocity_error", mean |v - u| / mean |u|.

    Args:
      model_def: graph definition of the student.
      config: velocity.teacher and velocity.guidance_scale describe the teacher; consistency.warmup_steps the weight of
        dv/dsigma; see also `noise_batch`.
      join: see `rehyat_jax.training.dmd.Join`.
    """
    apply, forward_mode = apply_model(model_def), apply_in_forward_mode(model_def)
    teacher = make_teacher(model_def, config, is_softmax=bool(config.velocity.teacher))

    def loss_fn(params: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        noisy = noise_batch(batch, context["null_text"], key, config)
        sigma = noisy.timestep / flow.NUM_TRAIN_TIMESTEPS
        along = teacher(params, context, noisy)
        frozen = jax.lax.stop_gradient(params)
        of_noisy = lambda latents, timestep: forward_mode(frozen, latents, timestep, noisy.text)
        speed = jnp.full_like(noisy.timestep, flow.NUM_TRAIN_TIMESTEPS)
        velocity, change = jax.jvp(of_noisy, (noisy.latents, noisy.timestep), (along, speed))
        weight = jnp.minimum(1.0, context["step"] / max(1, config.consistency.warmup_steps))
        of_example = lambda values: values.reshape(-1, 1, 1, 1, 1)
        tangent = along - velocity - weight * of_example(sigma) * change
        size = jnp.sqrt(jnp.square(tangent).mean(axis=(1, 2, 3, 4), keepdims=True))
        target = jax.lax.stop_gradient(tangent / (size + SMALLEST_SIZE))

        velocity = apply(params, noisy.latents, noisy.timestep, noisy.text)
        loss = flow.flow_matching_loss(velocity, jax.lax.stop_gradient(velocity) + target)
        error = jnp.abs(velocity - along).mean() / jnp.abs(along).mean()
        return loss, {"loss": loss, "tangent": size.mean(), "velocity_error": error}

    return finetune.make_grad_fn(loss_fn, join)


def apply_in_forward_mode(model_def: nnx.GraphDef) -> Any:
    """`apply_model` with the implementations of attention that support forward mode, on any platform."""

    def apply(params: Any, *inputs: jax.Array) -> jax.Array:
        model = nnx.merge(model_def, params)
        model.attention_implementation = None
        with without_kernels():
            return model(*inputs)

    return apply


def make_update(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, join: Join
) -> UpdateFn:
    """One update of the optimizer with the gradients of `make_grad_fn`."""
    return gradient_update(accumulate(make_grad_fn(model_def, config, join), config.accumulation_steps), optimizer)
