"""The noise from which videos are sampled."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.diffusion.samplers import fresh_noise

Array = jax.Array


def initial_noise(seed: int, videos: int | Sequence[int], latent_shape: Sequence[int]) -> Array:
    """Standard normal float32 [B, T, H, W, C]; video i's noise depends on the seed, i and the shape only.

    Args:
      seed: from 0 to 2**32 - 1.
      videos: the numbers i of B videos; or B, for the numbers from 0 to B - 1.
      latent_shape: (T, H, W, C).
    """

    def draw(index: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(key, tuple(latent_shape), jnp.float32)

    return jax.vmap(draw)(jnp.arange(videos) if isinstance(videos, int) else jnp.array(videos))


def host_noise(seed: int, videos: int | Sequence[int], latent_shape: Sequence[int]) -> np.ndarray:
    """`initial_noise` in the host's memory, drawn by the host's processors where JAX may use them."""
    with _on_host():
        return np.asarray(initial_noise(seed, videos, latent_shape))


def fresh_host_noise(noise: np.ndarray, number: int) -> np.ndarray:
    """`rehyat_jax.diffusion.samplers.fresh_noise` in the host's memory, drawn like `host_noise`."""
    with _on_host():
        return np.asarray(fresh_noise(jnp.asarray(noise), number))


def _on_host() -> contextlib.AbstractContextManager:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the host out
        return contextlib.nullcontext()
