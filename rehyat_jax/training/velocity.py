"""The velocity of a teacher, as the target of the complete transformer: distillation end to end.

Teacher and student read the same noisy latents. The teacher's forward pass is all that this costs in addition. It needs
no clean latents, so a student also learns from a teacher's trajectories.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.models.lora import joined, without_adapters
from rehyat_jax.models.student import softmax_velocity
from rehyat_jax.training.finetune import Teacher
from rehyat_jax.training.noising import NoisyBatch
from rehyat_jax.training.over_chunks import make_apply
from rehyat_jax.training.step import Context


def make_teacher(model_def: nnx.GraphDef, config: ml_collections.ConfigDict, *, is_softmax: bool = True) -> Teacher:
    """The velocity of a frozen model of the student's architecture; no gradient passes through it.

    Args:
      model_def: graph definition of the student, a `WanTransformer`.
      config: velocity.guidance_scale is read. A scale s above 1 gives the velocity after classifier-free guidance
        (arXiv 2207.12598), v_null + s (v - v_null), for another forward pass of the teacher.
      is_softmax: whether the teacher has softmax attention in all blocks; otherwise its forms are the student's.

    Returns:
      The teacher. Its parameters are context["teacher"]. Without them they are the student's own, which are a teacher's
      if only adapters, or only feature maps of a softmax teacher, are trained. It runs without the student's adapters.
    """
    scale, make = config.velocity.guidance_scale, make_apply(config)

    def teacher(params: Any, context: Context, noisy: NoisyBatch) -> jax.Array:
        model = nnx.merge(model_def, jax.lax.stop_gradient(joined(params, context.get("teacher", {}))))
        model = without_adapters(model)
        graphdef, params = nnx.split(model)

        def predict(text: jax.Array) -> jax.Array:
            inputs = noisy.latents, noisy.timestep, text
            return softmax_velocity(model, inputs) if is_softmax else make(graphdef)(params, *inputs, *noisy.past)

        velocity = predict(noisy.text)
        if scale == 1:
            return velocity
        unconditional = predict(jnp.broadcast_to(context["null_text"], noisy.text.shape))
        return unconditional + scale * (velocity - unconditional)

    return teacher
