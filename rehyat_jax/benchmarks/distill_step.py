"""Cost of a distillation step relative to its teacher: python -m rehyat_jax.benchmarks.distill_step.

Prints static cycles (docs/static_cycles.md) of a step of stage 1, and of only the softmax teacher's forward pass on the
same videos. Both are compiled without a TPU. The command line is that of `rehyat_jax.plan`; without arguments, the
benchmark takes Wan2.1 1.3B on v5e:4x4.

Options, all of which are those of `rehyat_jax.plan`:

  --config FILE, --topology NAME, --config.field=value, --frames N, --height H, --width W

Example:

  python -m rehyat_jax.benchmarks.distill_step --config configs/wan_1_3b_distill.py --topology v5e:4x4
"""

import sys

import jax

from rehyat_jax.cli import printed_help, progress, report_input_errors
from rehyat_jax.cost_model.chips import chip_of, device_count
from rehyat_jax.cost_model.tpu_compile import compiled_for_tpu
from rehyat_jax.errors import InputError
from rehyat_jax.plan import parse_arguments
from rehyat_jax.planning.estimate import step_cost
from rehyat_jax.planning.planner import Request

DEFAULT = ["--config", "configs/wan_1_3b_distill.py", "--topology", "v5e:4x4"]


def cycles(request: Request, program: str) -> int:
    """Static cycles, computed like those of `plan`, of the program that a function of `planning.train_step` lowers."""
    with (
        progress(f"compiling {program}; this takes minutes"),
        compiled_for_tpu(
            f"rehyat_jax.planning.train_step:{program}", request.case(), request.topology, for_all_devices=True
        ) as compiled,
    ):
        wan = request.wan.replace(hybrid_blocks=()) if program == "lowered_teacher" else request.wan
        chip, devices = chip_of(request.topology), device_count(request.topology)
        return step_cost(compiled, chip, devices, wan, flops=0).cycles


def compare(request: Request) -> None:
    """Prints the cycles of step and teacher. Raises InputError unless the configuration's stage is "distill"."""
    if request.config.stage != "distill":
        raise InputError(
            f'--config: expected one whose stage is "distill", found {request.config.stage!r}; see configs/*_distill.py'
        )
    step, teacher = (cycles(request, program) for program in ("lowered", "lowered_teacher"))
    print(f"| {request.topology} | static cycles |\n|---|---|")
    print(f"| distillation step | {step / 1e6:,.0f} M |\n| teacher's forward pass | {teacher / 1e6:,.0f} M |")
    print(f"| ratio | {step / teacher:.3f} |")


def main() -> int:
    """Parses the command line and prints the table; returns the exit code, 2 if the user's input is wrong."""
    argv = sys.argv[1:]
    if printed_help(argv, __doc__):
        return 0
    return report_input_errors(lambda: compare(parse_arguments(["plan", *(argv or DEFAULT)]).request))


if __name__ == "__main__":
    # The programs are compiled for the topology, not for devices of this machine.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
