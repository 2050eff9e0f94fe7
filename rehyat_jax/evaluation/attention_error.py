"""Measures the error of hybrid attention relative to the softmax attention it replaces, per block, with references."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from rehyat_jax.attention.features.inline import as_inline
from rehyat_jax.attention.forms.base import AttentionInputs, Form
from rehyat_jax.models.student import Inputs, converted_rows, teacher_scan
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch


def relative_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """mean |output - target| / mean |target|, float32 scalar."""
    output, target = output.astype(jnp.float32), target.astype(jnp.float32)
    return jnp.abs(output - target).mean() / jnp.abs(target).mean()


def exact_attention(form: Form, inputs: AttentionInputs, softmax: jax.Array) -> jax.Array:
    """Softmax attention to every frame that the form attends to, by softmax or linearly; [B, N, H, d].

    This is the form's attention with perfect feature maps. Its error is only the cost of the frames that the form
    leaves out, as a causal form leaves out the future.

    Args:
      softmax: full softmax attention, which is the result for a form that attends to every frame.
    """
    attended = np.logical_or(*form.keys(inputs.num_frames))
    if attended.all():
        return softmax
    frame = np.arange(inputs.query.shape[1]) // inputs.tokens_per_frame
    attended = np.pad(attended, (0, frame[-1] + 1 - inputs.num_frames))  # nothing attends to padding
    mask = jnp.asarray(attended[frame[:, None], frame[None, :]])[None, None]
    return jax.nn.dot_product_attention(inputs.query, inputs.key, inputs.value, mask=mask)


def attention_differences(model: WanTransformer, inputs: Inputs) -> dict[str, jax.Array]:
    """Mean sizes of differences from softmax attention, on each hybrid block's inputs in the softmax model.

    Args:
      model: a transformer with hybrid blocks.
      inputs: of the model.

    Returns:
      Float32 arrays [K, B] with one row per hybrid block: "hybrid", "window_only" and "exact" (see `attention_errors`),
      and "softmax", the size of softmax attention itself.
    """

    def differences(form: Form, inputs: AttentionInputs, target: jax.Array, maps: Any) -> dict[str, jax.Array]:
        features = model.features(form, inputs, maps)
        nothing = features
        if features is not None:
            zero = lambda phi: as_inline(jnp.zeros(phi.shape, phi.dtype), phi.dtype)
            nothing = features._replace(query=zero(features.query), key=zero(features.key))
        attend = lambda features: form.attend(inputs, features, implementation=model.attention_implementation)
        # Exact attention of padding is not zero, unlike that of the forms.
        size = lambda x: jnp.abs(x[:, : inputs.num_tokens]).mean((1, 2, 3))
        difference = lambda output: size(output.astype(jnp.float32) - target.astype(jnp.float32))
        return {
            "hybrid": difference(attend(features)),
            "window_only": difference(attend(nothing)),
            "exact": difference(exact_attention(form, inputs, target)),
            "softmax": size(target.astype(jnp.float32)),
        }

    return converted_rows(model, teacher_scan(model, inputs, differences))


def attention_errors(
    model_def: nnx.GraphDef,
    params: Any,
    batch: Batch,
    null_text: jax.Array,
    key: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, jax.Array]:
    """Relative L1 errors of every hybrid block's attention, on the block's inputs in the softmax teacher.

    Args:
      model_def, params: a transformer with hybrid blocks, whose other parameters are the teacher's.
      batch: "latents" [B, T, H, W, C] and "text" [B, L, text_dim].
      null_text, key, config: see `noise_batch`.

    Returns:
      Three arrays [K] with one entry per hybrid block:

        - "hybrid": the block's attention
        - "window_only": its attention without the linear branch
        - "exact": its attention with perfect feature maps; 0 for a form that attends to every frame
    """
    noisy = noise_batch(batch, null_text, key, config)
    found = attention_differences(nnx.merge(model_def, params), (noisy.latents, noisy.timestep, noisy.text))
    size = found.pop("softmax").mean(1)
    return {name: difference.mean(1) / size for name, difference in found.items()}
