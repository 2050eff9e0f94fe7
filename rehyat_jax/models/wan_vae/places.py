"""The height and width of frames: sharded over the devices of the mesh in use, or padded.

Every device has a rectangle of each frame, and all frames. Devices exchange the rows and columns that convolutions need
from the neighbours. Latents whose height or width the devices do not divide are padded at the bottom and on the right,
and so is a tile at the edge of a frame. Convolutions see zeros in the padding, as they see beyond the edge of a frame,
and no pixel attends to it. Padding therefore changes no pixel.

On TPUs, Pallas kernels compute the convolutions of bfloat16 frames (see `tpu/`). XLA's convolutions take several times
as long there. Devices then have complete rows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from rehyat_jax.attention.platform import target_platform
from rehyat_jax.attention.softmax.api import softmax_attention
from rehyat_jax.parallel.mesh import BATCH, axis_size
from rehyat_jax.parallel.sharding import constrain

KERNELS = ("tpu",)
"""Platforms whose convolutions Pallas kernels compute."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of pixels: their axes of the mesh, and the part of a frame that is not padding.

    Attributes:
      batch, rows, columns: axes of the mesh along which each is sharded.
      height, width: those of the latents, before `pad`.
      has_kernels: True if Pallas kernels compute the convolutions of bfloat16.
      tile: int [2], height and width of a tile's latents that are not padding; None if all are valid.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    height: int
    width: int
    has_kernels: bool
    tile: jax.Array | None = None

    @classmethod
    def of(cls, batch: int, height: int, width: int, tile: jax.Array | None = None) -> "Places":
        """The places of latents [batch, T, height, width, C] on the mesh in use.

        "data" and "fsdp" shard the batch if they divide it, otherwise rows. "context" shards rows. "tensor" shards
        columns, or rows if there are kernels.
        """
        in_use = lambda *axes: tuple(axis for axis in axes if axis_size(axis) > 1)
        divides = batch % _parts(BATCH) == 0
        rows, columns = in_use("context") if divides else in_use(*BATCH, "context"), in_use("tensor")
        if has_kernels := target_platform() in KERNELS:
            rows, columns = rows + columns, ()
        return cls(in_use(*BATCH) if divides else (), rows, columns, height, width, has_kernels, tile)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the latents after `pad`."""
        up = lambda size, parts: -(-size // parts) * parts
        return up(self.height, _parts(self.rows)), up(self.width, _parts(self.columns))

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads latents or video [B, T, H, W, C], and shards them."""
        scale = x.shape[2] // self.height
        rows, columns = (scale * size for size in self.padded)
        return self.shard(jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, columns - x.shape[3]), (0, 0))))

    def crop(self, x: jax.Array) -> jax.Array:
        """Inverse of `pad`."""
        scale = x.shape[2] // self.padded[0]
        return x[:, :, : scale * self.height, : scale * self.width]

    @property
    def spec(self) -> PartitionSpec:
        """The sharding of arrays [B, T, H, W, C]."""
        return PartitionSpec(self.batch or None, None, self.rows or None, self.columns or None, None)

    def shard(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C], sharded."""
        return constrain(x, tuple(self.spec))

    def use_kernels(self, dtype: jnp.dtype) -> bool:
        """True if Pallas kernels compute convolutions in this dtype."""
        return self.has_kernels and dtype == jnp.bfloat16

    def on_devices(self, kernel: Callable, pixels: Any, others: Any) -> Any:
        """kernel(pixels, others) on each device. The kernel calls `rows_around` for the rows of other devices.

        Args:
          pixels: tree of arrays [B, T, H, W, C], as are the results; every device has its part.
          others: tree of arrays that every device has completely.
        """
        if not self.batch + self.rows:
            return kernel(pixels, others)
        specs = self.spec, PartitionSpec()
        return jax.shard_map(kernel, in_specs=specs, out_specs=self.spec, check_vma=False)(pixels, others)

    def rows_around(self, first: jax.Array, last: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """The rows above and below a device's own rows, zeros beyond the frame; None if it has complete frames.

        Args:
          first, last: the first and the last of its rows, [B, T, 1, W, C].
        """
        if not self.rows:
            return None, None
        devices = _parts(self.rows)
        down = [(device, device + 1) for device in range(devices - 1)]
        up = [(below, above) for above, below in down]
        return jax.lax.ppermute(last, self.rows, down), jax.lax.ppermute(first, self.rows, up)

    def without_padding(self, x: jax.Array) -> jax.Array:
        """The input of a convolution [B, T, H, W, C], sharded, with zeros in its padding."""
        valid = self._valid(x)
        if valid is None:
            return self.shard(x)
        return self.shard(jnp.where(valid[..., None], x, 0))

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attention among the pixels of each frame, [B, T, H, W, C], except those of the padding."""
        valid = self._valid(key)
        tokens = lambda x: rearrange(x, "b t h w c -> t b (h w) 1 c")
        # Every device attends from its pixels to those of all devices.
        everywhere = lambda x: tokens(constrain(x, (self.batch, None, None, None, None)))

        def attend(frame: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            if valid is None:
                return softmax_attention(*frame)
            return jax.nn.dot_product_attention(*frame, mask=valid.reshape(1, 1, 1, -1))

        # One frame after another: the scores of a frame of 480p take 156 MB.
        attended = jax.lax.map(attend, (tokens(query), everywhere(key), everywhere(value)))
        return self.shard(rearrange(attended, "t b (h w) 1 c -> b t h w c", h=query.shape[2]))

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
