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
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.umt5 import load_text_encoder
from rehyat_jax.models.student import make_student
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.models.wan_vae.config import WAN_VAE_PRESETS, WanVaeConfig
from rehyat_jax.models.wan_vae.vae import WanVae
from rehyat_jax.weights import load_vae, load_wan

__all__ = [
    "WAN_PRESETS",
    "WAN_VAE_PRESETS",
    "FeatureMap",
    "FeatureMapConfig",
    "HybridConfig",
    "HybridState",
    "Pipeline",
    "SamplingOptions",
    "WanConfig",
    "WanTransformer",
    "WanVae",
    "WanVaeConfig",
    "apply_model",
    "hybrid_attention",
    "hybrid_attention_weights",
    "interpreted_tpu",
    "load_text_encoder",
    "load_vae",
    "load_wan",
    "make_student",
    "softmax_attention",
]
