"""Floating-point operations of the Wan transformer, from its sizes: a multiply-add is two.

Matrix products alone are counted, as is the custom for model FLOPs use (PaLM, arXiv 2204.02311, appendix B), and each
attention as what it is: softmax attention over all pairs of tokens, hybrid attention over its window and its sums.
Recomputation and padding are no work of the model, and are not in it.

With N tokens of width D = H d, L text tokens, a feed-forward width M and P = tokens of a frame, one block takes

    self-attention's projections    8 N D^2
    softmax attention               4 N^2 D
      or hybrid: its window         4 D P^2 (pairs of a frame and a frame of its window)
                 readout and sums   2 (N_q + N_k) F (D + H)      N_q tokens have a past to read, N_k are read
                 feature maps       2 (N_q + N_k) (D F + (layers - 1) H F^2)
    cross-attention                 4 N D^2 + 4 L D^2 + 4 N L D
    feed-forward                    4 N D M
"""

import dataclasses
import math

import numpy as np

from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.models.wan.config import WanConfig


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Of one video through the model: embeddings and head, and of one block each: all but self-attention's inner part
    (of which the last product, down from the feed-forward width), softmax attention, and hybrid attention's window,
    readout with sums, and feature maps."""

    outside: int
    block: int
    last_product: int
    softmax: int
    window: int
    linear: int
    feature_maps: int

    @property
    def hybrid(self) -> int:
        return self.window + self.linear + self.feature_maps


def forward_flops(config: WanConfig, latents: tuple[int, int, int]) -> ForwardFlops:
    """Counts for latents of (frames, height, width)."""
    frames, *size = (length // patch for length, patch in zip(latents, config.patch_size, strict=True))
    per_frame = math.prod(size)
    tokens, text, width = frames * per_frame, config.text_length, config.width
    patch = math.prod(config.patch_size)

    embed_text = 2 * text * width * (config.text_dim + width)
    embed_time = 2 * width * (config.freq_dim + width + 6 * width)
    in_and_out = 2 * tokens * width * patch * (config.in_channels + config.out_channels)

    cross = 4 * tokens * width**2 + 4 * text * width**2 + 4 * tokens * text * width
    form, maps = config.hybrid, config.hybrid.feature_map
    geometry = ChunkGeometry(frames, per_frame, form.chunk_frames, form.overlap_frames)
    window, linear = geometry.key_masks(causal=form.causal)
    ends = per_frame * int(np.count_nonzero(linear.any(axis=1)) + np.count_nonzero(linear.any(axis=0)))
    per_head = config.head_dim * maps.features + (maps.num_layers - 1) * maps.features**2
    return ForwardFlops(
        outside=embed_text + embed_time + in_and_out,
        block=8 * tokens * width**2 + cross + 4 * tokens * width * config.ffn_dim,
        last_product=2 * tokens * width * config.ffn_dim,
        softmax=4 * tokens**2 * width,
        window=4 * width * per_frame**2 * int(window.sum()),
        linear=2 * ends * maps.features * (width + config.num_heads),
        feature_maps=2 * ends * config.num_heads * per_head,
    )


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one video through a training step: the model's, and what the hardware does again for want of memory."""

    model: int
    recomputed: int


def distillation_flops(config: WanConfig, latents: tuple[int, int, int], *, remat: str) -> StepFlops:
    """Counts for stage 1, whatever the remat policy.

    The softmax teacher's forward pass, the hybrid attention next to it, and the gradients of the feature maps alone:
    for their products and the readout, twice the forward pass; for the sums, once, because values have no gradient.
    """
    del remat
    count, hybrid = forward_flops(config, latents), len(config.hybrid_block_indices)
    teacher = count.outside + config.num_layers * (count.block + count.softmax)
    gradients = 2 * count.feature_maps + count.linear * 3 // 2
    return StepFlops(teacher + hybrid * (count.hybrid + gradients), 0)


def training_flops(config: WanConfig, latents: tuple[int, int, int], *, remat: str) -> StepFlops:
    """Counts for the gradient of all parameters under a remat policy. A backward pass is twice its forward pass."""
    count, hybrid = forward_flops(config, latents), len(config.hybrid_block_indices)
    blocks = config.num_layers * count.block + hybrid * count.hybrid + (config.num_layers - hybrid) * count.softmax
    # "dots" keeps what the weights' products return, "attention" what attention does; others a block's input alone.
    # No gradient needs what a block ends with, where that is worth it (see `linear.Linear.gated`).
    tokens = math.prod(length // patch for length, patch in zip(latents, config.patch_size, strict=True))
    last = config.num_layers * count.last_product if tokens >= config.ffn_dim else 0
    products = config.num_layers * count.block
    attention = blocks - products
    recomputed = {"none": 0, "dots": attention, "attention": products - last, "attention_offload": products - last}
    return StepFlops(3 * (count.outside + blocks), recomputed.get(remat, blocks - last))
