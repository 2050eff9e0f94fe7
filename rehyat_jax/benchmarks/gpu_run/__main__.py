"""All GPU figures in one command: python -m rehyat_jax.benchmarks.gpu_run --json FILE [--budget SECONDS].

Sections run in order of value, each in a separate process with a time limit: correctness first, then the attention,
train steps, sampling, and the demo. FILE is rewritten with every result, so that an interrupted run keeps its results;
an existing FILE keeps its other sections. At the end the report is written next to it, as FILE with the suffix .md, or
to --out. `--render FILE` writes the report of an existing FILE, and measures nothing.

`--device cpu --tiny` tries everything on a CPU. Exit codes:

  0  all requested sections are complete and right
  1  a section is not complete or not right
  2  the user's input is wrong
"""

import argparse
import sys
from pathlib import Path

from rehyat_jax.benchmarks.gpu import positive
from rehyat_jax.benchmarks.gpu_run.machine import nvidia_smi
from rehyat_jax.benchmarks.gpu_run.report import render
from rehyat_jax.benchmarks.gpu_run.results import Results, is_right, read_results
from rehyat_jax.benchmarks.gpu_run.runner import run_sections
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.write import written_whole

BUDGET_SECONDS = 480


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    parser = CommandParser("benchmarks.gpu_run", __doc__, "--json results.json --budget 480")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    what.add_argument("--render", type=Path, metavar="FILE", help="only write the report of these results")
    parser.add_argument("--budget", type=positive, default=BUDGET_SECONDS, metavar="SECONDS", help="for all sections")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="the report; by default next to the results")
    parser.add_argument(
        "--cpu-results", type=Path, metavar="FILE", help="results of the demo on a CPU, for the report to compare with"
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the program")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> bool:
    """Measures unless only the report is wanted, and writes the report; returns True if all measurements are right."""
    file = arguments.json or arguments.render
    names = []
    on_cpu = read_results(arguments.cpu_results) if arguments.cpu_results else {}
    if arguments.json:
        # JAX is not used here: it would take memory that the sections need.
        if arguments.device == "gpu" and nvidia_smi() is None:
            raise InputError(
                "--device gpu: expected an NVIDIA GPU, found no nvidia-smi that answers; run this on a machine with "
                "one, or try the program with --device cpu --tiny"
            )
        names = [name for name in SECTIONS if name in (arguments.only or SECTIONS)]
        run_sections(names, Results(file), budget=arguments.budget, device=arguments.device, tiny=arguments.tiny)
    sections = read_results(file)
    report = arguments.out or file.with_suffix(".md")
    with written_whole(report) as temporary:
        temporary.write_text(render(sections, on_cpu))
    print(f"wrote {report}")
    return all(is_right(sections[name]) for name in names)


def main(argv: list[str] | None = None) -> int:
    """Runs everything and returns the exit code."""
    arguments = parse_arguments(argv)
    all_right = True

    def measured() -> None:
        nonlocal all_right
        all_right = run(arguments)

    return report_input_errors(measured) or int(not all_right)


if __name__ == "__main__":
    sys.exit(main())
