"""Model inputs of all stages: turns latents and captions into (noisy latents, timestep, text, target)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from rehyat_jax.diffusion import flow


class NoisyBatch(NamedTuple):
    """Model inputs [B, ...] and the velocity to predict; `velocity` is None if the clean latents are unknown.

    The timestep is [B], or [B, T] if chunks have their own. Frames at timestep 0 are clean then.

    With teacher forcing, `past` has what later chunks read in place of the noisy latents: the clean ones.
    """

    latents: jax.Array
    timestep: jax.Array
    text: jax.Array
    velocity: jax.Array | None
    past: tuple[jax.Array, ...] = ()

    @property
    def noisy_frames(self) -> jax.Array | None:
        """Boolean [B, T], the frames whose velocity can be learned; None for all."""
        return None if self.timestep.ndim == 1 else self.timestep > 0


def noise_batch(
    batch: dict[str, jax.Array],
    null_text: jax.Array,
    key: jax.Array,
    config: ml_collections.ConfigDict,
    *,
    chunk_frames: int | None = None,
) -> NoisyBatch:
    """Draws noise, timesteps and dropped captions.

    Args:
      batch: "latents" [B, T, H, W, C] and "text" [B, L, text_dim]. Latents of a teacher's trajectory are noisy already
        and come with "timestep" [B], their noise level.
      null_text: [L, text_dim], the embedding of no caption; replaces a share `config.caption_dropout` of captions.
      key: random key.
      config: flow_shift, timestep_sampling, caption_dropout and teacher_forcing are read.
      chunk_frames: latent frames of the chunks that have their own noise levels, see `chunk_sigmas`; None for one level
        in all frames of a video.
    """
    noise_key, sigma_key, drop_key = jax.random.split(key, 3)
    latents, text = batch["latents"], batch["text"]
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (text.shape[0], 1, 1))
    text = jnp.where(dropped, null_text, text)
    if "timestep" in batch:
        return NoisyBatch(latents=latents, timestep=batch["timestep"], text=text, velocity=None)
    noise = jax.random.normal(noise_key, latents.shape)
    draw = functools.partial(flow.sample_sigmas, distribution=config.timestep_sampling, shift=config.flow_shift)
    past: tuple[jax.Array, ...] = ()
    if chunk_frames is None:
        sigma = draw(sigma_key, latents.shape[0])
    elif config.teacher_forcing:
        sigma = chunk_sigmas(draw, sigma_key, latents.shape[:2], chunk_frames, some_clean=False)
        past = (latents,)
    else:
        sigma = chunk_sigmas(draw, sigma_key, latents.shape[:2], chunk_frames)
    return NoisyBatch(
        latents=flow.add_noise(latents, noise, sigma),
        timestep=flow.sigma_to_timestep(sigma),
        text=text,
        velocity=flow.velocity_target(latents, noise),
        past=past,
    )


def chunk_sigmas(
    draw: Callable[[jax.Array, int], jax.Array],
    key: jax.Array,
    shape: tuple[int, int],
    chunk_frames: int,
    *,
    some_clean: bool = True,
) -> jax.Array:
    """Noise levels of every frame, float32 [B, T], equal within chunks.

    Every chunk has its own level. For diffusion forcing (arXiv 2407.01392) by chunk, a random number of the first
    chunks is clean in half of the videos, and the next one is not. This is what the model meets when it samples chunk
    by chunk; independent draws near 0 are too rare for that.

    Args:
      draw: (key, n) -> n independent levels.
      key: random key.
      shape: (B, T).
      chunk_frames: frames of a chunk; the last one may have fewer.
      some_clean: whether there are clean chunks.
    """
    videos, frames = shape
    chunks = -(-frames // chunk_frames)
    level_key, half_key, clean_key = jax.random.split(key, 3)
    sigma = draw(level_key, videos * chunks).reshape(videos, chunks)
    if some_clean:
        has_clean = jax.random.bernoulli(half_key, 0.5, (videos, 1))
        clean = jnp.where(has_clean, jax.random.randint(clean_key, (videos, 1), 0, chunks), 0)
        sigma = jnp.where(jnp.arange(chunks) < clean, 0, sigma)
    return jnp.repeat(sigma, chunk_frames, axis=1)[:, :frames]
