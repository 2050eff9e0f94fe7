"""Trains and measures the variants of a study over several seeds: python -m rehyat_jax.study configs/studies/NAME.py.

Every variant and seed is trained by `rehyat_jax.train` in processes of its own and then measured. The workdir gets
`study.json` (all figures), `study.md` (the table and the comparison with published results) and `study.png`. The same
command resumes a stopped study: finished runs are not repeated, and stopped ones resume exactly. A failed run is
reported and does not end the others; the same command tries it again. docs/studies.md describes the files.

With --render, the command trains nothing: it writes a page from the records of several studies.

Exit codes:

  0    every run has its figures
  2    the user's input is wrong, or the study in the workdir began with another definition
  3    a run failed
  75   SIGTERM stopped the study
  130  Ctrl-C stopped the study
"""

import argparse
import sys
from pathlib import Path

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.studies.definition import read_study
from rehyat_jax.studies.page import write_page, write_results
from rehyat_jax.studies.record import RECORD, collect, write_record
from rehyat_jax.studies.running import run_study

FAILED = 3
"""The exit code if a run failed. 1 is that of a bug."""


def make_parser() -> CommandParser:
    """The parser of the command line."""
    parser = CommandParser("study", __doc__, "configs/studies/stabilizer.py")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="the study's file; records for --render")
    parser.add_argument("--workdir", type=Path, help="directory of the study; runs/studies/NAME by default")
    parser.add_argument("--jobs", type=int, help="processes at a time; on CPUs as many as cores and memory allow")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="variants to run; all by default")
    parser.add_argument("--render", type=Path, metavar="PAGE.md", help="write a page from study.json files")
    return parser


def study(arguments: argparse.Namespace) -> dict[str, str]:
    """Runs and reports the study of a command line; returns the runs that failed, with reasons. Raises InputError."""
    if len(arguments.files) > 1:
        raise InputError(f"expected one study, found {len(arguments.files)} files; run one after another")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, found {arguments.jobs}; leave it out, or give a number")
    (file,) = arguments.files
    workdir = arguments.workdir or Path("runs/studies") / file.stem
    failures = run_study(file, workdir, jobs=arguments.jobs, only=arguments.only)
    record = collect(file, read_study(file), workdir, failures)
    write_record(record, workdir / RECORD)
    print_message(f"wrote {write_page(record, workdir)}", result=True)
    for run, reason in failures.items():
        print_message(f"{run}: failed, {reason}")
    return failures


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs or renders; returns the exit code, see above."""
    arguments, failures = make_parser().parse_args(argv), {}

    def run() -> None:
        if arguments.render is not None:
            write_results(arguments.files, arguments.render)
            print_message(f"wrote {arguments.render}", result=True)
        else:
            failures.update(study(arguments))

    return report_input_errors(run) or (FAILED if failures else 0)


if __name__ == "__main__":
    sys.exit(main())
