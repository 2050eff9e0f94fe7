"""Evaluates a student against its teacher, from the same data, the same noise and the same prompts.

  python -m rehyat_jax.evaluate --teacher DIR --student DIR --out FOLDER [options]
  python -m rehyat_jax.evaluate vbench-videos ...                  samples for VBench; it has a --help of its own

TEACHER and STUDENT are model checkpoints or PyTorch folders. The command measures velocities and attention on --data,
the demo's digits or a folder that `rehyat_jax.prepare` wrote. --samples N also samples N videos from each model, with
the options of `rehyat_jax.sample`, and compares them. --topology also compiles both models for a TPU, which takes
minutes; no TPU is needed. FOLDER gets evaluation.json, evaluation.md and plots. Every figure has a 95% confidence
interval. A stopped command resumes with the samples that it has. docs/evaluation.md explains every figure.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import get_args

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.data.sources import JUDGES
from rehyat_jax.evaluation.compare_models import evaluate_models
from rehyat_jax.evaluation.options import EvaluationOptions
from rehyat_jax.evaluation.plots import save_plots
from rehyat_jax.evaluation.report import SINGLE, markdown, shown
from rehyat_jax.files.write import check_place, reported_write_errors, written_whole
from rehyat_jax.generation.options import Order, SamplingOptions, number

VBENCH = "vbench-videos"
JSON_FILE, REPORT = "evaluation.json", "evaluation.md"


def evaluate(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Measures, writes the results and prints the most important ones. Raises InputError."""
    folder = arguments.out
    for name in (JSON_FILE, REPORT):
        check_place(folder / name)
    options = options_of(arguments)
    found = evaluate_models(arguments.teacher, arguments.student, options, folder=folder, progress=True)
    found.about["command"] = shlex.join(["python", "-m", "rehyat_jax.evaluate", *argv])
    with reported_write_errors(folder):
        pictures = save_plots(folder, found)
        if options.samples:
            pictures.insert(0, "samples.png")
        for name, text in (
            (JSON_FILE, json.dumps(found.to_json(), indent=1) + "\n"),
            (REPORT, markdown(found, pictures)),
        ):
            with written_whole(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    for name in SINGLE:
        if name in found.metrics:
            print_message(f"{name}: {shown(found.metrics[name])}", result=True)
    print_message(f"see {folder / REPORT}", result=True)


def options_of(arguments: argparse.Namespace) -> EvaluationOptions:
    """The options of a command line. Raises InputError if two of them contradict each other."""
    names = ("data", "examples", "levels", "samples", "prompts", "judge", "models", "topology", "student_steps")
    values = {name: getattr(arguments, name) for name in names}
    sampling = SamplingOptions.from_arguments(arguments)
    return EvaluationOptions(**values, durations=tuple(arguments.durations), sampling=sampling)


def make_parser() -> CommandParser:
    """The parser of the command line, without `vbench-videos`."""
    example = "--teacher runs/demo/teacher --student runs/demo/finetune/model --out runs/demo/evaluation --samples 40"
    made = CommandParser("evaluate", __doc__, example)
    option, defaults = made.add_argument, EvaluationOptions()
    default = " (default: %(default)s)"
    count = number(int, 1, 1_000_000)
    option("--teacher", type=Path, required=True, metavar="DIR", help="model checkpoint, or PyTorch folder")
    option("--student", type=Path, required=True, metavar="DIR", help="likewise; of the teacher's size and codec")
    option("--out", type=Path, required=True, metavar="FOLDER", help="for the results")
    option("--data", default=defaults.data, metavar="digits|FOLDER", help="data, best unseen in training" + default)
    option("--examples", type=count, default=defaults.examples, help="for velocity and attention" + default)
    option("--levels", type=number(int, 1, 1000), default=defaults.levels, help="noise levels" + default)
    option("--samples", type=number(int, 0, 1_000_000), default=0, help="videos to sample from each model" + default)
    option("--prompts", type=Path, metavar="FILE", help="text file, one prompt a line (default: the judge's prompts)")
    option("--judge", choices=(*JUDGES, "none"), help="who reads the samples (default: that of --data, if any)")
    option("--models", metavar="PIPELINE", help="for samples: Wan2.1's folder or Hub name with the VAE and umT5")
    durations = "lengths of videos in the table of costs, as multiples of the data's (default: 1 2 4 8)"
    option("--durations", type=number(int, 1, 10_000), nargs="+", default=defaults.durations, help=durations)
    option("--topology", metavar="NAME", help="slice of TPUs for static cycles and memory, v5e:2x2 (default: none)")
    SamplingOptions.add_to(made)
    option("--order", choices=get_args(Order), help="of the student's samples, see `sample` (default: as in training)")
    own_steps = "of the student's samples (default: those that it was made for, else --steps)"
    option("--student-steps", type=number(int, 1, 10_000), metavar="N", help=own_steps)
    made.set_defaults(batch=8)
    return made


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and evaluates; returns the exit code, 2 if the user's input is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [VBENCH]:
        from rehyat_jax.evaluation.vbench import command

        return command.main(argv[1:])
    arguments = make_parser().parse_args(argv)
    return report_input_errors(lambda: evaluate(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
