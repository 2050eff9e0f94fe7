"""Curves, bars and samples for the demo's report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from rehyat_jax.demo.digits import CAPTIONS, NUM_FRAMES
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.files.write import written_whole

SHOWN_CAPTIONS = (1, 6, 14, 15)
"""Indices of the captions whose videos are pictured."""


def read_metric(workdir: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["step"] for line in lines]), np.array([line[name] for line in lines])


def save_losses(path: Path, runs: Mapping[str, Path]) -> None:
    """Writes a PNG with one panel for the loss of each run; `runs` maps titles to workdirs."""
    figure = Figure(figsize=(4 * len(runs), 2.6), layout="constrained", dpi=100)
    for axes, (title, workdir) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        axes.plot(*read_metric(workdir, "loss"), linewidth=1)
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    _save(figure, path)


def save_block_errors(path: Path, panels: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes a PNG of bars per block: panel title -> series title -> error of every hybrid block."""
    figure = Figure(figsize=(4.5 * len(panels), 2.8), layout="constrained", dpi=100)
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        width = 0.8 / len(series)
        for index, (name, errors) in enumerate(series.items()):
            axes.bar(np.arange(len(errors)) + (index - (len(series) - 1) / 2) * width, errors, width, label=name)
        axes.set(title=title, xlabel="block", ylabel="relative L1 error")
        axes.legend(fontsize=7)
    _save(figure, path)


def save_sheet(path: Path, videos: np.ndarray) -> None:
    """Writes an MP4 of the first video of every caption, in four rows of five; `videos` [N, T, H, W, 3] in [0, 1]."""
    sheet = rearrange(videos[: len(CAPTIONS)], "(r c) t h w rgb -> t (r h) (c w) rgb", r=4)
    write_video(path, sheet, fps=8, scale=6)


def save_samples(path: Path, videos: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
    """Writes a PNG that compares models: videos [N, 21, H, W, 3] in [0, 1] of the same captions, by model."""
    rows = {f"{captions[i]}\n{name}": videos[name][i] for i in SHOWN_CAPTIONS for name in videos}
    save_frames(path, rows, frames=range(0, NUM_FRAMES, 2))


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
