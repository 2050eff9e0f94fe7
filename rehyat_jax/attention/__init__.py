"""Hybrid attention (definition, implementations and feature maps) and full softmax attention."""

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.features.maps import FeatureMap
from rehyat_jax.attention.hybrid.api import hybrid_attention, hybrid_attention_weights, hybrid_key_sums
from rehyat_jax.attention.hybrid.state import HybridState
from rehyat_jax.attention.platform import interpreted_tpu
from rehyat_jax.attention.softmax.api import softmax_attention

__all__ = [
    "FeatureMap",
    "FeatureMapConfig",
    "HybridState",
    "InlineFeatures",
    "hybrid_attention",
    "hybrid_attention_weights",
    "hybrid_key_sums",
    "interpreted_tpu",
    "softmax_attention",
]
