"""The height and width of frames: sharded over the devices of the mesh in use, or padded.

Every device has a rectangle of each frame, and all frames. XLA exchanges the rows and columns that convolutions need
from the neighbours. Latents whose height or width the devices do not divide are padded at the bottom and on the right,
and so is a tile at the edge of a frame. Convolutions see zeros in the padding, as they see beyond the edge of a frame,
and no pixel attends to it. Padding therefore changes no pixel.

On a TPU, frames are divided into strips of neighbouring columns, which take the place of a batch. XLA's convolutions
need a batch of 8. XLA would otherwise make such strips for every convolution, and copy all pixels to and fro.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from rehyat_jax.attention.platform import target_platform
from rehyat_jax.attention.softmax.api import softmax_attention
from rehyat_jax.parallel.mesh import BATCH, axis_size
from rehyat_jax.parallel.sharding import constrain

STRIPS = {"tpu": 8}
"""Strips of every frame, by platform; one on others. The bfloat16 tiles of a TPU have 8 rows."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of pixels: their axes of the mesh, and the part of a frame that is not padding.

    Attributes:
      batch, rows, columns: axes of the mesh along which each is sharded.
      height, width: those of the latents, before `pad`.
      strips: strips of columns into which `pad` divides frames.
      tile: int [2], height and width of a tile's latents that are not padding; None if all are valid.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    height: int
    width: int
    strips: int
    tile: jax.Array | None = None

    @classmethod
    def of(cls, batch: int, height: int, width: int, tile: jax.Array | None = None) -> "Places":
        """The places of latents [batch, T, height, width, C] on the mesh in use.

        "data" and "fsdp" shard the batch if they divide it, otherwise rows. "context" shards rows, "tensor" columns.
        """
        in_use = lambda *axes: tuple(axis for axis in axes if axis_size(axis) > 1)
        divides = batch % _parts(BATCH) == 0
        rows, columns = in_use("context") if divides else in_use(*BATCH, "context"), in_use("tensor")
        strips = 1 if columns else STRIPS.get(target_platform(), 1)
        return cls(in_use(*BATCH) if divides else (), rows, columns, height, width, strips, tile)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the latents after `pad`."""
        up = lambda size, parts: -(-size // parts) * parts
        return up(self.height, _parts(self.rows)), up(self.width, _parts(self.columns) * self.strips)

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads latents or video [B, T, H, W, C], divides them into strips [B * strips, ...] and shards them."""
        scale = x.shape[2] // self.height
        rows, columns = (scale * size for size in self.padded)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, columns - x.shape[3]), (0, 0)))
        return self.shard(rearrange(x, "b t h (s w) c -> (b s) t h w c", s=self.strips))

    def crop(self, x: jax.Array) -> jax.Array:
        """Inverse of `pad`."""
        scale = x.shape[2] // self.padded[0]
        return self._joined(x)[:, :, : scale * self.height, : scale * self.width]

    def shard(self, x: jax.Array) -> jax.Array:
        """[B * strips, T, H, W, C], sharded."""
        return constrain(x, (self.batch, None, self.rows, self.columns, None))

    def convolve(
        self,
        convolve: Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array],
        x: jax.Array,
        kernel: jax.Array,
        padding: tuple[int, int],
    ) -> jax.Array:
        """A convolution with padded columns that sees the columns of neighbouring strips.

        Args:
          convolve: function of arrays like `x` and `kernel`, and of zero columns before and after each strip.
          x: [B * strips, T, H, W, C].
          kernel: [..., width, C, C'].
          padding: columns before and after, 0 or 1.
        """
        y = convolve(x, kernel, padding)
        if self.strips == 1:
            return y
        # Only the first and the last column are affected. To join the columns to `x` would copy all of it.
        strips = rearrange(x, "(b s) t h w c -> s b t h w c", s=self.strips)
        none = jnp.zeros_like(strips[:1, :, :, :, :1])
        join = lambda *parts: rearrange(jnp.concatenate(parts), "s b t h w c -> (b s) t h w c")
        if padding[0]:
            before = join(none, strips[:-1, :, :, :, -1:])
            y = y.at[:, :, :, :1].add(convolve(before, kernel[..., :1, :, :], (0, 0)))
        if padding[1]:
            after = join(strips[1:, :, :, :, :1], none)
            y = y.at[:, :, :, -1:].add(convolve(after, kernel[..., -1:, :, :], (0, 0)))
        return y

    def without_padding(self, x: jax.Array) -> jax.Array:
        """The input of a convolution [B, T, H, W, C], sharded, with zeros in its padding."""
        valid = self._valid(x)
        if valid is None:
            return self.shard(x)
        valid = rearrange(valid, "h (s w) -> s 1 h w 1", s=self.strips)
        return self.shard(jnp.where(jnp.tile(valid, (x.shape[0] // self.strips, 1, 1, 1, 1)), x, 0))

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attention among the pixels of each frame, [B * strips, T, H, W, C], except those of the padding."""
        valid = self._valid(key)
        query, key, value = (self._joined(array) for array in (query, key, value))
        tokens = lambda x: rearrange(x, "b t h w c -> t b (h w) 1 c")
        # Every device attends from its pixels to those of all devices.
        everywhere = lambda x: tokens(constrain(x, (self.batch, None, None, None, None)))

        def attend(frame: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            if valid is None:
                return softmax_attention(*frame)
            return jax.nn.dot_product_attention(*frame, mask=valid.reshape(1, 1, 1, -1))

        # One frame after another: the scores of a frame of 480p take 156 MB.
        attended = jax.lax.map(attend, (tokens(query), everywhere(key), everywhere(value)))
        pattern = "t b (h s w) 1 c -> (b s) t h w c"
        return self.shard(rearrange(attended, pattern, h=query.shape[2], s=self.strips))

    def _joined(self, x: jax.Array) -> jax.Array:
        """Frames of all strips, [B, T, H, W, C]."""
        return rearrange(x, "(b s) t h w c -> b t h (s w) c", s=self.strips)

    def _valid(self, x: jax.Array) -> jax.Array | None:
        """bool [H, W]: the pixels of complete frames that are not padding; None if there is none."""
        if self.tile is None and self.padded == (self.height, self.width):
            return None
        scale = x.shape[2] // self.padded[0]
        height, width = (self.height, self.width) if self.tile is None else self.tile
        inside = lambda size, valid: jnp.arange(scale * size) < scale * valid
        return inside(self.padded[0], height)[:, None] & inside(self.padded[1], width)


def _parts(axes: tuple[str, ...]) -> int:
    return math.prod(map(axis_size, axes))
