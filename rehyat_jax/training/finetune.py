"""Flow matching on the complete transformer: stage 2 of the recipe, and the pretraining of a softmax teacher."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from rehyat_jax.diffusion import flow
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics


def make_loss(
    apply: Callable[..., jax.Array], config: ml_collections.ConfigDict
) -> Callable[[Any, Context, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    """A function of (params, context, batch, key) -> (flow-matching loss, metrics); the only metric is "loss".

    Args:
      apply: (params, latents, timestep, text) -> velocity.
      config: see `noise_batch`.
    """

    def loss_fn(params: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        noisy = noise_batch(batch, context["null_text"], key, config)
        velocity = apply(params, noisy.latents, noisy.timestep, noisy.text)
        loss = flow.flow_matching_loss(velocity, noisy.velocity)
        return loss, {"loss": loss}

    return loss_fn


def make_grad_fn(apply: Callable[..., jax.Array], config: ml_collections.ConfigDict) -> GradFn:
    """Gradients of the flow-matching loss with respect to all parameters; see `make_loss`."""
    loss_fn = make_loss(apply, config)

    def grad_fn(params: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, context, batch, key)
        return metrics, grads

    return grad_fn
