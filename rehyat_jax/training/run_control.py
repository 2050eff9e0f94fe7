"""Decides what a run does after a step: log, evaluate, save, stop, or end because it diverged."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import ml_collections
import numpy as np

from rehyat_jax.training.metrics import MetricWriter, RecentMetrics
from rehyat_jax.training.stop_signal import StopSignal


class Evaluator(Protocol):
    """A plug-in that measures the model of a run: an entry of `config.evals`."""

    def __call__(self, params: Any) -> Iterable[tuple[str, Any]]:
        """(name, scalar or vector) pairs that measure a model with these parameters; all processes call it."""


class ScheduledEvaluator(NamedTuple):
    """An evaluator, its name in the metrics, and the number of steps from one evaluation to the next."""

    name: str
    every: int
    evaluate: Evaluator


class Decision(NamedTuple):
    """The actions to take after a step.

    Attributes:
      save: whether to save a checkpoint.
      loss: the mean of the logged losses since the last periodic checkpoint, which ranks the checkpoints.
      skipped: the number of consecutive skipped updates, if the run has diverged; else 0.
      stop: whether SIGTERM asked the run to stop before its last step.
    """

    save: bool
    loss: float | None
    skipped: int
    stop: bool


@dataclasses.dataclass
class RunControl:
    """Decides after each step; the writer only writes. All processes of a run decide alike.

    Attributes:
      config: configuration of the run; steps, log_every, checkpoint_every and max_skipped are read.
      first_step: number of updates made before this process started.
      writer: writer of the metrics.
      stop_signal: the signal that asks the run to stop.
      learning_rate: step, counted from 0 -> its learning rate.
      evaluators: evaluators of `config.evals`.
    """

    config: ml_collections.ConfigDict
    first_step: int
    writer: MetricWriter
    stop_signal: StopSignal
    learning_rate: Callable[[int], Any]
    evaluators: list[ScheduledEvaluator] = dataclasses.field(default_factory=list)
    _recent: RecentMetrics = dataclasses.field(default_factory=RecentMetrics)
    _losses: list[float] = dataclasses.field(default_factory=list)

    def after_step(
        self,
        number: int,
        metrics: dict[str, Any],
        *,
        more: Callable[[], Mapping[str, Any]] = dict,
        params: Callable[[], Any] = dict,
    ) -> Decision:
        """Logs and evaluates if the step is due, and decides what to do next.

        Args:
          number: number of the step, counted from 1.
          metrics: metrics of the step, still on the device.
          more: returns further metrics; called only if the step is logged.
          params: returns the parameters of the model; called only if the model is evaluated.
        """
        config, is_last = self.config, number == self.config.steps
        self._recent.add(metrics)
        self.writer.advance()
        values, skipped = {}, 0
        summary = None
        if number % config.log_every == 0 or number == 1 or is_last:
            summary = self._recent.summarise(number)
            self._losses += summary.losses
            skipped = summary.skipped_in_a_row
            values = {**summary.means, "learning_rate": self.learning_rate(number - 1), **more()}
            values["skipped"] = len(summary.skipped)
        for name, every, evaluate in self.evaluators:
            if number % every == 0 or is_last:
                values |= {f"{name}/{figure}": value for figure, value in evaluate(params())}
        if values:
            self.writer.write(number, values, summary.skipped if summary else ())
        is_periodic = number % config.checkpoint_every == 0 or is_last
        has_diverged, is_to_stop = (
            skipped >= config.max_skipped,
            self.stop_signal.is_requested(number - self.first_step),
        )
        return Decision(
            save=is_periodic or has_diverged or is_to_stop,
            loss=self._mean_loss() if is_periodic else None,
            skipped=skipped if has_diverged else 0,
            stop=is_to_stop and not is_last,
        )

    def _mean_loss(self) -> float | None:
        losses, self._losses = self._losses, []
        return float(np.mean(losses)) if losses else None
