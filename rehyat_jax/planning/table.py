"""The table of planned runs: each production configuration lists its runs, and each run's plan is one row."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import written_whole
from rehyat_jax.planning.planner import Plan
from rehyat_jax.planning.report import gib

RECORDS = Path("docs/measurements/planned_runs.json")
TABLE = Path("docs/planned_runs.md")

HEADER = """# Planned runs

None of these runs has been made. The configurations list them as `PLANNED_RUNS`. Each row comes from
`python -m rehyat_jax.plan --config configs/NAME.py` with the options in the row. [plan.md](plan.md) says how figures
are formed, and keeps earlier plans of some runs. Memory and cycles are those of one device. `plan` knows no cycles of
GPUs.

This command writes the page. It plans only the runs that [the record](measurements/planned_runs.json) does not have:

    python -m rehyat_jax.plan --table
"""

COLUMNS = ("options", "memory", "static cycles", "least cycles", "seconds a step", "model FLOPs use", "chip-hours")


def planned_runs(configs: Path = Path("configs")) -> list[str]:
    """The command lines of all runs: `--config FILE`, then one entry of the file's `PLANNED_RUNS`.

    Raises:
      InputError: no configuration there lists planned runs.
    """
    files = sorted(configs.glob("*.py"))
    runs = [f"--config {file} {run}" for file in files for run in runpy.run_path(str(file)).get("PLANNED_RUNS", ())]
    if not runs:
        raise InputError(f"{configs}: no configuration there has PLANNED_RUNS; run --table in the repository's root")
    return runs


def read_records() -> dict[str, Any]:
    """Recorded plans by command line. Raises InputError if the file is damaged."""
    return read_json_object(RECORDS) if RECORDS.exists() else {}


def write_records(records: dict[str, Any]) -> None:
    """Writes the plans; `read_records` reads them."""
    with written_whole(RECORDS) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n")


def record(plan: Plan) -> dict[str, Any]:
    """What is recorded of a plan: the JSON of `plan --json`, and the sizes of the run."""
    config = plan.request.config
    return {"steps": config.steps, "videos_per_step": config.batch_size, **plan.to_json()}


def write_table(runs: list[str], records: dict[str, Any]) -> None:
    """Writes the page, with a table for each configuration. It says so of runs without a record."""
    by_config: dict[str, list[str]] = {}
    for run in runs:
        _, config, *options = shlex.split(run)
        by_config.setdefault(config, []).append(_row(" ".join(options), records.get(run)))
    title = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n"
    sections = [f"\n## `{Path(config).stem}`\n\n" + title + "".join(rows) for config, rows in by_config.items()]
    shown = lambda versions: ", ".join(f"{name} {version}" for name, version in versions.items())
    compilers = sorted({shown(plan["versions"]) for plan in records.values()})
    page = HEADER + "".join(sections)
    with written_whole(TABLE) as temporary:
        temporary.write_text(page + f"\nPlanned with {'; '.join(compilers)}.\n")


def _row(options: str, plan: dict[str, Any] | None) -> str:
    if plan is None:
        return f"| `{options}` | not planned yet |" + " |" * (len(COLUMNS) - 2) + "\n"
    memory = f"{gib(plan['hbm_bytes_peak'])} of {gib(plan['hbm_bytes_limit'])}" if plan["hbm_bytes_peak"] else "unknown"
    if not plan["fits"]:
        return f"| `{options}` | {memory}: does not fit |" + " |" * (len(COLUMNS) - 2) + "\n"
    cycles = lambda name: f"{plan[name] / 1e6:,.0f} M" if plan[name] else ""
    low_use, high_use = (plan["model_flops_utilization"][end] for end in ("low", "high"))
    hours = plan["chip_hours"]
    cells = (
        f"`{options}`",
        memory,
        cycles("static_cycles"),
        cycles("least_cycles"),
        f"{plan['step_seconds_low']:.1f} to {plan['step_seconds_high']:.1f}",
        f"{low_use:.0%} to {high_use:.0%}",
        f"{hours['low']:.0f} to {hours['high']:.0f} ({plan['steps']:,} steps)",
    )
    return "| " + " | ".join(cells) + " |\n"
