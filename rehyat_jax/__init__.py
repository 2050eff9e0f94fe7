"""Recurrent hybrid attention (ReHyAt) for video diffusion transformers, in JAX."""

from rehyat_jax.attention import (
    FeatureMap,
    FeatureMapConfig,
    HybridState,
    hybrid_attention,
    hybrid_attention_weights,
    interpreted_tpu,
    softmax_attention,
)
from rehyat_jax.attention.form import HybridConfig
from rehyat_jax.generation.umt5 import load_text_encoder
from rehyat_jax.models.student import make_student
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.weights import load_wan

__all__ = [
    "WAN_PRESETS",
    "FeatureMap",
    "FeatureMapConfig",
    "HybridConfig",
    "HybridState",
    "WanConfig",
    "WanTransformer",
    "apply_model",
    "hybrid_attention",
    "hybrid_attention_weights",
    "interpreted_tpu",
    "load_text_encoder",
    "load_wan",
    "make_student",
    "softmax_attention",
]
