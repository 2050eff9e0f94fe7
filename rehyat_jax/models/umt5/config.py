"""Sizes of the umT5 text encoder, and the preset that Wan uses."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Architecture of `UMT5Encoder`.

    Attributes:
      vocab_size: rows of the token embedding. The tokenizer may have fewer tokens.
      model_dim: width of the residual stream and of the output.
      num_heads, head_dim: their product is the width of queries, keys and values, which may differ from model_dim.
      ffn_dim: width of the feed-forward hidden layer.
      num_layers: number of transformer blocks.
      num_buckets: number of buckets of relative positions, half of them for each direction.
      max_distance: relative positions from this one on share a bucket.
      eps: epsilon of every RMS norm.
    """

    vocab_size: int
    model_dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        exact = self.num_buckets // 4
        if self.num_buckets % 2 or exact < 1 or self.max_distance <= exact:
            raise ValueError(
                f"num_buckets must be even and at least 4, and max_distance more than a quarter of it, found "
                f"{self.num_buckets} and {self.max_distance}"
            )

    @property
    def width(self) -> int:
        """Width of the queries, keys and values of all heads."""
        return self.num_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "UMT5Config":
        """Inverse of `to_dict`. Raises ValueError on an unknown field."""
        if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"field {unknown[0]!r} is not one of a umT5 encoder; remove it")
        return cls(**fields)


UMT5_PRESETS: dict[str, UMT5Config] = {
    "umt5-xxl": UMT5Config(vocab_size=256384, model_dim=4096, num_heads=64, head_dim=64, ffn_dim=10240, num_layers=24),
}
"""The size that Wan2.1 and Wan2.2 use: 5,680,910,336 parameters (config.json of google/umt5-xxl)."""
