"""Floating-point operations of Wan2.1's VAE, from its sizes: a multiply-add is two.

Only convolutions and the products of attention are counted. A convolution takes 2 x taps x in x out channels for every
pixel of its output, at the edges of a clip too.
"""

from collections.abc import Sequence

from rehyat_jax.models.wan_vae.config import Stage, WanVaeConfig

_PIXEL_CHANNELS = 3


def encode_flops(config: WanVaeConfig, frames: int, height: int, width: int) -> int:
    """FLOPs of `encode` for one clip of 4n + 1 frames of height x width pixels."""
    channels = config.base_dim
    total = _products(27, _PIXEL_CHANNELS, channels, frames * height * width)
    for stage in config.encoder_stages:
        total += _blocks(stage, frames * height * width)
        if stage.resamples:
            height, width = height // 2, width // 2
            total += _products(9, stage.out_channels, stage.out_channels, frames * height * width)
        if stage.resamples_time:
            frames = (frames - 1) // 2 + 1
            total += _products(3, stage.out_channels, stage.out_channels, (frames - 1) * height * width)
    channels, pixels, moments = config.encoder_stages[-1].out_channels, frames * height * width, 2 * config.z_dim
    return (
        total
        + _middle(channels, pixels, height * width)
        + _products(27, channels, moments, pixels)
        + _products(1, moments, moments, pixels)
    )


def decode_flops(config: WanVaeConfig, frames: int, height: int, width: int) -> int:
    """FLOPs of `decode` for one clip of 4n + 1 frames of height x width pixels."""
    latent_frames = (frames - 1) // config.time_factor + 1
    frames, height, width = latent_frames, height // config.space_factor, width // config.space_factor
    stages: Sequence[Stage] = config.decoder_stages
    channels, pixels = stages[0].in_channels, frames * height * width
    total = _products(1, config.z_dim, config.z_dim, pixels)
    total += _products(27, config.z_dim, channels, pixels) + _middle(channels, pixels, height * width)
    for stage in stages:
        total += _blocks(stage, frames * height * width)
        if stage.resamples_time:
            total += _products(3, stage.out_channels, 2 * stage.out_channels, (frames - 1) * height * width)
            frames = 2 * frames - 1
        if stage.resamples:
            height, width = 2 * height, 2 * width
            total += _products(9, stage.out_channels, stage.out_channels // 2, frames * height * width)
    return total + _products(27, stages[-1].out_channels, _PIXEL_CHANNELS, frames * height * width)


def _blocks(stage: Stage, pixels: int) -> int:
    """The residual blocks of a stage."""
    inside, outside = stage.in_channels, stage.out_channels
    total = _products(27, inside, outside, pixels) + (2 * stage.blocks - 1) * _products(27, outside, outside, pixels)
    return total + (_products(1, inside, outside, pixels) if inside != outside else 0)


def _middle(channels: int, pixels: int, pixels_of_a_frame: int) -> int:
    """Two residual blocks, and attention among the pixels of each frame."""
    projections, attention = _products(4, channels, channels, pixels), 4 * pixels * pixels_of_a_frame * channels
    return 4 * _products(27, channels, channels, pixels) + projections + attention


def _products(taps: int, inside: int, outside: int, pixels: int) -> int:
    return 2 * taps * inside * outside * pixels
