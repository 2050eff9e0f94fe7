"""Stage 1: every block's feature maps learn to reproduce that block's softmax attention (ReHyAt, Attention Surgery).

One forward pass of the teacher serves all blocks. Each block's queries, keys and values come from the teacher, so the
blocks' losses are independent. Loss and gradient are computed inside the scan over layers, and nothing is
backpropagated through the network. Only the gradients take memory that grows with depth. A block's queries, keys,
values and softmax branch are constants of its loss: differentiation reaches only the linear branch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from rehyat_jax.attention.forms.base import AttentionInputs, Form
from rehyat_jax.models.hybrid import map_stacks, rows_over_blocks
from rehyat_jax.models.student import calibrated_maps, converted_rows, rows_of_stacks, teacher_scan
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.training.keys import calibration_key
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch, Context, GradFn, Metrics, Proposal, UpdateFn, accumulate, gradient_update


def with_feature_maps(model_def: nnx.GraphDef, frozen: Any, feature_maps: Any) -> WanTransformer:
    """The transformer with frozen parameters and the feature maps in training."""
    return nnx.merge(model_def, {**frozen, "feature_maps": feature_maps})


Mean = Callable[[jax.Array], jax.Array]
"""The mean of an array [B, N, H, d] over all tokens but padding."""

LOSSES: dict[str, Callable[[jax.Array, jax.Array, Mean], jax.Array]] = {
    "l1": lambda difference, target, mean: mean(jnp.abs(difference)),
    "l2": lambda difference, target, mean: mean(jnp.square(difference)),
    "energy_l2": lambda difference, target, mean: mean(jnp.square(difference)) / mean(jnp.square(target)),
}
"""A block's loss, from y_hat - y, y and `Mean`, by `config.distill.loss`. "l1" is that of the papers. "energy_l2" has
the same scale in every block, so that one clip_norm suits all of them."""


def block_loss_and_grads(
    model: WanTransformer, config: ml_collections.ConfigDict
) -> Callable[[Form, AttentionInputs, jax.Array, Any], dict[str, Any]]:
    """The `compare` of `teacher_scan` that gives a block's loss and the gradients of its feature maps.

    Its result has "loss", "error" (mean |y - y_hat|), "target" (mean |y|) and "grads".
    """

    def compare(form: Form, inputs: AttentionInputs, target: jax.Array, maps: Any) -> dict[str, Any]:
        # Output and target are zero at padding; the mean is over the other tokens.
        mean = lambda tokens: tokens.mean() * (tokens.shape[1] / inputs.num_tokens)
        target = target.astype(jnp.float32)

        def loss_fn(maps: Any) -> tuple[jax.Array, jax.Array]:
            features = model.features(form, inputs, maps)
            output = form.attend(inputs, features, implementation=model.attention_implementation)
            difference = output.astype(jnp.float32) - target
            return LOSSES[config.distill.loss](difference, target, mean), mean(jnp.abs(difference))

        (loss, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(maps)
        return {"loss": loss, "error": error, "target": mean(jnp.abs(target)), "grads": grads}

    return compare


def block_metrics(model: WanTransformer, blocks: dict[str, jax.Array]) -> Metrics:
    """The metrics of a step, from "loss", "error" and "target" of all blocks.

    They are "loss" (mean over the hybrid blocks), "block_loss" [K] and "relative_error" [K]: mean |y - y_hat| of every
    hybrid block divided by mean |y|, whatever the loss is.
    """
    loss, error, target = converted_rows(model, (blocks["loss"], blocks["error"], blocks["target"]))
    return {"loss": loss.mean(), "block_loss": loss, "relative_error": error / target}


def make_grad_fn(model_def: nnx.GraphDef, config: ml_collections.ConfigDict) -> GradFn:
    """Gradients of the sum over blocks of the blocks' losses, with respect to the feature maps.

    Args:
      model_def: graph definition of a `WanTransformer` with hybrid blocks.
      config: distill.loss is read; see also `noise_batch`.

    Returns:
      A function of (feature maps, context, batch, key). context["frozen"] is the teacher: the transformer's parameters
      without "feature_maps". `block_metrics` describes the metrics.
    """

    def grad_fn(feature_maps: Any, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        model = with_feature_maps(model_def, context["frozen"], feature_maps)
        noisy = noise_batch(batch, context["null_text"], key, config)
        inputs = noisy.latents, noisy.timestep, noisy.text
        blocks = teacher_scan(model, inputs, block_loss_and_grads(model, config))
        return block_metrics(model, blocks), rows_of_stacks(model, blocks["grads"])

    return grad_fn


def clipped(grads: Any, max_norm: float) -> Any:
    """The gradients of one block, scaled to a norm of at most `max_norm`; unchanged if that is 0."""
    if not max_norm:
        return grads
    # A norm that is not finite stays in the result, so that the step is skipped.
    factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
    return jax.tree.map(lambda leaf: leaf * factor, grads)


def updates_per_step(config: ml_collections.ConfigDict) -> int:
    """Updates of a step, all on one batch."""
    return config.distill.updates_per_batch


def make_update(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation
) -> UpdateFn:
    """The update of a step: one of all blocks, or distill.updates_per_batch of each block.

    Args:
      model_def: graph definition of a `WanTransformer` with hybrid blocks.
      config: the group "distill" and accumulation_steps are read; see also `noise_batch`.
      optimizer: an optimizer. For several updates, it must treat every parameter on its own, as AdamW does.
    """
    if updates_per_step(config) > 1:
        return _several_updates(model_def, config, optimizer)
    grad_fn = accumulate(make_grad_fn(model_def, config), config.accumulation_steps)

    def clipped_grad_fn(params: Any, context: Context, batches: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        metrics, grads = grad_fn(params, context, batches, key)
        forms = with_feature_maps(model_def, context["frozen"], params).config.block_forms
        clip = jax.vmap(lambda grads: clipped(grads, config.distill.clip_norm))
        return metrics, map_stacks(forms, lambda stack, grads: clip(grads), grads)

    return gradient_update(clipped_grad_fn if config.distill.clip_norm else grad_fn, optimizer)


def _several_updates(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation
) -> UpdateFn:
    """Several updates of each block inside the scan over layers, while its queries, keys, values and target are there.

    The teacher runs once for all of them, and nothing of a batch outlives its block. Because the blocks' losses are
    independent, these are the updates that the optimizer would make of all blocks together. The metrics are those
    before the first update, and the norm is the largest one of an update.
    """

    def update(params: Any, opt_state: Any, context: Context, batches: Batch, key: jax.Array) -> Proposal:
        model = with_feature_maps(model_def, context["frozen"], params)
        forms = model.config.block_forms
        noisy = noise_batch(jax.tree.map(lambda x: x[0], batches), context["null_text"], key, config)
        loss_and_grads = block_loss_and_grads(model, config)

        # The optimizer's state has trees like the parameters, with rows of blocks, and counts, which all blocks share.
        structure = jax.tree.structure(params)
        is_like_params = lambda node: jax.tree.structure(node) == structure
        leaves, treedef = jax.tree.flatten(opt_state, is_leaf=is_like_params)
        moments = [number for number, leaf in enumerate(leaves) if is_like_params(leaf)]

        def compare(form: Form, inputs: AttentionInputs, target: jax.Array, rows: Any) -> dict[str, Any]:
            def one(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
                maps, state = carry
                found = loss_and_grads(form, inputs, target, maps)
                grads = clipped(found.pop("grads"), config.distill.clip_norm)
                updates, state = optimizer.update(grads, state, maps)
                squares = jnp.square(optax.tree.norm(grads))
                return (optax.apply_updates(maps, updates), state), {**found, "squares": squares}

            state = treedef.unflatten([rows["moments"].get(number, leaf) for number, leaf in enumerate(leaves)])
            start = rows["feature_maps"], state
            (maps, state), found = jax.lax.scan(one, start, length=updates_per_step(config))
            squares = found.pop("squares")
            first = {name: values[0] for name, values in found.items()}
            return {**first, "squares": squares, "feature_maps": maps, "state": treedef.flatten_up_to(state)}

        rows = {
            "feature_maps": rows_over_blocks(forms, params),
            "moments": {number: rows_over_blocks(forms, leaves[number]) for number in moments},
        }
        blocks = teacher_scan(model, (noisy.latents, noisy.timestep, noisy.text), compare, rows)
        converted = forms.converted[0]
        new_state = treedef.unflatten(
            rows_of_stacks(model, tree) if number in moments else tree[converted]
            for number, tree in enumerate(blocks["state"])
        )
        norm = jnp.sqrt(blocks["squares"].sum(0)).max()
        return Proposal(block_metrics(model, blocks), norm, rows_of_stacks(model, blocks["feature_maps"]), new_state)

    return update


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
