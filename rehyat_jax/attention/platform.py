"""The platform that a program is compiled for, and TPU kernels interpreted on any machine."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_WITHOUT_KERNELS = contextvars.ContextVar("without_kernels", default=False)


def target_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the mesh in use (`jax.set_mesh`), else of the default backend.

    Ahead-of-time compilation for TPUs, on a machine that has none, uses a mesh of their topology. Within
    `without_kernels`, it is "cpu".
    """
    if _WITHOUT_KERNELS.get():
        return "cpu"
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """A context in which all attention is traced as on a CPU: kernels of GPUs and TPUs have no forward mode."""
    token = _WITHOUT_KERNELS.set(True)
    try:
        yield
    finally:
        _WITHOUT_KERNELS.reset(token)


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[None]:
    """A context in which `implementation="pallas_tpu"` runs on any machine, slowly: use small inputs.

    Products of float32 arrays are exact here, unlike on any TPU.
    """
    from jax.experimental.pallas import tpu as pltpu  # imported where it is used, as all kernels are

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()), jax.default_matmul_precision("highest"):
        yield
