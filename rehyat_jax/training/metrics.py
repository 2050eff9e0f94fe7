"""Where a run's numbers go: a progress bar, TensorBoard and a JSONL file."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from rehyat_jax.files.write import reported_write_errors, written_whole


class MetricWriter:
    """Writes a run's metrics, as means between logged steps, to the terminal, `metrics.jsonl` and TensorBoard's files.

    Args:
      workdir: directory of the run.
      first_step: number of updates already made; later lines of an earlier, interrupted run are dropped, since those
        steps are run again.
      steps: updates in the whole run.
      description: label of the progress bar.
      is_silent: write nothing, as all processes of a run but one.
    """

    def __init__(self, workdir: Path, *, first_step: int, steps: int, description: str, is_silent: bool = False):
        self._recent: list[dict[str, jax.Array]] = []
        self._losses: list[float] = []
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
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def advance(self, metrics: dict[str, jax.Array]) -> None:
        """Counts one step on the progress bar and keeps its metrics, on the device, for the next `write`."""
        self._recent.append(metrics)
        self._bar.update()

    def write(self, step: int, **more: Any) -> int:
        """Logs the means of scalars and vectors (one TensorBoard curve per entry) since the last call.

        Skipped updates are no part of the means; they are counted as "skipped", and each is reported.

        Args:
          step: steps made so far.
          **more: metrics of this step alone.

        Returns:
          How many updates were skipped in a row up to this step.
        """
        recent, self._recent = jax.device_get(self._recent), []
        in_a_row = [int(metrics.pop("skipped_in_a_row")) for metrics in recent]
        useful = [metrics for metrics, skipped in zip(recent, in_a_row, strict=True) if not skipped]
        means = {name: np.mean([metrics[name] for metrics in useful], axis=0) for name in useful[0]} if useful else {}
        self._losses += [float(metrics["loss"]) for metrics in useful]
        values = {name: np.asarray(value, np.float64) for name, value in {**means, **more}.items()}
        values["skipped"] = np.asarray(len(recent) - len(useful))
        if self._is_silent:
            return in_a_row[-1]
        for number, metrics, skipped in zip(range(step - len(recent) + 1, step + 1), recent, in_a_row, strict=True):
            if skipped:
                norm = f"gradient norm {metrics['gradient_norm']:.4g}"
                self._bar.write(f"step {number}: update skipped; loss {metrics['loss']:.4g}, {norm}", file=sys.stderr)
        with reported_write_errors(self._path):
            entry = {"step": step, **{name: value.tolist() for name, value in values.items()}}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        for name, value in values.items():
            if value.ndim == 0:
                self._tensorboard.add_scalar(name, float(value), step)
            for index, entry in enumerate(value.ravel() if value.ndim else ()):
                self._tensorboard.add_scalar(f"{name}/{index:02d}", float(entry), step)
        self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in values.items() if value.ndim == 0})
        return in_a_row[-1]

    def mean_loss(self) -> float | None:
        """Of the useful updates that were logged since the last call; None where there are none."""
        losses, self._losses = self._losses, []
        return float(np.mean(losses)) if losses else None

    def close(self) -> None:
        self._bar.close()
        if self._is_silent:
            return
        with reported_write_errors(self._path):
            self._file.close()
            self._tensorboard.close()


def _step(line: str) -> float:
    """The step that a line of `metrics.jsonl` is about; infinity for half a line, which a killed run may leave."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
