"""Wan2.1's VAE as a codec of sampling and data preparation."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.platform import target_platform
from rehyat_jax.generation.codecs import Array, WanVaeLatents
from rehyat_jax.models.wan_vae.vae import WanVae
from rehyat_jax.weights import load_vae


class WanCodec(WanVaeLatents):
    """A `Codec` whose weights are in memory; one latent frame after another is encoded and decoded.

    Attributes:
      vae: the VAE, for streams of frames.
    """

    def __init__(self, vae: WanVae):
        self.vae = vae

    def encode(self, video: Array) -> jax.Array:
        """[B, 4n + 1, 8h, 8w, 3] float32 in [0, 1] -> normalised mean latents [B, n + 1, h, w, 16] float32."""
        return self.vae.encode(jnp.asarray(video) * 2 - 1)

    def decode(self, latents: Array) -> jax.Array:
        """[B, T, h, w, 16] float32 -> [B, 4(T - 1) + 1, 8h, 8w, 3] float32 in [0, 1]."""
        return (self.vae.decode(jnp.asarray(latents)) + 1) / 2

    def frames(self, latents: Array) -> Iterator[np.ndarray]:
        """[B, T, h, w, 16] float32 -> uint8 [B, 1, 8h, 8w, 3] for the first latent frame, then [B, 4, 8h, 8w, 3]."""
        state = ready = None
        for index in range(latents.shape[1]):
            video, state = self.vae.decode_chunk(jnp.asarray(latents[:, index : index + 1]), state)
            # The device computes these frames while the caller uses those before.
            computed = _as_bytes(video)
            if ready is not None:
                yield np.asarray(ready)
            ready = computed
        yield np.asarray(ready)


@jax.jit
def _as_bytes(video: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8, on the device: a quarter of the bytes reach the host."""
    return jnp.round((video.clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)


def default_dtype() -> str:
    """The VAE's compute dtype: bfloat16 on TPUs, whose kernels take only that; float32 elsewhere, as in diffusers."""
    return "bfloat16" if target_platform() == "tpu" else "float32"


def load_wan_codec(
    models: Path, *, dtype: str | None = None, progress: Callable[[int], object] = lambda nbytes: None
) -> WanCodec:
    """The codec of a pipeline's folder, or of another path that `load_vae` takes. Raises InputError."""
    return WanCodec(load_vae(models, dtype=jnp.dtype(dtype or default_dtype()), progress=progress))
