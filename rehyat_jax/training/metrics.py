"""Where a run's numbers go: a progress bar, TensorBoard and a JSONL file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from rehyat_jax.files import written_whole


class MetricWriter:
    """Writes the metrics of logged steps to the terminal, `metrics.jsonl` and TensorBoard's event files.

    Args:
      workdir: directory of the run.
      first_step: number of updates already made; later lines of an earlier, interrupted run are dropped, since those
        steps are run again.
      steps: updates in the whole run.
      description: label of the progress bar.
    """

    def __init__(self, workdir: Path, *, first_step: int, steps: int, description: str):
        self._path = workdir / "metrics.jsonl"
        kept = []
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
        with written_whole(self._path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=steps, initial=first_step, desc=description, unit="step", dynamic_ncols=True, mininterval=1
        )

    def advance(self) -> None:
        """Counts one step on the progress bar."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs scalars and vectors (one TensorBoard curve per entry) of one step.

        Raises:
          FloatingPointError: the loss is not finite; better to stop than to save what comes of it.
        """
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss of step {step} is {values['loss']}; lower the learning rate")
        self._file.write(json.dumps({"step": step, **{name: value.tolist() for name, value in values.items()}}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value.ndim == 0:
                self._tensorboard.add_scalar(name, float(value), step)
            for index, entry in enumerate(value.ravel() if value.ndim else ()):
                self._tensorboard.add_scalar(f"{name}/{index:02d}", float(entry), step)
        self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in values.items() if value.ndim == 0})

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()
