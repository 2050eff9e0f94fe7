"""Makes a ReHyAt model of a small video transformer: python -m rehyat_jax.demo [--quick] [--workdir DIR].

The softmax teacher draws moving handwritten digits and comes with the package. The command converts it from PyTorch,
distils feature maps for all blocks (once causal, once bidirectional) and finetunes the causal student. It exports the
student to PyTorch and measures it: DIR gets `report.md`, pictures and videos, as well as all models. This takes about
14 minutes on two CPU cores and needs the extras `demo` and `torch`.

--quick shows the same way within a few minutes, with few updates and without the measurements. It first writes
`teacher.mp4`, videos of the teacher, and at the end `student.mp4`. It needs only the extra `demo`.

The same command resumes a stopped demo. configs/demo_distill.py and configs/demo_finetune.py describe the training.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_collections
import numpy as np

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.demo import measure
from rehyat_jax.demo.digits import CAPTIONS
from rehyat_jax.demo.plots import save_samples, save_sheet
from rehyat_jax.demo.report import report_misses
from rehyat_jax.extras import check_installed
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.train import train
from rehyat_jax.training.command_line import read_config_file
from rehyat_jax.weights import load_wan
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch

TEACHER = Path("assets/demo_teacher")

WORKDIR, QUICK_WORKDIR = Path("runs/demo"), Path("runs/demo_quick")

QUICK_STEPS = 50
"""Updates of each stage with --quick: the student's digits can be seen, but are often malformed."""


def demo(runs: Path) -> list[str]:
    """Runs the complete demo; returns the claims of its report that do not hold.

    Args:
      runs: folder for everything, created if needed.

    Raises:
      InputError: an extra is missing, or something cannot be read or written.
      RunStoppedError: SIGTERM asked to stop.
    """
    check_installed("the demo", "sklearn", "torch", "diffusers")
    with phase("1 of 6: convert the softmax teacher from PyTorch"):
        convert_teacher(runs)
    with phase("2 of 6: stage 1, distil the feature maps of a causal student"):
        train(config_of("distill", runs / "teacher"), runs / "distill")
    with phase("3 of 6: the same for a bidirectional student"):
        config = config_of("distill", runs / "teacher")
        config.hybrid.causal = False
        train(config, runs / "distill_bidirectional")
    with phase("4 of 6: stage 2, finetune the causal student"):
        train(config_of("finetune", runs / "distill" / "model"), runs / "finetune")
    with phase("5 of 6: export the student to PyTorch"):
        convert_to_torch(runs / "finetune" / "model", runs / "student_pytorch", "diffusers", replace=True)
    with phase("6 of 6: measure, and write the report"):
        return report_misses(runs)


def quick_demo(runs: Path) -> None:
    """Runs the causal student's part of the demo with few updates; Args and Raises as for `demo`."""
    check_installed("the demo", "sklearn")
    videos = {}
    with phase("1 of 5: convert the softmax teacher from PyTorch"):
        convert_teacher(runs)
    with phase("2 of 5: sample the teacher"):
        videos["teacher"] = sampled(runs / "teacher", runs / "teacher.mp4")
    with phase("3 of 5: stage 1, distil the feature maps of a causal student"):
        train(config_of("distill", runs / "teacher", QUICK_STEPS), runs / "distill")
    with phase("4 of 5: stage 2, finetune it"):
        train(config_of("finetune", runs / "distill" / "model", QUICK_STEPS), runs / "finetune")
    with phase("5 of 5: sample the student from the same noise, and export it to PyTorch"):
        videos["student"] = sampled(runs / "finetune" / "model", runs / "student.mp4")
        save_samples(runs / "samples.png", videos, list(CAPTIONS))
        convert_to_torch(runs / "finetune" / "model", runs / "student_pytorch", "diffusers", replace=True)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Prints the title before the block, and the seconds after it; drops what the block has compiled."""
    print_message(title, result=True)
    start = time.monotonic()
    yield
    jax.clear_caches()
    print_message(f"  {time.monotonic() - start:.0f} seconds", result=True)


def convert_teacher(runs: Path) -> None:
    """Writes the teacher as the model checkpoint `runs/teacher`."""
    with reported_write_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
    convert_from_torch(TEACHER, runs / "teacher", replace=True)


def config_of(stage: str, init_from: Path, steps: int | None = None) -> ml_collections.ConfigDict:
    """The demo's configuration of a stage, with the model that it starts from, and with other steps if given."""
    config = read_config_file(f"configs/demo_{stage}.py")
    config.init_from = str(init_from)
    config.steps = steps or config.steps
    return config


def sampled(model: Path, file: Path) -> np.ndarray:
    """Videos of all captions by a model, [20, 21, 24, 24, 3] in [0, 1]; also writes them side by side."""
    videos, _ = measure.sample_captions(load_wan(model), len(CAPTIONS), "videos", measure.solver_of(model))
    save_sheet(file, videos)
    print_message(f"wrote {file}", result=True)
    return videos


def make_parser() -> CommandParser:
    """The parser of the command line."""
    parser = CommandParser("demo", __doc__, "--quick")
    parser.add_argument("--quick", action="store_true", help="few updates, no measurements")
    workdir = f"folder for everything (default: {WORKDIR}, or {QUICK_WORKDIR} with --quick)"
    parser.add_argument("--workdir", type=Path, metavar="DIR", help=workdir)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs the demo; returns the exit code, 1 if the report misses an expectation."""
    arguments = make_parser().parse_args(argv)
    missed: list[str] = []

    def run() -> None:
        if arguments.quick:
            runs = arguments.workdir or QUICK_WORKDIR
            quick_demo(runs)
            print_message(f"see {runs / 'samples.png'}, teacher.mp4 and student.mp4 there", result=True)
        else:
            missed.extend(demo(arguments.workdir or WORKDIR))

    return report_input_errors(run) or int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
