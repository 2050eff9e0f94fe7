"""Runs one section in its own process: python -m rehyat_jax.benchmarks.gpu_run.process NAME DEVICE [tiny].

It writes lines of JSON to standard output. The first line describes the machine; every other line is a row. Other
output of the section goes to standard error.

Options:

  NAME     a section of `gpu_run`
  DEVICE   gpu or cpu
  tiny     the smallest sizes

Example:

  python -m rehyat_jax.benchmarks.gpu_run.process correctness cpu tiny
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

import jax

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, sizes_for
from rehyat_jax.cli import printed_help


def main(name: str, device: str, *tiny: str) -> None:
    # Libraries print to descriptor 1, compilers in C++ included.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    _end_with_parent()
    section = SECTIONS[name]
    # Without a GPU that works, JAX would measure the CPU.
    jax.config.update("jax_platforms", "cpu" if section.beside or device == "cpu" else "cuda,cpu")
    if tiny:
        jax.config.update("jax_disable_most_optimizations", True)  # tiny sizes spend all time in compilation
    write(describe_environment())
    for row in section.rows(sizes_for(device, tiny=bool(tiny))):
        write(row)


def _end_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, even by SIGKILL."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    if not printed_help(sys.argv[1:], __doc__):
        main(*sys.argv[1:])
