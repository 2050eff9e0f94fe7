"""Static cycles beside a TPU's trace: python -m rehyat_jax.benchmarks.trace_cycles --trace FOLDER --config FILE.py ...

The trace is that of `config.profile`, see docs/profiles.md. The same command compiles the run's step, as `plan` does,
and takes the same options: --topology must name the chips that the trace was made on. Both sides call an operation by
the same name if they have the same versions of jax and libtpu. Each row is an operation of the step:

- calls: in one step
- static: milliseconds of its static cycles at the chip's clock
- trace: milliseconds in one step, the mean over the trace
- ratio: trace / static. For the sum it is the factor by which stalls lengthen the step.

Example:

  python -m rehyat_jax.benchmarks.trace_cycles --trace runs/x/profile --topology v5e:4x4 \
      --config configs/wan_1_3b_finetune.py
"""

import collections
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from rehyat_jax.cli import printed_help, progress, report_input_errors
from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.cost_model.static_cycles import ProgramCost
from rehyat_jax.cost_model.tpu_compile import compiled_for_tpu
from rehyat_jax.errors import InputError
from rehyat_jax.plan import parse_arguments
from rehyat_jax.planning import train_step
from rehyat_jax.planning.estimate import program_cost

MOST = 40
"""Operations with separate rows, the longest in the trace. One more row sums the others."""


class Row(NamedTuple):
    """An operation of a step; times in milliseconds a step."""

    name: str
    source: str
    calls: float
    static: float
    trace: float


def mean_seconds(folder: Path) -> dict[str, float]:
    """Mean seconds of one call of every operation in the newest trace of a folder, by its name in the program.

    Raises:
      InputError: there is no trace of a TPU.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"{folder}: expected a trace, *.xplane.pb, found none; see config.profile")
    times: dict[str, list[float]] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            if plane.name.startswith("/device:TPU") and line.name == "XLA Ops":
                for event in line.events:
                    # "%name = type kind(...)", or the name alone.
                    times[re.match(r"%?([\w.\-]*)", event.name).group(1)].append(event.duration_ns / 1e9)
    if not times:
        raise InputError(f"{files[-1]}: expected the operations of a TPU, found none; was it made on another device?")
    return {name: sum(seconds) / len(seconds) for name, seconds in times.items()}


def side_by_side(cost: ProgramCost, seconds: dict[str, float], clock: float) -> list[Row]:
    """The operations of a step that the trace has, the longest first.

    Args:
      cost: static cycles of the step.
      seconds: see `mean_seconds`.
      clock: cycles a second.
    """
    operations = [(kernel.name, "kernel", kernel.calls, kernel.cycles) for kernel in cost.kernels]
    for operation in cost.xla:
        cycles = operation.estimated_cycles * operation.executions
        operations.append((operation.name, operation.source, operation.executions, cycles))
    rows = [
        Row(name, source, float(calls), float(cycles) / clock * 1e3, float(calls) * seconds[name] * 1e3)
        for name, source, calls, cycles in operations
        if name in seconds and calls
    ]
    return sorted(rows, key=lambda row: -row.trace)


def table(rows: list[Row]) -> Iterable[str]:
    """The rows as Markdown."""
    yield "| operation | calls | static, ms | trace, ms | ratio | source |\n|---|---|---|---|---|---|"
    total = Row("all of these", "", 0, sum(row.static for row in rows), sum(row.trace for row in rows))
    others = rows[MOST:]
    rest = Row("all others", "", 0, sum(row.static for row in others), sum(row.trace for row in others))
    for row in [*rows[:MOST], *([rest] if others else []), total]:
        ratio = f"{row.trace / row.static:.2f}" if row.static else ""
        calls = f"{row.calls:g}" if row.calls else ""
        yield f"| {row.name} | {calls} | {row.static:.3f} | {row.trace:.3f} | {ratio} | {row.source[-80:]} |"


def run(argv: list[str]) -> None:
    """Compiles the step and prints the table. Raises InputError."""
    values = flags.FlagValues()
    flags.DEFINE_string("trace", None, "folder of the trace", flag_values=values)
    rest = values(argv, known_only=True)
    if values.trace is None:
        raise InputError("--trace: expected the folder of a trace, found nothing")
    seconds = mean_seconds(Path(values.trace))
    request = parse_arguments(rest).request
    with (
        progress(f"compiling the step for {request.topology}; this takes minutes"),
        compiled_for_tpu(
            f"{train_step.__name__}:lowered", request.case(), request.topology, for_all_devices=True
        ) as program,
    ):
        rows = side_by_side(program_cost(program, request.wan), seconds, chip_of(request.topology).clock)
    if not rows:
        raise InputError(
            f"--trace {values.trace}: none of its {len(seconds)} operations is one of the step's; give the "
            f"configuration, the topology and the versions of jax and libtpu that it was made with"
        )
    print("\n".join(table(rows)))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv if argv is None else ["benchmarks.trace_cycles", *argv]
    if printed_help(argv, __doc__):
        return 0
    jax.config.update("jax_platforms", "cpu")
    return report_input_errors(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
