"""Recurrent hybrid attention (ReHyAt) for video diffusion transformers, in JAX.

The names below are imported when they are first used, so that `rehyat --help` starts without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rehyat_jax.attention import FeatureMap as FeatureMap
    from rehyat_jax.attention import FeatureMapConfig as FeatureMapConfig
    from rehyat_jax.attention import HybridState as HybridState
    from rehyat_jax.attention import hybrid_attention as hybrid_attention
    from rehyat_jax.attention import hybrid_attention_weights as hybrid_attention_weights
    from rehyat_jax.attention import interpreted_tpu as interpreted_tpu
    from rehyat_jax.attention import softmax_attention as softmax_attention
    from rehyat_jax.attention.forms.hybrid import HybridConfig as HybridConfig
    from rehyat_jax.generation.options import SamplingOptions as SamplingOptions
    from rehyat_jax.generation.pipeline import Pipeline as Pipeline
    from rehyat_jax.generation.umt5 import load_text_encoder as load_text_encoder
    from rehyat_jax.models.student import make_student as make_student
    from rehyat_jax.models.wan.config import WAN_PRESETS as WAN_PRESETS
    from rehyat_jax.models.wan.config import WanConfig as WanConfig
    from rehyat_jax.models.wan.modeling import WanTransformer as WanTransformer
    from rehyat_jax.models.wan.modeling import apply_model as apply_model
    from rehyat_jax.models.wan_vae.config import WAN_VAE_PRESETS as WAN_VAE_PRESETS
    from rehyat_jax.models.wan_vae.config import WanVaeConfig as WanVaeConfig
    from rehyat_jax.models.wan_vae.vae import WanVae as WanVae
    from rehyat_jax.weights import load_vae as load_vae
    from rehyat_jax.weights import load_wan as load_wan

_HOMES = {
    "FeatureMap": "attention",
    "FeatureMapConfig": "attention",
    "HybridConfig": "attention.forms.hybrid",
    "HybridState": "attention",
    "Pipeline": "generation.pipeline",
    "SamplingOptions": "generation.options",
    "WAN_PRESETS": "models.wan.config",
    "WAN_VAE_PRESETS": "models.wan_vae.config",
    "WanConfig": "models.wan.config",
    "WanTransformer": "models.wan.modeling",
    "WanVae": "models.wan_vae.vae",
    "WanVaeConfig": "models.wan_vae.config",
    "apply_model": "models.wan.modeling",
    "hybrid_attention": "attention",
    "hybrid_attention_weights": "attention",
    "interpreted_tpu": "attention",
    "load_text_encoder": "generation.umt5",
    "load_vae": "weights",
    "load_wan": "weights",
    "make_student": "models.student",
    "softmax_attention": "attention",
}
"""Public name -> the module below `rehyat_jax` that it is imported from."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
