"""Stage 1: every block's feature maps learn to reproduce that block's softmax attention (ReHyAt, Attention Surgery).

One forward pass of the teacher serves all blocks. Each block's queries, keys and values come from the teacher, so the
blocks' losses are independent. Loss and gradient are computed inside the scan over layers, and nothing is
backpropagated through the network. Only the gradients take memory that grows with depth. A block's queries, keys,
values and softmax branch are constants of its loss: differentiation reaches only the linear branch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.attention.forms.base import AttentionInputs, Form
from rehyat_jax.models.student import calibrated_maps, converted_rows, rows_of_stacks, teacher_scan
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.training.keys import calibration_key
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics


def with_feature_maps(model_def: nnx.GraphDef, frozen: Any, feature_maps: Any) -> WanTransformer:
    """The transformer with frozen parameters and the feature maps in training."""
    return nnx.merge(model_def, {**frozen, "feature_maps": feature_maps})


def make_grad_fn(model_def: nnx.GraphDef, config: ml_collections.ConfigDict) -> GradFn:
    """Gradients of the sum over blocks of mean |y - y_hat|, with respect to the feature maps.

    Args:
      model_def: graph definition of a `WanTransformer` with hybrid blocks.
      config: see `noise_batch`.

    Returns:
      A function of (feature maps, context, batch, key). context["frozen"] is the teacher: the transformer's parameters
      without "feature_maps". The metrics are "loss" (mean over blocks), "block_loss" [K] (mean |y - y_hat| of every
      hybrid block) and "relative_error" [K] (block_loss divided by mean |y|).
    """

    def grad_fn(feature_maps: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        model = with_feature_maps(model_def, context["frozen"], feature_maps)
        noisy = noise_batch(batch, context["null_text"], key, config)

        def loss_and_grads(form: Form, inputs: AttentionInputs, target: jax.Array, maps: Any) -> Any:
            def loss_fn(maps: Any) -> jax.Array:
                features = model.features(form, inputs, maps)
                output = form.attend(inputs, features, implementation=model.attention_implementation)
                return mean_size(output.astype(jnp.float32) - target.astype(jnp.float32))

            # Output and target are zero at padding; the mean is over the other tokens.
            mean_size = lambda tokens: jnp.abs(tokens).mean() * (tokens.shape[1] / inputs.num_tokens)
            loss, grads = jax.value_and_grad(loss_fn)(maps)
            return {"loss": loss, "target": mean_size(target.astype(jnp.float32)), "grads": grads}

        inputs = noisy.latents, noisy.timestep, noisy.text
        blocks = teacher_scan(model, inputs, loss_and_grads)
        loss, target = converted_rows(model, (blocks["loss"], blocks["target"]))
        metrics = {"loss": loss.mean(), "block_loss": loss, "relative_error": loss / target}
        return metrics, rows_of_stacks(model, blocks["grads"])

    return grad_fn


def calibrated(
    model_def: nnx.GraphDef,
    params: dict[str, Any],
    batches: Batch,
    null_text: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, Any]:
    """Parameters whose feature maps are calibrated (`calibrated_maps`) on a batch [1, B, ...] of training examples."""

    @jax.jit
    def calibrate(params: dict[str, Any], batches: Batch, null_text: jax.Array) -> Any:
        batch = jax.tree.map(lambda x: x[0], batches)
        noisy = noise_batch(batch, null_text, calibration_key(config.seed), config)
        return calibrated_maps(nnx.merge(model_def, params), (noisy.latents, noisy.timestep, noisy.text))

    return {**params, "feature_maps": calibrate(params, batches, null_text)}
