"""Encoding and decoding with Wan2.1's VAE: complete clips, and streams whose memory does not grow with their length.

The pure functions take (graphdef, params) of `nnx.split(WanAutoencoder(...))`. `WanVae` holds both.

A stream takes one latent frame in each step. Its state is the cache of every convolution in time. In the first step, a
clip's only frame is the last one (see `frames.Stream`): a clip of T latent frames is 4T frames in a stream, the first
three of which are padding. The program of a step is traced and compiled once, as the body of a `lax.scan`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.frames import Stream, WholeClip
from rehyat_jax.models.wan_vae.modeling import PIXEL_CHANNELS, WanAutoencoder
from rehyat_jax.models.wan_vae.places import Places
from rehyat_jax.models.wan_vae.tiles import assembled

Params = dict[str, Any]
Array = jax.Array | np.ndarray


class StreamState(NamedTuple):
    """The state of a stream between two steps: a tree of arrays, for `jax.jit` and `lax.scan`.

    Attributes:
      first: bool [], true before the first step of a clip.
      caches: the last input frames of every convolution in time, [B, 2 or 1, H, W, C] in the compute dtype. Those of
        TPU kernels have more channels, which are not read (see `convolutions.first_caches`).
    """

    first: jax.Array
    caches: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnums=0)
def encode_clip(graphdef: nnx.GraphDef, params: Params, video: jax.Array) -> jax.Array:
    """Normalised mean latents of a complete clip, all frames at once; see `WanVae.encode`."""
    model = nnx.merge(graphdef, params)
    return model.encode(video, WholeClip(_places(video, model.config.space_factor)))


@functools.partial(jax.jit, static_argnums=0)
def decode_clip(graphdef: nnx.GraphDef, params: Params, latents: jax.Array) -> jax.Array:
    """The video of a complete clip, all frames at once; see `WanVae.decode`."""
    return _clipped(nnx.merge(graphdef, params).decode(latents, WholeClip(_places(latents))))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def encode_stream(
    graphdef: nnx.GraphDef, params: Params, video: jax.Array, state: StreamState, tile: jax.Array | None = None
) -> tuple[jax.Array, StreamState]:
    """Latents of the next frames of a stream.

    Args:
      graphdef, params: the `WanAutoencoder`.
      video: [B, 4T, 8h, 8w, 3] in [-1, 1]; at the beginning of a clip, the first three frames are ignored.
      state: state after the frames before; from `initial_encoder_state` at the beginning of a clip. It is consumed:
        its memory becomes that of the new state.
      tile: int [2], height and width of the latents that are not padding; None if all are valid.

    Returns:
      (float32 latents [B, T, h, w, z_dim], the new state).
    """
    model = nnx.merge(graphdef, params)
    steps = rearrange(video, "b (t n) h w c -> t b n h w c", n=model.config.time_factor)
    latents, state = _scan(model.encode, steps, state, _places(video, model.config.space_factor, tile))
    return rearrange(latents, "t b n h w c -> b (t n) h w c"), state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_stream(
    graphdef: nnx.GraphDef, params: Params, latents: jax.Array, state: StreamState, tile: jax.Array | None = None
) -> tuple[jax.Array, StreamState]:
    """Frames of the next latents of a stream.

    Args:
      graphdef, params: the `WanAutoencoder`.
      latents: normalised, [B, T, h, w, z_dim].
      state: state after the latents before; from `initial_decoder_state` at the beginning of a clip. It is consumed:
        its memory becomes that of the new state.
      tile: int [2], height and width of the latents that are not padding; None if all are valid.

    Returns:
      (float32 video [B, 4T, 8h, 8w, 3], the new state). At the beginning of a clip, the first three frames are padding.
      The video is clipped to [-1, 1], but not that of a tile: tiles are blended first.
    """
    model = nnx.merge(graphdef, params)
    steps = rearrange(latents, "b t h w c -> t b 1 h w c")
    video, state = _scan(model.decode, steps, state, _places(latents, tile=tile))
    video = rearrange(video, "t b n h w c -> b (t n) h w c")
    return video if tile is not None else _clipped(video), state


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
        stream = Stream(jnp.array(True), None, places)
        getattr(nnx.merge(graphdef, params), method)(jnp.zeros(shape), stream)
        return stream.after

    factor = nnx.merge(graphdef, params).config.space_factor if method == "encode" else 1
    places = Places.of(shape[0], shape[2] // factor, shape[3] // factor)
    shapes = jax.eval_shape(caches, params)
    zeros = (places.shard(jnp.zeros(cache.shape, cache.dtype)) for cache in shapes)
    return StreamState(jnp.array(True), tuple(zeros))


def _places(x: Array, space_factor: int = 1, tile: jax.Array | None = None) -> Places:
    """The places of a video, with the factor between its sides and those of the latents, or of latents."""
    batch, _, height, width, _ = x.shape
    return Places.of(batch, height // space_factor, width // space_factor, tile)


def _clipped(video: jax.Array) -> jax.Array:
    return jnp.clip(video, -1, 1)


def _scan(code: Any, steps: jax.Array, state: StreamState, places: Places) -> tuple[jax.Array, StreamState]:
    def step(state: StreamState, x: jax.Array) -> tuple[StreamState, jax.Array]:
        stream = Stream(state.first, state.caches, places)
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

    def encode(self, video: Array, *, whole: bool = False, tile: int | None = None) -> Array:
        """The normalised mean latents (posterior mean - latents_mean) / latents_std of clips.

        Args:
          video: RGB in [-1, 1], [B, F, H, W, 3], of 4n + 1 frames; 8 divides H and W.
          whole: encodes all frames at once, which takes memory in proportion to F. Otherwise, the frames of one latent
            frame are encoded after another. Both give the same latents to rounding.
          tile: encodes frames in overlapping tiles of `tile` x `tile` pixels and blends their latents, as diffusers
            does; see `decode`.

        Returns:
          float32 [B, (F - 1) / 4 + 1, H / 8, W / 8, z_dim].

        Raises:
          InputError: the shape is none of these, or `tile` cannot be used.
        """
        self._check_video(video, first=True)
        if tile is not None and self._tiled(tile, whole, video.shape[2:4]):
            video = _with_padding(video, self.config, np)
            options: dict[str, Any] = {"frames": self.config.time_factor, "scales": (self.config.space_factor, 1)}
            return self._in_tiles(encode_stream, initial_encoder_state, video, tile, **options)
        if whole:
            return encode_clip(self.graphdef, self.params, video)
        return self.encode_chunk(video)[0]

    def decode(self, latents: Array, *, whole: bool = False, tile: int | None = None) -> Array:
        """The clips of normalised latents.

        Args:
          latents: [B, T, h, w, z_dim].
          whole: decodes all latent frames at once, which takes memory in proportion to T. Otherwise, one latent frame
            is decoded after another. Both give the same video to rounding.
          tile: decodes frames in overlapping tiles of `tile` x `tile` pixels and blends them, as diffusers does (its
            default is 256). The result is an approximation. It is a numpy array in the host's memory; the device holds
            one latent frame of one tile, for any length and size. Frames that are no larger are decoded as usual.

        Returns:
          RGB in [-1, 1], float32 [B, 4(T - 1) + 1, 8h, 8w, 3].

        Raises:
          InputError: the shape is none of these, or `tile` cannot be used.
        """
        self._check_latents(latents)
        if tile is not None and self._tiled(
            tile, whole, [self.config.space_factor * size for size in latents.shape[2:4]]
        ):
            options: dict[str, Any] = {"frames": 1, "scales": (1, self.config.space_factor)}
            video = self._in_tiles(decode_stream, initial_decoder_state, latents, tile, **options)
            return video[:, self.config.time_factor - 1 :].clip(-1, 1)
        if whole:
            return decode_clip(self.graphdef, self.params, latents)
        return self.decode_chunk(latents)[0]

    def encode_chunk(self, video: Array, state: StreamState | None = None) -> tuple[jax.Array, StreamState]:
        """The latents of the next frames of clips, with the same memory for every length.

        Args:
          video: RGB in [-1, 1], [B, F, H, W, 3]: 4n + 1 frames at the beginning of clips, 4n frames later.
          state: None at the beginning of clips, later the state that the call before returned. It is consumed.

        Returns:
          (float32 latents [B, n + 1 or n, H / 8, W / 8, z_dim], the state for the next call).

        Raises:
          InputError: the shape is none of these, or is not the state's.
        """
        self._check_video(video, first=state is None)
        if state is None:
            batch, _, height, width, _ = video.shape
            state = initial_encoder_state(self.graphdef, self.params, batch, height, width)
            video = _with_padding(video, self.config, jnp)
        self._check_state(state, video, "video")
        return encode_stream(self.graphdef, self.params, video, state)

    def decode_chunk(self, latents: Array, state: StreamState | None = None) -> tuple[jax.Array, StreamState]:
        """The frames of the next latents of clips, with the same memory for every length.

        Args:
          latents: normalised, [B, T, h, w, z_dim].
          state: None at the beginning of clips, later the state that the call before returned. It is consumed.

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

    def _tiled(self, tile: int, whole: bool, size: Sequence[int]) -> bool:
        """True if frames of that height and width are coded in tiles."""
        # A quarter of a tile is shared, in complete latents.
        unit = 4 * self.config.space_factor
        if tile < unit or tile % unit:
            raise InputError(f"tile must be a positive multiple of {unit} pixels, found {tile}; {8 * unit} is usual")
        if whole:
            raise InputError("whole=True and tile exclude each other: tiles are coded as streams; omit one")
        return max(size) > tile

    def _in_tiles(
        self, stream: Any, initial: Any, x: Array, tile: int, *, frames: int, scales: tuple[int, int]
    ) -> np.ndarray:
        """Codes tiles of `x` as streams, `frames` frames in a step.

        `scales` are the sides of a latent in `x` and in the result.
        """
        before, after = scales
        height, width = (size // before for size in x.shape[2:4])
        tile //= self.config.space_factor
        # All tiles have one shape, and so one program.
        shape = before * min(tile, height), before * min(tile, width)

        def code(rows: slice, columns: slice) -> np.ndarray:
            valid = np.array([rows.stop - rows.start, columns.stop - columns.start], np.int32)
            own = x[:, :, before * rows.start : before * rows.stop, before * columns.start : before * columns.stop]
            part = np.pad(own, ((0, 0), (0, 0), (0, shape[0] - own.shape[2]), (0, shape[1] - own.shape[3]), (0, 0)))
            state = initial(self.graphdef, self.params, x.shape[0], *shape)
            coded = []
            for at in range(0, x.shape[1], frames):
                y, state = stream(self.graphdef, self.params, part[:, at : at + frames], state, valid)
                coded.append(np.asarray(y)[:, :, : after * valid[0], : after * valid[1]])
            return np.concatenate(coded, axis=1)

        return assembled(code, height, width, tile, after)

    def _check_video(self, video: Array, *, first: bool) -> None:
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

    def _check_latents(self, latents: Array) -> None:
        shape = latents.shape
        if len(shape) != 5 or shape[4] != self.config.z_dim or not min(shape):
            raise InputError(
                f"latents must be [batch, frames, height, width, {self.config.z_dim}] (channels last), "
                f"found shape {tuple(shape)}; transpose them"
            )

    def _check_state(self, state: StreamState, x: Array, name: str) -> None:
        # Inside another program, there is nothing to ask.
        concrete = [cache for cache in state.caches if not isinstance(cache, jax.core.Tracer)]
        if any(getattr(cache, "is_deleted", bool)() for cache in concrete):
            raise InputError("state was consumed by an earlier call; give the state that the last call returned")
        scale = self.config.space_factor if name == "video" else 1
        places, (batch, _, *found) = _places(x, scale), state.caches[0].shape[:4]
        size = batch, *found
        if (x.shape[0], *(scale * padded for padded in places.padded)) != size:
            raise InputError(
                f"{name} must be [batch, height, width] = {size} as in the call before, found "
                f"{(x.shape[0], *x.shape[2:4])}; begin another clip with state=None"
            )


def _with_padding(video: Any, config: WanVaeConfig, library: Any) -> Any:
    """A clip as an array of numpy or jax.numpy, with the frames before the first one that complete its step."""
    before = library.repeat(video[:, :1], config.time_factor - 1, axis=1)
    return library.concatenate([before, video], axis=1)
