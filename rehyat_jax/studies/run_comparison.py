"""Compares training runs: the fields that differ, their metrics, and their speed."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.training.config import load_config
from rehyat_jax.training.metrics import TENSORBOARD, read_metrics
from rehyat_jax.training.values import shown_value

NOT_COMPARED = ("step", "learning_rate", "skipped", "skipped_records")
"""Entries of a line of metrics that have no best value."""

MOST_PANELS = 6
"""Number of metrics whose curves are plotted."""


@dataclasses.dataclass(frozen=True)
class RunLog:
    """The metrics of one training run.

    Attributes:
      name: its directory as it was given.
      fields: its configuration, by dotted name.
      curves: name -> (steps [n], values [n]); the mean of metrics that are vectors.
      seconds: median seconds of a step; None if fewer than two lines were logged by one process.
    """

    name: str
    fields: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    seconds: float | None


def read_run(workdir: Path) -> RunLog:
    """Reads the configuration, the metrics and the times of a run.

    Raises:
      InputError: `workdir` is no directory of a training run, a file is damaged, or no step was logged.
    """
    if not workdir.is_dir():
        raise InputError(f"{workdir}: expected the directory of a training run, found none; check the path")
    fields = flatten_dict(json.loads(load_config(workdir).to_json()), sep=".")
    lines = read_metrics(workdir)
    if not lines:
        raise InputError(f"{workdir}: expected logged steps in its metrics, found none; wait until the run logs some")
    curves = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        logged = [(line["step"], value) for line in lines if (value := _mean(line.get(name))) is not None]
        if name not in NOT_COMPARED and logged:
            steps, values = zip(*logged, strict=True)
            curves[name] = np.array(steps), np.array(values)
    if not curves:
        raise InputError(f"{workdir}: expected figures in its metrics, found none; the file is damaged")
    return RunLog(str(workdir), fields, curves, _step_seconds(workdir))


def _mean(value: Any) -> float | None:
    """The mean of a scalar or a vector from JSON; None for other values."""
    entries = value if isinstance(value, list) else [value]
    if not entries or any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in entries):
        return None
    try:
        return float(np.mean(np.array(entries, np.float64)))
    except OverflowError:  # an integer of hundreds of digits
        return None


def _step_seconds(workdir: Path) -> float | None:
    """Median seconds of a step, from the times of consecutive lines of one process in TensorBoard's files.

    Evaluations and checkpoints between two lines count; the median leaves out the few lines that have them, and the
    first line, which waits for the compiler, has no line before it.
    """
    seconds: list[float] = []
    files = (workdir / TENSORBOARD).glob("events.out.tfevents.*")
    for file in sorted(file for file in files if file.is_file()):
        events = [event for event in LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]
        pairs = itertools.pairwise(events)
        seconds += [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in pairs if b.step > a.step]
    return float(np.median(seconds)) if seconds else None


def check_different(runs: Sequence[RunLog]) -> None:
    """Raises InputError unless there are at least two runs with different names."""
    names = [run.name for run in runs]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"expected two or more different runs, found {', '.join(names)}; give their workdirs")


def comparison(runs: Sequence[RunLog], picture: str | None = None) -> str:
    """The comparison as Markdown: runs are columns.

    Args:
      runs: the runs.
      picture: path of the plotted curves, relative to the page; None for no picture.
    """
    head = ["", *short_names(runs)]
    lines = ["# Training runs compared", ""]
    lines += [f"- {shown(name)}: `{shown(run.name)}`" for name, run in zip(head[1:], runs, strict=True)]
    lines += ["", "## Configuration", ""]
    rows = differing_fields(runs)
    lines += _table(["field", *head[1:]], rows) if rows else ["No field differs."]
    lines += ["", "## Metrics", "", "Each cell is the last value and, in brackets, the lowest with its step.", ""]
    lines += _table(["metric", *head[1:]], _metric_rows(runs))
    lines += ["", "## Speed", ""]
    steps = ["last step", *(str(max(int(steps[-1]) for steps, _ in run.curves.values())) for run in runs)]
    seconds = ["median seconds a step", *("" if run.seconds is None else f"{run.seconds:.3g}" for run in runs)]
    lines += _table(head, [steps, seconds])
    if picture:
        lines += ["", f"![Curves of the runs]({picture})"]
    return "\n".join([*lines, ""])


def short_names(runs: Sequence[RunLog]) -> list[str]:
    """The directories of runs without the folders at the beginning and at the end that all have in common."""
    parts = [Path(run.name).parts for run in runs]
    shortest, start, end = min(map(len, parts)), 0, 0
    while start < shortest - 1 and len({path[start] for path in parts}) == 1:
        start += 1
    while end < shortest - start - 1 and len({path[-1 - end] for path in parts}) == 1:
        end += 1
    return ["/".join(path[start : len(path) - end]) for path in parts]


def differing_fields(runs: Sequence[RunLog]) -> list[list[str]]:
    """(field, value in each run) of the fields that are not the same in all runs; "" where a run has no such field."""
    names = sorted({name for run in runs for name in run.fields})
    values = lambda name: [shown_value(run.fields[name]) if name in run.fields else "" for run in runs]
    return [[name, *values(name)] for name in names if len(set(values(name))) > 1]


def _metric_rows(runs: Sequence[RunLog]) -> list[list[str]]:
    def cell(run: RunLog, name: str) -> str:
        if name not in run.curves:
            return ""
        steps, values = run.curves[name]
        if not np.isfinite(values).any():
            return f"{values[-1]:.4g}"
        best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
        return f"{values[-1]:.4g} ({values[best]:.4g} at {steps[best]})"

    return [[name, *(cell(run, name) for run in runs)] for name in dict.fromkeys(n for run in runs for n in run.curves)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(shown(cell).replace("|", "\\|") for cell in cells) + " |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def write_comparison(runs: Sequence[RunLog], page: Path) -> None:
    """Writes the comparison as Markdown, and its curves as a PNG next to it. Raises InputError if that fails."""
    picture = page.with_suffix(".png")
    with reported_write_errors(page):
        _save_curves(runs, picture)
        with written_whole(page) as temporary:
            temporary.write_text(comparison(runs, picture.name), encoding="utf-8")


def _save_curves(runs: Sequence[RunLog], path: Path) -> None:
    """Writes a PNG with one panel for each metric that all runs have, the loss first."""
    shared = [name for name in runs[0].curves if all(name in run.curves for run in runs)]
    names = sorted(shared or list(runs[0].curves), key=lambda name: name != "loss")[:MOST_PANELS]
    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained", dpi=100)
    labels = [shown(label) for label in short_names(runs)]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, run in enumerate(runs):
            if name in run.curves:
                axes.plot(*run.curves[name], linewidth=1, color=f"C{number % 10}")
        axes.set_title(shown(name), fontsize=9, parse_math=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    lines = [Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
    legend = figure.legend(lines, labels, loc="outside lower center", ncols=len(runs), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
