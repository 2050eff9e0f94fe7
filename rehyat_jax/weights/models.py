"""The tables of the models whose checkpoints can be read and written."""

from typing import Any

from rehyat_jax.weights.spec import ModelSpec
from rehyat_jax.weights.umt5.spec import UMT5
from rehyat_jax.weights.wan.spec import WAN
from rehyat_jax.weights.wan_vae.spec import WAN_VAE

MODELS: dict[str, ModelSpec] = {spec.architecture: spec for spec in (WAN,)}
"""Backbones by the architecture that model.json names; commands convert them."""

VAES: dict[str, ModelSpec] = {spec.architecture: spec for spec in (WAN_VAE,)}
"""Autoencoders of the backbones' latents; only PyTorch checkpoints hold them."""

TEXT_ENCODERS: dict[str, ModelSpec] = {spec.architecture: spec for spec in (UMT5,)}
"""Text encoders; only PyTorch checkpoints hold them."""


def spec_of(config: Any) -> ModelSpec:
    """The spec of a configuration's class."""
    return next(spec for spec in (MODELS | VAES | TEXT_ENCODERS).values() if isinstance(config, spec.config))
