"""The least memory that each part of a pipeline needs, from its configuration and the sizes of the videos.

The parts take turns, so each is compared with the memory that is free by itself.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.models.umt5.config import UMT5Config
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.vae import initial_decoder_state
from rehyat_jax.weights.load import abstract_module, module_bytes


def transformer_bytes(
    config: Any, latent_shape: tuple[int, int, int, int], *, videos: int, evaluated: int, dtype: str
) -> int:
    """Bytes that are in memory at once while videos are sampled, on all devices together.

    In a block, its input is there next to queries, keys and values, and next to the hidden layer of its MLP. Compilers
    fuse much, but none computes attention before it has all keys. A step takes two or more arrays of latents, and
    returns four.

    Args:
      config: architecture.
      latent_shape: (T, H, W, C) of the part of a video that is on the device.
      videos: videos sampled at once.
      evaluated: videos that the model evaluates at once.
      dtype: compute dtype.
    """
    latents = videos * math.prod(latent_shape)
    tokens = math.prod(latent_shape[:3]) // math.prod(config.patch_size)
    text = config.text_length * (config.text_dim + config.width)
    activations = evaluated * (tokens * (config.width + max(3 * config.width, config.ffn_dim)) + text)
    weights = module_bytes(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return weights + max(8 * latents + jnp.dtype(dtype).itemsize * activations, 24 * latents)


def streaming_host_bytes(latent_shape: tuple[int, int, int, int], videos: int) -> int:
    """Bytes of the host while videos are streamed: the noise, and the latents with the solver's history."""
    return 4 * 5 * videos * math.prod(latent_shape)


def tiled_host_bytes(config: WanVaeConfig, latent_shape: tuple[int, int, int, int], videos: int) -> int:
    """Bytes of the host while the frames of videos are assembled from tiles: their pixels in float32, and a copy."""
    factor = config.time_factor * config.space_factor**2
    return 2 * 4 * 3 * videos * factor * math.prod(latent_shape[:3])


def text_encoder_bytes(config: UMT5Config) -> int:
    """Bytes of the text encoder's parameters, which are bfloat16."""
    return module_bytes(config, dtype=jnp.dtype(jnp.bfloat16))


def decoder_bytes(
    config: WanVaeConfig,
    latent_shape: tuple[int, int, int, int],
    *,
    videos: int,
    dtype: jnp.dtype,
    tile: int | None = None,
    devices: int = 1,
) -> int:
    """Bytes on each device while the VAE decodes a latent frame of every video, or a tile of it with side `tile`.

    These are its parameters in float32, and the device's share of the frames that its convolutions remember, and of the
    input and output of a convolution at the size of the video.
    """
    _, height, width, _ = latent_shape
    if tile is not None:
        height, width = (min(side, tile // config.space_factor) for side in (height, width))
    places = videos * height * width
    pixels = places * config.time_factor * config.space_factor**2
    largest = 2 * dtype.itemsize * pixels * config.base_dim * config.dim_mult[0]
    return module_bytes(config) + (places * _remembered_bytes(config, dtype) + largest) // devices


@functools.cache
def _remembered_bytes(config: WanVaeConfig, dtype: jnp.dtype) -> int:
    """Bytes that the decoder's convolutions remember for each place of a latent frame."""
    graphdef, state = nnx.split(abstract_module(config, dtype=dtype))
    side = 64  # usual numbers of devices divide it, and pad nothing
    begin = lambda params: initial_decoder_state(graphdef, params, 1, side, side)
    remembered = jax.tree.leaves(jax.eval_shape(begin, nnx.to_pure_dict(state)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in remembered if leaf.ndim > 1) // side**2
