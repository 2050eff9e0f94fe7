"""Describes the machine of a measurement, for the line above a benchmark's table."""

import os
import platform
import sys

import jax

from rehyat_jax.cli import not_a_command


def describe_environment() -> str:
    """Processor or accelerator, cores, and versions of Python and JAX."""
    device = jax.devices()[0]
    hardware = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    return f"{hardware}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.cpu"))
