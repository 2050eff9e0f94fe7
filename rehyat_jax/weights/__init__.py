"""Checkpoints: loading, saving, and conversion from and to PyTorch."""

from rehyat_jax.weights.load import load_params as load_params
from rehyat_jax.weights.load import load_wan as load_wan
from rehyat_jax.weights.load import read_model_metadata as read_model_metadata
from rehyat_jax.weights.model_checkpoint import save_model as save_model
