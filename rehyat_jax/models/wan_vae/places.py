"""The height and width of frames: sharded over the devices of the mesh in use, or padded.

Every device has a rectangle of each frame, and all frames. XLA exchanges the rows and columns that convolutions need
from the neighbours. Latents whose height or width the devices do not divide are padded at the bottom and on the right,
and so is a tile at the edge of a frame. Convolutions see zeros in the padding, as they see beyond the edge of a frame,
and no pixel attends to it. Padding therefore changes no pixel.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from rehyat_jax.attention.softmax.api import softmax_attention
from rehyat_jax.parallel.mesh import BATCH, axis_size
from rehyat_jax.parallel.sharding import Axes, constrain


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of pixels: their axes of the mesh, and the part of a frame that is not padding.

    Attributes:
      batch, rows, columns: axes of the mesh along which each is sharded.
      height, width: those of the latents, before `pad`.
      tile: int [2], height and width of a tile's latents that are not padding; None if all are valid.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    height: int
    width: int
    tile: jax.Array | None = None

    @classmethod
    def of(cls, batch: int, height: int, width: int, tile: jax.Array | None = None) -> "Places":
        """The places of latents [batch, T, height, width, C] on the mesh in use.

        "data" and "fsdp" shard the batch if they divide it, otherwise rows. "context" shards rows, "tensor" columns.
        """
        in_use = lambda *axes: tuple(axis for axis in axes if axis_size(axis) > 1)
        if batch % _parts(BATCH):
            return cls((), in_use(*BATCH, "context"), in_use("tensor"), height, width, tile)
        return cls(in_use(*BATCH), in_use("context"), in_use("tensor"), height, width, tile)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the latents after `pad`."""
        up = lambda size, axes: -(-size // _parts(axes)) * _parts(axes)
        return up(self.height, self.rows), up(self.width, self.columns)

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads latents or video [B, T, H, W, C] and shards them."""
        scale = x.shape[2] // self.height
        rows, columns = (scale * size for size in self.padded)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, columns - x.shape[3]), (0, 0)))
        return self.shard(x)

    def crop(self, x: jax.Array) -> jax.Array:
        """Inverse of `pad`."""
        scale = x.shape[2] // self.padded[0]
        return x[:, :, : scale * self.height, : scale * self.width]

    def shard(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C], sharded."""
        return constrain(x, self._axes)

    def without_padding(self, x: jax.Array) -> jax.Array:
        """The input of a convolution [B, T, H, W, C], sharded, with zeros in its padding."""
        valid = self._valid(x)
        return self.shard(x if valid is None else jnp.where(valid[:, :, None], x, 0))

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attention among the pixels of each frame, [B, T, H, W, C], except those of the padding."""
        valid = self._valid(key)
        tokens = lambda x: rearrange(x, "b t h w c -> t b (h w) 1 c")
        # Every device attends from its pixels to those of all devices.
        everywhere = lambda x: constrain(x, (self.batch, None, None, None, None))
        key, value = everywhere(key), everywhere(value)

        def attend(frame: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            if valid is None:
                return softmax_attention(*frame)
            return jax.nn.dot_product_attention(*frame, mask=valid.reshape(1, 1, 1, -1))

        # One frame after another: the scores of a frame of 480p take 156 MB.
        attended = jax.lax.map(attend, (tokens(query), tokens(key), tokens(value)))
        return rearrange(attended, "t b (h w) 1 c -> b t h w c", h=query.shape[2])

    def _valid(self, x: jax.Array) -> jax.Array | None:
        """bool [H, W]: the pixels of `x` that are not padding; None if it has none."""
        if self.tile is None and self.padded == (self.height, self.width):
            return None
        scale = x.shape[2] // self.padded[0]
        height, width = (self.height, self.width) if self.tile is None else self.tile
        inside = lambda size, valid: jnp.arange(size) < scale * valid
        return inside(x.shape[2], height)[:, None] & inside(x.shape[3], width)

    @property
    def _axes(self) -> Axes:
        return (self.batch, None, self.rows, self.columns, None)


def _parts(axes: tuple[str, ...]) -> int:
    return math.prod(map(axis_size, axes))
