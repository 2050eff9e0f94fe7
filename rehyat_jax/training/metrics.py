"""Collects the metrics of a run's steps and writes them to a progress bar, TensorBoard and a JSONL file."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as TensorboardSummary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from rehyat_jax.files.write import reported_write_errors, written_whole


class SkippedStep(NamedTuple):
    """A step whose update was skipped."""

    number: int
    loss: float
    gradient_norm: float


class Summary(NamedTuple):
    """The steps since the last summary.

    Attributes:
      means: mean of every scalar and vector over the updates that were not skipped.
      losses: losses of the updates that were not skipped.
      skipped: the skipped updates.
      skipped_in_a_row: number of consecutive skipped updates that end at the last step.
    """

    means: dict[str, np.ndarray]
    losses: list[float]
    skipped: list[SkippedStep]
    skipped_in_a_row: int


class RecentMetrics:
    """The metrics of the last steps, kept on the device until they are summarised."""

    def __init__(self) -> None:
        self._recent: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._recent.append(metrics)

    def summarise(self, step: int) -> Summary:
        """Summary of the metrics added since the last call, of which the last are those of `step`."""
        recent, self._recent = jax.device_get(self._recent), []
        in_a_row = [int(metrics.pop("skipped_in_a_row")) for metrics in recent]
        numbers = range(step - len(recent) + 1, step + 1)
        skipped = [
            SkippedStep(number, float(metrics["loss"]), float(metrics["gradient_norm"]))
            for number, metrics, count in zip(numbers, recent, in_a_row, strict=True)
            if count
        ]
        useful = [metrics for metrics, count in zip(recent, in_a_row, strict=True) if not count]
        means = {name: np.mean([metrics[name] for metrics in useful], axis=0) for name in useful[0]} if useful else {}
        return Summary(means, [float(metrics["loss"]) for metrics in useful], skipped, in_a_row[-1])


class MetricWriter:
    """Writes a run's metrics to the terminal, `metrics.jsonl` and TensorBoard's files. It decides nothing.

    Args:
      workdir: directory of the run.
      first_step: number of updates already made; later lines of `metrics.jsonl` are dropped, since those steps run
        again.
      steps: number of updates in the complete run.
      description: label of the progress bar.
      is_silent: whether to write nothing; true in all processes except one.
    """

    def __init__(self, workdir: Path, *, first_step: int, steps: int, description: str, is_silent: bool = False):
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=description,
            unit="step",
            dynamic_ncols=True,
            mininterval=1,
            disable=is_silent,
        )
        self._is_silent = is_silent
        if is_silent:
            return
        self._path = workdir / "metrics.jsonl"
        kept = []
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= first_step]
        with reported_write_errors(self._path):
            with written_whole(self._path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
            self._file = self._path.open("a")
            self._tensorboard = EventFileWriter(str(workdir / "tensorboard"))
            # TensorBoard then drops what an earlier process wrote for the steps that run again.
            self._tensorboard.add_event(_event(first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def advance(self) -> None:
        """Counts one step on the progress bar."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, Any], skipped: Sequence[SkippedStep] = ()) -> None:
        """Writes scalars and vectors (one TensorBoard curve for each entry), and reports skipped updates.

        Args:
          step: steps made so far.
          values: scalars and vectors by name.
          skipped: updates skipped since the last call.
        """
        if self._is_silent:
            return
        for update in skipped:
            numbers = f"loss {update.loss:.4g}, gradient norm {update.gradient_norm:.4g}"
            self._bar.write(f"step {update.number}: update skipped; {numbers}", file=sys.stderr)
        arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
        with reported_write_errors(self._path):
            line = {"step": step, **{name: value.tolist() for name, value in arrays.items()}}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            curves = [curve for name, value in arrays.items() for curve in _curves(name, value)]
            self._tensorboard.add_event(_event(step, summary=TensorboardSummary(value=curves)))
        self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in arrays.items() if value.ndim == 0})

    def close(self) -> None:
        """Closes the progress bar and the files."""
        self._bar.close()
        if self._is_silent:
            return
        with reported_write_errors(self._path):
            self._file.close()
            self._tensorboard.close()


def _event(step: int, **content: Any) -> Event:
    return Event(wall_time=time.time(), step=step, **content)


def _curves(name: str, value: np.ndarray) -> list[TensorboardSummary.Value]:
    """The values of TensorBoard's curves: one for a scalar, one for each entry of a vector."""
    if value.ndim == 0:
        return [TensorboardSummary.Value(tag=name, simple_value=float(value))]
    return [
        TensorboardSummary.Value(tag=f"{name}/{index:02d}", simple_value=float(entry))
        for index, entry in enumerate(value.ravel())
    ]


def _step(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity for an incomplete line, which a killed run may leave."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
