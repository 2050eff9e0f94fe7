"""Hybrid attention: its definition, its implementations, its feature maps, and the full softmax attention beside it."""

from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.feature_map_config import FeatureMapConfig
from rehyat_jax.attention.feature_maps import FeatureMap
from rehyat_jax.attention.inline_features import InlineFeatures
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.attention.state import HybridState

__all__ = ["FeatureMap", "FeatureMapConfig", "HybridState", "InlineFeatures", "hybrid_attention", "softmax_attention"]
