"""Classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rehyat_jax.attention.product import accumulation_dtype
from rehyat_jax.diffusion.samplers import VelocityFn

Array = jax.Array


def guided_velocity(
    model: Callable[[Array, Array, Array], Array], text: Array, negative_text: Array, guidance_scale: float | Array
) -> VelocityFn:
    """The velocity uncond + guidance_scale (cond - uncond), with both halves evaluated as one doubled batch.

    Args:
      model: (latents [B, T, H, W, C], timestep [B], text [B, L, D]) -> velocity [B, T, H, W, C].
      text, negative_text: [B, L, D], the conditions to move towards and away from.
      guidance_scale: 1 is the plain conditional velocity, at twice its cost.
    """
    both = guided_difference(model, text, negative_text, guidance_scale)
    return lambda latents, timestep: both(latents, timestep)[0]


def guided_difference(
    model: Callable[[Array, Array, Array], Array], text: Array, negative_text: Array, guidance_scale: float | Array
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`guided_velocity` that also returns cond - uncond."""
    both_texts = jnp.concatenate([text, negative_text])

    def velocity(latents: Array, timestep: Array) -> tuple[Array, Array]:
        both = model(jnp.concatenate([latents, latents]), jnp.concatenate([timestep, timestep]), both_texts)
        # Guidance magnifies the rounding of the difference by guidance_scale.
        conditional, unconditional = jnp.split(both.astype(accumulation_dtype(both.dtype)), 2)
        difference = conditional - unconditional
        return unconditional + guidance_scale * difference, difference

    return velocity
