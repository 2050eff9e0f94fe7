"""Hyper-parameters of the Wan diffusion transformer, and presets of the published sizes."""

import dataclasses
from typing import Any, Literal

from rehyat_jax.attention.features.config import FeatureMapConfig


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """The form of the hybrid attention in converted blocks (see `rehyat_jax.attention.hybrid_attention`)."""

    chunk_frames: int = 3
    overlap_frames: int = 1
    causal: bool = True
    stabilizer: Literal["row_max", "joint"] = "row_max"
    feature_map: FeatureMapConfig = FeatureMapConfig()

    def __post_init__(self):
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, found {self.chunk_frames}")
        if not 0 <= self.overlap_frames <= self.chunk_frames:
            raise ValueError(
                f"overlap_frames must be between 0 and chunk_frames ({self.chunk_frames}), found {self.overlap_frames}"
            )
        if self.stabilizer not in ("row_max", "joint"):
            raise ValueError(f'stabilizer must be "row_max" or "joint", found {self.stabilizer!r}')


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
      hybrid_blocks: indices of the blocks with hybrid attention, or "all"; () is the softmax teacher.
      hybrid: the form of the hybrid attention in those blocks.
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
    hybrid: HybridConfig = HybridConfig()

    def __post_init__(self):
        if self.hybrid_blocks == "all":
            return
        blocks = tuple(self.hybrid_blocks)
        if blocks != tuple(sorted(set(blocks))) or any(not 0 <= block < self.num_layers for block in blocks):
            raise ValueError(
                f'hybrid_blocks must be "all" or increasing block indices below {self.num_layers}, '
                f"found {self.hybrid_blocks!r}"
            )
        object.__setattr__(self, "hybrid_blocks", blocks)

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.num_heads * self.head_dim

    @property
    def hybrid_block_indices(self) -> tuple[int, ...]:
        """The converted blocks as explicit indices."""
        return tuple(range(self.num_layers)) if self.hybrid_blocks == "all" else self.hybrid_blocks

    def replace(self, **changes: Any) -> "WanConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready nested dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WanConfig":
        """Inverse of `to_dict`. Raises TypeError on an unknown field."""
        fields = dict(fields)
        hybrid = dict(fields.pop("hybrid"))
        hybrid["feature_map"] = FeatureMapConfig(**hybrid["feature_map"])
        fields["patch_size"] = tuple(fields["patch_size"])
        return cls(**fields, hybrid=HybridConfig(**hybrid))


WAN_PRESETS: dict[str, WanConfig] = {
    "t2v-1.3B": WanConfig(num_heads=12, head_dim=128, ffn_dim=8960, num_layers=30),
    "t2v-14B": WanConfig(num_heads=40, head_dim=128, ffn_dim=13824, num_layers=40),
    # For tests and the demo: 9 tokens a frame at the demo's 6x6 latents.
    "tiny": WanConfig(num_heads=2, head_dim=64, ffn_dim=512, num_layers=6, text_dim=64, text_length=8),
}
"""Published text-to-video sizes of Wan2.1 and a tiny one."""
