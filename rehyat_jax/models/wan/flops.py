"""Floating-point operations of the Wan transformer, from its sizes: a multiply-add is two.

Only matrix products are counted, as is usual for model FLOPs use (PaLM, arXiv 2204.02311, appendix B). Softmax
attention counts over all pairs of tokens, hybrid attention over its window and its sums. Recomputation and padding do
not count, because they are not work of the model.

With N tokens of width D = H d, L text tokens, a feed-forward width M and P = tokens of a frame, one block takes

    self-attention's projections    8 N D^2
    softmax attention               4 N^2 D
      or hybrid: its window         4 D P^2 (pairs of a frame and a frame of its window)
                 readout and sums   2 (N_q + N_k) F (D + H)      N_q tokens read sums, N_k tokens enter them
                 feature maps       2 (N_q + N_k) (D F + (layers - 1) H F^2)
    cross-attention                 4 N D^2 + 4 L D^2 + 4 N L D
    feed-forward                    4 N D M
    an adapter of rank r            2 T r (in + out)       of a layer [in, out] with T tokens
"""

import dataclasses
import math
from typing import NamedTuple

from rehyat_jax.attention.forms.base import FormFlops, Sizes
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.models.lora import LoraConfig
from rehyat_jax.models.wan.config import WanConfig


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Operations of one video through the model.

    Attributes:
      outside: embeddings and head.
      block: one block without the inner part of self-attention.
      last_product: the part of `block` that leads from the feed-forward width down to the model's width.
      softmax: full softmax attention in one block.
      attention: the attention of every block, in the block's own form.
    """

    outside: int
    block: int
    last_product: int
    softmax: int
    attention: list[FormFlops]

    @property
    def blocks(self) -> int:
        """All blocks."""
        return len(self.attention) * self.block + sum(flops.total for flops in self.attention)


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
    sizes = Sizes(frames, per_frame, config.num_heads, config.head_dim)
    return ForwardFlops(
        outside=embed_text + embed_time + in_and_out,
        block=8 * tokens * width**2 + cross + 4 * tokens * width * config.ffn_dim,
        last_product=2 * tokens * width * config.ffn_dim,
        softmax=SOFTMAX.flops(sizes).total,
        attention=config.block_forms.flops(sizes),
    )


def adapter_flops(config: WanConfig, latents: tuple[int, int, int], lora: LoraConfig) -> int:
    """Operations of all adapters in a forward pass."""
    tokens = math.prod(length // patch for length, patch in zip(latents, config.patch_size, strict=True))
    square, feed_forward = 2 * config.width, config.width + config.ffn_dim
    # Keys and values of cross-attention are those of the text.
    of_both, of_text = 2 * tokens * square, (tokens + config.text_length) * square
    sizes = {
        "query": of_both,
        "key": of_text,
        "value": of_text,
        "output": of_both,
        "up": tokens * feed_forward,
        "down": tokens * feed_forward,
    }
    return config.num_layers * 2 * lora.rank * sum(size for name, size in sizes.items() if lora.on(name))


class StepFlops(NamedTuple):
    """Operations of one video in a training step: the model's, and those recomputed to save memory."""

    model: int
    recomputed: int


def teacher_flops(config: WanConfig, latents: tuple[int, int, int]) -> int:
    """Operations of the forward pass with softmax attention in all blocks."""
    count = forward_flops(config, latents)
    return count.outside + config.num_layers * (count.block + count.softmax)


def distillation_flops(config: WanConfig, latents: tuple[int, int, int], *, updates: int = 1) -> StepFlops:
    """Counts for stage 1, the same for every remat policy. They include:

    - the softmax teacher's forward pass;
    - for each of the `updates` of a batch, the hybrid attention next to it;
    - likewise the gradients of only the feature maps: twice the forward pass for their products and the readout, once
      for the sums, because values have no gradient.
    """
    count, forms = forward_flops(config, latents), config.block_forms
    students = [count.attention[block] for block in forms.converted]
    gradients = sum(2 * student.feature_maps + student.linear * 3 // 2 for student in students)
    return StepFlops(
        teacher_flops(config, latents) + updates * (sum(student.total for student in students) + gradients), 0
    )


def training_flops(
    config: WanConfig,
    latents: tuple[int, int, int],
    *,
    remat: str,
    trains_weights: bool = True,
    lora: LoraConfig | None = None,
) -> StepFlops:
    """Counts for gradients through all blocks under a remat policy. A backward pass is twice its forward pass.

    Args:
      config: the architecture.
      latents: frames, height and width of a video's latents.
      remat: name in `REMAT_POLICIES`.
      trains_weights: False if only feature maps, and adapters, are trained. Gradients then pass through the first block
        that has some and those after it, and the products with weights have no gradient but that of their input.
      lora: the adapters, in all blocks; None if there are none.
    """
    count = forward_flops(config, latents)
    # "dots" keeps the results of the weights' products, "attention" those of attention. Others keep its input only.
    # No gradient needs the result of a block's last product if its gate is frozen, or with enough tokens (see
    # `linear.Linear.gated`).
    tokens = math.prod(length // patch for length, patch in zip(latents, config.patch_size, strict=True))
    last = config.num_layers * count.last_product if tokens >= config.ffn_dim or not trains_weights else 0
    products = config.num_layers * count.block
    attention = count.blocks - products
    adapters = adapter_flops(config, latents, lora) if lora else 0
    others = products - last + adapters
    recomputed = {"none": 0, "dots": attention, "attention": others, "attention_offload": others}
    forward, backward = count.outside + count.blocks, 2 * (count.outside + count.blocks)
    if not trains_weights:
        first = 0 if lora else config.block_forms.converted[0]
        backward = (config.num_layers - first) * count.block + 2 * sum(flops.total for flops in count.attention[first:])
    model = forward + backward + 3 * adapters
    return StepFlops(model, recomputed.get(remat, attention + others))
