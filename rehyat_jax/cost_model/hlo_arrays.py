"""The arrays in a type of an HLO listing, such as `(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[])`."""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

_ARRAY = re.compile(r"(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?([^}]*))?\})?")
_KIND = re.compile(r"([a-z]+?)(\d+)(\w*)")


class HloArray(NamedTuple):
    """One array.

    Attributes:
      kind: "f32", "bf16", "pred"...
      bits: bits of an element.
      minor_to_major: its dimensions in their order in memory, minor first; empty if the listing does not give it.
      tile: sizes of a tile in its minor dimensions, the minor one last.
      memory: 0 for a TPU's HBM, 1 for its VMEM; others have other numbers.
    """

    kind: str
    bits: int
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    memory: int

    @property
    def in_hbm(self) -> bool:
        return self.memory == 0

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype."""
        if self.kind == "pred":
            return jnp.dtype(bool)
        letters, width, form = _KIND.fullmatch(self.kind).groups()
        name = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}[letters] + width
        return jnp.dtype(f"{name}_{form}" if form else name)

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def padded_bytes(self) -> int:
        """Size in complete tiles."""
        sizes = list(self.shape)
        for axis, unit in zip(self.minor_to_major, reversed(self.tile), strict=False):
            sizes[axis] = -(-sizes[axis] // unit) * unit
        return math.prod(sizes) * self.bits // 8


def arrays_of(hlo_type: str) -> list[HloArray]:
    """All arrays of a type, in order."""
    numbers = lambda text: tuple(int(number) for number in text.split(",") if number)
    return [
        HloArray(
            kind,
            8 if kind == "pred" else int(bits),
            numbers(shape),
            numbers(order),
            numbers(tile),
            int(memory.group(1)) if (memory := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for kind, bits, shape, order, tile, layout in _ARRAY.findall(hlo_type)
    ]
