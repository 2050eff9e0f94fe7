"""Hybrid attention: its definition, its implementations, its feature maps, and the full softmax attention beside it."""

from rehyat_jax.attention.api import hybrid_attention, hybrid_attention_weights
from rehyat_jax.attention.feature_map_config import FeatureMapConfig
from rehyat_jax.attention.feature_maps import FeatureMap
from rehyat_jax.attention.inline_features import InlineFeatures
from rehyat_jax.attention.interpreted import interpreted_tpu
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.attention.state import HybridState

__all__ = [
    "FeatureMap",
    "FeatureMapConfig",
    "HybridState",
    "InlineFeatures",
    "hybrid_attention",
    "hybrid_attention_weights",
    "interpreted_tpu",
    "softmax_attention",
]
