"""How far hybrid attention is from the softmax attention it replaces, block by block, with references beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from rehyat_jax.models.wan.modeling import AttentionInputs
from rehyat_jax.training.distill import teacher_scan
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch


def relative_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """mean |output - target| / mean |target|, float32 scalar."""
    output, target = output.astype(jnp.float32), target.astype(jnp.float32)
    return jnp.abs(output - target).mean() / jnp.abs(target).mean()


def exact_causal_attention(inputs: AttentionInputs, chunk_frames: int) -> jax.Array:
    """Softmax attention to every frame up to the end of the query's own chunk; [B, N, H, d].

    What causal hybrid attention would be with perfect feature maps: the error that causality alone costs.
    """
    chunk = np.arange(inputs.query.shape[1]) // (inputs.tokens_per_frame * chunk_frames)
    mask = jnp.asarray(chunk[:, None] >= chunk[None, :])[None, None]
    return jax.nn.dot_product_attention(inputs.query, inputs.key, inputs.value, mask=mask)


def attention_errors(
    model_def: nnx.GraphDef,
    params: Any,
    batch: Batch,
    null_text: jax.Array,
    key: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, jax.Array]:
    """Relative L1 errors of every hybrid block's attention on the inputs it has in the softmax teacher.

    Args:
      model_def, params: a transformer with hybrid blocks, whose other parameters are the teacher's.
      batch: "latents" [B, T, H, W, C] and "text" [B, L, text_dim].
      null_text, key, config: see `noise_batch`.

    Returns:
      Three arrays [K], one entry per hybrid block: "hybrid" (as it is), "window_only" (without its linear branch) and
      "exact" (with perfect maps: 0 unless the form is causal).
    """
    model = nnx.merge(model_def, params)
    form = model.config.hybrid

    def errors(inputs: AttentionInputs, target: jax.Array, maps: Any) -> dict[str, jax.Array]:
        phi_query, phi_key = model.block_features(inputs, maps)
        nothing = jnp.zeros_like(phi_query)
        exact = exact_causal_attention(inputs, form.chunk_frames) if form.causal else target
        return {
            "hybrid": relative_error(model.hybrid(inputs, phi_query, phi_key), target),
            "window_only": relative_error(model.hybrid(inputs, nothing, nothing), target),
            "exact": relative_error(exact, target),
        }

    return teacher_scan(model, noise_batch(batch, null_text, key, config), errors)
