"""Tables of parameters under their three names: here, in diffusers, and in a model's original PyTorch code.

Import and export read the same table in two directions. A row is one array of the parameter tree; the parameters of
all transformer blocks are stacked in one array, whose rows are tensors of their own in PyTorch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from rehyat_jax.attention.form import BlockForms

Layout = Literal["diffusers", "original"]
"""Which of the two PyTorch libraries' names."""

LAYOUTS: tuple[Layout, ...] = ("diffusers", "original")

BLOCK = "blocks.{block}."
"""What PyTorch names of block parameters begin with."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor's axes are laid out here and in PyTorch. Both functions return views."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda array: array, lambda array: array)
LINEAR = Transform(np.transpose, np.transpose)
"""[out, in] in PyTorch, [in, out] here."""
CONVOLUTION = Transform(lambda array: array.transpose(2, 3, 4, 1, 0), lambda array: array.transpose(4, 3, 0, 1, 2))
"""[out, in, frames, height, width] in PyTorch, [frames, height, width, in, out] here."""
MODULATION = Transform(lambda array: array[0], lambda array: array[None])
"""[1, parts, width] in PyTorch, [parts, width] here."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of the parameter tree and the tensors that hold it in PyTorch.

    Attributes:
      path: keys of the parameter tree, joined by dots.
      shape: here, without the axis of blocks.
      diffusers, original: PyTorch name, with {block} for the index of a block.
      transform: from one tensor to (a row of) the array.
      blocks: which blocks are stacked on the array's leading axis; None where it has no such axis.
    """

    path: str
    shape: tuple[int, ...]
    diffusers: str
    original: str
    transform: Transform = SAME
    blocks: tuple[int, ...] | None = None

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of the array in the parameter tree."""
        return self.shape if self.blocks is None else (len(self.blocks), *self.shape)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in PyTorch."""
        return self.transform.to_torch(np.broadcast_to(np.uint8(0), self.shape)).shape

    def names(self, layout: Layout) -> list[str]:
        """PyTorch names of the tensors, in the order of the array's leading axis."""
        template = self.diffusers if layout == "diffusers" else self.original
        return [template] if self.blocks is None else [template.format(block=block) for block in self.blocks]


def torch_names(table: list[Row], layout: Layout) -> Iterator[str]:
    """All PyTorch names, block after block as in a state dict."""
    for stacked, group in itertools.groupby(table, key=lambda row: row.blocks is not None):
        rows = list(group)
        if not stacked:
            yield from (name for row in rows for name in row.names(layout))
            continue
        named = [dict(zip(row.blocks or (), row.names(layout), strict=True)) for row in rows]
        for block in sorted({block for names in named for block in names}):
            yield from (names[block] for names in named if block in names)


def linear_rows(path: str, diffusers: str, original: str, in_features: int, out_features: int) -> list[Row]:
    """A linear layer's kernel and bias."""
    return [
        Row(f"{path}.kernel", (in_features, out_features), f"{diffusers}.weight", f"{original}.weight", LINEAR),
        Row(f"{path}.bias", (out_features,), f"{diffusers}.bias", f"{original}.bias"),
    ]


def feature_map_rows(forms: BlockForms, num_heads: int, head_dim: int) -> list[Row]:
    """The feature maps of the converted blocks. PyTorch has no such model, so their layout there is ours too."""
    rows = []
    for stack in forms.stacks:
        prefix = ".".join(("feature_maps", *filter(None, [stack.key]))) + "."
        for side in ("query", "key"):
            name = f"feature_map_{side}"
            maps: list[tuple[str, tuple[int, ...], str]] = [
                (f"layer_{i}.kernel", (num_heads, *shape), f"{name}.layers.{i}.weight")
                for i, shape in enumerate(stack.config.kernel_shapes(head_dim))
            ]
            maps.append(("log_scale", (num_heads,), f"{name}.log_scale"))
            for ours, shape, theirs in maps:
                row = Row(f"{side}.{ours}", shape, f"attn1.{theirs}", f"self_attn.{theirs}")
                rows.append(in_blocks(row, prefix, stack.blocks))
    return rows


def in_blocks(row: Row, prefix: str, blocks: tuple[int, ...]) -> Row:
    """A row of one block as a row of these blocks, stacked; `prefix` is of its path."""
    return dataclasses.replace(
        row, path=prefix + row.path, diffusers=BLOCK + row.diffusers, original=BLOCK + row.original, blocks=blocks
    )
