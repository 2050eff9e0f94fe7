"""Formats the results of `tpu_static`."""

import math
import sys
from collections.abc import Iterator

from rehyat_jax.cli import not_a_command
from rehyat_jax.cost_model.static_cycles import ProgramCost


def table_head() -> str:
    columns = "TPU | preset | frames | direction | implementation | cycles | splash / this | MXU | temporary MiB"
    return f"| {columns} | formed from |\n{'|---' * 10}|"


def table_line(row: dict, cost: ProgramCost | None) -> str:
    """A row of the table, with the sources of its cycles; without a cost, the case does not fit into the memory."""
    cells = [row[key] for key in ("topology", "preset", "frames", "direction")]
    cells.append(row["implementation"])
    if cost is None:
        cells += ["does not fit into memory", "", "", "", ""]
    else:
        kernels = [f"{kernel.name} {_millions(kernel.cycles)}" for kernel in cost.kernels]
        cells += [
            _millions(cost.cycles),
            "" if row["ratio_to_splash"] is None else f"{row['ratio_to_splash']:.2f}",
            "" if row["mxu_utilization"] is None else f"{row['mxu_utilization']:.0%}",
            f"{row['temporary_bytes'] / 2**20:,.0f}",
            " + ".join([*kernels, f"XLA's estimates {_millions(cost.xla_cycles)}"]),
        ]
    return f"| {' | '.join(map(str, cells))} |"


def details(cost: ProgramCost) -> str:
    """Every part of every kernel, with the share of its slots in use, and XLA's most expensive operations."""
    lines = []
    for kernel in cost.kernels:
        lines.append(
            f"{kernel.name}: {kernel.calls} x {kernel.cycles // kernel.calls:,} cycles, {len(kernel.times)} bundles"
        )
        lines.append(f"{'bundles':>16}{'times':>9}{'cycles':>13}  slots in use, %")
        for region in kernel.regions:
            if region.cycles * kernel.calls * 1000 >= cost.cycles:
                busy = " ".join(
                    f"{slot} {100 * share:.0f}"
                    for slot, share in zip(kernel.kernel.slot_names, region.busy, strict=True)
                    if share > 0.005
                )
                lines.append(f"{region.start:#8x}{region.end:#8x}{region.times:9,}{region.cycles:13,}  {busy}")
    for operation in sorted(cost.xla, key=lambda x: x.estimated_cycles * x.executions, reverse=True)[:12]:
        lines.append(
            f"XLA {operation.executions} x {operation.estimated_cycles:,} cycles: {operation.kind} {operation.name} "
            f"({operation.source})"
        )
    return "\n".join(lines)


def growth(rows: list[dict]) -> Iterator[str]:
    """Lines with the growth of cycles and memory as powers of frames, between the smallest and largest number."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        keys = ("topology", "preset", "direction", "implementation")
        series.setdefault(tuple(row[key] for key in keys), []).append(row)
    for name, members in series.items():
        fitting = sorted((row for row in members if row["cycles"]), key=lambda row: row["frames"])
        if len(fitting) > 1 and fitting[0]["frames"] < fitting[-1]["frames"]:
            first, last = fitting[0], fitting[-1]
            exponents = {
                key: math.log(last[key] / first[key]) / math.log(last["frames"] / first["frames"])
                for key in ("cycles", "total_bytes")
            }
            told = ", ".join(f"{key.replace('_', ' ')} as frames^{exponent:.2f}" for key, exponent in exponents.items())
            yield f"{' '.join(filter(None, name))}, {first['frames']} to {last['frames']} frames: {told}"


def _millions(cycles: int) -> str:
    return f"{cycles / 1e6:,.4g}M"


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.tpu_static"))
