"""Checks that the arrays of a step fit into the memory of the devices, before any of them is made."""

import contextlib
from collections.abc import Iterator

import jax
import ml_collections

from rehyat_jax.data.pipeline import Source
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.parallel.memory import device_bytes
from rehyat_jax.planning.train_step import abstract_step

REMEDY = (
    "lower config.batch_size, raise config.accumulation_steps, choose another config.remat or a smaller form of "
    "config.hybrid, or use more devices along config.mesh.fsdp; python -m rehyat_jax.plan estimates a run's memory"
)
"""The remedies for a run that needs too much memory."""


def check_memory(config: ml_collections.ConfigDict, wan: WanConfig, source: Source) -> None:
    """Raises InputError if a step's arguments do not fit this process's part of the mesh in use (`jax.set_mesh`).

    A step needs more than its arguments, so a run that passes may still not fit; `rehyat_jax.plan` compiles the step.

    Args:
      config: the training configuration.
      wan: the architecture to train.
      source: the training examples; the largest shape that is drawn counts.
    """
    devices = jax.sharding.get_mesh().local_devices
    weights = config.data.weights or (1,) * len(source.buckets)
    shapes = [bucket.latents_shape for bucket, weight in zip(source.buckets, weights, strict=False) if weight]
    frames, height, width, _ = max(shapes, key=lambda shape: shape[0] * shape[1] * shape[2], default=(1, 1, 1, 1))
    memory = abstract_step(config, wan, (frames, height, width)).memory
    # CPU devices share the memory of their host.
    sharing = len(devices) if devices[0].platform == "cpu" else 1
    sizes = {kind: sharing * size for kind, size in memory.items()}
    needed, available = sum(sizes.values()), device_bytes(devices[0])
    if available is None or needed <= available:
        return
    kinds = ", ".join(f"{kind} {_gigabytes(size)}" for kind, size in sizes.items() if size > needed / 100)
    raise InputError(
        f"{'the host' if devices[0].platform == 'cpu' else devices[0].device_kind}: expected at least "
        f"{_gigabytes(needed)} of free memory ({kinds}), found {_gigabytes(available)}; {REMEDY}"
    )


@contextlib.contextmanager
def reported_memory_errors() -> Iterator[None]:
    """Turns the errors of Python and of XLA when memory runs out in a run into InputError, which gives the remedy."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "an allocation failed")[:300]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise InputError(f"memory has run out ({reason}); {REMEDY}") from error


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"
