"""Checkpoints: loading, saving, and conversion from and to PyTorch."""

from rehyat_jax.weights.load import load_params, load_vae, load_wan, read_model_metadata
from rehyat_jax.weights.model_checkpoint import save_model

__all__ = ["load_params", "load_vae", "load_wan", "read_model_metadata", "save_model"]
