"""The frames before those at hand, which the VAE's convolutions in time need: of a complete clip, or of a stream.

The VAE's modules are written once. They are given an object with these three methods, which take a convolution and
its input [B, T, H, W, C]:

- `causal`: a convolution over every frame and the two frames before it, after a norm with SiLU and before a residual;
- `doubled`: twice as many frames, from a convolution with twice as many channels;
- `halved`: half as many frames, from a convolution with stride 2.

They also have `places`, which shards the pixels of frames over devices (see `places.py`).

The first frame of a clip is special: `doubled` and `halved` copy it, and `doubled` convolves the later frames as if
there were zeros before them.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from rehyat_jax.models.wan_vae.convolutions import WINDOW, causal_step, first_caches, norm_silu, through_shortcut
from rehyat_jax.models.wan_vae.places import Places


class TimeConvolution(Protocol):
    """A convolution of `WINDOW` frames: [B, before + T, H, W, C] -> [B, T or T / 2, H, W, C'].

    Attributes:
      kernel, bias: parameters.
      dtype: compute dtype.
    """

    kernel: nnx.Param
    bias: nnx.Param
    dtype: jnp.dtype

    def __call__(self, x: jax.Array, *, zeros_before: int = 0, time_stride: int = 1) -> jax.Array:
        """The convolution of `x`, with frames of zeros before it, at every `time_stride`-th frame."""


class Norm(Protocol):
    """A norm with the scale [C]."""

    scale: nnx.Param


class Frames(Protocol):
    """See the module's docstring."""

    places: Places

    def causal(
        self,
        convolution: TimeConvolution,
        x: jax.Array,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        shortcut: TimeConvolution | None = None,
    ) -> jax.Array:
        """convolution(silu(norm(x))) + shortcut(residual): [B, T, H, W, C] -> [B, T, H, W, C'].

        Without a shortcut, the residual is added as it is.
        """

    def doubled(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, 2T, H, W, C], or 2T - 1 frames of a complete clip."""

    def halved(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        """[B, 2T, H, W, C], or 2T - 1 frames of a complete clip -> [B, T, H, W, C]."""


class WholeClip:
    """All frames of a clip at once; nothing is cached."""

    def __init__(self, places: Places):
        self.places = places

    def causal(
        self,
        convolution: TimeConvolution,
        x: jax.Array,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        shortcut: TimeConvolution | None = None,
    ) -> jax.Array:
        x = norm_silu(self.places.without_padding(x), _scale(norm))
        y = convolution(x, zeros_before=WINDOW - 1)
        return y if residual is None else y + through_shortcut(residual, _parameters(shortcut))

    def doubled(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        if x.shape[1] == 1:
            return x
        later = convolution(x[:, 1:], zeros_before=WINDOW - 1)
        return jnp.concatenate([x[:, :1], _channels_to_frames(later)], axis=1)

    def halved(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], convolution(x, time_stride=2)], axis=1)


class Stream:
    """One step of a stream: one latent frame, and as many frames as it stands for.

    The first latent frame stands for one frame, the others for several. To give all steps the same shapes, the first
    frame of a clip is the last frame of its step. The frames before it in that step are padding. Every convolution in
    time sees zeros in their place, as it does at the beginning of a complete clip. So one traced program serves all
    steps.

    Args:
      first: bool [], true in the first step of a clip.
      caches: `after` of the step before; None for zeros, whose shapes then follow from the inputs.
      places: sharding of the frames' pixels.

    Attributes:
      after: the last input frames of every convolution in time, in the order of the calls.
    """

    def __init__(self, first: jax.Array, caches: Sequence[jax.Array] | None, places: Places):
        self.places = places
        self.after: list[jax.Array] = []
        self._first = first
        self._caches = None if caches is None else iter(caches)

    def causal(
        self,
        convolution: TimeConvolution,
        x: jax.Array,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
        shortcut: TimeConvolution | None = None,
    ) -> jax.Array:
        x = self.places.without_padding(x.astype(convolution.dtype))
        past = first_caches(x, self.places) if self._caches is None else next(self._caches)
        kernel, bias = convolution.kernel[...], convolution.bias[...]
        y, after = causal_step(
            x, past, kernel, bias, _scale(norm), residual, _parameters(shortcut), self._first, self.places
        )
        self.after.append(after)
        return y

    def doubled(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        later = convolution(self._with_past(jnp.where(self._first, 0, x), WINDOW - 1))
        return jnp.where(self._first, jnp.repeat(x, 2, axis=1), _channels_to_frames(later))

    def halved(self, convolution: TimeConvolution, x: jax.Array) -> jax.Array:
        return jnp.where(self._first, x[:, 1::2], convolution(self._with_past(x, 1), time_stride=2))

    def _with_past(self, x: jax.Array, frames: int) -> jax.Array:
        """`x` after the last `frames` frames of the steps before; caches those of this step."""
        past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype) if self._caches is None else next(self._caches)
        # A TPU's compiler would otherwise join the frames inside the convolution, which then takes 40 times as long.
        window = jax.lax.optimization_barrier(jnp.concatenate([past, x], axis=1))
        self.after.append(window[:, -frames:])
        return window


def _parameters(convolution: TimeConvolution | None) -> tuple[jax.Array, jax.Array] | None:
    return None if convolution is None else (convolution.kernel[...], convolution.bias[...])


def _scale(norm: Norm | None) -> jax.Array | None:
    return None if norm is None else norm.scale[...]


def _channels_to_frames(x: jax.Array) -> jax.Array:
    return rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)
