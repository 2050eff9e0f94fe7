"""The velocity of a softmax teacher, as the target of the complete transformer: distillation end to end.

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
from rehyat_jax.training.step import Context


def softmax_teacher(model_def: nnx.GraphDef, config: ml_collections.ConfigDict) -> Teacher:
    """The velocity of the student's architecture with softmax attention in all blocks; no gradient passes through it.

    Args:
      model_def: graph definition of the student, a `WanTransformer`.
      config: velocity.guidance_scale is read. A scale s above 1 gives the velocity after classifier-free guidance
        (arXiv 2207.12598), v_null + s (v - v_null), for another forward pass of the teacher.

    Returns:
      The teacher. Its parameters are context["teacher"]. Without them they are the student's own, which are a teacher's
      if only feature maps and adapters are trained. The teacher runs without the student's adapters.
    """
    scale = config.velocity.guidance_scale

    def teacher(params: Any, context: Context, noisy: NoisyBatch) -> jax.Array:
        model = nnx.merge(model_def, jax.lax.stop_gradient(joined(params, context.get("teacher", {}))))
        model = without_adapters(model)
        predict = lambda text: softmax_velocity(model, (noisy.latents, noisy.timestep, text))
        velocity = predict(noisy.text)
        if scale == 1:
            return velocity
        unconditional = predict(jnp.broadcast_to(context["null_text"], noisy.text.shape))
        return unconditional + scale * (velocity - unconditional)

    return teacher
