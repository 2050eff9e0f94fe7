"""The tables of models whose checkpoints can be read, written and converted."""

from typing import Any

from rehyat_jax.weights.spec import ModelSpec
from rehyat_jax.weights.umt5.spec import UMT5
from rehyat_jax.weights.wan.spec import WAN

MODELS: dict[str, ModelSpec] = {spec.architecture: spec for spec in (WAN,)}
"""Backbones by the architecture that model.json names."""

TEXT_ENCODERS: dict[str, ModelSpec] = {spec.architecture: spec for spec in (UMT5,)}
"""Text encoders, which are only read from and written to PyTorch checkpoints."""


def spec_of(config: Any) -> ModelSpec:
    """The spec of a configuration's class."""
    specs = (*MODELS.values(), *TEXT_ENCODERS.values())
    return next(spec for spec in specs if isinstance(config, spec.config))
