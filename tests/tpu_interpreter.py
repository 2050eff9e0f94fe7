"""The TPU kernels on a CPU, in Pallas' interpreter."""

import contextlib

import jax
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted_tpu():
    """Within it, TPU kernels are interpreted, and products of float32 are exact as on no TPU."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()), jax.default_matmul_precision("highest"):
        yield
