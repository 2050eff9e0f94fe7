"""The curves of an evaluation as PNG files."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.evaluation.results import Curve, Evaluation
from rehyat_jax.files.write import written_whole

PANELS = {
    "velocity.png": ("velocity_error_by_noise", "velocity_error_by_frame", "excess_by_noise", "excess_by_frame"),
    "attention.png": ("attention_error_by_block", "attention_moved_by_block"),
    "attention_by_distance.png": ("attention_by_distance/*",),
    "frames.png": (
        "*accuracy_by_frame",
        "sample_difference_by_frame",
        "sharpness_by_frame",
        "frame_change_by_frame",
    ),
    "cost.png": ("flops_by_duration", "static_cycles_by_duration", "memory_by_duration"),
}
"""The curves of each file, by patterns of their names."""

MOST_PANELS, COLUMNS = 12, 4
COLOURS = {"teacher": "C0", "student": "C1", "data": "C2", "hybrid": "C1", "window only": "C3", "exact": "C4"}


def save_plots(folder: Path, found: Evaluation) -> list[str]:
    """Writes a PNG for each row of `PANELS` of which a curve was found; returns the names of the files.

    Raises:
      InputError: a file cannot be written.
    """
    written = []
    for name, wanted in PANELS.items():
        curves = [found.curves[key] for pattern in wanted for key in fnmatch.filter(found.curves, pattern)]
        if curves:
            _save(folder / name, _spaced(curves, MOST_PANELS), logarithmic=name == "cost.png")
            written.append(name)
    return written


def _spaced(curves: Sequence[Curve], most: int) -> list[Curve]:
    """At most so many of the curves, evenly spaced."""
    chosen = np.linspace(0, len(curves) - 1, min(len(curves), most)).round().astype(int)
    return [curves[index] for index in chosen]


def _save(file: Path, curves: Sequence[Curve], *, logarithmic: bool) -> None:
    from matplotlib.figure import Figure  # not at the top: a command starts sooner without

    columns = min(len(curves), COLUMNS)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained", dpi=100)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, curve in zip(panels, curves, strict=False):
        _draw(axes, curve, logarithmic=logarithmic)
    for axes in panels[len(curves) :]:
        axes.remove()
    with written_whole(file) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Any, curve: Curve, *, logarithmic: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, estimate) in enumerate(curve.series.items()):
        style = dict(color=COLOURS.get(name, f"C{number}"), label=name)
        if curve.x_label == "block":
            place = np.array(curve.x) + 0.15 * (number - (len(curve.series) - 1) / 2)
            error = np.abs(np.stack([estimate.value - estimate.low, estimate.high - estimate.value]))
            axes.errorbar(place, estimate.value, error, fmt="o", markersize=3, capsize=2, **style)
        else:
            axes.plot(curve.x, estimate.value, marker="o", markersize=2, linewidth=1, **style)
            axes.fill_between(curve.x, estimate.low, estimate.high, alpha=0.2, color=style["color"], linewidth=0)
    axes.set(title=curve.title, xlabel=curve.x_label)
    axes.set_ylabel(curve.y_label, fontsize=7)
    axes.grid(alpha=0.3)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(curve.x, map(str, curve.x), minor=False)
        axes.set_xticks([], minor=True)
    elif all(float(x).is_integer() for x in curve.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curve.series) > 1 or curve.x_label == "block":
        axes.legend(fontsize=7)
