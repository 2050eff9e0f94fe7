"""One section in a process of its own: python -m rehyat_jax.benchmarks.gpu_run.process NAME DEVICE [tiny].

Writes lines of JSON to standard output: first what it runs on, then the rows. What a section itself prints goes to
standard error.
"""

import json
import os
import sys
from typing import Any

import jax

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, sizes_for


def main(name: str, device: str, *tiny: str) -> None:
    # Libraries print to descriptor 1, compilers in C++ included.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    section = SECTIONS[name]
    if section.beside or device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if tiny:
        jax.config.update("jax_disable_most_optimizations", True)  # there, all the time is compilation
    write(describe_environment())
    for row in section.rows(sizes_for(device, tiny=bool(tiny))):
        write(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
