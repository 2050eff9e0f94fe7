"""Measures the model that a run of a study ends with: python -m rehyat_jax.studies.measure MODEL --teacher TEACHER.

`rehyat_jax.study` runs this command after the last training run of each variant and seed. It writes the figures, the
hardware and the version of the code as JSON. All models meet the same held-out digits, the same noise and the same
noise levels.

Errors are those of the demo's report and of evaluators in training (`rehyat_jax.evaluation.on_batches`). The figures of
`rehyat_jax.evaluate` have the same names, but other draws: each noise level has its share, and captions are never
dropped. Studies keep their draws so that new records can be compared with old ones. Their uncertainty is the deviation
over seeds, not that over examples.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.demo import measure as digits
from rehyat_jax.demo.judge import Judge
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.consistency import chunk_changes, frame_changes
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.training.config import default_config
from rehyat_jax.training.continuation import code_version
from rehyat_jax.weights import load_wan

BY_BLOCK = "_by_block"
"""End of the names of figures with one entry for each converted block."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of a model: its title in tables, and which direction is better."""

    title: str
    lower_is_better: bool


class Sampled(NamedTuple):
    """The videos that are sampled: their number, the options of the solver, and whether chunk by chunk."""

    videos: int
    solver: dict[str, Any]
    by_chunk: bool


@dataclasses.dataclass(frozen=True)
class Measure:
    """One way to measure a model, whose name is its key in `MEASURES`.

    Attributes:
      metrics: its figures by name; the first is the most important.
      run: (student, teacher, how videos are sampled) -> the figures by name, scalars or, for names that end in
        `BY_BLOCK`, lists.
      needs_student: whether it compares a student with its teacher. If not, the teacher itself can be measured.
      needs_frozen_teacher: whether all parameters of the student but its feature maps must be the teacher's.
    """

    metrics: dict[str, Metric]
    run: Callable[[WanTransformer, WanTransformer, Sampled], dict[str, Any]]
    needs_student: bool = True
    needs_frozen_teacher: bool = False


def noise_levels() -> ml_collections.ConfigDict:
    """The configuration of the noise on which errors are measured; that of the demo's runs."""
    config = default_config()
    config.flow_shift, config.timestep_sampling = 5.0, "uniform"
    return config


def _attention_error(student: WanTransformer, teacher: WanTransformer, sampled: Sampled) -> dict[str, Any]:
    del teacher, sampled
    if not student.config.hybrid_blocks:
        raise InputError("the model has no hybrid blocks whose attention could be measured; measure another one")
    errors = digits.block_errors(student, noise_levels())
    names = {
        "hybrid": "attention_error",
        "window_only": "attention_error_window_only",
        "exact": "attention_error_exact",
    }
    means = {names[name]: float(error.mean()) for name, error in errors.items()}
    return means | {names[name] + BY_BLOCK: error.tolist() for name, error in errors.items()}


def _velocity_error(student: WanTransformer, teacher: WanTransformer, sampled: Sampled) -> dict[str, Any]:
    del sampled
    return {"velocity_error": digits.velocity_error(student, teacher, noise_levels())}


def _samples(student: WanTransformer, teacher: WanTransformer, sampled: Sampled) -> dict[str, Any]:
    del teacher
    count, solver, by_chunk = sampled
    videos, captions = digits.sample_captions(student, count, "sampling", solver, by_chunk=by_chunk)
    chunk_frames = max(student.config.block_forms.chunk_frames, HybridConfig.chunk_frames)
    at, within = chunk_changes(videos.shape[1], 1, chunk_frames)
    changes = frame_changes(videos).mean(0)
    jump = float(changes[at].mean() / changes[within].mean())
    return Judge.fit().score(videos, captions)._asdict() | {"chunk_jump": jump}


MEASURES = {
    "attention_error": Measure(
        {
            "attention_error": Metric("attention error", True),
            "attention_error_window_only": Metric("error of the window alone", True),
            "attention_error_exact": Metric("error of perfect feature maps", True),
        },
        _attention_error,
        needs_frozen_teacher=True,
    ),
    "velocity_error": Measure({"velocity_error": Metric("velocity error", True)}, _velocity_error),
    "samples": Measure(
        {
            "frame_accuracy": Metric("frame accuracy", False),
            "digit_accuracy": Metric("digit accuracy", False),
            "motion_accuracy": Metric("motion accuracy", False),
            "chunk_jump": Metric("change at boundaries / within chunks", True),
        },
        _samples,
        needs_student=False,
    ),
}
"""The measures by name.

- attention_error: mean relative L1 error of each block's attention on the block's inputs in the softmax teacher.
- velocity_error: mean |v - v_teacher| / mean |v_teacher| of the complete model.
- samples: videos of all captions, read by the digits' judge; see `rehyat_jax.demo.judge.Score`. Models without chunks
  have the change where those of the default hybrid form would begin.
"""

METRICS = {name: metric for measure in MEASURES.values() for name, metric in measure.metrics.items()}
"""All figures by name."""


def measure_model(model: Path, teacher: Path, measures: list[str], videos: int) -> dict[str, Any]:
    """The figures of a model by name.

    Args:
      model: the model checkpoint.
      teacher: its softmax teacher.
      measures: keys of `MEASURES`.
      videos: number of sampled videos, a multiple of 40.

    Raises:
      InputError: a checkpoint cannot be read, a measure does not fit the model, or a figure is not finite.
    """
    student, softmax = load_wan(model), load_wan(teacher)
    values: dict[str, Any] = {}
    sampled = Sampled(videos, digits.solver_of(model), digits.samples_by_chunk(model))
    for name in measures:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        values |= MEASURES[name].run(student, softmax, sampled)
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{model}: its {name} is {shown(value)}; look at the losses of its training run")
    return values


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, measures and writes; returns the exit code, 2 if the user's input is wrong."""
    example = "runs/distill/model --teacher assets/demo_teacher --out figures.json"
    parser = CommandParser("studies.measure", __doc__, example)
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model checkpoint")
    parser.add_argument("--teacher", type=Path, required=True, help="the softmax model that it was made from")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=["velocity_error"], help="what is measured")
    parser.add_argument("--videos", type=int, default=40, help="number of sampled videos, a multiple of 40")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)

    def run() -> None:
        if arguments.videos < 40 or arguments.videos % 40:
            raise InputError(f"--videos: expected a multiple of 40, found {arguments.videos}; give 40, 80, ...")
        values = measure_model(arguments.model, arguments.teacher, arguments.measures, arguments.videos)
        found = {"values": values, "hardware": describe_environment(), "code": code_version()}
        with reported_write_errors(arguments.out), written_whole(arguments.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        print_message(f"wrote {arguments.out}", result=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
