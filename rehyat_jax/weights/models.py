"""The table of the backbones whose checkpoints can be read, written and converted."""

from typing import Any

from rehyat_jax.weights.spec import ModelSpec
from rehyat_jax.weights.wan.spec import WAN

MODELS: dict[str, ModelSpec] = {spec.architecture: spec for spec in (WAN,)}
"""Specs by the architecture that model.json names."""


def spec_of(config: Any) -> ModelSpec:
    """The spec of a configuration's class."""
    return next(spec for spec in MODELS.values() if isinstance(config, spec.config))
