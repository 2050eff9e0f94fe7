"""Wan2.1's VAE as Flax NNX modules: a causal video encoder and decoder.

The numerics follow Wan2.1's `WanVAE_` and diffusers' `AutoencoderKLWan`. Parameters are float32. Convolutions run in
the compute dtype; the statistics of norms and the activation after them are float32. Arrays are channels last,
[batch, frames, height, width, channels].

A module does not know if it sees a complete clip or one step of a stream: it is given `frames` (see `frames.py`), which
provides the frames before those at hand.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.models.wan_vae.config import Stage, WanVaeConfig
from rehyat_jax.models.wan_vae.convolutions import convolve, doubled, halved, rms_norm
from rehyat_jax.models.wan_vae.frames import Frames

PIXEL_CHANNELS = 3

_init = nnx.initializers.lecun_normal()


class VideoConvolution(nnx.Module):
    """Convolution over frames, height and width, which keeps height and width. It sees no frames that it isn't given.

    Args:
      kernel_size: (frames, height, width), the last two odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(_init(rngs.params(), (*kernel_size, in_channels, out_channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, zeros_before: int = 0, time_stride: int = 1) -> jax.Array:
        """[B, T, H, W, C] -> [B, (zeros_before + T - kernel frames) / time_stride + 1, H, W, C']."""
        options: dict[str, Any] = dict(zeros_before=zeros_before, time_stride=time_stride)
        return convolve(x.astype(self.dtype), self.kernel[...], self.bias[...], **options)


class FrameConvolution(nnx.Module):
    """The parameters of a convolution over the height and width of every frame."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, T, H, W, C']."""
        return convolve(x.astype(self.dtype), self.kernel[...][None], self.bias[...])


class RMSNorm(nnx.Module):
    """The scale of an RMS norm over the channels; see `rms_norm`."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> float32 [..., C]."""
        return rms_norm(x, self.scale[...])


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice, next to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.norm_1 = RMSNorm(in_channels)
        self.conv_1 = VideoConvolution(in_channels, out_channels, (3, 3, 3), **options)
        self.norm_2 = RMSNorm(out_channels)
        self.conv_2 = VideoConvolution(out_channels, out_channels, (3, 3, 3), **options)
        if in_channels != out_channels:
            self.shortcut = VideoConvolution(in_channels, out_channels, (1, 1, 1), **options)

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        """[B, T, H, W, in] -> [B, T, H, W, out]."""
        y = frames.causal(self.conv_1, x, self.norm_1)
        return frames.causal(self.conv_2, y, self.norm_2, x, getattr(self, "shortcut", None))


class AttentionBlock(nnx.Module):
    """Single-head attention among the pixels of each frame, added to its input."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RMSNorm(channels)
        self.query_key_value = FrameConvolution(channels, 3 * channels, 1, dtype=dtype, rngs=rngs)
        self.output = FrameConvolution(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        """[B, T, H, W, C] -> the same shape."""
        return x + self.output(frames.places.attend(*jnp.split(self.query_key_value(self.norm(x)), 3, axis=-1)))


class Downsample(nnx.Module):
    """Halves height and width, then possibly the number of frames."""

    def __init__(self, channels: int, *, time: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = FrameConvolution(channels, channels, 3, dtype=dtype, rngs=rngs)
        if time:
            self.time_conv = VideoConvolution(channels, channels, (3, 1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        places = frames.places
        x = halved(places.without_padding(x), self.conv.kernel[...], self.conv.bias[...], places)
        return frames.halved(self.time_conv, x) if hasattr(self, "time_conv") else x


class Upsample(nnx.Module):
    """Doubles possibly the number of frames, then height and width by repetition; a convolution halves the channels."""

    def __init__(self, channels: int, *, time: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = FrameConvolution(channels, channels // 2, 3, dtype=dtype, rngs=rngs)
        if time:
            self.time_conv = VideoConvolution(channels, 2 * channels, (3, 1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        x = frames.doubled(self.time_conv, x) if hasattr(self, "time_conv") else x
        places = frames.places
        return doubled(places.without_padding(x), self.conv.kernel[...], self.conv.bias[...], places)


class ResolutionStage(nnx.Module):
    """Residual blocks `block_0`, `block_1`, ... and possibly a change of resolution."""

    def __init__(self, stage: Stage, resample: type[Downsample | Upsample], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths = [stage.in_channels, *[stage.out_channels] * stage.blocks]
        for index in range(stage.blocks):
            setattr(self, f"block_{index}", ResidualBlock(widths[index], widths[index + 1], dtype=dtype, rngs=rngs))
        if stage.resamples:
            self.resample = resample(stage.out_channels, time=stage.resamples_time, dtype=dtype, rngs=rngs)
        self.blocks = stage.blocks

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        for index in range(self.blocks):
            x = getattr(self, f"block_{index}")(x, frames)
        return self.resample(x, frames) if hasattr(self, "resample") else x


class Middle(nnx.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block_0 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attention = AttentionBlock(channels, dtype=dtype, rngs=rngs)
        self.block_1 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        return self.block_1(self.attention(self.block_0(x, frames), frames), frames)


class Coder(nnx.Module):
    """The parts of the encoder and of the decoder: `conv_in`, `middle`, `stage_0`, ..., `norm_out` and `conv_out`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stages: Sequence[Stage],
        resample: type[Downsample | Upsample],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        lowest = stages[-1].out_channels if resample is Downsample else stages[0].in_channels
        self.conv_in = VideoConvolution(in_channels, stages[0].in_channels, (3, 3, 3), **options)
        self.middle = Middle(lowest, **options)
        for index, stage in enumerate(stages):
            setattr(self, f"stage_{index}", ResolutionStage(stage, resample, **options))
        self.norm_out = RMSNorm(stages[-1].out_channels)
        self.conv_out = VideoConvolution(stages[-1].out_channels, out_channels, (3, 3, 3), **options)
        self.num_stages = len(stages)
        self.middle_first = resample is Upsample

    def __call__(self, x: jax.Array, frames: Frames) -> jax.Array:
        x = frames.causal(self.conv_in, x)
        stages = [getattr(self, f"stage_{index}") for index in range(self.num_stages)]
        for part in [self.middle, *stages] if self.middle_first else [*stages, self.middle]:
            x = part(x, frames)
        return frames.causal(self.conv_out, x, self.norm_out)


class WanAutoencoder(nnx.Module):
    """Wan2.1's VAE: `encode` and `decode` of a complete clip, or of one step of a stream.

    Args:
      config: sizes.
      rngs: initialisation of the parameters (`rngs.params`).
      dtype: compute dtype; parameters stay float32. Products of float32 are computed at full precision on every
        platform.
    """

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        z_dim = config.z_dim
        self.encoder = Coder(PIXEL_CHANNELS, 2 * z_dim, config.encoder_stages, Downsample, **options)
        self.quant_conv = VideoConvolution(2 * z_dim, 2 * z_dim, (1, 1, 1), **options)
        self.post_quant_conv = VideoConvolution(z_dim, z_dim, (1, 1, 1), **options)
        self.decoder = Coder(z_dim, PIXEL_CHANNELS, config.decoder_stages, Upsample, **options)
        self.config = config
        self.dtype = dtype

    def encode(self, video: jax.Array, frames: Frames) -> jax.Array:
        """The posterior's normalised mean.

        Args:
          video: RGB in [-1, 1], [B, F, H, W, 3]; F, H and W as `frames` and the strides require.
          frames: source of the frames before.

        Returns:
          float32 [B, T, H / 8, W / 8, z_dim].
        """
        video = frames.places.pad(video)
        with self._precision():
            moments = frames.places.crop(self.quant_conv(self.encoder(video.astype(self.dtype), frames)))
        mean, std = self._statistics()
        return (moments[..., : self.config.z_dim].astype(jnp.float32) - mean) / std

    def decode(self, latents: jax.Array, frames: Frames) -> jax.Array:
        """The video of normalised latents [B, T, h, w, z_dim]; float32 [B, F, 8h, 8w, 3], not clipped to [-1, 1]."""
        mean, std = self._statistics()
        latents = (frames.places.pad(latents).astype(jnp.float32) * std + mean).astype(self.dtype)
        with self._precision():
            video = frames.places.crop(self.decoder(self.post_quant_conv(latents), frames))
        return video.astype(jnp.float32)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the latents, float32 [z_dim]."""
        return jnp.array(self.config.latents_mean, jnp.float32), jnp.array(self.config.latents_std, jnp.float32)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        full = jnp.dtype(self.dtype) == jnp.float32
        return jax.default_matmul_precision("highest") if full else contextlib.nullcontext()
