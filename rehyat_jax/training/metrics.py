"""Collects the metrics of a run's steps and writes them to a progress bar, TensorBoard and a JSONL file."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as TensorboardSummary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.write import reported_write_errors, written_whole

METRICS_FILE = "metrics.jsonl"
"""The file in a run's workdir with one JSON object for each logged step."""

TENSORBOARD = "tensorboard"
"""The folder there with TensorBoard's files."""

TAIL_BYTES = 2**16
"""Bytes at the end of the file that `last_step` reads: more than two lines."""


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

    A line that cannot be written raises no error at once, since the other processes would wait for this one: `trouble`
    holds the error, and nothing more is written. A terminal that is gone, or a full disk behind it, ends no run.

    Attributes:
      trouble: the first error of writing; None if there is none.

    Args:
      workdir: directory of the run.
      first_step: number of updates already made; later lines of `metrics.jsonl` are dropped, since those steps run
        again.
      steps: number of updates in the complete run.
      description: label of the progress bar.
      is_silent: whether to write nothing; true in all processes except one.
    """

    def __init__(self, workdir: Path, *, first_step: int, steps: int, description: str, is_silent: bool = False):
        self.trouble: InputError | None = None
        self._is_silent = is_silent
        self._path = workdir / METRICS_FILE
        if not is_silent:
            self._open(workdir, first_step)
        shown = dict(total=steps, initial=first_step, desc=description, unit="step", dynamic_ncols=True, mininterval=1)
        try:
            self._bar = tqdm(**shown, disable=is_silent)
        except OSError:
            self._bar = tqdm(disable=True)

    def _open(self, workdir: Path, first_step: int) -> None:
        with reported_write_errors(self._path):
            lines = self._path.read_bytes().splitlines() if self._path.is_file() else []
            kept = [line for line in lines if _step(line) <= first_step]
            with written_whole(self._path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            self._file = self._path.open("a")
            self._tensorboard = _Tensorboard(workdir / TENSORBOARD)
            self._tensorboard.write(Event(file_version="brain.Event:2"))
            # TensorBoard then drops what an earlier process wrote for the steps that run again.
            self._tensorboard.write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def advance(self) -> None:
        """Counts one step on the progress bar."""
        with suppress(OSError):
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
            with suppress(OSError):
                self._bar.write(f"step {update.number}: update skipped; {numbers}", file=sys.stderr)
        arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
        try:
            self._write(step, arrays)
        except InputError as error:
            self.trouble = self.trouble or error
        with suppress(OSError):
            self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in arrays.items() if value.ndim == 0})

    def _write(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self.trouble is not None:
            return
        with reported_write_errors(self._path):
            line = {"step": step, **{name: value.tolist() for name, value in arrays.items()}}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            curves = [curve for name, value in arrays.items() for curve in _curves(name, value)]
            self._tensorboard.write(Event(step=step, summary=TensorboardSummary(value=curves)))

    def close(self) -> None:
        """Closes the progress bar and the files. Raises InputError if something could not be written."""
        with suppress(OSError):
            self._bar.close()
        if self._is_silent:
            return
        try:
            with reported_write_errors(self._path), closing(self._tensorboard):
                self._file.close()
        except InputError as error:
            self.trouble = self.trouble or error
        if self.trouble is not None:
            raise self.trouble


class _Tensorboard:
    """A file of TensorBoard's events. TensorBoard's own writer has a thread, where a full disk is noticed late."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        number = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / f"events.out.tfevents.{number}").open("xb")
        self._records = RecordWriter(self._file)

    def write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _curves(name: str, value: np.ndarray) -> list[TensorboardSummary.Value]:
    """The values of TensorBoard's curves: one for a scalar, one for each entry of a vector."""
    if value.ndim == 0:
        return [TensorboardSummary.Value(tag=name, simple_value=float(value))]
    return [
        TensorboardSummary.Value(tag=f"{name}/{index:02d}", simple_value=float(entry))
        for index, entry in enumerate(value.ravel())
    ]


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics: "step", and scalars and vectors by name. Lines that are no objects are left out.

    Raises:
      InputError: there are no metrics, or they cannot be read.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        raise InputError(f"{path}: expected the metrics of a training run, found no file; check the folder")
    check_regular_file(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return [json.loads(line) for line in lines if _step(line) < float("inf")]


def last_step(workdir: Path) -> int:
    """The last step of a run whose metrics were written, 0 if there is none. Reads only the end of the file."""
    try:
        with (workdir / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            steps = [step for line in file.read().splitlines() if (step := _step(line)) < float("inf")]
    except OSError:
        return 0
    return int(steps[-1]) if steps else 0


def _step(line: bytes) -> float:
    """The step of a line of `metrics.jsonl`; infinity for a line that is no object with a step.

    A killed run may leave an incomplete line, and a machine that lost power one of other bytes.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else float("inf")
