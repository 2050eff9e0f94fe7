"""The arrays in a type of an HLO listing, such as `(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[])`."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?([^}]*))?\})?")


class HloArray(NamedTuple):
    """One array.

    Attributes:
      bits: bits of an element.
      minor_to_major: its dimensions in their order in memory, minor first; empty if the listing does not give it.
      tile: sizes of a tile in its minor dimensions, the minor one last.
      in_hbm: True unless it is in a TPU's VMEM or another memory.
    """

    bits: int
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    in_hbm: bool

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
            8 if kind == "pred" else int(bits),
            numbers(shape),
            numbers(order),
            numbers(tile),
            not re.search(r"S\([1-9]", layout),
        )
        for kind, bits, shape, order, tile, layout in _ARRAY.findall(hlo_type)
    ]
