"""Tables of planned runs: one plan is one row. A table is made row by row, from a record that keeps every plan.

Each production configuration lists its training runs; `TRAINING` is their table.
"""

import dataclasses
import json
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.packaged import importable_configs
from rehyat_jax.files.shown import closest
from rehyat_jax.files.write import written_whole
from rehyat_jax.planning.planner import Plan
from rehyat_jax.planning.report import gib

HEADER = """# Planned runs

None of these runs has been made. The configurations list them as `PLANNED_RUNS`. Each row comes from
`python -m rehyat_jax.plan --config configs/NAME.py` with the options in the row. [plan.md](plan.md) says how figures
are formed. Memory and cycles are those of one device. `plan` knows no cycles of GPUs.

This command writes the page. It plans only the runs that [the record](measurements/planned_runs.json) does not have.
With texts, it plans again the runs whose command lines contain one of them, and no others:

    python -m rehyat_jax.plan --table
    python -m rehyat_jax.plan --table wan_14b_distill.py "wan_14b_finetune.py --topology v5p:4x4x4"
"""


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """A page with a table for each group of runs, and the record from which it is written.

    Attributes:
      records: JSON file of plans by run; a run is its command line.
      page: the page.
      header: its text before the tables.
      columns: titles of all columns.
      split: a run -> (its group, the options that its row shows).
      cells: a recorded plan -> its row's cells after the options. A plan that does not fit may have fewer.
    """

    records: Path
    page: Path
    header: str
    columns: tuple[str, ...]
    split: Callable[[str], tuple[str, str]]
    cells: Callable[[dict[str, Any]], tuple[str, ...]]

    def update(self, runs: list[str], plan: Callable[[str], dict[str, Any]], again: Sequence[str] = ()) -> None:
        """Plans the runs that have no record, in their order, and writes record and page after each.

        A run that cannot be planned here, because its compiler is not installed, is named and keeps its record, if any.

        Args:
          runs: all runs of the table.
          plan: a run -> its plan, for the record.
          again: texts. If there are some, only the runs that contain one of them are planned, also if recorded.

        Raises:
          InputError: the recorded plans are damaged, or no run contains one of the texts.
        """
        records = self.read_records()
        for text in again:
            if not any(text in run for run in runs):
                nearest = closest(text, runs)[0]
                raise InputError(f"--table: expected a part of a run, found {text!r}; the closest run is {nearest!r}")
        wanted = [run for run in runs if (any(text in run for text in again) if again else run not in records)]
        for number, run in enumerate(wanted, 1):
            print(f"run {number} of {len(wanted)}: {run}", file=sys.stderr, flush=True)
            try:
                records[run] = plan(run)
            except InputError as error:
                print(f"  not planned: {error}", file=sys.stderr, flush=True)
                continue
            self.write_records({run: records[run] for run in runs if run in records})
            self.write_page(runs, records)
        self.write_page(runs, records)
        print(f"wrote {self.page}")

    def read_records(self) -> dict[str, Any]:
        """Recorded plans by command line. Raises InputError if the file is damaged."""
        return read_json_object(self.records) if self.records.exists() else {}

    def write_records(self, records: dict[str, Any]) -> None:
        """Writes the plans; `read_records` reads them."""
        with written_whole(self.records) as temporary:
            temporary.write_text(json.dumps(records, indent=1) + "\n")

    def write_page(self, runs: list[str], records: dict[str, Any]) -> None:
        """Writes the page. It says so of runs without a record."""
        groups: dict[str, list[str]] = {}
        for run in runs:
            group, options = self.split(run)
            cells = self.cells(records[run]) if run in records else ("not planned yet",)
            cells = (f"`{options}`", *cells, *[""] * (len(self.columns) - 1 - len(cells)))
            groups.setdefault(group, []).append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n")
        title = "| " + " | ".join(self.columns) + " |\n" + "|---" * len(self.columns) + "|\n"
        sections = [f"\n## {group}\n\n" + title + "".join(rows) for group, rows in groups.items()]
        shown = lambda versions: ", ".join(f"{name} {version}" for name, version in versions.items())
        compilers = sorted({shown(plan["versions"]) for plan in records.values()})
        with written_whole(self.page) as temporary:
            planned = f"\nPlanned with {'; '.join(compilers)}.\n" if compilers else ""
            temporary.write_text(self.header + "".join(sections) + planned)


def planned_runs(configs: Path = Path("configs")) -> list[str]:
    """The command lines of all runs: `--config FILE`, then one entry of the file's `PLANNED_RUNS`.

    Raises:
      InputError: no configuration there lists planned runs.
    """
    files = sorted(configs.glob("*.py"))
    with importable_configs(configs):
        runs = [f"--config {file} {run}" for file in files for run in runpy.run_path(str(file)).get("PLANNED_RUNS", ())]
    if not runs:
        raise InputError(f"{configs}: no configuration there has PLANNED_RUNS; run --table in the repository's root")
    return runs


def record(plan: Plan) -> dict[str, Any]:
    """What is recorded of a plan: the JSON of `plan --json`, and the sizes of the run."""
    config = plan.request.config
    return {"steps": config.steps, "videos_per_step": config.batch_size, **plan.to_json()}


def memory_cell(peak: int | None, limit: int) -> str:
    """The memory that a program needs of a chip."""
    return f"{gib(peak)} of {gib(limit)}" if peak else "unknown"


def _split(run: str) -> tuple[str, str]:
    _, config, *options = shlex.split(run)
    return f"`{Path(config).stem}`", " ".join(options)


def _cells(plan: dict[str, Any]) -> tuple[str, ...]:
    memory = memory_cell(plan["hbm_bytes_peak"], plan["hbm_bytes_limit"])
    if not plan["fits"]:
        return (f"{memory}: does not fit",)
    cycles = lambda name: f"{plan[name] / 1e6:,.0f} M" if plan[name] else ""
    low_use, high_use = (plan["model_flops_utilization"][end] for end in ("low", "high"))
    hours = plan["chip_hours"]
    return (
        memory,
        cycles("static_cycles"),
        cycles("least_cycles"),
        f"{plan['step_seconds_low']:.1f} to {plan['step_seconds_high']:.1f}",
        f"{low_use:.0%} to {high_use:.0%}",
        f"{hours['low']:.0f} to {hours['high']:.0f} ({plan['steps']:,} steps)",
    )


TRAINING = PlanTable(
    records=Path("docs/measurements/planned_runs.json"),
    page=Path("docs/planned_runs.md"),
    header=HEADER,
    columns=("options", "memory", "static cycles", "least cycles", "seconds a step", "model FLOPs use", "chip-hours"),
    split=_split,
    cells=_cells,
)
"""The runs that the configurations list."""
