"""The TPU kernels on any machine, in Pallas' interpreter."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[None]:
    """Within it, `implementation="pallas_tpu"` runs on any machine, slowly: use small inputs.

    Products of float32 arrays are exact, as they are on no TPU.
    """
    from jax.experimental.pallas import tpu as pltpu  # imported where it is used, as all kernels are

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()), jax.default_matmul_precision("highest"):
        yield
