"""What an evaluation finds: single figures and curves, each with confidence intervals, and what they were made from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.bootstrap import Estimate
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.shown import shown


@dataclasses.dataclass(frozen=True)
class Curve:
    """Figures along an axis, such as frames or blocks.

    Attributes:
      title, x_label, y_label: words for a plot.
      x: N positions on the axis.
      series: by name, such as "teacher" and "student": an estimate of shape [N].
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        series = {name: estimate.to_json() for name, estimate in self.series.items()}
        return {
            "title": self.title,
            "x_label": self.x_label,
            "y_label": self.y_label,
            "x": list(self.x),
            "series": series,
        }


@dataclasses.dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
      about: models, options, versions and other facts with which the figures can be made again, JSON-ready.
      metrics: scalar estimates by name; docs/evaluation.md explains each.
      curves: by name.
    """

    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)

    def add(self, other: "Evaluation") -> None:
        """Takes over the findings of a part of the evaluation."""
        self.about |= other.about
        self.metrics |= other.metrics
        self.curves |= other.curves

    def to_json(self) -> dict[str, Any]:
        """The content of `evaluation.json`."""
        return {
            "about": self.about,
            "metrics": {name: estimate.to_json() for name, estimate in self.metrics.items()},
            "curves": {name: curve.to_json() for name, curve in self.curves.items()},
        }


def read_evaluation(file: Path) -> Evaluation:
    """Facts and scalar estimates of an `evaluation.json`; curves are not read.

    Raises:
      InputError: the file is missing or damaged, or it is another one.
    """
    content = read_json_object(file)
    about, metrics = content.get("about"), content.get("metrics")
    fields = ("models", "options", "data", "versions", "device")
    if not isinstance(about, dict) or not isinstance(metrics, dict) or any(name not in about for name in fields):
        raise InputError(
            f"{file}: expected the evaluation.json of `rehyat evaluate`, found other fields; give its file"
        )
    for name in ("models", "options", "data", "versions"):
        if not isinstance(about[name], dict):
            raise InputError(
                f"{file}: about.{name} should be an object, found {shown(about[name])}; get the file again"
            )
    if not isinstance(about["models"].get("student"), dict):
        raise InputError(f"{file}: about.models.student should be an object; get the file again")
    estimates = {}
    for name, value in metrics.items():
        try:
            estimates[name] = Estimate.from_json(value)
        except ValueError as error:
            raise InputError(f"{file}: metrics.{name}: {shown(error)}; get the file again") from error
        if estimates[name].value.ndim:
            raise InputError(f"{file}: metrics.{name} should be one figure, found several; get the file again")
    return Evaluation(about, estimates)
