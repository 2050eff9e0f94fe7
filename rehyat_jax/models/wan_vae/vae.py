"""Encoding and decoding with Wan2.1's VAE: complete clips, and streams whose memory does not grow with their length.

The pure functions take (graphdef, params) of `nnx.split(WanAutoencoder(...))`. `WanVae` holds both.

A stream takes one latent frame in each step. Its state is the cache of every convolution in time. In the first step, a
clip's only frame is the last one (see `frames.Stream`): a clip of T latent frames is 4T frames in a stream, the first
three of which are padding. The program of a step is traced and compiled once, as the body of a `lax.scan`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.frames import Stream, WholeClip
from rehyat_jax.models.wan_vae.modeling import PIXEL_CHANNELS, WanAutoencoder

Params = dict[str, Any]


class StreamState(NamedTuple):
    """The state of a stream between two steps: a tree of arrays, for `jax.jit` and `lax.scan`.

    Attributes:
      first: bool [], true before the first step of a clip.
      caches: the last input frames of every convolution in time, [B, 2 or 1, H, W, C] in the compute dtype.
    """

    first: jax.Array
    caches: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnums=0)
def encode_clip(graphdef: nnx.GraphDef, params: Params, video: jax.Array) -> jax.Array:
    """Normalised mean latents of a complete clip, all frames at once; see `WanVae.encode`."""
    return nnx.merge(graphdef, params).encode(video, WholeClip())


@functools.partial(jax.jit, static_argnums=0)
def decode_clip(graphdef: nnx.GraphDef, params: Params, latents: jax.Array) -> jax.Array:
    """The video of a complete clip, all frames at once; see `WanVae.decode`."""
    return nnx.merge(graphdef, params).decode(latents, WholeClip())


@functools.partial(jax.jit, static_argnums=0)
def encode_stream(
    graphdef: nnx.GraphDef, params: Params, video: jax.Array, state: StreamState
) -> tuple[jax.Array, StreamState]:
    """Latents of the next frames of a stream.

    Args:
      graphdef, params: the `WanAutoencoder`.
      video: [B, 4T, 8h, 8w, 3] in [-1, 1]; at the beginning of a clip, the first three frames are ignored.
      state: state after the frames before; from `initial_encoder_state` at the beginning of a clip.

    Returns:
      (float32 latents [B, T, h, w, z_dim], the new state).
    """
    model = nnx.merge(graphdef, params)
    steps = rearrange(video, "b (t n) h w c -> t b n h w c", n=model.config.time_factor)
    latents, state = _scan(model.encode, steps, state)
    return rearrange(latents, "t b n h w c -> b (t n) h w c"), state


@functools.partial(jax.jit, static_argnums=0)
def decode_stream(
    graphdef: nnx.GraphDef, params: Params, latents: jax.Array, state: StreamState
) -> tuple[jax.Array, StreamState]:
    """Frames of the next latents of a stream.

    Args:
      graphdef, params: the `WanAutoencoder`.
      latents: normalised, [B, T, h, w, z_dim].
      state: state after the latents before; from `initial_decoder_state` at the beginning of a clip.

    Returns:
      (float32 video [B, 4T, 8h, 8w, 3] in [-1, 1], the new state). At the beginning of a clip, the first three frames
      are padding.
    """
    model = nnx.merge(graphdef, params)
    steps = rearrange(latents, "b t h w c -> t b 1 h w c")
    video, state = _scan(model.decode, steps, state)
    return rearrange(video, "t b n h w c -> b (t n) h w c"), state


def initial_encoder_state(graphdef: nnx.GraphDef, params: Params, batch: int, height: int, width: int) -> StreamState:
    """The state before the first frame of videos of these pixels."""
    frames = nnx.merge(graphdef, params).config.time_factor
    return _initial_state(graphdef, params, "encode", (batch, frames, height, width, PIXEL_CHANNELS))


def initial_decoder_state(graphdef: nnx.GraphDef, params: Params, batch: int, height: int, width: int) -> StreamState:
    """The state before the first latent frame of videos of these latent pixels."""
    z_dim = nnx.merge(graphdef, params).config.z_dim
    return _initial_state(graphdef, params, "decode", (batch, 1, height, width, z_dim))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _initial_state(graphdef: nnx.GraphDef, params: Params, method: str, shape: tuple[int, ...]) -> StreamState:
    def caches(params: Params) -> list[jax.Array]:
        stream = Stream(jnp.array(True), None)
        getattr(nnx.merge(graphdef, params), method)(jnp.zeros(shape), stream)
        return stream.after

    shapes = jax.eval_shape(caches, params)
    return StreamState(jnp.array(True), tuple(jnp.zeros(cache.shape, cache.dtype) for cache in shapes))


def _scan(code: Any, steps: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
    def step(state: StreamState, x: jax.Array) -> tuple[StreamState, jax.Array]:
        stream = Stream(state.first, state.caches)
        y = code(x, stream)
        return StreamState(jnp.zeros_like(state.first), tuple(stream.after)), y

    state, coded = jax.lax.scan(step, state, steps)
    return coded, state


class WanVae:
    """Wan2.1's VAE with its weights. `rehyat_jax.load_vae` makes one from a file.

    Every method is a compiled, differentiable function of its arrays.

    Attributes:
      config: sizes.
      graphdef, params: structure and parameters of the `WanAutoencoder`, for the pure functions of this module.
    """

    config: WanVaeConfig
    graphdef: nnx.GraphDef
    params: Params

    def __init__(self, model: WanAutoencoder):
        self.config = model.config
        self.graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)

    def encode(self, video: jax.Array, *, whole: bool = False) -> jax.Array:
        """The normalised mean latents (posterior mean - latents_mean) / latents_std of clips.

        Args:
          video: RGB in [-1, 1], [B, F, H, W, 3], of 4n + 1 frames; 8 divides H and W.
          whole: encodes all frames at once, which takes memory in proportion to F. Otherwise, the frames of one latent
            frame are encoded after another. Both give the same latents to rounding.

        Returns:
          float32 [B, (F - 1) / 4 + 1, H / 8, W / 8, z_dim].

        Raises:
          InputError: the shape is none of these.
        """
        self._check_video(video, first=True)
        if whole:
            return encode_clip(self.graphdef, self.params, video)
        return self.encode_chunk(video)[0]

    def decode(self, latents: jax.Array, *, whole: bool = False) -> jax.Array:
        """The clips of normalised latents.

        Args:
          latents: [B, T, h, w, z_dim].
          whole: decodes all latent frames at once, which takes memory in proportion to T. Otherwise, one latent frame
            is decoded after another. Both give the same video to rounding.

        Returns:
          RGB in [-1, 1], float32 [B, 4(T - 1) + 1, 8h, 8w, 3].

        Raises:
          InputError: the shape is none of these.
        """
        self._check_latents(latents)
        if whole:
            return decode_clip(self.graphdef, self.params, latents)
        return self.decode_chunk(latents)[0]

    def encode_chunk(self, video: jax.Array, state: StreamState | None = None) -> tuple[jax.Array, StreamState]:
        """The latents of the next frames of clips, with the same memory for every length.

        Args:
          video: RGB in [-1, 1], [B, F, H, W, 3]: 4n + 1 frames at the beginning of clips, 4n frames later.
          state: None at the beginning of clips, later the state that the call before returned.

        Returns:
          (float32 latents [B, n + 1 or n, H / 8, W / 8, z_dim], the state for the next call).

        Raises:
          InputError: the shape is none of these, or is not the state's.
        """
        self._check_video(video, first=state is None)
        factor = self.config.time_factor
        if state is None:
            batch, _, height, width, _ = video.shape
            state = initial_encoder_state(self.graphdef, self.params, batch, height, width)
            video = jnp.concatenate([jnp.repeat(video[:, :1], factor - 1, axis=1), video], axis=1)
        self._check_state(state, video, "video")
        return encode_stream(self.graphdef, self.params, video, state)

    def decode_chunk(self, latents: jax.Array, state: StreamState | None = None) -> tuple[jax.Array, StreamState]:
        """The frames of the next latents of clips, with the same memory for every length.

        Args:
          latents: normalised, [B, T, h, w, z_dim].
          state: None at the beginning of clips, later the state that the call before returned.

        Returns:
          (RGB in [-1, 1], float32 [B, F, 8h, 8w, 3], the state for the next call). F is 4(T - 1) + 1 at the beginning
          of clips, 4T later.

        Raises:
          InputError: the shape is none of these, or is not the state's.
        """
        self._check_latents(latents)
        padding = 0
        if state is None:
            batch, _, height, width, _ = latents.shape
            state = initial_decoder_state(self.graphdef, self.params, batch, height, width)
            padding = self.config.time_factor - 1
        self._check_state(state, latents, "latents")
        video, state = decode_stream(self.graphdef, self.params, latents, state)
        return video[:, padding:], state

    def _check_video(self, video: jax.Array, *, first: bool) -> None:
        time, space = self.config.time_factor, self.config.space_factor
        frames = f"{time}n + 1" if first else f"{time}n"
        shape = video.shape
        if (
            len(shape) != 5
            or shape[4] != PIXEL_CHANNELS
            or not min(shape)
            or shape[1] % time != (1 % time if first else 0)
            or shape[2] % space
            or shape[3] % space
        ):
            raise InputError(
                f"video must be [batch, {frames} frames, height, width, {PIXEL_CHANNELS}], with a height and width "
                f"that are multiples of {space}, found shape {tuple(shape)}; crop it"
            )

    def _check_latents(self, latents: jax.Array) -> None:
        shape = latents.shape
        if len(shape) != 5 or shape[4] != self.config.z_dim or not min(shape):
            raise InputError(
                f"latents must be [batch, frames, height, width, {self.config.z_dim}] (channels last), "
                f"found shape {tuple(shape)}; transpose them"
            )

    def _check_state(self, state: StreamState, x: jax.Array, name: str) -> None:
        expected, found = _places(state.caches[0]), _places(x)
        if expected != found:
            raise InputError(
                f"{name} must be [batch, height, width] = {expected} as in the call before, found {found}; begin "
                f"another clip with state=None"
            )


def _places(x: jax.Array) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:4])
