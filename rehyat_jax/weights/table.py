"""Tables of parameters with their three names: in this package, in diffusers, and in the original PyTorch code.

Import and export read the same table in two directions. A row is one array of the parameter tree. The parameters of
all transformer blocks are stacked in one array, while PyTorch has one tensor for each block.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from rehyat_jax.attention.form import BlockForms

Layout = Literal["diffusers", "original"]
"""The PyTorch library whose names are used: the parts of diffusers' pipelines, or the original code. The text encoder
of diffusers' pipelines is a model of transformers.
"""

LAYOUTS: tuple[Layout, ...] = ("diffusers", "original")

BLOCK, ENCODER_BLOCK = "blocks.{block}.", "encoder.block.{block}."
"""Prefixes of the PyTorch names of block parameters: of Wan's models, and of encoders in transformers."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts the axes of one tensor between this package and PyTorch. Both functions return views."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda array: array, lambda array: array)
LINEAR = Transform(np.transpose, np.transpose)
"""[out, in] in PyTorch, [in, out] here."""
CONVOLUTION = Transform(lambda array: array.transpose(2, 3, 4, 1, 0), lambda array: array.transpose(4, 3, 0, 1, 2))
"""[out, in, frames, height, width] in PyTorch, [frames, height, width, in, out] here."""
FRAME_CONVOLUTION = Transform(lambda array: array.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1))
"""[out, in, height, width] in PyTorch, [height, width, in, out] here."""
FRAME_SCALE = Transform(lambda array: array[:, 0, 0], lambda array: array[:, None, None])
"""[channels, 1, 1] in PyTorch, [channels] here."""
VIDEO_SCALE = Transform(lambda array: array[:, 0, 0, 0], lambda array: array[:, None, None, None])
"""[channels, 1, 1, 1] in PyTorch, [channels] here."""
MODULATION = Transform(lambda array: array[0], lambda array: array[None])
"""[1, parts, width] in PyTorch, [parts, width] here."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of the parameter tree and the tensors that hold it in PyTorch.

    Attributes:
      path: keys of the parameter tree, joined by dots.
      shape: shape in this package, without the axis of blocks.
      diffusers, original: PyTorch name, with {block} for the index of a block.
      transform: conversion between one tensor and the array, or one row of it.
      blocks: the blocks that are stacked on the array's leading axis; None if it has no such axis.
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
    """All PyTorch names, block after block, in the order of a state dict."""
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
    """The learned parameters of the converted blocks' attention.

    PyTorch has no such model, so this package defines their layout.
    """
    rows = []
    for stack in forms.stacks:
        prefix = ".".join(("feature_maps", *filter(None, [stack.key]))) + "."
        learned = stack.config
        found: list[tuple[str, tuple[int, ...], str]] = []
        for side in ("query", "key"):
            name = f"feature_map_{side}"
            maps: list[tuple[str, tuple[int, ...], str]] = [
                (f"layer_{i}.kernel", (num_heads, *shape), f"{name}.layers.{i}.weight")
                for i, shape in enumerate(learned.feature_map.kernel_shapes(head_dim))
            ]
            maps.append(("log_scale", (num_heads,), f"{name}.log_scale"))
            if learned.feature_map.gate:
                maps.append(("gate", (num_heads, head_dim), f"{name}.gate"))
            found += [(f"{side}.{ours}", shape, theirs) for ours, shape, theirs in maps]
        found += [("decay", (num_heads,), "linear_decay")] * learned.decay
        found += [("branch_gate", (num_heads,), "branch_gate")] * learned.branch_gate
        for ours, shape, theirs in found:
            row = Row(ours, shape, f"attn1.{theirs}", f"self_attn.{theirs}")
            rows.append(in_blocks(row, prefix, stack.blocks))
    return rows


def in_blocks(row: Row, prefix: str, blocks: tuple[int, ...], *, diffusers: str = BLOCK) -> Row:
    """Turns the row of one block into the stacked row of several blocks.

    Args:
      row: row of one block.
      prefix: prepended to its path.
      blocks: indices of the blocks.
      diffusers: prepended to its name in diffusers or transformers, one of the prefixes above.
    """
    return dataclasses.replace(
        row, path=prefix + row.path, diffusers=diffusers + row.diffusers, original=BLOCK + row.original, blocks=blocks
    )
