"""Measures compilation time: python -m rehyat_jax.benchmarks.compile_seconds --config FILE --topology NAME.

Compiles the train step of a configuration for a slice of TPUs or the GPUs of a host, like `rehyat_jax.train` at its
start. It needs neither. The command line is that of `rehyat_jax.plan`. For TPUs, `plan` takes longer, because it
compiles the kernels again for their listings.

Options, all of which are those of `rehyat_jax.plan`:

  --config FILE, --topology NAME, --config.field=value, --frames N, --height H, --width W

Example:

  python -m rehyat_jax.benchmarks.compile_seconds --config configs/wan_1_3b_finetune.py --topology v5e:4x4
"""

import os
import sys
import time

import jax

from rehyat_jax.cli import printed_help, progress, report_input_errors
from rehyat_jax.cost_model.chips import devices_of
from rehyat_jax.plan import parse_arguments
from rehyat_jax.planning import train_step
from rehyat_jax.planning.planner import Request


def measure(request: Request) -> None:
    """Times tracing and compilation, and prints a table.

    Raises InputError if libtpu is missing or does not know the topology, or the mesh cannot shard the model or batch.
    """
    devices = devices_of(request.topology)
    with progress(f"compiling the step for {request.topology}; this takes minutes"):
        start = time.monotonic()
        lowered = train_step.lowered(devices, **request.case())
        traced = time.monotonic()
        lowered.compile()
        compiled = time.monotonic()
    print(f"| {request.topology}, compiled on {os.cpu_count()} cores | seconds |\n|---|---|")
    print(f"| tracing | {traced - start:.0f} |\n| compilation | {compiled - traced:.0f} |")


def main() -> int:
    """Parses the command line and prints the table; returns the exit code, 2 if the user's input is wrong."""
    argv = sys.argv[1:]
    if printed_help(argv, __doc__):
        return 0
    return report_input_errors(lambda: measure(parse_arguments(["compile_seconds", *argv]).request))


if __name__ == "__main__":
    # The program is compiled for the topology, not for devices of this machine.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
