"""Section "machine": the hardware and libraries of the measurements, and the ceilings for comparison."""

import importlib.metadata
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from rehyat_jax.benchmarks.gpu import milliseconds
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes

_PACKAGES = (
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "torch",
    "diffusers",
)


def rows(sizes: Sizes) -> Iterator[Row]:
    """One row: hardware, driver, libraries; TFLOP/s of a square bfloat16 product; TB/s of a copy (read and written)."""
    side, copied = (8192, 2**31) if sizes.device == "gpu" else (256, 2**20)
    left, right = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product_ms = milliseconds(jnp.matmul, left, right, repeats=sizes.repeats)
    source = jax.random.normal(jax.random.key(1), (copied // 4,), jnp.float32)
    copy_ms = milliseconds(jnp.negative, source, repeats=sizes.repeats)
    yield {
        "accelerator": nvidia_smi() or jax.devices()[0].device_kind,
        "libraries": {name: version for name in _PACKAGES if (version := _version(name))},
        "product_side": side,
        "product_ms": product_ms,
        "peak_tflops": 2 * side**3 / product_ms / 1e9,
        "copied_bytes": copied,
        "copy_ms": copy_ms,
        "copy_tb_s": 2 * copied / copy_ms / 1e9,
    }


def nvidia_smi() -> str | None:
    """Name, memory and driver of the GPU; None if there is no GPU."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
