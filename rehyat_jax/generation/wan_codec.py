"""Wan2.1's VAE as a codec of sampling and data preparation."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rehyat_jax.generation.codecs import Array, WanVaeLatents
from rehyat_jax.models.wan_vae.vae import WanVae
from rehyat_jax.weights import load_vae


class WanCodec(WanVaeLatents):
    """A `Codec` whose weights are in memory; one latent frame after another is encoded and decoded.

    Attributes:
      vae: the VAE, for streams of frames.
    """

    fps = 16

    def __init__(self, vae: WanVae):
        self.vae = vae

    def encode(self, video: Array) -> jax.Array:
        """[B, 4n + 1, 8h, 8w, 3] float32 in [0, 1] -> normalised mean latents [B, n + 1, h, w, 16] float32."""
        return self.vae.encode(jnp.asarray(video) * 2 - 1)

    def decode(self, latents: Array) -> jax.Array:
        """[B, T, h, w, 16] float32 -> [B, 4(T - 1) + 1, 8h, 8w, 3] float32 in [0, 1]."""
        return (self.vae.decode(jnp.asarray(latents)) + 1) / 2


def load_wan_codec(models: Path, *, dtype: jnp.dtype = jnp.float32) -> WanCodec:
    """The codec of a pipeline's folder, or of another path that `load_vae` takes. Raises InputError."""
    return WanCodec(load_vae(models, dtype=dtype))
