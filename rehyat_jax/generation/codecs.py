"""Codecs between videos and the latents that the diffusion transformer works on."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from einops import rearrange, repeat

from rehyat_jax.errors import InputError

Array = Any
"""A numpy or JAX array; a codec returns the kind that it was given."""


class Codec(Protocol):
    """The interface of a codec to sampling and data preparation.

    Videos are RGB, [batch, frames, height, width, 3] float32 in [0, 1]; latents are [batch, T, H, W, C] float32,
    already normalised to roughly zero mean and unit variance.

    Attributes:
      fps: frames per second of the videos.
      default_size: (frames, height, width) of the videos the codec's models were made for.
      default_dtype: compute dtype in which these models are published.
    """

    fps: int
    default_size: tuple[int, int, int]
    default_dtype: str

    def encode(self, video: Array) -> Array:
        """Video to latents."""

    def decode(self, latents: Array) -> Array:
        """Latents to video, clipped to [0, 1]."""

    def frames(self, latents: Array) -> Iterator[np.ndarray]:
        """The video of latents in successive pieces, uint8 [batch, frames, height, width, 3].

        The next piece is computed while one is used. Only the latents' own memory grows with the length.
        """

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H, W, C) of one encoded video. Raises InputError for a size the codec cannot represent."""


class WanVaeLatents:
    """The videos and latents of Wan2.1's VAE: 4 frames and 8x8 pixels become one latent pixel of 16 channels."""

    fps = 16
    default_size = (81, 480, 832)
    default_dtype = "bfloat16"

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """((frames - 1) / 4 + 1, height / 8, width / 8, 16), which the transformer's patches of 2x2 divide.

        Raises InputError unless there are 4n + 1 frames, and 16 divides both sides.
        """
        if min(frames, height, width) < 1 or frames % 4 != 1 or height % 16 or width % 16:
            nearest = lambda size: max((size + 8) // 16, 1) * 16
            raise InputError(
                f"--frames {frames} --height {height} --width {width}: expected 4n + 1 frames, and a height and width "
                f"that are multiples of 16; nearest are {max(frames + 1, 0) // 4 * 4 + 1} frames of "
                f"{nearest(height)}x{nearest(width)}"
            )
        return (frames - 1) // 4 + 1, height // 8, width // 8, 16

    def video_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the video that latents of this size encode."""
        return 4 * (frames - 1) + 1, 8 * height, 8 * width


class SpaceToDepth:
    """The demo's lossless codec for grey videos: every 4x4 block of pixels becomes one latent pixel of 16 channels.

    There is no temporal compression. `encode` averages the channels, and `decode` returns three equal channels.
    """

    block = 4
    fps = 16
    default_size = (21, 24, 24)
    default_dtype = "float32"

    # Mean and standard deviation of the moving digits' pixels (0.136 and 0.253 over 1,000 videos), so that latents are
    # as large as the noise they are mixed with.
    pixel_mean = 0.13
    pixel_std = 0.25

    def encode(self, video: Array) -> Array:
        """[B, T, 4H, 4W, 3] float32 in [0, 1] -> [B, T, H, W, 16] float32."""
        self.latent_shape(*video.shape[1:4])
        blocks = rearrange(video.mean(-1), "b t (h p) (w q) -> b t h w (p q)", p=self.block, q=self.block)
        return (blocks - self.pixel_mean) / self.pixel_std

    def decode(self, latents: Array) -> Array:
        """[B, T, H, W, 16] float32 -> [B, T, 4H, 4W, 3] float32 in [0, 1]."""
        grey = rearrange(latents, "b t h w (p q) -> b t (h p) (w q)", p=self.block, q=self.block)
        return repeat((grey * self.pixel_std + self.pixel_mean).clip(0, 1), "b t h w -> b t h w rgb", rgb=3)

    def frames(self, latents: Array) -> Iterator[np.ndarray]:
        """[B, T, H, W, 16] float32 -> uint8 [B, at most 16, 4H, 4W, 3], in succession."""
        for first in range(0, latents.shape[1], 16):
            video = self.decode(np.asarray(latents[:, first : first + 16]))
            yield (video * 255).round().astype(np.uint8)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frames, height / 4, width / 4, 16). Raises InputError unless all are positive and 4 divides both sides."""
        if frames < 1 or height < 1 or width < 1 or height % self.block or width % self.block:
            raise InputError(
                f"codec space_to_depth: expected at least one frame and a height and width that are multiples of "
                f"{self.block}, found {frames} frames of {height}x{width}; choose a size such as "
                f"{self.default_size[1]}x{self.default_size[2]}"
            )
        return frames, height // self.block, width // self.block, self.block**2

    def video_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the video that latents of this size encode."""
        return frames, self.block * height, self.block * width


LATENT_SIZES: dict[str, SpaceToDepth | WanVaeLatents] = {"space_to_depth": SpaceToDepth(), "wan_vae": WanVaeLatents()}
"""`fps`, the defaults, `latent_shape` (see `Codec`) and its inverse `video_size`, by the codec's name."""
