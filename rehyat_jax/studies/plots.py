"""The picture of a study: the headline of every variant and seed, and the error of every block."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rehyat_jax.files.write import written_whole
from rehyat_jax.studies.measure import BY_BLOCK, METRICS
from rehyat_jax.studies.record import Record, statistics


def save_study(record: Record, path: Path) -> None:
    """Writes a PNG. Dots are seeds; a bar is the mean ± the standard deviation; lines are means over seeds by block."""
    by_block = any(record.headline + BY_BLOCK in run.values for run in record.runs)
    height = 1.2 + 0.32 * len(record.variants)
    figure = Figure(figsize=(9 if by_block else 5.5, max(height, 2.6)), layout="constrained", dpi=100)
    panels = figure.subplots(1, 2 if by_block else 1, squeeze=False)[0]
    _headline(panels[0], record)
    if by_block:
        _blocks(panels[1], record)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def _headline(axes: Axes, record: Record) -> None:
    metric = METRICS[record.headline]
    for row, label in enumerate(record.variants):
        values = record.values(label, record.headline)
        if not values:
            continue
        found, color = statistics(values), f"C{row % 10}"
        axes.errorbar(found.mean, row, xerr=found.deviation, fmt="|", markersize=14, capsize=3, color=color)
        axes.plot(list(values.values()), [row] * len(values), "o", markersize=4, alpha=0.6, color=color)
    if record.headline in record.teacher:
        axes.axvline(record.teacher[record.headline], color="grey", linewidth=1, linestyle="--", label="teacher")
        axes.legend(fontsize=7)
    axes.set_yticks(range(len(record.variants)), list(record.variants), fontsize=8, parse_math=False)
    axes.set_ylim(len(record.variants) - 0.5, -0.5)
    axes.set_xlabel(f"{metric.title}, {'lower' if metric.lower_is_better else 'higher'} is better", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _blocks(axes: Axes, record: Record) -> None:
    name = record.headline + BY_BLOCK
    for row, label in enumerate(record.variants):
        lines = [run.values[name] for run in record.runs if run.variant == label and name in run.values]
        if lines:
            axes.plot(np.mean(lines, axis=0), marker=".", linewidth=1, color=f"C{row % 10}", label=label)
    axes.set_xlabel("converted block", fontsize=8)
    axes.set_ylabel(METRICS[record.headline].title, fontsize=8)
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
