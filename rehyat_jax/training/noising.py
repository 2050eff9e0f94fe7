"""Model inputs of all stages: turns latents and captions into (noisy latents, timestep, text, target)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from rehyat_jax.diffusion import flow


class NoisyBatch(NamedTuple):
    """Model inputs [B, ...] and the velocity to predict; `velocity` is None if the clean latents are unknown."""

    latents: jax.Array
    timestep: jax.Array
    text: jax.Array
    velocity: jax.Array | None


def noise_batch(
    batch: dict[str, jax.Array], null_text: jax.Array, key: jax.Array, config: ml_collections.ConfigDict
) -> NoisyBatch:
    """Draws noise, timesteps and dropped captions.

    Args:
      batch: "latents" [B, T, H, W, C] and "text" [B, L, text_dim]. Latents of a teacher's trajectory are noisy already
        and come with "timestep" [B], their noise level.
      null_text: [L, text_dim], the embedding of no caption; replaces a share `config.caption_dropout` of captions.
      key: random key.
      config: flow_shift, timestep_sampling and caption_dropout are read.
    """
    noise_key, sigma_key, drop_key = jax.random.split(key, 3)
    latents, text = batch["latents"], batch["text"]
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (text.shape[0], 1, 1))
    text = jnp.where(dropped, null_text, text)
    if "timestep" in batch:
        return NoisyBatch(latents=latents, timestep=batch["timestep"], text=text, velocity=None)
    noise = jax.random.normal(noise_key, latents.shape)
    sigma = flow.sample_sigmas(
        sigma_key, latents.shape[0], distribution=config.timestep_sampling, shift=config.flow_shift
    )
    return NoisyBatch(
        latents=flow.add_noise(latents, noise, sigma),
        timestep=flow.sigma_to_timestep(sigma),
        text=text,
        velocity=flow.velocity_target(latents, noise),
    )
