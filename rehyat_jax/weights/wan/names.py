"""Wan2.1's parameters under their three names: here, in diffusers' `WanTransformer3DModel`, in the original `WanModel`.

Import and export read the same table in two directions. A row is one array of the parameter tree; the parameters of
all transformer blocks are stacked in one array, whose rows are tensors of their own in PyTorch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from rehyat_jax.models.wan.config import WanConfig

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


def wan_table(config: WanConfig) -> list[Row]:
    """The rows of a model, in the order of diffusers' state dict."""
    width, patch, text = config.width, config.patch_size, "condition_embedder.text_embedder."
    patch_out = int(np.prod(patch)) * config.out_channels
    time = "condition_embedder.time_embedder."
    before = [
        Row("head.modulation", (2, width), "scale_shift_table", "head.modulation", MODULATION),
        Row(
            "patch_embedding.kernel",
            (*patch, config.in_channels, width),
            "patch_embedding.weight",
            "patch_embedding.weight",
            CONVOLUTION,
        ),
        Row("patch_embedding.bias", (width,), "patch_embedding.bias", "patch_embedding.bias"),
        *_linear("time_embedding.linear_1", time + "linear_1", "time_embedding.0", config.freq_dim, width),
        *_linear("time_embedding.linear_2", time + "linear_2", "time_embedding.2", width, width),
        *_linear("time_projection", "condition_embedder.time_proj", "time_projection.1", width, 6 * width),
        *_linear("text_embedding.linear_1", text + "linear_1", "text_embedding.0", config.text_dim, width),
        *_linear("text_embedding.linear_2", text + "linear_2", "text_embedding.2", width, width),
    ]
    block = [
        Row("modulation", (6, width), "scale_shift_table", "modulation", MODULATION),
        *_attention("self_attention", "attn1", "self_attn", width),
        *_attention("cross_attention", "attn2", "cross_attn", width),
        Row("cross_attention_norm.scale", (width,), "norm2.weight", "norm3.weight"),
        Row("cross_attention_norm.bias", (width,), "norm2.bias", "norm3.bias"),
        *_linear("feed_forward.up", "ffn.net.0.proj", "ffn.0", width, config.ffn_dim),
        *_linear("feed_forward.down", "ffn.net.2", "ffn.2", config.ffn_dim, width),
    ]
    after = _linear("head.projection", "proj_out", "head.head", width, patch_out)
    return [
        *before,
        *(_in_blocks(row, "blocks.", tuple(range(config.num_layers))) for row in block),
        *(_in_blocks(row, "feature_maps.", config.hybrid_block_indices) for row in _feature_maps(config)),
        *after,
    ]


def torch_names(table: list[Row], layout: Layout) -> Iterator[str]:
    """All PyTorch names, block after block as in a state dict."""
    for stacked, rows in itertools.groupby(table, key=lambda row: row.blocks is not None):
        rows = list(rows)
        if not stacked:
            yield from (name for row in rows for name in row.names(layout))
            continue
        named = [dict(zip(row.blocks, row.names(layout), strict=True)) for row in rows]
        for block in sorted({block for names in named for block in names}):
            yield from (names[block] for names in named if block in names)


def _linear(path: str, diffusers: str, original: str, in_features: int, out_features: int) -> list[Row]:
    return [
        Row(f"{path}.kernel", (in_features, out_features), f"{diffusers}.weight", f"{original}.weight", LINEAR),
        Row(f"{path}.bias", (out_features,), f"{diffusers}.bias", f"{original}.bias"),
    ]


def _attention(path: str, diffusers: str, original: str, width: int) -> list[Row]:
    projections = (("query", "to_q", "q"), ("key", "to_k", "k"), ("value", "to_v", "v"), ("output", "to_out.0", "o"))
    rows = []
    for ours, theirs, short in projections:
        rows += _linear(f"{path}.{ours}", f"{diffusers}.{theirs}", f"{original}.{short}", width, width)
    for ours, theirs in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        rows.append(
            Row(f"{path}.{ours}.scale", (width,), f"{diffusers}.{theirs}.weight", f"{original}.{theirs}.weight")
        )
    return rows


def _feature_maps(config: WanConfig) -> list[Row]:
    """The feature maps of a hybrid block; PyTorch has no such model, so their layout there is ours too."""
    features, rows = config.hybrid.feature_map.features, []
    if not config.hybrid_block_indices:
        return rows
    for side in ("query", "key"):
        name = f"feature_map_{side}"
        for i in range(config.hybrid.feature_map.num_layers):
            shape = (config.num_heads, features if i else config.head_dim, features)
            weight = f"{name}.layers.{i}.weight"
            rows.append(Row(f"{side}.layer_{i}.kernel", shape, f"attn1.{weight}", f"self_attn.{weight}"))
        scale = f"{name}.log_scale"
        rows.append(Row(f"{side}.log_scale", (config.num_heads,), f"attn1.{scale}", f"self_attn.{scale}"))
    return rows


def _in_blocks(row: Row, prefix: str, blocks: tuple[int, ...]) -> Row:
    return dataclasses.replace(
        row, path=prefix + row.path, diffusers=BLOCK + row.diffusers, original=BLOCK + row.original, blocks=blocks
    )
