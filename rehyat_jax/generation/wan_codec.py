"""Wan2.1's VAE as a codec of sampling and data preparation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
      tile: side in pixels of the tiles in which larger frames are coded, see `WanVae.decode`; None for whole frames.
    """

    def __init__(self, vae: WanVae, tile: int | None = None):
        self.vae, self.tile = vae, tile

    def encode(self, video: Array) -> jax.Array:
        """[B, 4n + 1, 8h, 8w, 3] float32 in [0, 1] -> normalised mean latents [B, n + 1, h, w, 16] float32."""
        return jnp.asarray(self.vae.encode(jnp.asarray(video) * 2 - 1, tile=self.tile))

    def decode(self, latents: Array) -> jax.Array:
        """[B, T, h, w, 16] float32 -> [B, 4(T - 1) + 1, 8h, 8w, 3] float32 in [0, 1]."""
        return (jnp.asarray(self.vae.decode(jnp.asarray(latents), tile=self.tile)) + 1) / 2

    def frames(self, latents: Array) -> Iterator[np.ndarray]:
        """[B, T, h, w, 16] float32 -> uint8 [B, 1, 8h, 8w, 3] for the first latent frame, then [B, 4, 8h, 8w, 3].

        In tiles, the complete video is one piece, because one tile after another is decoded.
        """
        if self.tile is not None and self.vae.config.space_factor * max(latents.shape[2:4]) > self.tile:
            yield _as_bytes(self.vae.decode(latents, tile=self.tile), np)
            return
        state = ready = None
        for index in range(latents.shape[1]):
            video, state = self.vae.decode_chunk(jnp.asarray(latents[:, index : index + 1]), state)
            # The device computes these frames while the caller uses those before.
            computed = _as_bytes_on_device(video)
            if ready is not None:
                yield np.asarray(ready)
            ready = computed
        yield np.asarray(ready)


def _as_bytes(video: Any, xp: Any) -> Any:
    """[-1, 1] -> uint8, by numpy or jax.numpy."""
    return xp.round((video.clip(-1, 1) + 1) * 127.5).astype(xp.uint8)


@jax.jit
def _as_bytes_on_device(video: jax.Array) -> jax.Array:
    """A quarter of the bytes reach the host."""
    return _as_bytes(video, jnp)


def default_dtype() -> str:
    """The VAE's compute dtype: bfloat16 on TPUs, whose kernels take only that; float32 elsewhere, as in diffusers."""
    return "bfloat16" if target_platform() == "tpu" else "float32"


def load_wan_codec(
    models: Path,
    *,
    dtype: str | None = None,
    tile: int | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> WanCodec:
    """The codec of a pipeline's folder, or of another path that `load_vae` takes. Raises InputError."""
    return WanCodec(load_vae(models, dtype=jnp.dtype(dtype or default_dtype()), progress=progress), tile)
