"""Hyper-parameters of the Wan diffusion transformer, and presets of the published sizes."""

import dataclasses
import functools
from typing import Any, Literal

from rehyat_jax.attention.form import FORM_FIELDS, BlockForms, forms_from_json, forms_to_json
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.forms.softmax import SOFTMAX


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Architecture of `WanTransformer`; everything that a checkpoint must carry.

    Attributes:
      num_heads, head_dim: the model's width is their product.
      ffn_dim: width of the feed-forward hidden layer.
      num_layers: number of transformer blocks.
      in_channels, out_channels: latent channels in and out.
      text_dim: width of the text encoder's embeddings.
      text_length: text embeddings are zero-padded to this many tokens before they are projected.
      freq_dim: width of the sinusoidal timestep embedding.
      patch_size: (frames, height, width) of one token, in latent pixels.
      eps: epsilon of every normalisation.
      hybrid_blocks: indices of the converted blocks, or "all"; () is the softmax teacher.
      hybrid: the form of attention in those blocks, or one form for each of them.
    """

    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    hybrid_blocks: tuple[int, ...] | Literal["all"] = ()
    hybrid: HybridConfig | tuple[HybridConfig, ...] = HybridConfig()

    def __post_init__(self):
        blocks = tuple(range(self.num_layers)) if self.hybrid_blocks == "all" else tuple(self.hybrid_blocks)
        if blocks != tuple(sorted(set(blocks))) or any(not 0 <= block < self.num_layers for block in blocks):
            raise ValueError(
                f'hybrid_blocks must be "all" or increasing block indices below {self.num_layers}, '
                f"found {self.hybrid_blocks!r}"
            )
        # Normalise the fields, so that equal architectures compare equal.
        hybrid = self.hybrid if isinstance(self.hybrid, tuple | list) else (self.hybrid,) * len(blocks)
        if len(hybrid) != len(blocks):
            raise ValueError(
                f"hybrid must be one form, or one for each of the {len(blocks)} hybrid_blocks, "
                f"found {len(hybrid)} forms"
            )
        if len(different := dict.fromkeys(hybrid)) < 2:
            object.__setattr__(self, "hybrid", next(iter(different), HybridConfig()))
        else:
            object.__setattr__(self, "hybrid", tuple(hybrid))
        if self.hybrid_blocks != "all" or len(different) > 1:
            object.__setattr__(self, "hybrid_blocks", blocks)

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.num_heads * self.head_dim

    @property
    def hybrid_block_indices(self) -> tuple[int, ...]:
        """The converted blocks as explicit indices."""
        return tuple(range(self.num_layers)) if self.hybrid_blocks == "all" else self.hybrid_blocks

    @functools.cached_property
    def block_forms(self) -> BlockForms:
        """The form of every block."""
        blocks = self.hybrid_block_indices
        hybrid = self.hybrid if isinstance(self.hybrid, tuple) else (self.hybrid,) * len(blocks)
        converted = dict(zip(blocks, hybrid, strict=True))
        return BlockForms(tuple(converted.get(block, SOFTMAX) for block in range(self.num_layers)))

    @property
    def chunk_frames(self) -> int:
        """Latent frames of the smallest video that has complete chunks in every block."""
        return self.block_forms.chunk_frames * self.patch_size[0]

    def replace(self, **changes: Any) -> "WanConfig":
        """A copy with other values. Blocks that stay hybrid keep their forms."""
        if "hybrid_blocks" in changes and "hybrid" not in changes and isinstance(self.hybrid, tuple):
            blocks = changes["hybrid_blocks"]
            chosen = range(self.num_layers) if blocks == "all" else blocks
            changes["hybrid"] = tuple(self.block_forms.of_block[block] for block in chosen) or HybridConfig()
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready nested dict; `from_dict` reads it back. It has "attention" only if a block is converted."""
        fields = dataclasses.asdict(self)
        del fields["hybrid_blocks"], fields["hybrid"]
        return fields | ({"attention": forms_to_json(self.hybrid_blocks, self.hybrid)} if self.hybrid_blocks else {})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WanConfig":
        """Inverse of `to_dict`, for format version 1 or 2. Raises TypeError on an unknown field."""
        fields = dict(fields)
        if "patch_size" in fields:
            fields["patch_size"] = tuple(fields["patch_size"])
        form_fields = [name for names in FORM_FIELDS.values() for name in names if name in fields]
        forms = forms_from_json({name: fields.pop(name) for name in form_fields})
        return cls(**fields, **forms)


WAN_PRESETS: dict[str, WanConfig] = {
    "t2v-1.3B": WanConfig(num_heads=12, head_dim=128, ffn_dim=8960, num_layers=30),
    "t2v-14B": WanConfig(num_heads=40, head_dim=128, ffn_dim=13824, num_layers=40),
    # For tests and the demo: 9 tokens a frame at the demo's 6x6 latents.
    "tiny": WanConfig(num_heads=2, head_dim=64, ffn_dim=512, num_layers=6, text_dim=64, text_length=8),
}
"""Published text-to-video sizes of Wan2.1 and a tiny one."""
