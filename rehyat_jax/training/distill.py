"""Stage 1: every block's feature maps learn to reproduce that block's softmax attention (ReHyAt, Attention Surgery).

One forward pass of the teacher serves all blocks. Each block's queries, keys and values come from the teacher, so the
blocks' losses are independent: loss and gradient are formed inside the scan over layers, nothing is backpropagated
through the network, and memory does not grow with depth beyond the gradients themselves. A block's queries, keys and
values are constants of its loss, and so is its softmax branch: differentiation reaches the linear branch alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.attention.hybrid.calibration import linear_mass_log_scale
from rehyat_jax.models.wan.modeling import AttentionInputs, WanTransformer
from rehyat_jax.training.keys import calibration_key
from rehyat_jax.training.noising import NoisyBatch, noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics


def hybrid_rows(model: WanTransformer, stacked: Any) -> Any:
    """Rows of the hybrid blocks from a tree stacked over all layers."""
    if len(model.config.hybrid_block_indices) == model.config.num_layers:
        return stacked
    return jax.tree.map(lambda leaf: leaf[jnp.array(model.config.hybrid_block_indices)], stacked)


def teacher_scan(model: WanTransformer, noisy: NoisyBatch, per_hybrid_block: Any) -> Any:
    """Runs the softmax teacher and returns `per_hybrid_block(inputs, target, feature_maps)` of every hybrid block.

    Args:
      model: a transformer with hybrid blocks; their softmax attention is the teacher.
      noisy: model inputs.
      per_hybrid_block: (AttentionInputs, target [B, N, H, d], parameters of one block's feature maps) -> tree.

    Returns:
      The trees, stacked on a leading axis over hybrid blocks.
    """
    all_hybrid = len(model.config.hybrid_block_indices) == model.config.num_layers

    def attend(inputs: AttentionInputs, per_block: Any) -> tuple[jax.Array, Any]:
        target = inputs.softmax()
        run = lambda: per_hybrid_block(inputs, target, per_block["feature_maps"])
        skip = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
        return target, run() if all_hybrid else jax.lax.cond(per_block["is_hybrid"], run, skip)

    _, outputs = model.forward(noisy.latents, noisy.timestep, noisy.text, attend, model.per_block_attention())
    return hybrid_rows(model, outputs)


def with_feature_maps(model_def: nnx.GraphDef, frozen: Any, feature_maps: Any) -> WanTransformer:
    """The transformer with frozen parameters and the feature maps in training."""
    return nnx.merge(model_def, {**frozen, "feature_maps": feature_maps})


def make_grad_fn(model_def: nnx.GraphDef, config: ml_collections.ConfigDict) -> GradFn:
    """Gradients of the sum over blocks of mean |y - y_hat|, with respect to the feature maps.

    Args:
      model_def: graph definition of a `WanTransformer` with hybrid blocks.
      config: see `noise_batch`.

    Returns:
      A function of (feature maps, context, batch, key); context["frozen"] is the teacher, the transformer's parameters
      without "feature_maps". Metrics: "loss" (mean over blocks), "block_loss" [K]
      (mean |y - y_hat| of every hybrid block) and "relative_error" [K] (the same over mean |y|).
    """

    def grad_fn(feature_maps: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        model = with_feature_maps(model_def, context["frozen"], feature_maps)
        noisy = noise_batch(batch, context["null_text"], key, config)

        def block_loss_and_grads(inputs: AttentionInputs, target: jax.Array, maps: Any) -> Any:
            def loss_fn(maps: Any) -> jax.Array:
                output = model.hybrid(inputs, *model.block_features(inputs, maps))
                return mean_size(output.astype(jnp.float32) - target.astype(jnp.float32))

            # Both are zero for padding, which is not counted.
            mean_size = lambda tokens: jnp.abs(tokens).mean() * (tokens.shape[1] / inputs.num_tokens)
            loss, grads = jax.value_and_grad(loss_fn)(maps)
            return {"loss": loss, "target": mean_size(target.astype(jnp.float32)), "grads": grads}

        blocks = teacher_scan(model, noisy, block_loss_and_grads)
        metrics = {
            "loss": blocks["loss"].mean(),
            "block_loss": blocks["loss"],
            "relative_error": blocks["loss"] / blocks["target"],
        }
        return metrics, nnx.to_pure_dict(blocks["grads"])

    return grad_fn


def calibrated(
    model_def: nnx.GraphDef,
    params: dict[str, Any],
    batches: Batch,
    null_text: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, Any]:
    """Parameters whose linear branches carry the softmax mass that they stand for, measured on a batch [1, B, ...].

    The correction of every head is split evenly between phi_query and phi_key, which keeps both well scaled.
    """

    @jax.jit
    def correction(params: dict[str, Any], batches: Batch, null_text: jax.Array) -> jax.Array:
        model = nnx.merge(model_def, params)
        form = model.config.hybrid
        batch = jax.tree.map(lambda x: x[0], batches)

        def log_scale(inputs: AttentionInputs, target: jax.Array, maps: Any) -> jax.Array:
            features = (features.compute() for features in model.block_features(inputs, maps))
            return linear_mass_log_scale(
                *(tokens[:, : inputs.num_tokens] for tokens in (inputs.query, inputs.key, *features)),
                tokens_per_frame=inputs.tokens_per_frame,
                chunk_frames=form.chunk_frames,
                overlap_frames=form.overlap_frames,
                causal=form.causal,
                stabilizer=form.stabilizer,
            )

        noisy = noise_batch(batch, null_text, calibration_key(config.seed), config)
        return teacher_scan(model, noisy, log_scale)

    half = correction(params, batches, null_text) / 2
    maps = {name: {**tree, "log_scale": tree["log_scale"] + half} for name, tree in params["feature_maps"].items()}
    return {**params, "feature_maps": maps}
